"""Figures of evaluations, for one model or several side by side.

Reports are given by label: {'gate': report, 'baseline': report}, each as eval.py writes
it. The i-th label has the same colour and marker in every figure.

P positions
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from gated.probes import style

CURVE = 'nats_per_token', 'tokens'
COLUMNS = 4  # Panels in a row of a figure.

Reports = Mapping[str, Mapping[str, Any]]


@style.styled
def positions(curves: Reports) -> Figure:
  """Held-out loss by the tokens of context: {label: 'positions' of eval.py's report}.

  Each point is the mean over the targets in a quarter of an octave of positions.
  """
  figure = Figure(figsize=(style.WIDTH, 2.3 + 0.14 * len(curves)))
  ax, places = figure.subplots(), set()
  for i, (label, curve) in enumerate(style.nonempty(curves).items()):
    ax.plot(
      *_octaves(*(style.value(label, curve, key) for key in CURVE)), **style.look(i)
    )
    places.add(str(style.value(label, curve, 'position_in')))
  ax.set_xscale('log', base=2)
  ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:.0f}'))
  place = ' or '.join(sorted(places))
  ax.set(xlabel=f'tokens of context in the {place}', ylabel='nats per token')
  style.legend(figure, dict(enumerate(curves)))
  return figure


@style.styled
def by_domain(reports: Reports) -> Figure:
  """Held-out loss of each domain: {label: eval.py's report}. Bars are standard errors."""
  domains = style.values(reports, 'domains')
  names = [*dict.fromkeys(name for each in domains.values() for name in each)]
  figure = Figure(figsize=(style.WIDTH, 0.9 + (0.25 + 0.13 * len(reports)) * len(names)))
  ax = figure.subplots()
  step = 0.6 / len(domains)
  for i, (label, each) in enumerate(domains.items()):
    y = np.array([names.index(name) for name in each]) + step * (i - len(domains) / 2)
    nats, error = (  # None becomes NaN: without rows, or the error of a single row.
      np.array(
        [style.value(label, x, f'nats_per_token{end}') for x in each.values()], float
      )
      for end in ('', '_stderr')
    )
    marks: dict[str, Any] = style.look(i) | {'ls': ''}
    ax.errorbar(nats, y + step / 2, xerr=error, elinewidth=0.8, **marks)
  ax.set_yticks(range(len(names)), names)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.set_xlabel('nats per token')
  style.legend(figure, dict(enumerate(reports)))
  return figure


@style.styled
def ruler(reports: Reports, name: str) -> Figure:
  """RULER by length, a panel a task: {label: a model's part of eval.py --ruler's report}.

  `name` is loss, of the reference answer, or score. Bars are standard errors. A length
  that a model is not prepared for has no point.
  """
  lengths = style.values(reports, 'lengths')
  known = [each for by_length in lengths.values() for each in by_length.values() if each]
  tasks = [*dict.fromkeys(['mean', *(task for each in known for task in each)])]
  rows = -(-len(tasks) // COLUMNS)
  size = (2 * style.WIDTH, 1.25 * rows + 0.45 + 0.14 * len(reports))
  figure = Figure(figsize=size)
  panels = [*figure.subplots(rows, COLUMNS, sharex=True, squeeze=False).flat]
  for ax, task in zip(panels, tasks):
    for i, (label, by_length) in enumerate(lengths.items()):
      points = [(int(length), each[task]) for length, each in by_length.items() if each]
      error = [point.get(f'{name}_stderr') for _, point in points]  # A mean has none.
      ax.errorbar(
        [length for length, _ in points],
        np.array([style.value(label, point, name) for _, point in points], float),
        yerr=np.array(error, float),
        elinewidth=0.8,
        **style.look(i),
      )
    ax.set_title(task)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:.0f}'))
    ax.tick_params('x', rotation=45)
  for ax in panels[max(0, len(tasks) - COLUMNS) : len(tasks)]:
    ax.tick_params('x', labelbottom=True)  # The lowest of its column.
  for ax in panels[len(tasks) :]:
    ax.set_visible(False)
  figure.supxlabel('tokens of prompt and answer', fontsize=8)
  figure.supylabel({'loss': 'nats per token of the answer'}.get(name, name), fontsize=8)
  style.legend(figure, dict(enumerate(reports)), place='upper')
  return figure


def _octaves(nats: Any, tokens: Any) -> tuple[np.ndarray, ...]:
  """Losses by position -> mean context and loss in each quarter of an octave."""
  nats_P, tokens_P = np.nan_to_num(np.array(nats, float)), np.array(tokens)
  context_P = 1.0 + np.arange(len(nats_P))
  bin_P = np.floor(4 * np.log2(context_P)).astype(int)
  sums = tokens_P, tokens_P * context_P, tokens_P * nats_P
  tokens, context, nats = (np.bincount(bin_P, x) for x in sums)
  return tuple(x[tokens > 0] / tokens[tokens > 0] for x in (context, nats))
