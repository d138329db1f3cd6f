"""Two yardsticks beside a model: a bigram model of the training tokens, and `xz -9e`."""

import dataclasses
import lzma
from collections.abc import Iterable
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Bigram:
  """An interpolated bigram model: the least that a language model has to beat.

  Witten-Bell interpolation (Witten and Bell 1991, "The zero-frequency problem", method C;
  Chen and Goodman 1998, TR-10-98, section 2.5) with an add-one unigram below:

    p(w | c) = (n(c, w) + t(c) * p(w)) / (n(c) + t(c)),    p(w) = (n(w) + 1) / (N + V)

  where t(c) is how many different tokens were seen after c; after a c never seen, p(w).
  Pairs are kept sparsely, as sorted keys c * V + w: memory goes with the different pairs
  that occur, 16 bytes each, not with V * V.
  """

  pair_P: np.ndarray
  count_P: np.ndarray
  unigram_V: np.ndarray
  seen_V: np.ndarray
  follower_V: np.ndarray

  @classmethod
  def fit(cls, batches: Iterable[tuple], *, vocab: int) -> Self:
    """(tokens_BT, targets_BT, weights_BT), ... -> the model of their counted pairs.

    A target of weight zero is no pair. Up to PENDING pairs wait to be merged at a time.
    """
    pair_P, count_P = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for tokens_BT, targets_BT, weights_BT in batches:
      counted_BT = np.asarray(weights_BT) > 0
      tokens_N = _checked(np.asarray(tokens_BT)[counted_BT], vocab)
      waiting.append(
        tokens_N * vocab + _checked(np.asarray(targets_BT)[counted_BT], vocab)
      )
      if sum(map(len, waiting)) >= PENDING:
        pair_P, count_P = _merge(pair_P, count_P, waiting)
        waiting = []
    pair_P, count_P = _merge(pair_P, count_P, waiting)
    context_P, target_P = np.divmod(pair_P, vocab)
    target_V = np.bincount(target_P, weights=count_P, minlength=vocab)
    return cls(
      pair_P=pair_P,
      count_P=count_P,
      unigram_V=(target_V + 1) / (target_V.sum() + vocab),
      seen_V=np.bincount(context_P, weights=count_P, minlength=vocab),
      follower_V=np.bincount(context_P, minlength=vocab).astype(np.float64),
    )

  def nll(self, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    """-> nats_BT, float64: what each target costs after its token."""
    vocab = len(self.unigram_V)
    tokens_BT, targets_BT = _checked(tokens_BT, vocab), _checked(targets_BT, vocab)
    count_BT = self._count(tokens_BT * vocab + targets_BT)
    seen_BT, follower_BT = self.seen_V[tokens_BT], self.follower_V[tokens_BT]
    unigram_BT = self.unigram_V[targets_BT]
    # An unseen context has no followers either: give it one, and it says p(w).
    follower_BT = np.maximum(follower_BT, 1)
    return -np.log((count_BT + follower_BT * unigram_BT) / (seen_BT + follower_BT))

  def _count(self, pair_BT: np.ndarray) -> np.ndarray:
    if not len(self.pair_P):
      return np.zeros(pair_BT.shape)
    place_BT = np.searchsorted(self.pair_P, pair_BT).clip(max=len(self.pair_P) - 1)
    return np.where(self.pair_P[place_BT] == pair_BT, self.count_P[place_BT], 0)


# 32 MiB of keys.
PENDING = 1 << 22


def _checked(tokens: np.ndarray, vocab: int) -> np.ndarray:
  tokens = np.asarray(tokens, np.int64)
  if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
    worst = tokens.min() if tokens.min() < 0 else tokens.max()
    raise ValueError(f'token {worst} is outside the vocabulary of {vocab}')
  return tokens


def _merge(
  pair_P: np.ndarray, count_P: np.ndarray, waiting: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Sorted pairs with their counts and lists of more pairs -> the same, all counted."""
  if not waiting:
    return pair_P, count_P
  fresh_P, fresh_count_P = np.unique(np.concatenate(waiting), return_counts=True)
  every_P, place_P = np.unique(np.concatenate([pair_P, fresh_P]), return_inverse=True)
  total_P = np.zeros(len(every_P), np.int64)
  # Within each of the two lists a pair stands once, so plain indexing loses none.
  total_P[place_P[: len(pair_P)]] += count_P
  total_P[place_P[len(pair_P) :]] += fresh_count_P
  return every_P, total_P


def xz(text: bytes) -> float:
  """Text -> bits per byte as `xz -9e` compresses it; takes some 700 MB while it runs."""
  if not text:
    raise ValueError('an empty text has no bits per byte')
  packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  return 8 * len(packed) / len(text)
