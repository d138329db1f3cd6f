"""Lines: the points that differ in learning rate and seed alone, and their numbers."""

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
  """A line at a learning rate: its seeds."""

  lr: float
  points: tuple[Judged, ...]

  @property
  def finals(self) -> list[float]:
    """Final losses of those that finished and did not diverge."""
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
    """At the learning rate whose mean is the lowest, of those where no seed diverged."""
    sound = [c for c in self.cells() if c.finals and not c.diverged]
    return min(sound, key=lambda c: c.mean, default=None)

  def sensitivities(self) -> dict[int, float]:
    """Seed -> LR sensitivity, of the seeds that are done at every learning rate."""
    found = {}
    for seed in self.seeds if len(self.lrs) > 1 else []:
      own = [p for p in self.points if p.seed == seed]
      whole = all(p.done and math.isfinite(p.init or math.nan) for p in own)
      if whole and {p.lr for p in own} == set(self.lrs):
        finals = [math.nan if p.log.final is None else p.log.final for p in own]
        found[seed] = judge.sensitivity(finals, [p.init for p in own])
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def gather(points: Sequence[Judged]) -> list[Line]:
  """Points -> lines, in the order in which they first come."""
  names = dict.fromkeys(p.line for p in points)
  return [Line(name, tuple(p for p in points if p.line == name)) for name in names]
