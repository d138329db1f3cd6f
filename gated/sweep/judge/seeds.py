"""Seed noise of final losses: means, standard deviations, significant differences."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # Two-sided confidence at which two means differ.


class Spread(NamedTuple):
  """Final losses of one configuration over seeds, in nats."""

  mean: float  # NaN without a seed
  std: float  # sample standard deviation, by n - 1; NaN with fewer than two seeds
  n: int  # seeds


def spread(finals: Sequence[float]) -> Spread:
  """Final losses, one per seed -> Spread of the finite ones; leave diverged runs out."""
  x = np.asarray([f for f in finals if math.isfinite(f)], np.float64)
  mean = float(x.mean()) if len(x) else math.nan
  return Spread(mean, float(x.std(ddof=1)) if len(x) > 1 else math.nan, len(x))


@dataclass(frozen=True)
class Noise:
  """The noise floor of a sweep; `str` gives the sentence for the report."""

  std: float  # of a final loss over seeds, pooled over cells, in nats; NaN if unknown
  dof: int  # degrees of freedom; 0: unknown
  cells: int  # configurations with two or more seeds

  def beyond(self, n: int, m: int) -> float:
    """Numbers of seeds of two means -> the smallest significant difference, in nats.

        t * std * sqrt(1/n + 1/m)

    with Student's t, two-sided, at LEVEL. It holds for one comparison chosen beforehand;
    the best of many needs more. inf if the noise is unknown or a mean has no seed.
    """
    if min(n, m) < 1:
      return math.inf
    return self.within(n) * math.sqrt(1 + n / m)

  def within(self, n: int) -> float:
    """A number of seeds -> half of the confidence interval of their mean, in nats.

        t * std / sqrt(n)

    inf if the noise is unknown or there is no seed.
    """
    if not self.dof or n < 1:
      return math.inf
    # A late import: SciPy takes as long to load as the rest of a short run.
    from scipy.special import stdtrit

    return float(stdtrit(self.dof, (1 + LEVEL) / 2)) * self.std / math.sqrt(n)

  def __str__(self) -> str:
    if not self.dof:
      return (
        'No configuration has two seeds without divergence. So the noise of a final loss '
        'is unknown, and the report claims no ordering.'
      )
    limits = ', '.join(f'{self.beyond(n, n):.4f} (n={n})' for n in (1, 2, 3, 5))
    return (
      f'Noise floor: the standard deviation of a final loss over seeds is {self.std:.4f} '
      f'nats (pooled over {self.cells} configurations with two or more seeds, '
      f'{self.dof} degrees of freedom). At {LEVEL:.0%} confidence, two means of n seeds '
      f'each differ if they are further apart than {limits}. A smaller difference claims '
      'no ordering.'
    )


def noise(cells: Iterable[Sequence[float]]) -> Noise:
  """Final losses of each cell (variant x learning rate), one per seed -> Noise.

      std^2 = sum of (n - 1) std_cell^2 / sum of (n - 1)

  over the cells with two or more finite losses. It assumes equal noise in all cells. The
  noise grows near the highest stable learning rate: leave out cells with a diverged seed.
  """
  spreads = [s for s in map(spread, cells) if s.n > 1]
  dof = sum(s.n - 1 for s in spreads)
  if not dof:
    return Noise(math.nan, 0, 0)
  square = sum((s.n - 1) * s.std**2 for s in spreads) / dof
  return Noise(math.sqrt(square), dof, len(spreads))
