"""The results of an experiment as one table and one figure.

docs/results/NAME.csv   a row for each point
docs/results/NAME.svg   loss, sinks and activations while training; if nothing was probed
                        there, the final losses, by learning rate where several rates
                        share a weight decay, else by arm; and .png

At other scales than gpu they are experiments/NAME/results/SCALE.csv and .svg. In the
table `f_attn` is by document where documents are masked, and `probed_rows` is 0 where the
probes are those of the last training step.
"""

import csv
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated import storage
from gated.evidence import measures, result
from gated.evidence.arms import split
from gated.evidence.result import Result

NUMBERS = {
  'heldout_loss': measures.LOSS,
  'spikes_per_1000_steps': measures.SPIKES,
  'f_attn': measures.F_ATTN,
  'sink_64': measures.SINK,
  'm_act': measures.M_ACT,
  'm_act_max': measures.M_ACT_MAX,
  'kurtosis': measures.KURTOSIS,
  'gate_mean': measures.GATE,
  'gate_below_0.1': measures.GATE_SMALL,
}
DIGITS = 5


class Panel(NamedTuple):
  """One curve of each result, over training tokens."""

  title: str
  kind: str  # of the records: probes or heldout
  # A result -> the name of the curve's values, or the two names of a quotient.
  names: Callable[[Result], Sequence[str]]
  line: float | None = None  # a threshold
  log: bool = False


PANELS = (
  Panel('Sink64', 'probes', lambda r: ['sink_rate_64'], measures.SINK_RATE),
  Panel(
    'F-Attn, queries from 64 on',
    'probes',
    lambda r: [measures.first_token(r)],
    measures.FIRST_TOKEN,
  ),
  Panel(
    'largest |h| over the median',
    'probes',
    lambda r: ['m_act_max', 'm_act_median'],
    measures.MASSIVE,
    log=True,
  ),
  Panel('held-out loss (nats per token)', 'heldout', lambda r: ['loss']),
)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Results -> the rows of the table."""
  labels = list(dict.fromkeys(name for r in results for name in r.labels))
  return [
    {name: r.labels.get(name, '') for name in labels}
    | {'seed': r.config['seed'], 'state': r.state, 'steps': r.steps, 'tokens': r.tokens}
    | {'parameters': r.parameters}
    | {name: f'{number.of(r):.{DIGITS}g}' for name, number in NUMBERS.items()}
    | {'probed_rows': r.probes.get('rows', 0)}
    | {'tokens_per_second': f'{r.tokens_per_second:.0f}', 'machine': r.machine}
    for r in results
  ]


def write(
  root: storage.Path, experiment: str, scale: str, others: Sequence[Result] = ()
) -> storage.Path:
  """Writes the table and the figure of an experiment's results -> the table's path.

  A figure by learning rate also shows the results of `others` in the same setting.
  ValueError if the experiment has no results. Needs matplotlib.
  """
  results = result.read_all(root, experiment, scale)
  if not results:
    raise ValueError(f'experiments/{experiment} has no results at scale={scale}')
  table, text = rows(results), io.StringIO()
  writer = csv.DictWriter(text, table[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(table)
  folder, name = result.folder(root, experiment, scale).parent, scale
  if scale == 'gpu':
    folder, name = root / 'docs/results', experiment
  storage.write(folder / f'{name}.csv', text.getvalue().encode())
  from gated.probes import style  # matplotlib is in requirements-report.txt.

  style.save(figure(results, others), folder, name, ('svg', 'png'))
  return folder / f'{name}.csv'


def figure(results: Sequence[Result], others: Sequence[Result] = ()) -> Any:
  """Results -> the figure that suits them; see the top of this file."""
  if any('probes' in r.curves for r in results):
    return training_curves(results)
  rates: dict[str, set[str]] = {}
  for r in results:
    rates.setdefault(r.labels.get('decay', ''), set()).add(r.labels.get('lr', ''))
  decay = max(rates, key=lambda decay: len(rates[decay]))
  if len(rates[decay]) == 1:
    return final_losses(results)
  own = [_model(r) for r in results]
  alike = [r for r in others if _model(r) in own]
  return losses_by_rate([r for r in (*alike, *results) if r.labels.get('decay') == decay])


def _model(r: Result) -> tuple[Any, ...]:
  """What a result shares with its other seeds and cells: setting, arm, and data."""
  return *split(r.config), r.data


def _varying(results: Sequence[Result]) -> list[str]:
  """The labels that differ between results, except the seed."""
  labels = dict.fromkeys(label for r in results for label in r.labels)
  return [n for n in labels if n != 'seed' and len({r.labels[n] for r in results}) > 1]


def _arm(r: Result) -> str:
  return r.labels.get('arm', '')


def final_losses(results: Sequence[Result]) -> Any:
  """Results -> a figure of their held-out losses, a row for each arm, best arm first.

  Seeds of a cell have one mark, diverged runs none. The dotted line is the mean of the
  baseline's best cell.
  """
  from matplotlib.figure import Figure

  from gated.probes import style

  settings = [n for n in _varying(results) if n != 'arm']
  cells: dict[tuple, dict[str, list[float]]] = {}
  for r in results:
    cell = cells.setdefault(tuple(r.labels[n] for n in settings), {})
    cell.setdefault(_arm(r), []).append(r.loss)
  best: dict[str, float] = {}
  for cell in cells.values():
    for arm, own in cell.items():
      best[arm] = min(best.get(arm, np.inf), float(np.mean(own)))
  arms = sorted(best, key=lambda arm: best[arm])

  @style.styled
  def draw() -> Any:
    drawing = Figure(figsize=(5.0, 1.0 + 0.22 * len(arms)))
    ax = drawing.subplots()
    for i, (cell, own) in enumerate(cells.items()):
      points = [(x, arms.index(arm)) for arm, values in own.items() for x in values]
      label = ', '.join(_named(n, value) for n, value in zip(settings, cell))
      look: dict[str, Any] = style.look(i) | {'ls': '', 'alpha': 0.8}
      ax.plot(*zip(*points), label=label, **look)
    if np.isfinite(best.get('baseline', np.inf)):
      ax.axvline(best['baseline'], color=style.GREY, lw=0.8, ls=':')
    ax.set_yticks(range(len(arms)), arms)
    ax.invert_yaxis()
    ax.set_xlabel('held-out loss (nats per token)')
    if settings:
      drawing.legend(loc='outside lower center', ncols=len(cells))
    return drawing

  return draw()


def losses_by_rate(results: Sequence[Result]) -> Any:
  """Results -> a figure of their held-out losses by learning rate, a line for each arm.

  Lines are means over seeds. A seed has a mark; a diverged run has a cross at the top.
  """
  from matplotlib.figure import Figure

  from gated.probes import style
  from gated.sweep.report.figures import rate_axis

  by_arm: dict[str, dict[tuple[float, str], float]] = {}
  for r in results:
    run = float(r.labels['lr']), r.labels['seed']
    by_arm.setdefault(_arm(r), {})[run] = r.loss if r.finished else np.nan

  @style.styled
  def draw() -> Any:
    drawing = Figure(figsize=(3.5, 2.8))
    ax = drawing.subplots()
    for i, (arm, runs) in enumerate(by_arm.items()):
      line: dict[str, Any] = style.look(i) | {'marker': ''}
      marks: dict[str, Any] = style.look(i) | {'ls': '', 'alpha': 0.8}
      rates = np.array([rate for rate, _ in runs])
      losses = np.array([*runs.values()])
      ended = np.isfinite(losses)
      places = np.unique(rates[ended])
      means = [losses[ended & (rates == rate)].mean() for rate in places]
      ax.plot(places, means, label=arm, **line)
      ax.plot(rates[ended], losses[ended], **marks)
      top = {'marker': 'x', 'transform': ax.get_xaxis_transform()}
      crosses: dict[str, Any] = marks | top
      ax.plot(rates[~ended], np.full(sum(~ended), 0.97), **crosses)
    rate_axis(ax, sorted({rate for runs in by_arm.values() for rate, _ in runs}))
    ax.set_ylabel('held-out loss (nats per token)')
    drawing.legend(loc='outside lower center', ncols=3)
    return drawing

  return draw()


def training_curves(results: Sequence[Result]) -> Any:
  """Results -> a figure of the training loss and of PANELS, a line for each result.

  Lines of an arm share their colour; those that differ only in the seed look the same.
  """
  from matplotlib.figure import Figure

  from gated.probes import style
  from gated.sweep.report.figures import log_scale

  varying = _varying(results)
  setting_of = lambda r: tuple(r.labels[n] for n in varying if n != 'arm')
  arms, settings = (list(dict.fromkeys(map(of, results))) for of in (_arm, setting_of))

  def look(r: Result) -> dict[str, Any]:
    dash = style.DASHES[settings.index(setting_of(r)) % len(style.DASHES)]
    return style.look(arms.index(_arm(r))) | {'ls': dash}

  def curve(ax: Any, r: Result, kind: str, names: Sequence[str], **options: Any) -> None:
    curves = r.curves.get(kind, {})
    if all(name in curves for name in names):
      tokens = np.array(curves['step']) * (r.tokens / r.steps)
      values = functools.reduce(np.divide, [np.array(curves[n]) for n in names])
      label = ', '.join(_named(n, r.labels[n]) for n in varying)
      ax.plot(tokens / 1e6, values, label=label, **look(r) | options)

  @style.styled
  def draw() -> Any:
    drawing = Figure(figsize=(6.8, 6.6))
    places = drawing.subplot_mosaic('AA;BC;DE')
    for ax, panel in zip(list(places.values())[1:], PANELS, strict=True):
      for r in results:
        curve(ax, r, panel.kind, panel.names(r), markevery=0.2)
      if panel.line is not None:
        ax.axhline(panel.line, color=style.GREY, lw=0.8, ls=':')
      ax.set_title(panel.title)
      if panel.log:
        log_scale(ax)
    top = places['A']
    for r in results:
      curve(top, r, 'train', ['loss'], marker='', lw=0.8)
    top.set_title('training loss (nats per token)')
    for ax in drawing.axes:
      ax.set_xlabel('training tokens (millions)')
    handles, names = drawing.axes[1].get_legend_handles_labels()
    shown = dict(zip(names, handles))
    options: dict[str, Any] = {'loc': 'outside lower center', 'handlelength': 5}
    drawing.legend(shown.values(), shown, ncols=2, **options)
    return drawing

  return draw()


def _named(label: str, value: str) -> str:
  return value if label in ('arm', 'condition') else f'{label} {value}'
