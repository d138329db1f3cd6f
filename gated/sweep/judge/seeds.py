"""What seeds alone do to a final loss: means, their spread, and what is beyond it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# That two means differ is said where this much of chance is left out, on both sides.
LEVEL = 0.95


class Spread(NamedTuple):
  """Final losses of one configuration under several seeds, in nats."""

  mean: float  # NaN without a seed
  std: float  # of a sample (n - 1); NaN with fewer than two seeds
  n: int  # seeds


def spread(finals: Sequence[float]) -> Spread:
  """Final losses, one a seed -> their mean, std and number; what is not finite is out.

  Give those of runs that did not diverge: what a diverged one ends at is no noise.
  """
  x = np.asarray([f for f in finals if math.isfinite(f)], np.float64)
  mean = float(x.mean()) if len(x) else math.nan
  return Spread(mean, float(x.std(ddof=1)) if len(x) > 1 else math.nan, len(x))


@dataclass(frozen=True)
class Noise:
  """The noise floor of a sweep: what is below it, seeds do; `str` of it states it."""

  std: float  # of a final loss over seeds, pooled over cells, in nats; NaN if unknown
  dof: int  # degrees of freedom that it is known by; 0: it is unknown
  cells: int  # configurations with two seeds or more

  def beyond(self, n: int, m: int) -> float:
    """Seeds of two means -> how far apart they must be to differ, in nats.

        t * std * sqrt(1/n + 1/m)

    with Student's t at LEVEL, of two sides, for one comparison chosen beforehand: the
    best of many needs more. inf where the noise is unknown, or a mean has no seed.
    """
    if not self.dof or min(n, m) < 1:
      return math.inf
    # Imported late: SciPy takes as long as all else of a short run's start.
    from scipy.special import stdtrit

    return float(stdtrit(self.dof, (1 + LEVEL) / 2)) * self.std * math.sqrt(1 / n + 1 / m)

  def differ(self, a: Spread, b: Spread) -> bool:
    """Whether the means of two cells differ by more than the noise."""
    return abs(a.mean - b.mean) > self.beyond(a.n, b.n)

  def __str__(self) -> str:
    if not self.dof:
      return (
        'No configuration has two seeds that did not diverge: the noise of a final loss '
        'is not known, and no ordering may be claimed.'
      )
    apart = ', '.join(f'{self.beyond(n, n):.4f} (n={n})' for n in (1, 2, 3, 5))
    return (
      f'Noise floor: over seeds a final loss has a standard deviation of {self.std:.4f} '
      f'nats (pooled over {self.cells} configurations with two seeds or more, '
      f'{self.dof} degrees of freedom). At {LEVEL:.0%} two means of n seeds each differ '
      f'where they are further apart than {apart}; closer ones claim no ordering.'
    )


def noise(cells: Iterable[Sequence[float]]) -> Noise:
  """Final losses of each cell (variant x learning rate), one a seed -> Noise.

      std^2 = sum of (n - 1) std_cell^2 / sum of (n - 1)

  over the cells with two finite losses or more. It takes the noise to be alike in all of
  them: near the highest stable learning rate it is larger, so leave cells out in which
  any seed diverged.
  """
  found = [s for s in map(spread, cells) if s.n > 1]
  dof = sum(s.n - 1 for s in found)
  if not dof:
    return Noise(math.nan, 0, 0)
  square = sum((s.n - 1) * s.std**2 for s in found) / dof
  return Noise(math.sqrt(square), dof, len(found))
