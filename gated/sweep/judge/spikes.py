"""Loss spikes: where a logged loss rises above its running median, and how far.

The measure that was applied to the paper's released curves: what is left of a loss when
the centred rolling median of 101 logged points is taken off. It is made to hold where
that plain median does not. Points of an excursion are left out of the median and it is
taken anew, until none is added: so neither a wide excursion nor a second one beside it
lifts the median that its height is taken above.

n points of a log
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# How often noise alone may be taken for a spike: in one log of a hundred.
CHANCE = 0.01
# A normal deviate's standard deviation over its median absolute value.
SIGMA = 1.4826


# As the paper's released curves were measured.
WINDOW, THRESHOLD, WARMUP, GAP = 101, 0.1, 5000, 200


class Spike(NamedTuple):
  """An excursion of the loss; steps are those of logged points."""

  step: int  # of its peak
  height: float  # of the peak above the running median, in nats; inf if not finite
  first: int  # step that is too high
  last: int  # one
  # Whether the log ends in it, or more of its points are too high than half a window has:
  # it may as well be a lasting change of the level, and its height is less sure.
  lasting: bool


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

  Too high is a point past step `warmup` that is not finite, or lies more than `threshold`
  nats above the centred median of `window` logged points, however irregular their steps.
  Two such points are of one excursion if they are at most `gap` steps apart, or if
  nothing logged between them says that the loss came back: the lowest mean of five
  successive points there is to be within half a threshold of the median. Where the noise
  is so strong that by chance alone one log of a hundred would have a normal deviate above
  `threshold`, the threshold is that deviate: beyond a sigma of 0.02 in 10,000 points.

  What cannot be told: an excursion of more than half a window (50 points) that begins at
  once and stays level is a new level to a median, and is not found where it is flat;
  `diverged` tells if the loss never came back. At the start of a log a fall is no
  excursion: there the windows are shorter, and a spike at the very first point is not
  seen. At its end an excursion and a rise look alike. A spike between two logged points
  leaves no trace.

  Defaults are the published ones (window, threshold, warmup and gap of the released
  curves of arXiv 2505.06708). ValueError where the lengths differ, the steps do not
  increase, or a number is out of range.
  """
  steps, losses = _log(steps, losses)
  _check(window=window, threshold=threshold, warmup=warmup, gap=gap)
  most = limit(steps, losses, threshold=threshold, warmup=warmup)
  above = losses - _baseline(steps, losses, window // 2, most)
  above[~np.isfinite(losses)] = np.inf
  found = []
  high = np.flatnonzero((above > most) & (steps > warmup))
  for at in _groups(steps, above, high, gap=gap, limit=most):
    peak = at[np.argmax(above[at])]
    first, last = int(at[0]), int(at[-1])
    lasting = last == len(steps) - 1 or len(at) > window // 2
    where = (int(steps[i]) for i in (first, last))
    found.append(Spike(int(steps[peak]), float(above[peak]), *where, lasting))
  return found


def limit(steps: ArrayLike, losses: ArrayLike, *, threshold: float, warmup: int) -> float:
  """Losses in nats -> how far above the median is too high to `spikes`: the threshold,
  or more where the noise is stronger; to be stated beside what was counted."""
  steps, losses = _log(steps, losses)
  return max(threshold, _reach(losses[steps > warmup]))


def excess(
  steps: ArrayLike, losses: ArrayLike, *, window: int, threshold: float, warmup: int
) -> dict[str, float]:
  """Losses in nats -> how what exceeds the running median is spread, past `warmup`.

  By name: `points`, `sigma` (robust, from the median absolute value), `std`, `kurtosis`
  (3 of a normal deviate), `largest`, and the fractions `above_0.05`, `above_0.1`,
  `above_0.5`, `above_1` of all points, in nats. What is not finite counts as above all of
  them, and is left out of the rest. NaN where there are no points.
  """
  steps, losses = _log(steps, losses)
  _check(window=window, threshold=threshold, warmup=warmup, gap=0)
  most = limit(steps, losses, threshold=threshold, warmup=warmup)
  above = (losses - _baseline(steps, losses, window // 2, most))[steps > warmup]
  finite = above[np.isfinite(above)]
  told = {'points': float(len(above))}
  for name in ('sigma', 'std', 'kurtosis', 'largest'):
    told[name] = math.nan
  if len(finite):
    std = float(finite.std())
    told |= {
      'sigma': float(SIGMA * np.median(np.abs(finite - np.median(finite)))),
      'std': std,
      'kurtosis': float(np.mean(((finite - finite.mean()) / std) ** 4))
      if std
      else math.nan,
      'largest': float(finite.max()),
    }
  for level in (0.05, 0.1, 0.5, 1):
    high = ~(above <= level)
    told[f'above_{level:g}'] = float(high.mean()) if len(above) else math.nan
  return told


def _log(steps: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Steps and losses -> arrays; ValueError if they are no log."""
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


def _check(*, window: int, threshold: float, warmup: int, gap: int) -> None:
  if window != int(window) or window < 3 or window % 2 == 0:
    raise ValueError(
      f'window={window}, but it must be an odd number of points, 3 or more'
    )
  if not 0 < threshold < math.inf:
    raise ValueError(f'threshold={threshold}, but it must be positive, in nats')
  for name, value in (('warmup', warmup), ('gap', gap)):
    if not 0 <= value < math.inf:
      raise ValueError(f'{name}={value}, but it must be a number of steps, 0 or more')


def _reach(losses: np.ndarray) -> float:
  """Losses -> how far up noise alone reaches in so many, in nats.

  Told from differences of successive losses, which know of no trend and of no baseline.
  """
  losses = losses[np.isfinite(losses)]
  if len(losses) < 3:
    return 0.0
  # Here and below SciPy is imported late: it takes as long as all of a short run's rest.
  from scipy.special import ndtri

  sigma = SIGMA * np.median(np.abs(np.diff(losses))) / math.sqrt(2)
  return float(-ndtri(CHANCE / len(losses)) * sigma)


def _baseline(
  steps: np.ndarray, losses: np.ndarray, half: int, limit: float
) -> np.ndarray:
  """Losses -> their running median (n,), points more than `limit` above it left out."""
  good = np.isfinite(losses)
  base = np.full(len(losses), np.nan)
  # Each round at least one more point goes. What a window cannot settle in as many rounds
  # as it has points is a slope, not a spike.
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

  Within the first and last half window it is of fewer points, centred all the same: so a
  falling curve lies nowhere above it. At the end it may not exceed the last whole
  window's, so that an excursion that the log ends in is seen.
  """
  from scipy import ndimage

  n = len(x)
  half = min(half, (n - 1) // 2)
  y = ndimage.median_filter(x, 2 * half + 1)
  for i in range(half):
    y[i] = np.median(x[: 2 * i + 1])
    y[n - 1 - i] = min(np.median(x[n - 1 - 2 * i :]), y[n - 1 - half])
  return y


def _groups(
  steps: np.ndarray, above: np.ndarray, high: np.ndarray, *, gap: int, limit: float
) -> Sequence[np.ndarray]:
  """Indices of points that are too high -> those of each excursion."""
  if not len(high):
    return []
  far = np.flatnonzero(np.diff(steps[high]) > gap)
  cuts = [i + 1 for i in far if _came_back(above[high[i] + 1 : high[i + 1]], limit)]
  return np.split(high, cuts)


def _came_back(between: np.ndarray, limit: float) -> bool:
  """Points between two that are too high -> whether they lie near the median again."""
  if not len(between):
    return False
  count = min(5, len(between))
  means = np.convolve(between, np.full(count, 1 / count), 'valid')
  return bool(means.min() <= limit / 2)
