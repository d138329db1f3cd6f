"""Figures of the probes, for one run or several side by side.

Reports are given by label: {'gate': report, 'baseline': report}, each as `Loaded.probe`
returns it or as eval.py writes it. The figures are as wide as a column. Values of the
paper (arXiv 2505.06708) are those of its Table 4: means over the layers of a 15B MoE.

L layers  H heads  T tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, ticker
from matplotlib.figure import Figure

from gated.probes import outputs, style
from gated.probes.page import shown

# First-token attention (F-Attn) and largest activation (M-Act).
PAPER = {'baseline': (0.467, 1053), 'elementwise gate': (0.048, 94)}
MEANS = {'elementwise': 0.116, 'value': 0.221, 'head-shared': 0.271}  # mean gate scores
# The text of the authors' demo. It shows layers 1, 7, 21 and 28 of 28.
PROMPT = 'Sparse gating mechanism mitigates attention sink.'
SHOWN = (0, 6 / 27, 20 / 27, 1)
NAMED = 16  # Maximum tokens of a map whose axes show the tokens' texts.
ACROSS = 8  # Heads in a row of a figure.

NORM = colors.PowerNorm(1 / 3, 0, 1)  # Shows both uniform attention and a sink.

Reports = Mapping[str, Mapping[str, Any]]


def layers_of(depth: int) -> list[int]:
  """The layers whose maps are drawn, spread as in the authors' demo."""
  return sorted({round(place * (depth - 1)) for place in SHOWN})


@style.styled
def sinks(reports: Reports) -> Figure:
  """First-token attention and the largest activation (M-Act) of each layer."""
  first, largest = (_by_layer(reports, n) for n in ('first_token_attention', 'm_act'))
  uniform = _by_layer(reports, 'first_token_uniform').values()
  figure = Figure(figsize=(style.WIDTH, 4.1 + 0.14 * len(reports)))
  above, below = axes = figure.subplots(2, sharex=True)
  for panel, (ax, lines) in enumerate(zip(axes, (first, largest), strict=True)):
    for i, line in enumerate(lines.values()):
      ax.plot(range(len(line)), line, zorder=3, **style.look(i))
    for i, values in enumerate(PAPER.values()):
      ax.axhline(values[panel], color=style.GREY, ls=style.DASHES[1 + 2 * i], lw=0.8)
    ax.set_yscale('log')
    ax.margins(y=0.12)
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{y:g}'))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
  for line in {tuple(line) for line in uniform}:
    above.plot(range(len(line)), line, color='black', ls=':', lw=1)
  above.set_ylabel('first-token attention')
  below.set_ylabel('largest activation')
  _layer_axis(below)
  more = [style.entry('uniform attention', color='black', ls=':', lw=1)]
  for i, (name, values) in enumerate(PAPER.items()):
    label = f'paper, {name}: {values[0]} and {values[1]}'
    more.append(style.entry(label, color=style.GREY, ls=style.DASHES[1 + 2 * i], lw=0.8))
  style.legend(figure, dict(enumerate(reports)), more)
  return figure


@style.styled
def gates(reports: Reports) -> Figure:
  """The histogram of all gate scores of each run, with their mean."""
  runs, handles = _histograms(reports), []
  figure = Figure(figsize=(style.WIDTH, 2.7 + 0.14 * len(runs)))
  ax = figure.subplots()
  for i, label, histogram, mean in runs:
    _histogram(ax, histogram['value'], histogram['edges'], mean['value'], i)
    name = f'{style.wrapped(label, 40)}: mean {mean["value"]:.3f}'
    handles.append(style.entry(name, color=style.COLORS[i % len(style.COLORS)]))
  for i, (name, value) in enumerate(MEANS.items()):
    mark: Any = dict(
      color=style.GREY, mfc='white', ls='none', marker=style.MARKERS[i + 2]
    )
    place: Any = dict(transform=ax.get_xaxis_transform(), clip_on=False)
    ax.plot([value], [1], **mark, **place)
    handles.append(style.entry(f'paper, {name}: mean {value}', **mark))
  ax.set(xlabel='gate score', ylabel='density', ylim=(0, None))
  figure.legend(handles=handles, loc='outside lower center', ncols=1)
  return figure


@style.styled
def gates_by_layer(reports: Reports) -> Figure:
  """The histogram of each layer's gate scores, with their mean."""
  runs = _histograms(reports)
  depth = max(len(histogram['layers']) for *_, histogram, _ in runs)
  across = min(4, depth)
  down = -(-depth // across)
  figure = Figure(figsize=(style.WIDTH, 0.9 + 0.75 * down + 0.14 * len(runs)))
  axes = figure.subplots(down, across, sharex=True, squeeze=False)
  for layer, ax in enumerate(axes.flat):
    ax.set_visible(layer < depth)
    ax.tick_params(labelbottom=layer + across >= depth)
    ax.set_title(f'layer {layer}', size=6, pad=2)
    for line, (i, _, histogram, mean) in enumerate(runs):
      number = mean['layers'][layer] if layer < len(mean['layers']) else None
      if number is not None and np.isfinite(number):  # The layer has the gate.
        _histogram(ax, histogram['layers'][layer], histogram['edges'], number, i)
        place: Any = dict(ha='right', va='top', transform=ax.transAxes, zorder=5)
        place |= dict(bbox=dict(fc='white', ec='none', pad=0.3))
        color = style.COLORS[i % len(style.COLORS)]
        ax.text(1, 0.98 - 0.17 * line, f'{number:.2f}', size=6, color=color, **place)
    ax.set(yticks=[], ylim=(0, None))
  figure.supxlabel('gate score', size=8)
  figure.supylabel('density', size=8)
  labels = {i: label for i, label, *_ in runs}
  style.legend(figure, labels, markers=False, place='upper')
  return figure


@style.styled
def sparsity(reports: Reports) -> Figure:
  """The share of small SDPA outputs: before the gate, after it, times its mean score."""
  kinds = {
    'before the gate': '_before',
    'after the gate': '',
    'scaled by its mean': '_scaled',
  }
  single, drawn = len(style.nonempty(reports)) == 1, set()
  figure = Figure(figsize=(style.WIDTH, 3.8 + 0.14 * len(reports)))
  axes = figure.subplots(2, sharex=True)
  for ax, limit in zip(axes, outputs.SMALL, strict=True):
    key = f'output_below_{limit:.0e}'.replace('e-0', 'e-')
    shares = [_by_layer(reports, key + suffix) for suffix in kinds.values()]
    for run, label in enumerate(reports):
      lines = [share[label] for share in shares]
      # Without a gate after SDPA all three are the same.
      same = all(np.array_equal(line, lines[0]) for line in lines)
      for kind, line in enumerate(lines[:1] if same else lines):
        opts = style.look(kind) | {
          'color': style.COLORS[(kind if single else run) % len(style.COLORS)]
        }
        ax.plot(range(len(line)), line, clip_on=False, **opts)
        drawn.add(kind)
    ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{100 * y:g}%'))
    ax.set_ylim(0, None)
    ax.set_ylabel(f'|SDPA output| < {limit:g}')
  _layer_axis(axes[-1])
  handles = [
    style.entry(name, **style.look(i) | ({} if single else {'color': style.GREY}))
    for i, name in enumerate(kinds)
    if i in drawn
  ]
  labels = {} if single else dict(enumerate(reports))
  style.legend(figure, labels, handles, markers=False)
  return figure


@style.styled
def attention(
  maps: Mapping[str, np.ndarray], tokens: Sequence[str] = (), layers: Sequence[int] = ()
) -> Figure:
  """Attention maps {label: (L, H, T, T)}, mean over heads, at four layers.

  Several runs are drawn side by side. The title of a map has the mean weight of the first
  token over all queries but the first. `tokens` are the texts of the tokens; `layers`
  replaces the four layers.
  """
  runs = [
    (label, _checked(label, x, layers)) for label, x in style.nonempty(maps).items()
  ]
  columns = runs
  if len(runs) == 1:  # Two columns of layers.
    [(_, rows)] = runs
    columns = [('', part) for part in (rows[0::2], rows[1::2]) if part]
  down, across = max(len(rows) for _, rows in columns), len(columns)
  size = min(1.5, 3.0 / across)
  figure = Figure(figsize=(max(style.WIDTH, size * across), 0.75 + (size + 0.16) * down))
  axes = figure.subplots(down, across, squeeze=False)
  for x, (label, rows) in enumerate(columns):
    for ax in axes[len(rows) :, x]:
      ax.set_visible(False)
    for y, (ax, (layer, weight)) in enumerate(zip(axes[:, x], rows)):
      mean = weight.mean(0)
      _map(ax, mean, tokens, left=x == 0, bottom=y == len(rows) - 1)
      title = f'layer {layer}: first {_to_first(mean):.2f}'
      title = f'{style.wrapped(label, 24)}\n{title}' if label and not y else title
      ax.set_title(title, size=6.5, pad=3)
  _color_bar(figure, axes)
  return figure


@style.styled
def attention_heads(
  weight: np.ndarray, tokens: Sequence[str] = (), layers: Sequence[int] = ()
) -> Figure:
  """The attention maps (L, H, T, T) of every head of one run, at four layers."""
  rows = _checked('maps', weight, layers)
  heads = weight.shape[1]
  across = min(heads, ACROSS)
  lines = -(-heads // across)
  size = (style.WIDTH - 0.4) / across
  figure = Figure(figsize=(style.WIDTH, 0.8 + (size + 0.16) * lines * len(rows)))
  axes = figure.subplots(lines * len(rows), across, squeeze=False)
  for i, (layer, weight) in enumerate(rows):
    panels = axes[i * lines : (i + 1) * lines].flat
    for head, ax in enumerate(panels):
      ax.set_visible(head < heads)
      if head < heads:
        _map(ax, weight[head], (), left=False, bottom=False)
        ax.set_title(f'{_to_first(weight[head]):.2f}', size=5.5, pad=1.5)
    panels[0].set_ylabel(f'layer {layer}', size=6.5)
  label = "attention weight\n(above each head's map: the first token's mean weight)"
  _color_bar(figure, axes, label)
  return figure


def _by_layer(reports: Reports, name: str) -> dict[str, np.ndarray]:
  """The name of a number -> its values by layer, for each label."""
  numbers = style.values(reports, name)
  return {k: np.asarray(number['layers'], float) for k, number in numbers.items()}


def _histograms(reports: Reports) -> list[Any]:
  """-> index, label, histogram and mean of each run with a gate; ValueError if none."""
  runs = []
  for i, (label, report) in enumerate(style.nonempty(reports).items()):
    histogram, mean = (
      style.value(label, report, f'gate_{n}') for n in ('histogram', 'mean')
    )
    if histogram['value'] is not None:
      runs.append((i, label, histogram, mean))
  if not runs:
    raise ValueError(f'no gates to draw: {", ".join(reports)} have none')
  return runs


def _histogram(ax: Any, counts: Any, edges: Any, mean: float, index: int) -> None:
  color = style.COLORS[index % len(style.COLORS)]
  counts, edges = np.asarray(counts, float), np.asarray(edges, float)
  density = counts / counts.sum() / np.diff(edges)
  ax.stairs(density, edges, color=color, lw=0.9, zorder=3)
  ax.stairs(density, edges, color=color, alpha=0.25, fill=True, lw=0)
  ax.axvline(mean, color=color, ls=style.DASHES[1 + index % 4], lw=0.9, zorder=4)


def _layer_axis(ax: Any) -> None:
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  ax.set_xlabel('layer')


def _checked(
  label: str, weight: np.ndarray, layers: Sequence[int]
) -> list[tuple[int, np.ndarray]]:
  """Maps (L, H, T, T) -> the layers to draw, each with its map."""
  weight = np.asarray(weight)
  if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not weight.size:
    raise ValueError(f'{label}: maps of shape {weight.shape}, but (L, H, T, T) is needed')
  depth = len(weight)
  if wrong := [layer for layer in layers if not 0 <= layer < depth]:
    raise ValueError(f'layers={wrong}, but {label} has the layers 0 to {depth - 1}')
  return [(layer, weight[layer]) for layer in layers or layers_of(depth)]


def _to_first(weight_TT: np.ndarray) -> float:
  """The mean weight of the first token, without query 0, which sees only itself."""
  return float(weight_TT[1:, 0].mean()) if len(weight_TT) > 1 else 1.0


def _map(ax: Any, weight_TT, tokens: Sequence[str], *, left: bool, bottom: bool) -> None:
  """Draws one map; keys that a query does not see are white."""
  length = len(weight_TT)
  seen = np.tri(length, dtype=bool)
  ax.imshow(np.where(seen, weight_TT, np.nan), cmap='viridis', norm=NORM)
  ax.grid(visible=False)
  places = range(length) if len(tokens) == length <= NAMED else (0, length - 1)
  names = [shown(tokens[i]) for i in places] if len(places) == len(tokens) else places
  turn = 90 if len(places) == len(tokens) else 0
  ax.set_xticks(
    places if bottom else [], names if bottom else [], size=5.5, rotation=turn
  )
  ax.set_yticks(places if left else [], names if left else [], size=5.5)
  ax.tick_params(length=2, pad=1)


def _color_bar(figure: Figure, axes: np.ndarray, label: str = 'attention weight') -> None:
  image = axes[0, 0].images[0]
  options: dict[str, Any] = dict(location='bottom', aspect=40, pad=0.02, fraction=0.05)
  bar = figure.colorbar(image, ax=axes, label=label, **options)
  bar.set_ticks([0, 0.01, 0.1, 0.3, 0.6, 1], labels=['0', '.01', '.1', '.3', '.6', '1'])
