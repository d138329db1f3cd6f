"""Loss spikes: points where a logged loss rises above its running median.

The method, made for the paper's released curves, subtracts the centred rolling median of
101 logged points from the loss. Points of a spike are excluded and the median is
recomputed, until no more are found. So neither a wide spike nor a second one nearby
raises the baseline from which its height is measured.

n points of a log
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CHANCE = 0.01  # The chance that noise alone causes a spike in a log.
SIGMA = 1.4826  # A normal deviate's standard deviation over its median absolute value.
# The parameters used on the paper's released curves.
WINDOW, THRESHOLD, WARMUP, GAP = 101, 0.1, 5000, 200


class Spike(NamedTuple):
  """An excursion of the loss; steps are those of logged points."""

  step: int  # of its peak
  height: float  # of the peak above the running median, in nats; inf if not finite
  first: int  # the first step above the threshold
  last: int  # the last one


def spikes(
  steps: ArrayLike,
  losses: ArrayLike,
  *,
  window: int = WINDOW,
  threshold: float = THRESHOLD,
  warmup: int = WARMUP,
  gap: int = GAP,
) -> list[Spike]:
  """Losses in nats and the steps they were logged at -> their distinct excursions.

  A point is high if it is past step `warmup` and non-finite, or more than `threshold`
  nats above the centred median of `window` logged points; steps may be irregular. Two
  high points belong to one excursion if they are at most `gap` steps apart, or if the
  loss did not return between them: the lowest mean of five successive points there is not
  within half a threshold of the median. Strong noise raises the threshold to the normal
  deviate that one log of a hundred exceeds by chance; for 10,000 points, this happens if
  sigma is above 0.02.

  Limits of the method. A flat excursion longer than half a window (50 points) with a
  sudden start looks like a new level and is missed; `diverged` finds it if the loss never
  returns. Windows are shorter at the start of a log, so that a falling loss has no spike
  there; a spike at the first point is missed. At the end of a log an excursion and a
  lasting rise look alike. A spike between two logged points leaves no trace.

  The defaults are those of the released curves of arXiv 2505.06708. ValueError for
  different lengths, steps that do not increase, or a parameter out of range.
  """
  if window != int(window) or window < 3 or window % 2 == 0:
    raise ValueError(
      f'window={window}, but it must be an odd number of points, 3 or more'
    )
  if not 0 <= gap < math.inf:
    raise ValueError(f'gap={gap}, but it must be a number of steps, 0 or more')
  steps, losses = log(steps, losses)
  most = limit(steps, losses, threshold=threshold, warmup=warmup)
  above = losses - _baseline(steps, losses, window // 2, most)
  above[~np.isfinite(losses)] = np.inf
  high = np.flatnonzero((above > most) & (steps > warmup))
  far = np.flatnonzero(np.diff(steps[high]) > gap)
  cuts = [i + 1 for i in far if _returned(above[high[i] + 1 : high[i + 1]], most)]
  excursions = []
  for group in np.split(high, cuts) if len(high) else []:
    peak = group[np.argmax(above[group])]
    ends = int(steps[group[0]]), int(steps[group[-1]])
    excursions.append(Spike(int(steps[peak]), float(above[peak]), *ends))
  return excursions


def limit(steps: ArrayLike, losses: ArrayLike, *, threshold: float, warmup: int) -> float:
  """Losses in nats -> the threshold that `spikes` applies to them.

  It is `threshold`, or the height that noise alone exceeds with probability CHANCE. The
  noise is that of differences of successive losses: they do not depend on the trend.
  """
  if not 0 < threshold < math.inf:
    raise ValueError(f'threshold={threshold}, but it must be positive, in nats')
  if not 0 <= warmup < math.inf:
    raise ValueError(f'warmup={warmup}, but it must be a number of steps, 0 or more')
  steps, losses = log(steps, losses)
  losses = losses[(steps > warmup) & np.isfinite(losses)]
  if len(losses) < 3:
    return threshold
  # A late import: SciPy takes as long to load as the rest of a short run.
  from scipy.special import ndtri

  sigma = SIGMA * np.median(np.abs(np.diff(losses))) / math.sqrt(2)
  return max(threshold, float(-ndtri(CHANCE / len(losses)) * sigma))


def log(steps: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Steps and losses -> arrays; ValueError if they are not a log."""
  steps, losses = np.asarray(steps), np.asarray(losses, np.float64)
  if steps.ndim != 1 or losses.shape != steps.shape:
    raise ValueError(
      f'steps of shape {steps.shape} and losses of shape {losses.shape}, but a log is '
      'two lists of the same length'
    )
  if len(steps) and steps.dtype.kind not in 'iuf':
    raise ValueError(f'steps are {steps.dtype}, but must be numbers')
  bad = np.flatnonzero(~(np.diff(steps.astype(np.float64)) > 0))
  if len(bad) or not np.isfinite(steps.astype(np.float64)).all():
    pair = steps[bad[0] : bad[0] + 2].tolist() if len(bad) else steps.tolist()
    raise ValueError(f'steps must increase, but {pair[0]} is followed by {pair[-1]}')
  return steps, losses


def _baseline(
  steps: np.ndarray, losses: np.ndarray, half: int, limit: float
) -> np.ndarray:
  """Losses -> their running median (n,) without points more than `limit` above it."""
  good = np.isfinite(losses)
  base = np.full(len(losses), np.nan)
  # Each round removes at least one point. If a window has not converged after as many
  # rounds as it has points, it is a slope and not a spike.
  for _ in range(2 * half + 1):
    if not good.any():
      break
    base = np.interp(steps, steps[good], _median(losses[good], half))
    high = good & (losses - base > limit)
    if not high.any():
      break
    good &= ~high
  return base


def _median(x: np.ndarray, half: int) -> np.ndarray:
  """(n,) -> (n,): the centred running median of 2 half + 1 points.

  The windows near the ends are smaller but still centred, so that a falling curve is
  never above its median. At the end the median is at most that of the last full window,
  so that an excursion at the end of the log is found.
  """
  from scipy import ndimage

  n = len(x)
  half = min(half, (n - 1) // 2)
  y = ndimage.median_filter(x, 2 * half + 1)
  for i in range(half):
    y[i] = np.median(x[: 2 * i + 1])
    y[n - 1 - i] = min(np.median(x[n - 1 - 2 * i :]), y[n - 1 - half])
  return y


def _returned(between: np.ndarray, limit: float) -> bool:
  """Points between two high ones -> whether the loss returned to the median there."""
  if not len(between):
    return False
  count = min(5, len(between))
  means = np.convolve(between, np.full(count, 1 / count), 'valid')
  return bool(means.min() <= limit / 2)
