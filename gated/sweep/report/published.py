"""The paper's numbers beside ours, as differences of nats: ln of a ratio of perplexities.

Scale, data and tokenizer differ from the paper's, and with them every loss: only signs
and ratios of differences may be compared.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gated.sweep.report.lines import Cell, Line, rate
from gated.sweep.report.tables import Table, told

MEANS = (
  'nats: less the baseline at the lowest rate of these rows, in the paper and in ours. '
  'beside: less the baseline at the same rate. ours there: at so many times the best '
  "rate of our baseline as the row's is the paper's lowest; nats there: less that best."
)
SAME, NEAR = 0.02, 0.1  # How far a learning rate may lie, as a part of it.


class Published(NamedTuple):
  """A row of the paper's that trained a variant at a learning rate."""

  setting: str  # what it shares with the rows that it is compared with
  variant: str
  lr: float
  ppl: float | None  # None where the paper says that it diverged


def by_rate(
  lines: Sequence[Line], rows: Sequence[Published]
) -> Iterator[tuple[str, Table]]:
  """(What it is of, a table) for each setting of the paper, and of what else we vary."""
  contexts: dict[str, dict[str, Line]] = {}
  for line in lines:
    own = dict(line.points[0].apart)
    variant = own.pop('variant', None)
    rest = ', '.join(own.values())
    if variant is not None:
      contexts.setdefault(rest, {})[variant] = line
  for rest, ours in contexts.items():
    for setting in dict.fromkeys(row.setting for row in rows):
      some = [row for row in rows if row.setting == setting and row.variant in ours]
      first = min(
        (r for r in some if r.variant == 'baseline'), key=lambda r: r.lr, default=None
      )
      if first and first.ppl and len({r.lr for r in some}) > 1:
        name = f'{setting}; ours: {rest}' if rest else setting
        yield name, _table(some, first, ours)


def _table(rows: Sequence[Published], first: Published, ours: dict[str, Line]) -> Table:
  start = _cell(ours['baseline'], first.lr, SAME)
  best = ours['baseline'].best()
  plain = {row.lr: row.ppl for row in rows if row.variant == 'baseline'}
  cells = []
  for row in rows:
    times = row.lr / first.lr
    same = _cell(ours[row.variant], row.lr, SAME)
    beside = _cell(ours['baseline'], row.lr, SAME)
    near = _cell(ours[row.variant], best.lr * times, NEAR) if best else None
    other = row.variant != 'baseline'
    cells.append(
      {
        'variant': row.variant,
        'lr': rate(row.lr),
        'ppl, paper': f'{row.ppl:.3f}' if row.ppl else 'diverged',
        'nats, paper': _nats(row.ppl, first.ppl) if row.ppl else 'diverged',
        'beside, paper': _nats(row.ppl, plain.get(row.lr)) if other else '–',
        'ours': told(same),
        'nats, ours': _difference(same, start),
        'beside, ours': _difference(same, beside) if other else '–',
        'times': f'{times:.3g}',
        'our lr': rate(near.lr) if near else '–',
        'ours there': told(near),
        'nats there': _difference(near, best),
      }
    )
  # A column that has nothing is left out; of the last ones all, for they say one thing.
  empty = {name for name in cells[0] if all(c[name] == '–' for c in cells)}
  if 'our lr' in empty:
    empty.add('times')
  kept = [name for name in cells[0] if name not in empty]
  return Table(kept, [[c[name] for name in kept] for c in cells])


def _nats(ppl: float | None, start: float | None) -> str:
  return f'{math.log(ppl / start):+.4f}' if ppl and start else '–'


def _cell(line: Line, lr: float, within: float) -> Cell | None:
  """A line's seeds at the learning rate that is nearest, if it is so near."""
  cell = min(line.cells(), key=lambda c: abs(math.log(c.lr / lr)))
  return cell if abs(cell.lr / lr - 1) <= within else None


def _difference(cell: Cell | None, start: Cell | None) -> str:
  if cell and cell.diverged:
    return told(cell)
  if not (cell and start) or not (cell.finals and start.finals) or start.diverged:
    return '–'
  return f'{cell.mean - start.mean:+.4f}'


def by_row(lines: Sequence[Line]) -> Table | None:
  """Of points that are rows of the paper's tables: what it printed, beside ours.

  The difference is to the row that their recipe names as the baseline.
  """
  rows = {}
  for line in lines:
    for p in line.points:
      paper = p.config['paper']
      if paper['table'] and paper['published']:
        rows.setdefault((paper['table'], paper['row'], p.lr), []).append(p)
  mean = lambda ps: float(np.mean(Cell(0, tuple(ps)).finals or [math.nan]))
  cells = []
  for (table, row, lr), points in rows.items():
    paper = points[0].config['paper']
    start = paper['baseline'].partition(':')[2].partition(',')[0]
    base = rows.get((table, start, lr))
    ppl = paper['published'].get('ppl')
    before = base[0].config['paper']['published'].get('ppl') if base else None
    nats = f'{math.log(ppl / before):+.4f}' if ppl and before else '–'
    final = told(Cell(0, tuple(points)))
    ours = mean(points) - mean(base) if base else math.nan
    shown = f'{ours:+.4f}' if math.isfinite(ours) else '–'
    cells.append([table, row, rate(lr), ppl and f'{ppl:.3f}', nats, final, shown])
  columns = [
    'table',
    'row',
    'lr',
    'ppl, paper',
    'nats, paper',
    'final loss, ours',
    'nats, ours',
  ]
  return Table(columns, cells) if cells else None
