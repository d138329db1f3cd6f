"""Whether a run of a sweep diverged, and how much its loss minds the learning rate."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

LEAST = 3  # Points that a level is the median of, at least.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """When a run counts as diverged; `str` of it is the sentence that a report states."""

  multiple: float  # of the best final loss of the sweep; above it is diverged
  rise: float  # nats above its lowest level, at the end of a run that never recovered
  tail: float  # of a run's logged points; the median of so many is its level

  def __post_init__(self):
    if not 1 < self.multiple < math.inf:
      raise ValueError(
        f'multiple={self.multiple}, but it must be above 1: so many times the best final '
        'loss of the sweep'
      )
    if not 0 < self.rise < math.inf:
      raise ValueError(f'rise={self.rise}, but it must be positive, in nats')
    if not 0 < self.tail <= 0.5:
      raise ValueError(
        f'tail={self.tail}, but it is a fraction of a run, above 0 and at most 0.5'
      )

  def __str__(self) -> str:
    return (
      'A run has diverged if it was left as unstable; if its loss at the end is not '
      f'finite; if its final loss is above {self.multiple:g} times the best of the '
      'sweep, unless its learning rate is below the best one of its line and that one '
      'did not diverge, for then it learned slowly; or if it never recovered: its level '
      f'at the end, the median of the last {100 * self.tail:g}% of its logged losses '
      f'({LEAST} at least), is more than {self.rise:g} nats above the lowest level that '
      'it had held.'
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

  `best` is the lowest final loss of the sweep, inf where there is none, or where the run
  may be a slow one (`best_rate`); `final` this run's final loss, of the same kind, where
  that is known better than by the level at its end. `broken` is whether it was left as
  unstable. A step that was not finite in a run that went on is no divergence. ValueError
  where there is nothing to judge.
  """
  steps, losses = np.asarray(steps), np.asarray(losses, np.float64)
  if steps.ndim != 1 or losses.shape != steps.shape:
    raise ValueError(
      f'steps of shape {steps.shape} and losses of shape {losses.shape}, but a log is '
      'two lists of the same length'
    )
  if math.isnan(best):
    raise ValueError('best=nan, but it is the lowest final loss, or inf without one')
  if broken:
    return f'it was left as unstable{f" at step {steps[-1]}" if len(steps) else ""}'
  if not len(steps):
    raise ValueError('there are no losses to judge a run by')
  level, at = _levels(losses, rule.tail)
  end = level[-1]
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
  low = int(level.argmin())
  if end - level[low] > rule.rise:
    return (
      f'it never recovered: its level at the end, {end:.4g}, is {end - level[low]:.3g} '
      f'nats above {level[low]:.4g}, the lowest it had held (about step {steps[at[low]]})'
    )
  return ''


def best_rate(runs: Iterable[tuple[float, float]], *, best: float, rule: Rule) -> float:
  """(learning rate, final loss) of a line's sound runs -> the rate of the lowest loss.

  Below it a final loss that is too far above `best`, the lowest of the sweep, is of a run
  that learned slowly. 0, so that no run is slow, where none of the line came near enough
  to `best` to say so: what fails at every rate does not fail for want of rate.
  """
  near = [(final, rate) for rate, final in runs if final <= rule.multiple * best]
  return min(near)[1] if near else 0.0


def _levels(losses: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
  """(n,) losses -> medians of successive points, and each one's middle, as an index.

  What is not finite is above all that is.
  """
  from scipy import ndimage

  n = len(losses)
  # An odd number of points has a middle.
  half = min(max(LEAST, round(tail * n)) // 2, (n - 1) // 2)
  top = np.finfo(np.float64).max
  x = np.where(np.isfinite(losses), losses, top)
  at = np.arange(half, n - half)
  level = ndimage.median_filter(x, 2 * half + 1)[at]
  return np.where(level == top, np.inf, level), at


def sensitivity(finals: ArrayLike, inits: ArrayLike, best: float | None = None) -> float:
  """Final losses and losses at initialisation, by learning rate -> LR sensitivity, nats.

      E over rates of [min(final, init) - best]

  as Wortsman et al. define it (arXiv 2309.14322): the expectation is over the range of
  learning rates, and `best` is the lowest loss within it. The rates of a grid are taken
  as the sample of the range, each with the same weight: they should be even in the
  logarithm, and what is compared must have the same grid, as more rates beyond the stable
  ones raise the mean. Give the losses of one seed, or means over seeds.

  A final loss that is not finite counts as the loss at initialisation. NaN where none is
  finite: then no loss is the best. ValueError where an initial loss is missing, or `best`
  is not the lowest.
  """
  finals, inits = np.asarray(finals, np.float64), np.asarray(inits, np.float64)
  if finals.ndim != 1 or finals.shape != inits.shape or not len(finals):
    raise ValueError(
      f'final losses of shape {finals.shape} and initial ones of shape {inits.shape}, '
      'but there must be one of each for every learning rate'
    )
  if not np.isfinite(inits).all():
    raise ValueError(f'losses at initialisation {inits.tolist()}, but all must be finite')
  if best is None and not np.isfinite(finals).any():
    return math.nan
  reached = np.minimum(np.where(np.isfinite(finals), finals, inits), inits)
  least = float(reached.min())
  if best is None:
    best = least
  elif not best <= least + 1e-9 * abs(least):
    raise ValueError(f'best={best}, but a loss of the range is lower: {least}')
  return float(np.mean(reached - best))


def lowest(finals: Sequence[float]) -> float:
  """Final losses of a sweep -> the best: the lowest finite one; inf without one."""
  return min((x for x in finals if math.isfinite(x)), default=math.inf)
