"""The paper's differences in nats, the logarithm of a ratio of perplexities, beside ours.

Scale, data and tokenizer differ from the paper's, and so does every loss: only signs and
ratios of differences may be compared.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gated.sweep.report.points import Cell, Judged, Line, rate
from gated.sweep.report.tables import Table, loss_text

MEANS = (
  'nats: minus the baseline at the lowest rate of these rows, in the paper and in ours. '
  'beside: minus the baseline at the same rate. times: the rate over the lowest one. our '
  "lr: the same multiple of our baseline's best rate, where the loss is ours there; nats "
  'there: that loss minus the one at our best rate.'
)
SAME, NEAR = 0.02, 0.1  # Relative tolerances of a learning rate.


class Published(NamedTuple):
  """A row of the paper's tables: a variant at a learning rate."""

  setting: str  # the same in all rows that are compared with it
  variant: str
  lr: float
  ppl: float | None  # None if it diverged


def by_rate(
  lines: Sequence[Line], rows: Sequence[Published]
) -> Iterator[tuple[str, Table]]:
  """(name, table) for each setting of the paper and each combination of other labels."""
  contexts: dict[str, dict[str, Line]] = {}
  for line in lines:
    labels = dict(line.points[0].line_labels)
    variant = labels.pop('variant', None)
    if variant is not None:
      contexts.setdefault(', '.join(labels.values()), {})[variant] = line
  settings = dict.fromkeys(row.setting for row in rows)
  for (context, ours), setting in itertools.product(contexts.items(), settings):
    some = [row for row in rows if row.setting == setting and row.variant in ours]
    baselines = [row for row in some if row.variant == 'baseline']
    first = min(baselines, key=lambda row: row.lr, default=None)
    if first and first.ppl and len({row.lr for row in some}) > 1:
      name = f'{setting}; ours: {context}' if context else setting
      yield name, _table(some, first, ours)


def _table(rows: Sequence[Published], first: Published, ours: dict[str, Line]) -> Table:
  baseline = ours['baseline']
  start, best = _cell(baseline, first.lr, SAME), baseline.best
  baseline_ppl = {row.lr: row.ppl for row in rows if row.variant == 'baseline'}
  cells = []
  for row in rows:
    times = row.lr / first.lr
    same = _cell(ours[row.variant], row.lr, SAME)
    beside = _cell(baseline, row.lr, SAME)
    near = _cell(ours[row.variant], best.lr * times, NEAR) if best else None
    other = row.variant != 'baseline'
    cells.append(
      {
        'variant': row.variant,
        'lr': rate(row.lr),
        'ppl, paper': f'{row.ppl:.3f}' if row.ppl else 'diverged',
        'nats, paper': _nats(row.ppl, first.ppl) if row.ppl else 'diverged',
        'beside, paper': _nats(row.ppl, baseline_ppl.get(row.lr)) if other else '–',
        'ours': loss_text(same),
        'nats, ours': _difference(same, start),
        'beside, ours': _difference(same, beside) if other else '–',
        'times': f'{times:.3g}',
        'our lr': rate(near.lr) if near else '–',
        'ours there': loss_text(near),
        'nats there': _difference(near, best),
      }
    )
  # Drop empty columns, and `times` with the last ones, which need it.
  empty = {name for name in cells[0] if all(c[name] == '–' for c in cells)}
  if 'our lr' in empty:
    empty.add('times')
  kept = [name for name in cells[0] if name not in empty]
  return Table(kept, [[c[name] for name in kept] for c in cells])


def _nats(ppl: float | None, start: float | None) -> str:
  return f'{math.log(ppl / start):+.4f}' if ppl and start else '–'


def _cell(line: Line, lr: float, within: float) -> Cell | None:
  """The cell at the nearest learning rate; None if that is not `within` tolerance."""
  cell = min(line.cells, key=lambda c: abs(math.log(c.lr / lr)))
  return cell if abs(cell.lr / lr - 1) <= within else None


def _difference(cell: Cell | None, start: Cell | None) -> str:
  if cell and cell.diverged:
    return loss_text(cell)
  if not (cell and start) or not (cell.finals and start.finals) or start.diverged:
    return '–'
  return f'{cell.mean - start.mean:+.4f}'


def by_row(lines: Sequence[Line]) -> Table | None:
  """The paper's results beside ours, for points that are rows of the paper's tables.

  Differences are to the row that the recipe names as the baseline.
  """
  groups: dict[tuple[str, str, float], list[Judged]] = {}
  for p in (p for line in lines for p in line.points):
    paper = p.point.config['paper']
    if paper['table'] and paper['published']:
      groups.setdefault((paper['table'], paper['row'], p.lr), []).append(p)
  rows = {key: Cell(key[2], points) for key, points in groups.items()}
  papers = {key: points[0].point.config['paper'] for key, points in groups.items()}
  ppls = {key: paper['published'].get('ppl') for key, paper in papers.items()}
  cells = []
  for key, cell in rows.items():
    table, row, lr = key
    start = table, papers[key]['baseline'].partition(':')[2].partition(',')[0], lr
    base, ppl, nats = rows.get(start), ppls[key], _nats(ppls[key], ppls.get(start))
    ours = cell.mean - base.mean if base else math.nan
    shown = f'{ours:+.4f}' if math.isfinite(ours) else '–'
    cells.append(
      [table, row, rate(lr), ppl and f'{ppl:.3f}', nats, loss_text(cell), shown]
    )
  columns = ['table', 'row', 'lr', 'ppl, paper', 'nats, paper', 'final loss, ours']
  return Table([*columns, 'nats, ours'], cells) if cells else None
