"""The main table: each line at its best learning rate, compared with a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gated.sweep import judge
from gated.sweep.report.points import Cell, Line


class Difference(NamedTuple):
  """A mean final loss minus the baseline's, in nats."""

  value: float
  within: float  # half of its confidence interval; inf if the noise is unknown
  pairs: int  # seeds that both have, if they are compared in pairs; otherwise 0

  @property
  def verdict(self) -> str:
    """'lower' or 'higher' than the baseline, 'within the noise', or 'noise unknown'."""
    if not math.isfinite(self.within):
      return 'noise unknown'
    if abs(self.value) <= self.within:
      return 'within the noise'
    return 'lower' if self.value < 0 else 'higher'


@dataclass(frozen=True, kw_only=True)
class Result:
  """A line of the main table; None for a number that it lacks."""

  line: Line
  cell: Cell | None  # at the best rate without divergence
  within: float  # half of the confidence interval of the mean loss, or inf
  parameters: int | None
  added: int | None  # parameters minus the baseline's
  flops: float | None  # per trained token
  rate: float | None  # tokens per second, the median over the runs of the cell
  difference: Difference | None


def of_lines(
  lines: Sequence[Line], baseline: Line, noise: judge.Noise
) -> tuple[list[Result], judge.Noise]:
  """Lines -> their results, and the noise of the differences of pairs.

  A line that shares two or more seeds with the baseline is compared with it seed by seed:
  the same seed gives both the same order of the data. The standard deviation of such a
  difference is pooled over the lines. Other lines are compared by the noise of a final
  loss.
  """
  pairs = {x.name: _pairs(x.best, baseline.best) for x in lines if x is not baseline}
  paired = judge.noise(pairs.values())
  return [_result(line, baseline, noise, paired, pairs) for line in lines], paired


def _pairs(cell: Cell | None, base: Cell | None) -> list[float]:
  """The differences by common seed; empty if there are fewer than two."""
  if not (cell and base):
    return []
  common = [seed for seed in cell.by_seed if seed in base.by_seed]
  differences = [cell.by_seed[seed] - base.by_seed[seed] for seed in common]
  return differences if len(differences) > 1 else []


def _result(
  line: Line,
  baseline: Line,
  noise: judge.Noise,
  paired: judge.Noise,
  pairs: Mapping[str, Sequence[float]],
) -> Result:
  cell, base, first = line.best, baseline.best, line.points[0]
  start = baseline.points[0].parameters
  rates = [p.log.rate for p in cell.points if p.log.rate] if cell else []
  difference = None
  if cell and base and line is not baseline:
    if each := pairs[line.name]:
      value, n = float(np.mean(each)), len(each)
      difference = Difference(value, paired.within(n), n)
    else:
      floor = noise.beyond(cell.spread.n, base.spread.n)
      difference = Difference(cell.mean - base.mean, floor, 0)
  known = first.parameters is not None and start is not None
  return Result(
    line=line,
    cell=cell,
    within=noise.within(cell.spread.n) if cell else math.inf,
    parameters=first.parameters,
    added=first.parameters - start if known else None,
    flops=first.flops,
    rate=float(np.median(rates)) if rates else None,
    difference=difference,
  )


def baseline(lines: Sequence[Line], label: str) -> Line:
  """'' -> the first ungated line, or the first; a name or label -> the line that has it.

  ValueError if no line has the label, or several.
  """
  if not label:
    return next((line for line in lines if not line.gated), lines[0])
  fits = [line for line in lines if line.name == label]
  has = lambda line: {*line.name.split(', '), *_labels(line)}
  fits = fits or [line for line in lines if label in has(line)]
  if len(fits) == 1:
    return fits[0]
  names = '\n'.join(f'  {line.name}' for line in fits or lines)
  problem = 'fits several lines' if fits else 'is not a line; the lines are'
  raise ValueError(f'--baseline={label} {problem}:\n{names}')


def _labels(line: Line) -> set[str]:
  labels = line.points[0].line_labels
  return {*labels.values(), *(f'{k}={v}' for k, v in labels.items())}
