"""Tables, as CSV with full precision, and as Markdown."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated.sweep.report.lines import Cell, Line, rate
from gated.sweep.report.points import Judged

KEPT = 300  # Points of a curve in curves.csv.
# Cells that are aligned right.
NUMBER = re.compile(
  r'(|–|diverged( \d+ of \d+)?|[+-]?[\d.,]+(e-?\d+)?( ± [\d.]+| \(\+[\d.inf]+\))?)'
)
# Characters that Markdown would interpret.
MARKUP = re.compile(r'[\\`*\[\]<>|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])')


class Table(NamedTuple):
  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]

  def csv(self) -> bytes:
    """CSV with floats to the last bit; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerows([self.columns, *self.rows])
    return out.getvalue().encode()

  def markdown(self) -> list[str]:
    """Lines of Markdown; columns of numbers are aligned right."""
    cells = [[plain(_shown(cell)) for cell in row] for row in self.rows]
    right = [all(NUMBER.fullmatch(c) for c in column) for column in zip(*cells)]
    rule = ['---:' if r else '---' for r in right] or ['---'] * len(self.columns)
    head = [plain(name) for name in self.columns]
    return [f'| {" | ".join(row)} |' for row in (head, rule, *cells)]


def plain(text: str) -> str:
  """Any text -> Markdown that shows it literally, on one line."""
  return MARKUP.sub(lambda m: '\\' + m.group(), ' '.join(text.split()))


def _shown(cell: Any) -> str:
  if cell is None:
    return '–'
  return f'{cell:.4f}' if isinstance(cell, float) else str(cell)


def _labels(points: Sequence[Judged]) -> list[str]:
  """The names of all labels, in the order of their first use."""
  return list(dict.fromkeys(name for p in points for name in p.point.labels))


def of_points(points: Sequence[Judged]) -> Table:
  """A row for each point."""
  labels = _labels(points)
  columns = ['point', *labels, 'state', 'step', 'steps', 'learning_rate', 'final_loss']
  columns += ['final_loss_of', 'best_loss', 'loss_at_init', 'spikes', 'max_spike']
  columns += ['spike_limit', 'spikes_noted', 'diverged_because', 'warnings', 'seconds']
  columns += ['tokens_per_second', 'device']
  warnings = list(dict.fromkeys(name for p in points for name in p.log.warnings))
  rows = [
    [
      p.name,
      *map(p.point.labels.get, labels),
      *(p.state, p.log.step, p.steps, p.lr, p.log.final, p.log.final_of, p.best, p.init),
      *(len(p.spikes), p.height, p.limit, p.log.noted, p.reason, warned(p)),
      *(p.log.seconds, p.log.rate, p.log.device),
      *map(p.log.warnings.get, warnings),
    ]
    for p in points
  ]
  return Table([*columns, *warnings], rows)


def warned(p: Judged) -> str:
  """'attention_logit from step 120, grad_norm from step 300': its early warnings."""
  return ', '.join(f'{name} from step {step}' for name, step in p.alarms.items())


def of_curves(points: Sequence[Judged]) -> Table:
  """Training losses to six digits, thinned."""
  labels = _labels(points)
  rows = [
    [p.name, *map(p.point.labels.get, labels), int(step), float(f'{loss:.6g}')]
    for p in points
    for step, loss in zip(*p.log.train.thinned(KEPT), strict=True)
  ]
  return Table(['point', *labels, 'step', 'loss'], rows)


def of_summary(lines: Sequence[Line]) -> Table:
  """A row for each line and learning rate, over its seeds."""
  columns = ['line', 'learning_rate', 'mean', 'std', 'n', 'least', 'largest']
  columns += ['diverged', 'not_done', 'spikes', 'max_spike']
  rows = []
  for line in lines:
    for c in line.cells():
      some = len(c.finals) > 0
      ends = (min(c.finals), max(c.finals)) if some else (None, None)
      moments = c.mean if some else None, c.spread.std if len(c.finals) > 1 else None
      spikes = sum(len(p.spikes) for p in c.points), max(p.height for p in c.points)
      counts = len(c.diverged), sum(not p.done for p in c.points)
      rows.append([line.name, c.lr, *moments, len(c.finals), *ends, *counts, *spikes])
  return Table(columns, rows)


def of_sensitivity(lines: Sequence[Line]) -> Table:
  """A row for each line and seed, and one for the mean of each line."""
  columns = ['line', 'seed', 'sensitivity', 'std', 'n', 'lowest_rate', 'highest_rate']
  rows = []
  for line in lines:
    by_seed, ends = line.sensitivities(), (line.lrs[0], line.lrs[-1])
    rows += [[line.name, seed, s, None, 1, *ends] for seed, s in by_seed.items()]
    if by_seed:
      values = list(by_seed.values())
      std = float(np.std(values, ddof=1)) if len(values) > 1 else None
      rows.append([line.name, 'mean', float(np.mean(values)), std, len(values), *ends])
  return Table(columns, rows)


def by_rate(lines: Sequence[Line], text: Callable[[Cell | None], str]) -> Table:
  """The `text` of each cell: a row for each line, a column for each learning rate."""
  lrs = sorted({lr for line in lines for lr in line.lrs})
  cells = [{c.lr: c for c in line.cells()} for line in lines]
  rows = [
    [line.name, *(text(own.get(lr)) for lr in lrs)]
    for line, own in zip(lines, cells, strict=True)
  ]
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
