"""The probes of a sweep: gate scores, first-token attention and massive activations.

Each is the last logged value (config.log.probes), mean over the seeds of a line at its
best learning rate.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gated import probes
from gated.sweep.report.points import Cell, Line
from gated.sweep.report.tables import SINKS, Table

# Scalars of the probes -> their headings and formats.
SHOWN = {
  'gate_mean': ('gate score', '.3f'),
  'gate_below_0.1': ('scores < 0.1', '.3f'),
  **SINKS,
  'kurtosis': ('kurtosis', '.3g'),
  'output_below_1e-2': ('|y| < 0.01', '.3f'),
}
GATE, AGAINST = 'gate_mean', ('first_token_attention', 'm_act')


class Correlation(NamedTuple):
  """Spearman's rank correlation."""

  rho: float
  n: int

  def __str__(self) -> str:
    return f'{self.rho:+.2f} (n = {self.n})'


def value(cell: Cell | None, name: str) -> float | None:
  """`Cell.probe`; None without a cell."""
  return cell.probe(name) if cell else None


def lines_with(lines: Sequence[Line]) -> list[Line]:
  """The lines whose points at the best learning rate logged probes."""
  return [x for x in lines if any(value(x.best, name) is not None for name in SHOWN)]


def correlation(pairs: Sequence[tuple[float | None, float | None]]) -> Correlation | None:
  """Pairs of numbers, without those that lack one -> Correlation.

  None for fewer than three pairs, or if all numbers of a side are equal.
  """
  from scipy import stats

  known = [(x, y) for x, y in pairs if x is not None and y is not None]
  if len(known) < 3 or any(len(set(side)) == 1 for side in zip(*known, strict=True)):
    return None
  rho = float(stats.spearmanr(*zip(*known, strict=True)).statistic)
  return Correlation(rho, len(known)) if math.isfinite(rho) else None


def of_lines(lines: Sequence[Line], name: str) -> Correlation | None:
  """The correlation of the mean gate score with a number, over the gated lines."""
  return correlation([(value(x.best, GATE), value(x.best, name)) for x in lines])


def section(lines: Sequence[Line]) -> Iterator[str]:
  """Lines -> the report's paragraphs on probes; none without probes."""
  shown = lines_with(lines)
  if not shown:
    return
  steps = {_last(line) for line in shown}
  at = ' to '.join(str(x) for x in sorted({min(steps), max(steps)}))
  yield (
    f'Each line at its best learning rate, mean over the seeds, on rows of the batch of '
    f'step {at}.'
  )
  names = [n for n in SHOWN if any(value(x.best, n) is not None for x in shown)]
  rows = []
  for line in shown:
    numbers = [(value(line.best, name), SHOWN[name][1]) for name in names]
    cells = [None if x is None else format(x, form) for x, form in numbers]
    rows.append([line.name, *cells])
  yield Table(['', *(SHOWN[name][0] for name in names)], rows).markdown()
  correlations = {SHOWN[name][0]: of_lines(lines, name) for name in AGAINST}
  texts = [f'{title}: {rho}' for title, rho in correlations.items() if rho]
  if texts:
    yield (
      "Spearman's rank correlation of the mean gate score over the gated lines, with "
      f'{"; with ".join(texts)}.'
    )
  yield '\n'.join(f'- {SHOWN[n][0]}: {probes.CONVENTIONS[n]}' for n in names)


def _last(line: Line) -> int:
  """The last probed step of a line."""
  curves = (
    [p.log.curves[f'probes/{name}'] for p in line.best.points for name in SHOWN]
    if line.best
    else []
  )
  return max((int(c.steps[-1]) for c in curves if len(c.steps)), default=0)
