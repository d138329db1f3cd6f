"""Lines: points that differ only in learning rate and seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gated.sweep import judge
from gated.sweep.report.points import Judged


def rate(lr: float) -> str:
  """0.0032 -> '3.2e-3', 0.01 -> '1e-2'."""
  digits, _, power = f'{lr:.2e}'.partition('e')
  return f'{digits.rstrip("0").rstrip(".")}e{int(power)}'


@dataclass(frozen=True)
class Cell:
  """The seeds of a line at one learning rate."""

  lr: float
  points: tuple[Judged, ...]

  @property
  def finals(self) -> list[float]:
    """Final losses of the points without divergence."""
    return [
      p.log.final for p in self.points if p.log.final is not None and not p.diverged
    ]

  @property
  def diverged(self) -> list[Judged]:
    return [p for p in self.points if p.diverged]

  @property
  def spread(self) -> judge.Spread:
    return judge.spread(self.finals)

  @property
  def mean(self) -> float:
    return self.spread.mean


@dataclass(frozen=True)
class Line:
  name: str
  points: tuple[Judged, ...]

  @property
  def lrs(self) -> list[float]:
    return sorted({p.lr for p in self.points})

  @property
  def seeds(self) -> list[int]:
    return sorted({p.seed for p in self.points})

  def cells(self) -> list[Cell]:
    at = lambda lr: tuple(p for p in self.points if p.lr == lr)
    return [Cell(lr, at(lr)) for lr in self.lrs]

  def best(self) -> Cell | None:
    """The cell with the lowest mean, of those without a diverged seed."""
    stable = [c for c in self.cells() if c.finals and not c.diverged]
    return min(stable, key=lambda c: c.mean, default=None)

  def sensitivities(self) -> dict[int, float]:
    """Seed -> LR sensitivity, for seeds that have ended at every learning rate."""
    by_seed = {}
    for seed in self.seeds if len(self.lrs) > 1 else []:
      own = [p for p in self.points if p.seed == seed]
      whole = all(p.done and math.isfinite(p.init or math.nan) for p in own)
      if whole and {p.lr for p in own} == set(self.lrs):
        finals = [math.nan if p.log.final is None else p.log.final for p in own]
        by_seed[seed] = judge.sensitivity(finals, [p.init for p in own])
    return {seed: value for seed, value in by_seed.items() if math.isfinite(value)}


def gather(points: Sequence[Judged]) -> list[Line]:
  """Points -> lines, in the order of their first points."""
  names = dict.fromkeys(p.line for p in points)
  return [Line(name, tuple(p for p in points if p.line == name)) for name in names]
