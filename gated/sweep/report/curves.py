"""Figures over steps: the training loss of every point, and early warnings."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from gated.probes.style import COLORS, wrapped
from gated.sweep.report.figures import COLUMN, PAGE, Drawn, log_scale
from gated.sweep.report.logs import WATCHED, Curve
from gated.sweep.report.points import Judged, Line, rate

DRAWN = 240  # Points of a curve in a figure.
SMOOTH = 60  # Windows of the rolling median per curve.
CALM = ('finished', 'partial')  # States whose losses set the range of the axis.
FIRST = 0.1  # Losses in this first fraction of the steps may lie above the axis.


def training(lines: list[Line]) -> Drawn:
  """Training loss over steps, a panel for each line; colour is the learning rate."""
  points = [p for line in lines for p in line.points if len(p.log.train.steps)]
  lrs = sorted({p.lr for p in points})
  if not lrs:
    return None
  count = len(lines)
  columns = count if count < 3 else 2 if count == 4 else 3
  rows = -(-count // columns)
  width = COLUMN if columns == 1 else PAGE
  figure = Figure(figsize=(width, 0.7 + 1.55 * rows))
  axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
  # Above 0.88 the map is too bright for white paper.
  hues = matplotlib.colormaps['viridis'](np.linspace(0, 0.88, len(lrs)))
  low, top = _losses(points)
  for ax, line in zip(axes.flat, lines, strict=False):
    ax.set_title(wrapped(line.name, 26))
    for p in line.points:
      if len(p.log.train.steps):
        _curve(ax, p, hues[lrs.index(p.lr)], top)
  axes[0][0].set_ylim(low, top)
  for ax in axes.flat[count:]:
    ax.set_visible(False)
  # Panels above a hidden one show step labels too.
  for ax in axes.flat[max(0, count - columns) : count]:
    ax.xaxis.set_tick_params(labelbottom=True)
    _steps(ax)
  figure.supylabel('training loss (nats/token)', size=8)
  handles = [
    Line2D([], [], color=hue, label=f'lr {rate(lr)}')
    for lr, hue in zip(lrs, hues, strict=False)
  ]
  caption = (
    'Training loss, pale, and its rolling median; colour is the peak learning rate.'
  )
  mark: dict[str, Any] = dict(color='black', ms=4, ls='none')
  if any(p.spikes for p in points):
    handles.append(Line2D([], [], marker='v', label='spike', **mark))
    caption += ' Triangles: spikes.'
  if any(p.diverged for p in points):
    handles.append(Line2D([], [], marker='x', label='diverged', **mark))
    caption += ' Crosses: ends of runs that diverged.'
  most = 4 if width == COLUMN else 6
  across = -(-len(handles) // -(-len(handles) // most))
  options: dict[str, Any] = dict(handlelength=1.2, columnspacing=1.2)
  figure.legend(handles=handles, loc='outside lower center', ncols=across, **options)
  return figure, f'{caption} Marks at the upper edge stand for values above the axis.'


def _losses(points: Sequence[Judged]) -> tuple[float, float]:
  """-> the limits of the y axis, set by the stable runs."""
  late = [
    p.log.train.values[p.log.train.steps > FIRST * p.steps]
    for p in points
    if p.state in CALM and np.isfinite(p.log.train.values).any()
  ]
  finite = [x[np.isfinite(x)] for x in late or [p.log.train.values for p in points]]
  finite = [x for x in finite if len(x)]
  if not finite:
    return 0.0, 1.0
  low = min(float(x.min()) for x in finite)
  # A spike may rise above the axis: its triangle then stands at the edge.
  high = max(float(np.quantile(x, 0.995)) for x in finite)
  pad = 0.06 * max(high - low, 0.02 * abs(low))
  return low - pad, high + 2 * pad


def _steps(ax: Any) -> None:
  nice = ticker.MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10])
  ax.xaxis.set_major_locator(nice)
  ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  ax.set_xlabel('step')


def _strand(ax: Any, curve: Curve, color: Any, dash: Any = '-') -> None:
  """Draws a pale curve and its rolling median."""
  steps, values = curve.thinned(DRAWN)
  ax.plot(steps, values, color=color, lw=0.5, alpha=0.4, zorder=2)
  finite = np.isfinite(curve.values)
  size = len(curve.steps) // SMOOTH
  if size > 1:
    smooth = ndimage.median_filter(curve.values[finite], size, mode='nearest')
    steps, values = curve.steps[finite][:: size // 2], smooth[:: size // 2]
  ax.plot(steps, values, color=color, lw=0.9, ls=dash, zorder=3)


def _curve(ax: Any, p: Judged, color: Any, top: float) -> None:
  _strand(ax, p.log.train, color)
  mark = dict(color=color, ls='none', clip_on=False, zorder=4)
  if p.spikes:
    at = [s.step for s in p.spikes]
    values = np.nan_to_num(p.log.train.values, nan=np.inf)
    y = np.minimum(values[np.searchsorted(p.log.train.steps, at)], top)
    ax.plot(at, y, marker='v', ms=3.2, mec='black', mew=0.4, **mark)
  if p.diverged:
    last = np.median(p.log.train.values[-max(1, len(p.log.train.values) // SMOOTH) :])
    last = last if np.isfinite(last) else np.inf
    ax.plot([p.log.train.steps[-1]], [min(last, top)], marker='x', ms=5, mew=1.3, **mark)


def warnings(lines: list[Line]) -> Drawn:
  """Early warnings at the highest stable rate and the lowest diverged one."""
  rows = [(line, pair) for line in lines if any(pair := around(line))]
  names = [
    name
    for name in WATCHED
    if any(len(p.log.watched(name).steps) for _, ps in rows for p in ps if p)
  ]
  if not names:
    return None
  figure = Figure(figsize=(PAGE, 0.75 + 1.15 * len(rows)))
  options: dict[str, Any] = dict(sharex=True, sharey='col', squeeze=False)
  axes = figure.subplots(len(rows), len(names), **options)
  for row, (line, pair) in zip(axes, rows, strict=True):
    for ax, name in zip(row, names, strict=True):
      for p, (color, dash, _) in zip(pair, PAIR, strict=True):
        if p and len(p.log.watched(name).steps):
          steps, values = p.log.watched(name)
          shown = np.isfinite(values) & (values > 0)
          _strand(ax, Curve(steps[shown], values[shown]), color, dash)
      log_scale(ax)
      ax.tick_params(labelsize=6)
    rates = [rate(p.lr) if p else 'none' for p in pair]
    row[0].set_ylabel(f'{wrapped(line.name, 20)}\n{rates[0]} | {rates[1]}', size=7)
  for top, bottom, name in zip(axes[0], axes[-1], names, strict=True):
    low, high = top.get_ylim()  # Of the column.
    subs = (1, 2, 5) if high < 300 * low else (1,)
    for ax in axes[:, names.index(name)]:
      ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
    top.set_title(WATCHED[name], size=7)
    _steps(bottom)
  drawn = [any(pair[i] for _, pair in rows) for i in range(2)]
  handles = [
    Line2D([], [], color=c, ls=dash, label=text)
    for (c, dash, text), there in zip(PAIR, drawn, strict=True)
    if there
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=2)
  caption = 'Early warnings at the highest learning rate where every seed is stable, and '
  caption += 'the lowest where one diverged (beside the axis: both rates).'
  return figure, caption + ('' if drawn[1] else ' None diverged.')


PAIR = (
  (COLORS[0], '-', 'highest stable learning rate'),
  (COLORS[1], (0, (4, 1.5)), 'lowest diverged learning rate'),
)


def around(line: Line) -> tuple[Judged | None, Judged | None]:
  """A line -> its points at the highest stable and the lowest diverged rate, or None."""
  stable = [p for c in line.stable[-1:] for p in c.points if p.done]
  broken = [p for c in line.cells for p in c.diverged]
  return stable[0] if stable else None, broken[0] if broken else None
