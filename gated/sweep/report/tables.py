"""Tables, as CSV with every digit, and as Markdown for the eye."""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gated.sweep.report.lines import Line, rate
from gated.sweep.report.points import Judged

KEPT = 300  # Points of a curve in curves.csv.
# What stands on the right of a cell.
NUMBER = re.compile(
  r'(|–|diverged( \d+ of \d+)?|[+-]?[\d.,]+(e-?\d+)?( ± [\d.]+| \(\+[\d.inf]+\))?)'
)
MEANT = re.compile(r'[\\`*\[\]<>|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])')


class Table(NamedTuple):
  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]

  def csv(self) -> bytes:
    """Floats to the last bit; nothing for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerows([self.columns, *self.rows])
    return out.getvalue().encode()

  def markdown(self) -> list[str]:
    """Lines of Markdown; columns of which every cell looks like a number stand right."""
    cells = [[plain(_shown(cell)) for cell in row] for row in self.rows]
    right = [all(NUMBER.fullmatch(c) for c in column) for column in zip(*cells)]
    rule = ['---:' if r else '---' for r in right] or ['---'] * len(self.columns)
    head = [plain(name) for name in self.columns]
    return [f'| {" | ".join(row)} |' for row in (head, rule, *cells)]


def plain(text: str) -> str:
  """Text that someone wrote -> Markdown that shows it, on one line, and does nothing."""
  return MEANT.sub(lambda m: '\\' + m.group(), ' '.join(text.split()))


def _shown(cell: Any) -> str:
  if cell is None:
    return '–'
  return f'{cell:.4f}' if isinstance(cell, float) else str(cell)


def labels(points: Sequence[Judged]) -> list[str]:
  """The names of all labels, in the order in which they first come."""
  return list(dict.fromkeys(name for p in points for name in p.labels))


def of_points(points: Sequence[Judged]) -> Table:
  """A row for each point."""
  names = labels(points)
  columns = ['point', *names, 'state', 'step', 'steps', 'learning_rate', 'final_loss']
  columns += ['final_loss_of', 'best_loss', 'loss_at_init', 'spikes', 'max_spike']
  columns += [
    'spike_limit',
    'spikes_noted',
    'diverged_because',
    'warnings',
    'seconds',
    'tokens_per_second',
    'device',
  ]
  measured = list(dict.fromkeys(name for p in points for name in p.warnings))
  row = lambda p: [
    p.name,
    *(p.labels.get(name) for name in names),
    *(p.state, p.step, p.steps, p.lr, p.final, p.final_of, p.best, p.init),
    *(len(p.spikes), p.height, p.limit, p.noted, p.reason),
    warned(p),
    *(p.seconds, p.rate, p.device),
    *(p.warnings.get(name) for name in measured),
  ]
  return Table([*columns, *measured], [row(p) for p in points])


def warned(p: Judged) -> str:
  """'attention_logit from step 120, grad_norm from step 300': what left its range."""
  return ', '.join(f'{name} from step {step}' for name, step in p.left.items())


def of_curves(points: Sequence[Judged]) -> Table:
  """Training losses to six digits, thinned: of each stretch the least and largest."""
  names = labels(points)
  rows = [
    [p.name, *(p.labels.get(name) for name in names), int(step), float(f'{loss:.6g}')]
    for p in points
    for step, loss in zip(*p.train.thinned(KEPT), strict=True)
  ]
  return Table(['point', *names, 'step', 'loss'], rows)


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
      counts = len(c.diverged), len(c.missing)
      rows.append([line.name, c.lr, *moments, len(c.finals), *ends, *counts, *spikes])
  return Table(columns, rows)


def of_sensitivity(lines: Sequence[Line]) -> Table:
  """A row for each line and seed, and one for their mean."""
  columns = ['line', 'seed', 'sensitivity', 'std', 'n', 'lowest_rate', 'highest_rate']
  rows = []
  for line in lines:
    found, ends = line.sensitivities(), (line.lrs[0], line.lrs[-1])
    rows += [[line.name, seed, s, None, 1, *ends] for seed, s in found.items()]
    if found:
      each = list(found.values())
      std = float(np.std(each, ddof=1)) if len(each) > 1 else None
      rows.append([line.name, 'mean', float(np.mean(each)), std, len(each), *ends])
  return Table(columns, rows)


def by_rate(lines: Sequence[Line]) -> Table:
  """For the eye: final losses, a row a line and a column a learning rate."""
  lrs = sorted({lr for line in lines for lr in line.lrs})
  rows = []
  for line in lines:
    cells = {c.lr: c for c in line.cells()}
    rows.append([line.name, *(told(cells.get(lr)) for lr in lrs)])
  return Table(['', *map(rate, lrs)], rows)


def told(cell: Any) -> str:
  """'2.3456 ± 0.0012', 'diverged 1 of 3', '–'."""
  if cell is None or not (cell.finals or cell.diverged):
    return '–'
  count = len(cell.points)
  if cell.diverged:
    return 'diverged' + (f' {len(cell.diverged)} of {count}' if count > 1 else '')
  spread = f' ± {cell.spread.std:.4f}' if len(cell.finals) > 1 else ''
  return f'{cell.mean:.4f}{spread}'


def of_spikes(lines: Sequence[Line]) -> Table:
  """For the eye: spikes a run, and the highest, by line and learning rate."""
  lrs = sorted({lr for line in lines for lr in line.lrs})

  def cell(c: Any) -> str:
    if c is None or not any(len(p.train.steps) for p in c.points):
      return '–'
    count = sum(len(p.spikes) for p in c.points) / len(c.points)
    highest = max(p.height for p in c.points)
    return f'{count:.3g}' + (f' (+{highest:.2f})' if highest else '')

  rows = []
  for line in lines:
    cells = {c.lr: c for c in line.cells()}
    rows.append([line.name, *(cell(cells.get(lr)) for lr in lrs)])
  return Table(['', *map(rate, lrs)], rows)
