"""Tables, as CSV with full precision, and as Markdown."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated.probes.report import SCALARS
from gated.sweep.report import evaluations
from gated.sweep.report.points import Cell, Judged, Line, rate
from gated.sweep.report.results import Result

KEPT = 300  # Points of a curve in curves.csv.
# Cells that are aligned right.
NUMBER = re.compile(
  r'(|–|(diverged )?\d+ of \d+|diverged|\d+ pairs'
  r'|[+-]?[\d.,]+(e-?\d+)?[kMGTB]?( ± [\d.]+| \(\+[\d.inf]+\))?)'
)
# Probes that the main table has too -> their headings and formats.
SINKS = {
  'first_token_attention': ('F-Attn', '.4f'),
  'sink_rate': ('sink rate', '.3f'),
  'm_act': ('M-Act', '.4g'),
}
# Characters that Markdown would interpret.
MARKUP = re.compile(r'[\\`*\[\]<>|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])')


class Table(NamedTuple):
  """Column names and rows of cells, as CSV or Markdown."""

  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]

  def csv(self) -> bytes:
    """CSV with floats to the last bit; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([self.columns, *self.rows])
    return out.getvalue().encode()

  def markdown(self) -> str:
    """Markdown; columns of numbers are aligned right."""
    cells = [[plain(_shown(cell)) for cell in row] for row in self.rows]
    number = lambda column: any(column) and all(map(NUMBER.fullmatch, column))
    right = [number(column) for column in zip(*cells)]
    rule = ['---:' if r else '---' for r in right] or ['---'] * len(self.columns)
    head = [plain(name) for name in self.columns]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (head, rule, *cells))


def plain(text: str) -> str:
  """Any text -> Markdown that shows it literally, on one line."""
  return MARKUP.sub(lambda m: '\\' + m.group(), ' '.join(text.split()))


def _shown(cell: Any) -> str:
  if cell is None:
    return '–'
  return f'{cell:.4f}' if isinstance(cell, float) else str(cell)


def _from(rows: Sequence[dict[str, Any]]) -> Table:
  """Rows as mappings -> Table; a missing cell is None."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  return Table(columns, [[row.get(name) for name in columns] for row in rows])


def of_points(points: Sequence[Judged]) -> Table:
  """A row for each point."""
  labels = dict.fromkeys(name for p in points for name in p.point.labels)
  rows = []
  for p in points:
    losses = p.log.train.values[np.isfinite(p.log.train.values)]
    row: dict[str, Any] = {'point': p.name, **labels, **p.point.labels}
    row |= {'line': p.line, 'state': p.state, 'step': p.log.step, 'steps': p.steps}
    row |= {'learning_rate': p.lr, 'train_seed': p.seed}
    row |= {'parameters': p.parameters, 'flops_per_token': p.flops}
    row |= {'final_loss': p.final, 'final_loss_of': p.final_of}
    row |= {'best_loss': losses.min() if len(losses) else None, 'loss_at_init': p.init}
    row |= {'spikes': len(p.spikes), 'max_spike': p.height, 'spike_limit': p.limit}
    row |= {'spikes_noted': p.log.noted, 'diverged_because': p.reason}
    row |= {'warnings': warned(p), 'seconds': p.log.seconds}
    row |= {'tokens_per_second': p.log.rate, 'device': p.log.device}
    probed = {name: p.log.curves[f'probes/{name}'].last for name in SCALARS}
    row |= {f'probe_{name}': x for name, x in probed.items() if x is not None}
    rows.append(row | dict(p.log.warnings))
  return _from(rows)


def warned(p: Judged) -> str:
  """'attention_logit from step 120, grad_norm from step 300': its early warnings."""
  return ', '.join(f'{name} from step {step}' for name, step in p.alarms.items())


def of_curves(points: Sequence[Judged]) -> Table:
  """Training losses to six digits, thinned."""
  labels = dict.fromkeys(name for p in points for name in p.point.labels)
  rows = [
    [p.name, *map(p.point.labels.get, labels), int(step), float(f'{loss:.6g}')]
    for p in points
    for step, loss in zip(*p.log.train.thinned(KEPT), strict=True)
  ]
  return Table(['point', *labels, 'step', 'loss'], rows)


def of_evaluations(points: Sequence[Judged]) -> Table:
  """A row for each number that eval.py measured of a point."""
  rows = [
    [p.name, p.line, p.lr, p.seed, *number] for p in points for number in p.evaluations
  ]
  columns = ['point', 'line', 'learning_rate', 'train_seed']
  return Table([*columns, *evaluations.Number._fields], rows)


def of_summary(lines: Sequence[Line]) -> Table:
  """A row for each line and learning rate, over its seeds."""
  rows = []
  for line in lines:
    for c in line.cells:
      row: dict[str, Any] = {'line': line.name, 'learning_rate': c.lr}
      row |= {'mean': c.mean if c.finals else None}
      row |= {'std': c.spread.std if len(c.finals) > 1 else None, 'n': len(c.finals)}
      row |= {'least': min(c.finals, default=None)}
      row |= {'largest': max(c.finals, default=None), 'diverged': len(c.diverged)}
      row |= {'not_done': sum(not p.done for p in c.points)}
      row |= {'spikes': sum(len(p.spikes) for p in c.points)}
      rows.append(row | {'max_spike': max(p.height for p in c.points)})
  return _from(rows)


def of_sensitivity(lines: Sequence[Line]) -> Table:
  """A row for each line and seed, and one for the mean of each line."""
  columns = ['line', 'seed', 'sensitivity', 'std', 'n', 'lowest_rate', 'highest_rate']
  rows = []
  for line in lines:
    ends = line.lrs[0], line.lrs[-1]
    rows += [[line.name, s, x, None, 1, *ends] for s, x in line.sensitivities.items()]
    if values := [*line.sensitivities.values()]:
      std = float(np.std(values, ddof=1)) if len(values) > 1 else None
      rows.append([line.name, 'mean', float(np.mean(values)), std, len(values), *ends])
  return Table(columns, rows)


def of_results(results: Sequence[Result]) -> Table:
  """A row for each line of the main table, with full precision."""
  rows = []
  for r in results:
    row: dict[str, Any] = {'line': r.line.name, 'parameters': r.parameters}
    row |= {'added': r.added, 'flops_per_token': r.flops, 'tokens_per_second': r.rate}
    row |= {'learning_rate': r.cell and r.cell.lr, 'loss': r.cell and r.cell.mean}
    row |= {'loss_interval': _finite(r.within), 'seeds': r.cell and len(r.cell.finals)}
    if r.difference:
      row |= {'difference': r.difference.value, 'pairs': r.difference.pairs}
      row |= {'difference_interval': _finite(r.difference.within)}
      row |= {'verdict': r.difference.verdict}
    ended = [p for p in r.line.points if p.done]
    row |= {'ended': len(ended), 'diverged': sum(p.diverged for p in ended)}
    probed = {name: r.cell.probe(name) for name in SINKS} if r.cell else {}
    rows.append(row | {f'probe_{k}': x for k, x in probed.items() if x is not None})
  return _from(rows)


def _finite(x: float) -> float | None:
  return x if math.isfinite(x) else None


def main(results: Sequence[Result], loss: str) -> Table:
  """The main table as it is shown; `loss` names the loss.

  `diverged` counts the runs of a line at all its rates.
  """
  logged = lambda name: any(r.cell and r.cell.probe(name) is not None for r in results)
  names = [name for name in SINKS if logged(name)]
  columns = ['', 'parameters', 'added', 'FLOPs/token', 'tokens/s', 'best lr', loss]
  columns += ['seeds', 'difference', 'verdict', 'diverged']
  columns += [SINKS[name][0] for name in names]
  rows = []
  for r in results:
    n, d = r.cell and len(r.cell.finals), r.difference
    added = None if r.added is None else f'{r.added:+,}' if r.added else '0'
    ended = [p.diverged for p in r.line.points if p.done]
    probed = [r.cell and r.cell.probe(name) for name in names]
    rows.append(
      [
        r.line.name,
        None if r.parameters is None else short(r.parameters, 'kMBT'),
        added,
        None if r.flops is None else short(r.flops, 'kMGT'),
        None if r.rate is None else short(r.rate, 'kMGT'),
        rate(r.cell.lr) if r.cell else None,
        _plus_minus(f'{r.cell.mean:.4f}', r.within) if r.cell else _ended(r),
        f'{d.pairs} pairs' if d and d.pairs else n,
        _plus_minus(f'{d.value:+.4f}', d.within) if d else None,
        d.verdict if d else None,
        f'{sum(ended)} of {len(ended)}',
        *(
          None if x is None else format(x, SINKS[name][1])
          for name, x in zip(names, probed, strict=True)
        ),
      ]
    )
  return Table(columns, rows)


def _ended(result: Result) -> str | None:
  """Why a line has no loss: all rates have a diverged seed, or none has ended."""
  return 'diverged' if any(p.diverged for p in result.line.points) else None


def short(number: float, units: str, digits: int = 4) -> str:
  """1783744 and 'kMBT' -> '1.784M'."""
  for power, unit in reversed(list(enumerate(units, 1))):
    if number >= 1000**power:
      return f'{number / 1000**power:.{digits}g}{unit}'
  return f'{number:.{digits}g}'


def _plus_minus(text: str, within: float) -> str:
  return f'{text} ± {within:.4f}' if math.isfinite(within) else text


def by_rate(lines: Sequence[Line], text: Callable[[Cell | None], str]) -> Table:
  """The `text` of each cell: a row for each line, a column for each learning rate."""
  lrs = sorted({lr for line in lines for lr in line.lrs})
  rows = []
  for line in lines:
    cells = {c.lr: c for c in line.cells}
    rows.append([line.name, *(text(cells.get(lr)) for lr in lrs)])
  return Table(['', *map(rate, lrs)], rows)


def loss_text(cell: Cell | None) -> str:
  """'2.3456 ± 0.0012', 'diverged 1 of 3', '–'."""
  if cell is None or not (cell.finals or cell.diverged):
    return '–'
  count = len(cell.points)
  if cell.diverged:
    return 'diverged' + (f' {len(cell.diverged)} of {count}' if count > 1 else '')
  spread = f' ± {cell.spread.std:.4f}' if len(cell.finals) > 1 else ''
  return f'{cell.mean:.4f}{spread}'


def spike_text(cell: Cell | None) -> str:
  """'1.5 (+0.83)': spikes per run, and the height of the highest in nats."""
  if cell is None or not any(len(p.log.train.steps) for p in cell.points):
    return '–'
  count = sum(len(p.spikes) for p in cell.points) / len(cell.points)
  highest = max(p.height for p in cell.points)
  return f'{count:.3g}' + (f' (+{highest:.2f})' if highest else '')
