"""What a model is worth on held-out text, and two yardsticks to hold beside it.

Sums per row go in, nats per token, perplexity and bits per byte come out, each with a
standard error. The yardsticks: an interpolated bigram model of the training tokens, and
what `xz -9e` makes of the text itself. This file is host arithmetic in float64; the
model's own losses come from `step`.
"""

import dataclasses
import lzma
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
from jax.sharding import Mesh

from gated import mesh


def perplexity(
  evaluate: Callable, model: Any, corpus: Any, *, on: Mesh, batch: int, limit: int
) -> dict:
  """A model on held-out text -> {'loss': nats per token, 'domains': {name: summary}}.

  `evaluate(model, batch)` gives each row's (nats, weight); of each domain the first
  `limit` rows are read (0 for all), `batch` of them at a time. Without held-out tokens
  the loss is None.
  """
  held = list(mesh.rows(on, batch))
  domains, nats, tokens = {}, 0.0, 0.0
  for domain in corpus.domains:
    sums = []
    every = corpus.heldout(domain, batch=batch, rows=range(batch), limit=limit)
    for whole, bytes_B in every:
      local = type(whole)(*(x[held] for x in whole))
      nll_B, weight_B = evaluate(model, mesh.place(local, on, batch))
      sums.append((np.asarray(nll_B), np.asarray(weight_B), bytes_B))
    nll_R, weight_R, bytes_R = (np.concatenate(column) for column in zip(*sums))
    if weight_R.any():
      domains[domain] = summarize(nll_R, weight_R, bytes_R)
      nats, tokens = nats + nll_R.sum(dtype=float), tokens + weight_R.sum(dtype=float)
  return {'loss': float(nats / tokens) if tokens else None, 'domains': domains}


def summarize(nll_R: np.ndarray, weight_R: np.ndarray, bytes_R: np.ndarray) -> dict:
  """Per row R: summed nats, counted tokens, bytes of their text -> the row of a report.

  nats_per_token = sum(nll) / sum(weight) and bits_per_byte = sum(nll) / (ln 2 *
  sum(bytes)) are ratios r = sum(y) / sum(x) over rows. Tokens of one row are not
  independent, so rows are the clusters; the ratio estimator's error (Cochran 1977,
  "Sampling Techniques", chapter 6, without the finite population's correction) is

    stderr(r)^2 = R / (R - 1) * sum((y - r * x)^2) / sum(x)^2.

  Rows without tokens do not count. A standard error of a single row is None.
  """
  nll_R, weight_R, bytes_R = (
    np.asarray(a, np.float64) for a in (nll_R, weight_R, bytes_R)
  )
  counted_R = weight_R > 0
  if not counted_R.any():
    raise ValueError('there is nothing to evaluate: no row holds a counted token')
  nll_R, weight_R, bytes_R = nll_R[counted_R], weight_R[counted_R], bytes_R[counted_R]
  nats, nats_error = _ratio(nll_R, weight_R)
  bits, bits_error = _ratio(nll_R / math.log(2), bytes_R)
  return {
    'nats_per_token': nats,
    'nats_per_token_stderr': nats_error,
    'perplexity': float(np.exp(nats)),
    'bits_per_byte': bits,
    'bits_per_byte_stderr': bits_error,
    'tokens': int(weight_R.sum()),
    'bytes': int(bytes_R.sum()),
    'rows': len(nll_R),
  }


def _ratio(y_R: np.ndarray, x_R: np.ndarray) -> tuple[float, float | None]:
  rows, total = len(y_R), x_R.sum()
  ratio = float(y_R.sum() / total)
  if rows == 1:
    return ratio, None
  square = rows / (rows - 1) * np.square(y_R - ratio * x_R).sum() / total**2
  return ratio, float(np.sqrt(square))


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


# Heading, the report's key, format. The model's columns, then the yardsticks'.
COLUMNS = (
  ('nats/token', 'nats_per_token', '.4f'),
  ('± stderr', 'nats_per_token_stderr', '.4f'),
  ('perplexity', 'perplexity', '.3f'),
  ('bits/byte', 'bits_per_byte', '.4f'),
  ('± stderr', 'bits_per_byte_stderr', '.4f'),
  ('tokens', 'tokens', ',d'),
  ('bigram b/B', 'bigram_bits_per_byte', '.4f'),
  ('xz -9e b/B', 'xz_bits_per_byte', '.4f'),
)


def table(report: Mapping[str, Any]) -> str:
  """{'step': int or None, 'domains': {name: summary + yardsticks}} -> a line a domain.

  A yardstick that a domain lacks, and an error of one row, is a dash.
  """
  step = 'imported' if report['step'] is None else f'step {report["step"]}'
  lines = [[step, *(heading for heading, _, _ in COLUMNS)]]
  for name, domain in report['domains'].items():
    known = {k: v for k, v in domain.items() if v is not None}
    cells = [
      format(known[key], form) if key in known else '-' for _, key, form in COLUMNS
    ]
    lines.append([name, *cells])
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths))
    )
    for line in lines
  )
