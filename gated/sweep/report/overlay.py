"""Runs in one panel, along steps, tokens or hours, and their difference to a baseline.

Also the panels of single numbers of a log, for `scripts/plot.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from gated.probes.style import look, wrapped
from gated.sweep.report.figures import (
  COLUMN,
  MANY,
  PAGE,
  Drawn,
  legend_columns,
  log_scale,
)
from gated.sweep.report.logs import AXES, Curve, Log
from gated.sweep.report.points import Line

LOSS, CHANGE = 20, 10  # Windows of the rolling median in a curve and in a difference.
BANDS = 3  # Differences with bands; more would cover each other.
DRAWN = 400  # Points of a curve in a figure.
FIRST = 0.1  # This first fraction of a curve may lie outside the axis.
# The least extent of an axis in hours -> its unit, and hours in the unit.
UNITS = ((1.0, 'hours', 1.0), (1 / 60, 'minutes', 1 / 60), (0.0, 'seconds', 1 / 3600))

NO_MARK, NO_LINE = {'marker': ''}, {'ls': 'none'}
NOTHING = np.zeros(0)
Heights = tuple[np.ndarray, np.ndarray]  # The drawn values of lines, and of marks.


class Series(NamedTuple):
  """Runs that are drawn alike: the seeds of a recipe."""

  label: str
  logs: Mapping[int, Log]  # by seed


def of_lines(lines: list[Line], *, baseline: Line, by: str) -> Drawn:
  """Each line at its best rate, and its difference to the baseline over training."""
  series = [Series(x.name, {p.seed: p.log for p in _cell(x).points}) for x in lines]
  drawn = losses(series, base=lines.index(baseline), by=by)
  if drawn and any(line.best is None and line.started for line in lines):
    figure, caption = drawn
    return figure, f'{caption} A line without a stable rate is shown at its lowest one.'
  return drawn


def _cell(line: Line) -> Any:
  return line.best or line.cells[0]


def losses(series: Sequence[Series], *, base: int, by: str) -> Drawn:
  """Training and held-out losses of all series, and the differences to one of them."""
  shown = [s for s in series if any(len(log.train.steps) for log in s.logs.values())]
  if not shown:
    return None
  below = [s for s in shown if s is not series[base]] if series[base] in shown else []
  rows = 2 if below else 1
  columns = legend_columns([s.label for s in shown]) if len(shown) > MANY else 1
  names = [wrapped(s.label, 30 if columns > 1 else 44) for s in series]
  height = 2.2 * rows + 0.16 * sum(n.count('\n') + 1 for n in names) / columns + 0.3
  figure = Figure(figsize=(PAGE if columns > 1 else COLUMN, height))
  axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
  extent = max(_extent(log, by) for s in shown for log in s.logs.values())
  label, unit = _unit(by, extent)
  handles, drawn = [], []
  for i, s in enumerate(series):
    if s not in shown:
      continue
    drawn.append(_losses(axes[0], s, look(i), by, unit))
    handles.append(Line2D([], [], label=names[i], **look(i)))
  _frame(axes[0], drawn)
  axes[0].set_ylabel('loss (nats/token)')
  many = any(len(s.logs) > 1 for s in shown)
  mean = ', mean over the seeds' if many else ''
  caption = f'Training loss (lines: smoothed{mean}) and held-out loss (marks).'
  if below:
    drawn = []
    for i, s in enumerate(series):
      if s in below:
        lines, band = _difference(s, series[base], by), len(below) <= BANDS
        drawn.append(_draw(axes[1], s, lines, look(i), (by, unit), band))
    axes[1].axhline(0, color='black', lw=0.6, zorder=1)
    _frame(axes[1], drawn)
    axes[1].set_ylabel('difference (nats/token)')
    each = ', seed by seed where both have it' if many else ''
    caption += f' Below: minus the loss of {series[base].label}{each}.'
    if len(below) <= BANDS and any(len(s.logs) > 1 for s in below):
      caption += ' Bands are the range over the seeds.'
  axes[-1].set_xlabel(label)
  _ticks(axes[-1], by)
  options: dict[str, Any] = dict(loc='outside lower center', handlelength=3)
  figure.legend(handles=handles, ncols=columns, **options)
  return figure, caption


def _extent(log: Log, by: str) -> float:
  return float(log.along(log.train, by)[-1]) if len(log.train.steps) else 0.0


def _unit(by: str, extent: float) -> tuple[str, float]:
  """An axis and its extent -> its label, and its unit as a multiple of the log's."""
  if by != 'hours':
    return AXES[by], 1.0
  return next((f'{name} of training', u) for least, name, u in UNITS if extent >= least)


def _ticks(ax: Any, by: str) -> None:
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  if by != 'hours':
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))


def _smooth(values: np.ndarray, windows: int) -> np.ndarray:
  """Values -> the rolling mean of their rolling median, both over the same windows.

  Non-finite values rank as the largest; a median may therefore be non-finite.
  """
  size = len(values) // windows
  if size < 2:
    return values
  top = np.finfo(np.float64).max
  x = ndimage.median_filter(np.nan_to_num(values, nan=top, posinf=top), size | 1)
  x = np.where(x == top, np.nan, x)
  return ndimage.uniform_filter1d(x, size | 1) if np.isfinite(x).all() else x


def _mean(curves: Sequence[Curve]) -> tuple[Curve, np.ndarray, np.ndarray]:
  """Curves -> the mean, smallest and largest of their values at common steps."""
  steps = curves[0].steps
  for curve in curves[1:]:
    steps = np.intersect1d(steps, curve.steps)
  rows = np.stack([c.values[np.searchsorted(c.steps, steps)] for c in curves])
  return Curve(steps, rows.mean(0)), rows.min(0), rows.max(0)


def _losses(ax: Any, s: Series, look: dict, by: str, unit: float) -> Heights:
  """Draws the mean training curve and the held-out marks -> the drawn values."""
  logs = [log for log in s.logs.values() if len(log.train.steps)]
  train, *_ = _mean([Curve(x.train.steps, _smooth(x.train.values, LOSS)) for x in logs])
  curve = train.thinned(DRAWN)
  ax.plot(logs[0].along(curve, by) / unit, curve.values, zorder=3, **look | NO_MARK)
  held = [log.heldout for log in logs if len(log.heldout.steps)]
  if not held:
    return _late(train), NOTHING
  mean, *_ = _mean(held)
  ax.plot(logs[0].along(mean, by) / unit, mean.values, zorder=4, **look | NO_LINE)
  return _late(train), mean.values


def _difference(s: Series, base: Series, by: str) -> list[list[Curve]]:
  """Two series -> the differences of their training and held-out losses, by seed."""
  common = [seed for seed in s.logs if seed in base.logs]
  pairs = [(s.logs[seed], base.logs[seed]) for seed in common]
  pairs = pairs or [(log, next(iter(base.logs.values()))) for log in s.logs.values()]
  kinds = [
    [_minus(own, other, by, name) for own, other in pairs]
    for name in ('train/loss', 'heldout/loss')
  ]
  return [[c for c in curves if len(c.steps)] for curves in kinds]


def _draw(
  ax: Any,
  s: Series,
  differences: Sequence[Sequence[Curve]],
  look: dict,
  axis: tuple[str, float],
  band: bool,
) -> Heights:
  """Draws the differences of a series -> the drawn values."""
  by, unit = axis
  log = next(log for log in s.logs.values() if len(log.train.steps))
  train, held = differences
  lines = marks = NOTHING
  if train:
    smooth = [Curve(c.steps, _smooth(c.values, CHANGE)) for c in train]
    mean, least, most = _mean(smooth)
    x = log.along(mean, by) / unit
    ax.plot(x, mean.values, zorder=3, **look | NO_MARK)
    if len(train) > 1 and band:
      ax.fill_between(x, least, most, color=look['color'], alpha=0.15, lw=0)
    lines = _late(mean)
  if held:
    mean, *_ = _mean(held)
    ax.plot(log.along(mean, by) / unit, mean.values, zorder=4, **look | NO_LINE)
    marks = _late(mean)
  return lines, marks


def _minus(own: Log, other: Log, by: str, name: str) -> Curve:
  """A curve of one log minus that of another, at the same step, token or hour.

  At the same step both have read the same rows, so their noise partly cancels. Elsewhere
  the other curve is interpolated.
  """
  a, b = own.curves[name], other.curves[name]
  if by == 'step':
    steps = np.intersect1d(a.steps, b.steps)
    left, right = (c.values[np.searchsorted(c.steps, steps)] for c in (a, b))
    return Curve(steps, left - right)
  if not len(b.steps):
    return Curve(b.steps, b.values)
  x, xs = own.along(a, by), other.along(b, by)
  inside = (x >= xs[0]) & (x <= xs[-1])
  return Curve(a.steps[inside], a.values[inside] - np.interp(x[inside], xs, b.values))


def _late(curve: Curve) -> np.ndarray:
  """The values after the first steps, which may lie outside the axis."""
  return curve.values[curve.steps > FIRST * max(curve.steps, default=0)]


def _frame(ax: Any, drawn: Sequence[Heights]) -> None:
  """Sets the range of the axis: all marks, and the lines without their outer percent."""
  lines, marks = (np.concatenate([*column, NOTHING]) for column in zip(*drawn))
  lines, marks = lines[np.isfinite(lines)], marks[np.isfinite(marks)]
  ends = [*np.quantile(lines, [0.005, 0.995])] if len(lines) else []
  if ends := [*ends, *marks]:
    low, high = min(ends), max(ends)
    pad = 0.08 * max(high - low, 1e-3 * abs(high), 1e-9)
    ax.set_ylim(low - pad, high + pad)


def panels(series: Sequence[Series], titles: Mapping[str, str], *, by: str) -> Drawn:
  """A small panel for each number of `titles` that a log has; None if none has any."""
  logs = [log for s in series for log in s.logs.values()]
  names = [n for n in titles if any(len(log.curves[n].steps) for log in logs)]
  if not names:
    return None
  across = min(3, len(names))
  down = -(-len(names) // across)
  size = PAGE if across > 1 else COLUMN, 0.5 + 1.5 * down + 0.16 * len(series)
  figure = Figure(figsize=size)
  axes = figure.subplots(down, across, squeeze=False, sharex=True)
  label, unit = _unit(by, max(_extent(log, by) for log in logs))
  for ax in axes.flat[len(names) :]:
    ax.set_visible(False)
  for panel, (ax, name) in enumerate(zip(axes.flat, names)):
    ax.set_title(wrapped(titles[name], 24), size=7)
    for i, s in enumerate(series):
      for log in s.logs.values():
        curve = log.curves[name].thinned(DRAWN)
        style = look(i) | ({'marker': ''} if len(curve.steps) > 12 else {'ms': 2.5})
        ax.plot(log.along(curve, by) / unit, curve.values, **style | {'lw': 0.8})
    _scale(ax)
    ax.tick_params(labelsize=6, labelbottom=panel + across >= len(names))
    _ticks(ax, by)
  figure.supxlabel(label, size=8)
  handles = [
    Line2D([], [], label=wrapped(s.label, 40), **look(i)) for i, s in enumerate(series)
  ]
  options: dict[str, Any] = dict(loc='outside upper center', handlelength=3)
  figure.legend(handles=handles, ncols=2 if len(series) > 1 else 1, **options)
  return figure, f'By {by}: {", ".join(titles[name] for name in names)}.'


def _scale(ax: Any) -> None:
  """A logarithmic axis for positive numbers that span more than a factor of 30."""
  values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
  values = values[np.isfinite(values)]
  if len(values) and values.min() > 0 and values.max() > 30 * values.min():
    log_scale(ax)
