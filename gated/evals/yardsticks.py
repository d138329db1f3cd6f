"""Two yardsticks for a model: a bigram model of the training tokens, and `xz -9e`."""

import dataclasses
import lzma
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Self

import numpy as np

from gated import data
from gated.data.progress import Progress

YARDSTICKS = 'bigram', 'xz'
PENDING = 1 << 22  # Number of pairs to merge at a time: 32 MiB.
ROWS = 64  # Rows of a batch for the bigram model.


def define(flags: Any) -> Callable[[], dict[str, Any]]:
  """Defines the flags of the yardsticks -> a function that reads them.

  `flags` is absl's module. The values are arguments of `plan.evaluation.complete`;
  ValueError for an unknown yardstick.
  """
  chosen = flags.DEFINE_list(
    'yardsticks', list(YARDSTICKS), 'bigram and xz, which take minutes; or none.'
  )
  rows = flags.DEFINE_integer('bigram_rows', 65536, 'Rows of the bigram model.', 1)
  xz_bytes = flags.DEFINE_integer('xz_bytes', 1 << 26, 'Bytes for xz; 0 for all.', 0)

  def read() -> dict[str, Any]:
    names = [] if chosen.value == ['none'] else chosen.value or []
    if not set(names) <= set(YARDSTICKS):
      allowed = f'none, or of {", ".join(YARDSTICKS)}'
      raise ValueError(f'--yardsticks={",".join(names)}, but allowed are {allowed}')
    return dict(chosen=names, rows=rows.value, xz_bytes=xz_bytes.value)

  return read


@dataclasses.dataclass(frozen=True, eq=False)
class Bigram:
  """An interpolated bigram model, a weak baseline for language models.

  Witten-Bell interpolation (Witten and Bell 1991, "The zero-frequency problem", method C;
  Chen and Goodman 1998, TR-10-98, section 2.5) with an add-one unigram below:

    p(w | c) = (n(c, w) + t(c) * p(w)) / (n(c) + t(c)),    p(w) = (n(w) + 1) / (N + V)

  where t(c) is the number of distinct tokens seen after c. An unseen c gives p(w). Pairs
  are stored as sorted keys c * V + w: memory is 16 bytes per distinct pair, not V * V.
  """

  pair_P: np.ndarray
  count_P: np.ndarray
  unigram_V: np.ndarray
  seen_V: np.ndarray
  follower_V: np.ndarray

  @classmethod
  def fit(cls, batches: Iterable[tuple], *, vocab: int) -> Self:
    """(tokens_BT, targets_BT, weights_BT), ... -> the model of their pairs.

    Ignores targets of weight zero.
    """
    pair_P, count_P = np.zeros(0, np.int64), np.zeros(0, np.int64)
    pending: list[np.ndarray] = []
    for tokens_BT, targets_BT, weights_BT in batches:
      counted_BT = np.asarray(weights_BT) > 0
      tokens_N, targets_N = (
        _checked(np.asarray(a)[counted_BT], vocab) for a in (tokens_BT, targets_BT)
      )
      pending.append(tokens_N * vocab + targets_N)
      if sum(map(len, pending)) >= PENDING:
        pair_P, count_P = _merge(pair_P, count_P, pending)
        pending = []
    pair_P, count_P = _merge(pair_P, count_P, pending)
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
    """-> nats_BT, float64: the loss of each target after its token."""
    vocab = len(self.unigram_V)
    tokens_BT, targets_BT = _checked(tokens_BT, vocab), _checked(targets_BT, vocab)
    count_BT = self._count(tokens_BT * vocab + targets_BT)
    seen_BT, follower_BT = self.seen_V[tokens_BT], self.follower_V[tokens_BT]
    unigram_BT = self.unigram_V[targets_BT]
    # An unseen context has no followers; with one follower, the formula gives p(w).
    follower_BT = np.maximum(follower_BT, 1)
    return -np.log((count_BT + follower_BT * unigram_BT) / (seen_BT + follower_BT))

  def _count(self, pair_BT: np.ndarray) -> np.ndarray:
    if not len(self.pair_P):
      return np.zeros(pair_BT.shape)
    place_BT = np.searchsorted(self.pair_P, pair_BT).clip(max=len(self.pair_P) - 1)
    return np.where(self.pair_P[place_BT] == pair_BT, self.count_P[place_BT], 0)


def _checked(tokens: np.ndarray, vocab: int) -> np.ndarray:
  tokens = np.asarray(tokens, np.int64)
  if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
    token = tokens.min() if tokens.min() < 0 else tokens.max()
    raise ValueError(f'token {token} is outside the vocabulary of {vocab}')
  return tokens


def _merge(
  pair_P: np.ndarray, count_P: np.ndarray, pending: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Sorted pairs with their counts, and lists of further pairs -> the same, merged."""
  every_N = np.concatenate([pair_P, *pending])
  count_N = np.concatenate([count_P, np.ones(len(every_N) - len(pair_P))])
  merged_P, place_N = np.unique(every_N, return_inverse=True)
  return merged_P, np.bincount(place_N, count_N, len(merged_P)).astype(np.int64)


def xz(text: bytes) -> float:
  """Text -> bits per byte of its compression by `xz -9e`, which needs about 700 MB."""
  if not text:
    raise ValueError('an empty text has no bits per byte')
  packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  return 8 * len(packed) / len(text)


def measure_yardsticks(
  corpus: data.Corpus,
  trained: data.Corpus,
  *,
  chosen: Collection[str],
  rows: int,
  limit: int,
  xz_bytes: int,
) -> dict[str, dict[str, Any]]:
  """The `chosen` YARDSTICKS on held-out text: bits per byte of each domain.

  The bigram model is fitted to the first `rows` training rows of `trained`. Both read the
  first `limit` held-out rows of each domain of `corpus` (0: all); xz compresses the first
  `xz_bytes` of their text (0: all). Long work shows its progress.
  """
  report: dict[str, dict[str, Any]] = {domain: {} for domain in corpus.domains}
  if 'bigram' in chosen:
    bigram = _fit(trained, rows, corpus.vocab)
    for domain in corpus.domains:
      report[domain] = {'bigram_rows': rows} | _bigram(bigram, corpus, domain, limit)
  if 'xz' in chosen:
    for domain in corpus.domains:
      text = corpus.heldout_text(domain, limit)
      # Unknown tokens lose text, but all yardsticks count the bytes of the original.
      batches = corpus.heldout(domain, batch=1, rows=[0], limit=limit)
      kept = len(text) / max(1, sum(int(bytes_B.sum()) for _, bytes_B in batches))
      text = text[: xz_bytes or None]
      with Progress(f'yardstick xz -9e, {len(text):,} bytes of {domain}'):
        measured = {'xz_bits_per_byte': xz(text) * kept} if text else {}
        report[domain] |= {'xz_bytes': len(text)} | measured
  return report


def _fit(trained: data.Corpus, rows: int, vocab: int) -> Bigram:
  """The bigram model of the first training rows."""
  starts = range(0, rows, ROWS)
  with Progress('yardstick bigram: fitting', total=rows, unit='rows') as progress:

    def pairs() -> Iterator[tuple]:
      for start in starts:
        batch = trained.packed(range(start, min(start + ROWS, rows)))
        yield batch.tokens, batch.targets, batch.weights
        progress.add(len(batch.tokens))

    return Bigram.fit(pairs(), vocab=vocab)


def _bigram(bigram: Bigram, corpus: data.Corpus, domain: str, limit: int) -> dict:
  nats, size = 0.0, 0
  heldout = corpus.heldout(domain, batch=ROWS, rows=range(ROWS), limit=limit)
  total = corpus.heldout_rows(domain, limit)
  with Progress(f'yardstick bigram: {domain}', total=total, unit='rows') as progress:
    for batch, bytes_B in heldout:
      nats += (bigram.nll(batch.tokens, batch.targets) * batch.weights).sum()
      size += int(bytes_B.sum())
      progress.add(len(bytes_B))
  return {'bigram_bits_per_byte': float(nats / np.log(2) / size)} if size else {}
