"""The figures of a report: final loss by learning rate, LR sensitivity, and probes.

They are one column or one page wide, in the style of `gated.probes.style`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from gated import storage
from gated.probes import style
from gated.probes.style import GREY, look, wrapped
from gated.sweep.report import probed as probes
from gated.sweep.report.points import LOSSES, Line, rate
from gated.sweep.report.published import PROBES, Row

Drawn = tuple[Figure, str] | None  # A figure and its caption; None without data.
COLUMN, PAGE = 3.5, 5.5  # Widths in inches.
MANY = 10  # More lines need the width of a page for their names.
SHORT = 20  # Characters of a name that fits a page three times.
NARROW = 0.15  # If stable losses fill less than this of the axis, it shows only them.


def rate_axis(ax: Any, lrs: list[float]) -> None:
  """Makes the x axis logarithmic, with ticks at the learning rates."""
  ax.set_xscale('log')
  places = np.log(lrs)
  kept = lrs[:1]
  for lr, place in zip(lrs, places, strict=True):
    if place - np.log(kept[-1]) >= (places[-1] - places[0]) / 9:
      kept.append(lr)
  ax.set_xticks(kept, [*map(rate, kept)])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set_xlabel('peak learning rate')


def log_scale(ax: Any) -> None:
  """Makes the y axis logarithmic, with numbers such as 0.05 and 2e4."""
  text = lambda y: f'{y:g}' if y < 10_000 else f'{y:.0e}'.replace('e+0', 'e')
  ax.set_yscale('log')
  ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: text(y)))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def loss_against_rate(lines: list[Line]) -> Drawn:
  """Final loss over the learning rate; crosses are diverged runs."""
  lrs = sorted({p.lr for line in lines for p in line.points if p.done})
  if len(lrs) < 2:
    return None
  figure = Figure(figsize=(COLUMN, 2.6 + 0.16 * len(lines)))
  ax = figure.subplots()
  rate_axis(ax, lrs)
  low, top = _range(lines)
  ax.set_ylim(low, top)
  crossed = Counter()
  for i, line in enumerate(lines):
    color = look(i)['color']
    cells = [c for c in line.cells if c.finals]
    x, y = [c.lr for c in cells], [c.mean for c in cells]
    ax.plot(x, y, zorder=3, **look(i))
    if any(len(c.finals) > 1 for c in cells):
      least, most = [min(c.finals) for c in cells], [max(c.finals) for c in cells]
      ax.fill_between(x, least, most, color=color, alpha=0.2, lw=0)
    _crosses(ax, line, color, crossed, top)
  init_text = _init(ax, lines, top)
  handles = [
    Line2D([], [], label=wrapped(line.name, 46), **look(i))
    for i, line in enumerate(lines)
  ]
  diverged = any(p.diverged for line in lines for p in line.points)
  if diverged:
    handles.append(Line2D([], [], color=GREY, marker='x', ls='none', label='diverged'))
  columns = 2 if max(len(line.name) for line in lines) <= 20 else 1
  below: dict[str, Any] = dict(loc='outside lower center', ncols=columns)
  figure.legend(handles=handles, handlelength=3, **below)
  ax.set_ylabel(f'final {loss_name(lines)} (nats/token)')
  caption = f'Final {loss_name(lines)} against the peak learning rate. '
  if any(len(c.finals) > 1 for line in lines for c in line.cells):
    caption += 'Lines are means over the seeds that did not diverge, bands their range. '
  if all(len(c.points) == 1 for line in lines for c in line.cells):
    caption += 'One seed each: they claim no ordering. '
  if diverged:
    caption += 'Crosses: runs that diverged, at min(final loss, loss at initialisation), '
    caption += 'or at the upper edge where that lies above it. '
  caption += init_text
  return figure, caption.strip()


def loss_name(lines: Sequence[Line]) -> str:
  """'held-out loss': the kind of the final losses, the same for all points."""
  kinds = {p.final_of for line in lines for p in line.points if p.final_of}
  return LOSSES[kinds.pop()] if kinds else 'loss'


def _range(lines: list[Line]) -> tuple[float, float]:
  """-> the limits of the y axis, chosen so that stable losses fill much of it."""
  points = [p for line in lines for p in line.points if p.done]
  stable = [p.final for p in points if not p.diverged and p.final is not None]
  crosses = [p.capped for p in points if p.diverged and p.capped is not None]
  if not stable + crosses:
    return 0.0, 1.0
  low, high = min(stable or crosses), max(stable + crosses)
  most = max(stable, default=high)
  if most - low < NARROW * (high - low):
    high = most + 0.7 * max(most - low, 0.02 * abs(most))
    return low - 0.06 * (high - low), high
  # Include the loss at initialisation only if it is near the crosses.
  high = max([high, *(x for x in _inits(lines) if x < low + 1.5 * (high - low))])
  pad = 0.06 * max(high - low, 0.02 * abs(low))
  return low - pad, high + pad


def _inits(lines: list[Line]) -> list[float]:
  inits = [p.init for line in lines for p in line.points if p.init is not None]
  return [x for x in inits if np.isfinite(x)]


def _crosses(ax: Any, line: Line, color: str, before: Counter[float], top: float) -> None:
  """Draws diverged seeds side by side, and a dotted line from the last mean.

  `before` counts the earlier lines with crosses at each rate.
  """
  last = None
  for cell in line.cells:
    heights = [top if p.capped is None else min(p.capped, top) for p in cell.diverged]
    for j, y in enumerate(heights):
      # In points: seeds are side by side, and lines at the edge below each other.
      across = 4 * (j - (len(heights) - 1) / 2) + (2 * before[cell.lr] if y < top else 0)
      down = -5 * before[cell.lr] if y == top else 0
      shift = ScaledTranslation(across / 72, down / 72, ax.figure.dpi_scale_trans)
      look_of = dict(color=color, marker='x', ls='none', mew=1.3, ms=4.5, zorder=4)
      ax.plot([cell.lr], [y], transform=ax.transData + shift, clip_on=False, **look_of)
    before[cell.lr] += bool(heights)
    if heights and not cell.finals and last and last.finals:
      ends = [last.mean, float(np.mean(heights))]
      ax.plot([last.lr, cell.lr], ends, color=color, ls=':', lw=0.8)
    last = cell


def _init(ax: Any, lines: list[Line], top: float) -> str:
  """Draws the loss at initialisation if it is on the axis -> a caption."""
  inits = _inits(lines)
  if not inits:
    return ''
  mean = float(np.mean(inits))
  if mean <= top:
    ax.axhline(mean, color=GREY, ls=(0, (4, 3)), lw=0.8, zorder=1)
    text = dict(xy=(0, mean), xycoords=('axes fraction', 'data'), xytext=(3, -2))
    ax.annotate(
      'initial loss', **text, textcoords='offset points', va='top', color=GREY, size=6.5
    )
    return f'Dashed: the loss at initialisation, {mean:.2f}.'
  return f'The loss at initialisation, {mean:.2f}, lies above the axis.'


def sensitivity(lines: list[Line]) -> Drawn:
  """Bars of the mean LR sensitivity, with a stroke for each seed."""
  shown = [(i, x, x.sensitivities) for i, x in enumerate(lines) if x.sensitivities]
  if not shown:
    return None
  figure = Figure(figsize=(COLUMN, 0.75 + 0.34 * len(shown)))
  ax = figure.subplots()
  for y, (i, _, by_seed) in enumerate(shown):
    values = list(by_seed.values())
    mean, most = float(np.mean(values)), max(values)
    ax.barh(y, mean, height=0.62, color=look(i)['color'], alpha=0.85)
    if len(values) > 1:
      ax.plot([min(values), most], [y, y], color='black', lw=0.8)
      ax.plot(values, [y] * len(values), color='black', marker='|', ls='none', ms=6)
    beside: dict[str, Any] = dict(textcoords='offset points', va='center', size=7)
    ax.annotate(f'{mean:.3f}', (most, y), (4, 0), **beside)
  ax.set_yticks(range(len(shown)), [wrapped(line.name, 24) for _, line, _ in shown])
  ax.invert_yaxis()
  ax.grid(axis='y', visible=False)
  ax.margins(x=0.16)
  ax.set_xlim(left=0)
  ax.set_xlabel('LR sensitivity (nats/token)')
  seeds = ' Strokes are the seeds.' if any(len(f) > 1 for *_, f in shown) else ''
  if all(len(f) == 1 for *_, f in shown):
    seeds = ' One seed each: they claim no ordering.'
  if len({tuple(line.lrs) for _, line, _ in shown}) > 1:
    seeds += ' The learning rates differ by line: these bars are not comparable.'
  text = 'LR sensitivity: the mean over learning rates of min(final loss, loss at '
  return figure, f'{text}initialisation) minus the best final loss.{seeds}'


def probed(lines: list[Line], rows: Sequence[Row] = ()) -> Drawn:
  """First-token attention and M-Act against the mean gate score, as in Table 4.

  Marks are lines; `rows` are those of the paper, drawn in grey where it has the numbers.
  """
  shown = [(i, x) for i, x in enumerate(lines) if x in probes.lines_with(lines)]
  if not any(probes.value(x.best, probes.GATE) is not None for _, x in shown):
    return None
  figure = Figure(figsize=(PAGE, 2.4 + 0.15 * -(-len(shown) // 2)))
  axes = figure.subplots(1, 2)
  papers = {row.paper['row']: row.paper['published'] for row in rows}.values()
  caption = 'Mean over the seeds of the last probed step. Lines without a gate: '
  caption += 'horizontal lines, whose marks have no meaning along the axis.'
  bare = [i for i, x in shown if probes.value(x.best, probes.GATE) is None]
  correlated = False
  for ax, name in zip(axes, probes.AGAINST, strict=True):
    values = []
    for i, line in shown:
      x, y = probes.value(line.best, probes.GATE), probes.value(line.best, name)
      look_of = look(i) | {'ls': 'none', 'zorder': 3}
      if y is None:
        continue
      values.append(y)
      if x is None:
        ax.axhline(y, color=look_of['color'], lw=0.5)
        # Side by side, so that marks of equal levels can be told apart.
        place = (bare.index(i) + 0.5) / len(bare)
        ax.plot([place], [y], transform=ax.get_yaxis_transform(), **look_of)
      else:
        ax.plot([x], [y], **look_of)
    pairs = [_paper(paper, name) for paper in papers]
    for x, y in [(x, y) for x, y in pairs if x is not None and y is not None]:
      ax.plot([x], [y], marker='o', ms=4, mfc='none', mec=GREY, ls='none', zorder=2)
      values.append(y)
    if min(values) > 0 and max(values) > 10 * min(values):
      log_scale(ax)
      ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
    else:
      ax.set_ylim(0, 1.12 * max(values))
    ax.set(xlabel='mean gate score', ylabel=LABELS[name])
    ax.set_xlim(0, 1.05 * max(ax.dataLim.x1, 1e-9))
    texts = {'ours': probes.of_lines(lines, name), 'paper': probes.correlation(pairs)}
    words = [f'ρ {source} {rho}' for source, rho in texts.items() if rho]
    ax.set_title('\n'.join(words), size=7)
    correlated |= bool(words)
  handles = [_mark(i, line) for i, line in shown]
  if any(None not in _paper(paper, probes.AGAINST[0]) for paper in papers):
    label = "the paper's Table 4"
    circle: dict[str, Any] = dict(marker='o', ms=4, mfc='none', mec=GREY, ls='none')
    handles.append(Line2D([], [], label=label, **circle))
    caption += " Circles: the paper's models; scale and data differ from ours."
  options: dict[str, Any] = dict(loc='outside lower center', handlelength=2.5)
  figure.legend(
    handles=handles, ncols=legend_columns([x.name for _, x in shown]), **options
  )
  if correlated:
    caption += " ρ: Spearman's rank correlation over the gated lines."
  title = 'First-token attention and largest activation against the gate score.'
  return figure, f'{title} {caption}'


LABELS = {
  'first_token_attention': 'first-token attention (F-Attn)',
  'm_act': 'largest activation (M-Act)',
}


def legend_columns(names: Sequence[str]) -> int:
  """The columns of a legend as wide as a page."""
  return 3 if len(names) > MANY and max(map(len, names)) <= SHORT else 2


def _mark(i: int, line: Line) -> Line2D:
  bare = probes.value(line.best, probes.GATE) is None
  own: dict[str, Any] = look(i) | {'ls': '-' if bare else 'none', 'lw': 0.5}
  return Line2D([], [], label=wrapped(line.name, 30), **own)


def _paper(paper: Mapping[str, float], name: str) -> tuple[float | None, float | None]:
  """A row of the paper -> its gate score, and its value of a number of the probes."""
  columns = {ours: column for column, (ours, *_) in PROBES.items()}
  pair = [paper[c] if (c := columns[n]) in paper else None for n in (probes.GATE, name)]
  return pair[0], pair[1]


def draw(
  pictures: Mapping[str, Callable[[Any], Drawn]],
  shown: Any,
  folder: storage.Path,
  formats: tuple[str, ...] = (*style.FORMATS,),
) -> dict[str, str]:
  """Writes FOLDER/NAME.FORMAT for each figure that has data -> their captions.

  Each function of `pictures` draws `shown`, such as the lines of a report.
  """
  captions = {}
  with matplotlib.rc_context(style.STYLE):
    for name, picture in pictures.items():
      drawn = picture(shown)
      if not drawn:
        continue
      figure, captions[name] = drawn
      style.save(figure, folder, name, formats)
  return captions
