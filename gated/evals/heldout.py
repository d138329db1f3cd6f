"""Held-out loss: row sums -> nats per token, perplexity, bits per byte, with errors.

Host arithmetic in float64. The row sums come from `train.losses.per_row`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gated import config
from gated.devices import mesh


@dataclass(frozen=True, kw_only=True)
class Config:
  """The interval and the number of rows of a run's evaluations."""

  every: int  # steps
  rows: int  # held-out rows of each domain; 0 for all

  def __post_init__(self):
    config.at_least('config.eval.every', self.every, 1)
    config.at_least('config.eval.rows', self.rows, 0)


def perplexity(
  evaluate: Callable,
  model: Any,
  corpus: Any,
  *,
  on: Mesh,
  batch: int,
  limit: int,
  after: Callable[[str], bool],
) -> dict | None:
  """A model on held-out text -> {'loss': nats per token, 'domains': {name: summary}}.

  `evaluate(model, batch)` gives each row's (nats, weight). The first `limit` rows of each
  domain are read (0 for all), `batch` at a time. Without held-out tokens, the loss is
  None. `after` is called after each batch with its name, such as 'batch 3 of code'; if it
  returns True, the evaluation ends, with None.
  """
  held = list(mesh.rows(on, batch))
  domains, nats, tokens = {}, 0.0, 0.0
  for domain in corpus.domains:
    sums = []
    batches = corpus.heldout(domain, batch=batch, rows=range(batch), limit=limit)
    for number, (whole, bytes_B) in enumerate(batches, 1):
      local = type(whole)(*(x[held] for x in whole))
      nll_B, weight_B = evaluate(model, mesh.place(local, on, batch))
      sums.append((np.asarray(nll_B), np.asarray(weight_B), bytes_B))
      if after(f'batch {number} of {domain}'):
        return None
    nll_R, weight_R, bytes_R = (np.concatenate(column) for column in zip(*sums))
    if weight_R.any():
      domains[domain] = summarize(nll_R, weight_R, bytes_R)
      nats, tokens = nats + nll_R.sum(dtype=float), tokens + weight_R.sum(dtype=float)
  return {'loss': float(nats / tokens) if tokens else None, 'domains': domains}


def summarize(nll_R: np.ndarray, weight_R: np.ndarray, bytes_R: np.ndarray) -> dict:
  """Per row R: summed nats, counted tokens, bytes of their text -> a summary.

  nats_per_token = sum(nll) / sum(weight) and bits_per_byte = sum(nll) / (ln 2 *
  sum(bytes)) are ratios r = sum(y) / sum(x) over rows. Tokens of one row are not
  independent, so rows are the clusters. The standard error of a ratio (Cochran 1977,
  "Sampling Techniques", chapter 6, without the finite population correction) is

    stderr(r)^2 = R / (R - 1) * sum((y - r * x)^2) / sum(x)^2.

  Rows without tokens are ignored. The standard error of a single row is None, and so are
  the bits per byte of rows without text, such as those that hold only ends of text.
  """
  counted_R = np.asarray(weight_R) > 0
  if not counted_R.any():
    raise ValueError('no row to evaluate holds a counted token')
  nll_R, weight_R, bytes_R = (
    np.asarray(a, np.float64)[counted_R] for a in (nll_R, weight_R, bytes_R)
  )
  nats, nats_error = _ratio(nll_R, weight_R)
  assert nats is not None
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


def _ratio(y_R: np.ndarray, x_R: np.ndarray) -> tuple[float | None, float | None]:
  rows, total = len(y_R), x_R.sum()
  if not total:
    return None, None
  ratio = float(y_R.sum() / total)
  if rows == 1:
    return ratio, None
  square = rows / (rows - 1) * np.square(y_R - ratio * x_R).sum() / total**2
  return ratio, float(np.sqrt(square))


# Heading, key of the summary, format. The last two are the yardsticks.
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
  """{'step': int or None, 'domains': {name: summary + yardsticks}} -> a line per domain.

  Reports by label under 'beside' add their lines, 'domain, label'. Missing yardsticks and
  errors are dashes; a last line gives the reason for each yardstick in 'without'.
  """
  step = 'imported' if report['step'] is None else f'step {report["step"]}'
  lines = [[step, *(heading for heading, _, _ in COLUMNS)]]
  domains = [
    (name if label is None else f'{name}, {label}', other['domains'][name])
    for name in report['domains']
    for label, other in {None: report, **report.get('beside', {})}.items()
  ]
  for name, domain in domains:
    values = ((domain.get(key), form) for _, key, form in COLUMNS)
    cells = ('-' if value is None else format(value, form) for value, form in values)
    lines.append([name, *cells])
  widths = [max(map(len, column)) for column in zip(*lines)]
  align = ['<', *('>' for _ in COLUMNS)]
  rows = (zip(line, align, widths) for line in lines)
  text = ['  '.join(f'{cell:{a}{w}}' for cell, a, w in row) for row in rows]
  text += [f'without {name}: {why}' for name, why in report.get('without', {}).items()]
  return '\n'.join(text)
