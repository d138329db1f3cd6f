"""Divergence of a run, and the sensitivity of a loss to the learning rate."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from gated.sweep.judge.spikes import log

LEAST = 3  # Minimum number of logged losses whose median is a run's level.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """When a run counts as diverged; `str` gives the sentence for the report."""

  multiple: float  # Diverged: a final loss above `multiple` times the sweep's best.
  rise: float  # Diverged: a final level this many nats above the run's lowest level.
  tail: float  # The fraction of the logged losses whose median is a level.

  def __post_init__(self):
    if not 1 < self.multiple < math.inf:
      raise ValueError(
        f'multiple={self.multiple}, but it must be above 1: the limit is a multiple of '
        'the best final loss of the sweep'
      )
    if not 0 < self.rise < math.inf:
      raise ValueError(f'rise={self.rise}, but it must be positive, in nats')
    if not 0 < self.tail <= 0.5:
      raise ValueError(
        f'tail={self.tail}, but it is a fraction of a run, above 0 and at most 0.5'
      )

  def __str__(self) -> str:
    return (
      'A run counts as diverged in any of these cases. It stopped as unstable. Its last '
      f'loss is not finite. Its final loss is above {self.multiple:g} times the best of '
      'the sweep, unless its learning rate is below the best stable one of its line: '
      'then that run learned slowly. It never recovered: its final level, the median of '
      f'the last {100 * self.tail:g}% of its logged losses (at least {LEAST}), is '
      f'more than {self.rise:g} nats above its lowest level.'
    )


def diverged(
  steps: ArrayLike,
  losses: ArrayLike,
  *,
  best: float,
  rule: Rule,
  broken: bool,
  final: float | None = None,
) -> str:
  """A run's training losses in nats -> why it counts as diverged; '' if it does not.

  `best` is the lowest final loss of the sweep; inf disables that comparison. `final` is
  this run's final loss of the same kind (default: its final level). `broken` means that
  the run stopped as unstable. A non-finite step does not count if the run continued.
  ValueError for an empty log.
  """
  steps, losses = log(steps, losses)
  if math.isnan(best):
    raise ValueError('best=nan, but it must be the lowest final loss, or inf')
  if broken:
    return f'it stopped as unstable{f" at step {steps[-1]}" if len(steps) else ""}'
  if not len(steps):
    raise ValueError('the log has no losses')
  levels, centres = _levels(losses, rule.tail)
  end = levels[-1]
  final = float(end) if final is None else final
  if not math.isfinite(losses[-1]) or not math.isfinite(end):
    return f'its loss is not finite at its end, step {steps[-1]}'
  if not math.isfinite(final):
    return 'its final loss is not finite'
  if final > rule.multiple * best:
    return (
      f'its final loss, {final:.4g}, is above {rule.multiple:g} times the best of the '
      f'sweep, {best:.4g}'
    )
  low = int(levels.argmin())
  if end - levels[low] > rule.rise:
    return (
      f'it never recovered: its final level, {end:.4g}, is {end - levels[low]:.3g} nats '
      f'above its lowest level, {levels[low]:.4g} (about step {steps[centres[low]]})'
    )
  return ''


def best_rate(runs: Iterable[tuple[float, float]], *, best: float, rule: Rule) -> float:
  """(learning rate, final loss) of a line's stable runs -> the rate of its lowest loss.

  Below this rate a high final loss means slow learning, not divergence. 0 if no run of
  the line is within `rule.multiple` of `best`, the sweep's lowest loss: a line that fails
  at every rate does not fail because its rate is low.
  """
  near = [(final, rate) for rate, final in runs if final <= rule.multiple * best]
  return min(near)[1] if near else 0.0


def _levels(losses: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
  """(n,) losses -> running medians, and the index of the centre of each.

  Non-finite losses rank above all finite ones.
  """
  from scipy import ndimage

  n = len(losses)
  # The number of points is odd, so that a window has a centre.
  half = min(max(LEAST, round(tail * n)) // 2, (n - 1) // 2)
  top = np.finfo(np.float64).max
  x = np.where(np.isfinite(losses), losses, top)
  centres = np.arange(half, n - half)
  levels = ndimage.median_filter(x, 2 * half + 1)[centres]
  return np.where(levels == top, np.inf, levels), centres


def sensitivity(finals: ArrayLike, inits: ArrayLike) -> float:
  """Final losses and losses at initialisation, by learning rate -> LR sensitivity, nats.

      E over rates of [min(final, init) - best]

  The definition of Wortsman et al. (arXiv 2309.14322): the expectation is over the range
  of learning rates, and `best` the lowest loss in it. The grid's rates sample the range
  with equal weights: space them evenly in the logarithm, and compare equal grids only,
  because more unstable rates raise the mean. Give the losses of one seed, or means.

  A non-finite final loss counts as the loss at initialisation. NaN if no final loss is
  finite. ValueError for a non-finite initial loss.
  """
  finals, inits = np.asarray(finals, np.float64), np.asarray(inits, np.float64)
  if finals.ndim != 1 or finals.shape != inits.shape or not len(finals):
    raise ValueError(
      f'final losses of shape {finals.shape} and initial ones of shape {inits.shape}, '
      'but there must be one of each for every learning rate'
    )
  if not np.isfinite(inits).all():
    raise ValueError(f'losses at initialisation {inits.tolist()}, but all must be finite')
  if not np.isfinite(finals).any():
    return math.nan
  reached = np.minimum(np.where(np.isfinite(finals), finals, inits), inits)
  return float(np.mean(reached - reached.min()))
