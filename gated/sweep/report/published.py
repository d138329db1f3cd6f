"""The paper's numbers beside ours, for points that are rows of the paper's tables.

A point is a row if `config.paper` and the model are unchanged from the recipe that its
command names, whatever its labels; and the learning rate, if the table gives one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gated import config
from gated.sweep.grid import Resolve
from gated.sweep.report import probed
from gated.sweep.report.points import Cell, Line, rate
from gated.sweep.report.tables import Table, loss_text, short

# Knobs of a model that choose how it is computed.
COMPUTED = 'config.layers', 'config.remat', 'config.numerics.'
# The paper's columns -> our scalars of the probes, and the format of both.
PROBES = {
  'gate_score': ('gate_mean', 'gate score', '.3f'),
  'm_act': ('m_act', 'M-Act', '.4g'),
  'f_attn': ('first_token_attention', 'F-Attn', '.3f'),
}


class Row(NamedTuple):
  """A row of a table of the paper, and our results of its recipe."""

  line: Line
  cell: Cell
  paper: Mapping[str, Any]  # config.paper

  @property
  def scale(self) -> str:
    """The recipe's scale, such as 'test'; its baseline has the same."""
    _, _, scale = self.paper['baseline'].partition('scale=')
    return scale.partition(',')[0]

  @property
  def start(self) -> tuple[str, str, str]:
    """The table, row and scale of its baseline."""
    row = self.paper['baseline'].partition(':')[2].partition(',')[0]
    return self.paper['table'], row, self.scale

  @property
  def context(self) -> tuple[str, ...]:
    """The labels of the other axes of the grid."""
    labels = self.line.points[0].line_labels
    return tuple(f'{k}={v}' for k, v in labels.items() if v != self.paper['row'])

  @property
  def key(self) -> tuple[str, str, str]:
    return self.paper['table'], self.paper['row'], self.scale


def rows(lines: Sequence[Line], resolve: Resolve | None) -> list[Row]:
  """The cells that are rows of the paper; `resolve` gives the recipe of a command."""
  matches: list[Row] = []
  if not resolve:
    return matches
  for line in lines:
    for cell in line.cells:
      point = cell.points[0].point
      paper = point.config['paper']
      if paper['table'] and paper['published'] and _is_row(point.config, point, resolve):
        matches.append(Row(line, cell, paper))
  return matches


def _is_row(own: Mapping[str, Any], point: Any, resolve: Resolve) -> bool:
  """Whether a point's recipe has the model and learning rate of the paper's row."""
  try:
    recipe = resolve(point.command[1:2])
  except ValueError:  # A recipe that this version lacks.
    return False
  same = all(own['paper'][k] == recipe['paper'][k] for k in ('table', 'row', 'baseline'))
  printed = own['paper']['published']
  if not same or dict(printed) != dict(recipe['paper']['published']):
    return False
  if 'max_lr' in printed and not math.isclose(own['optim']['lr'], printed['max_lr']):
    return False
  a, b = config.flatten(own['model']), config.flatten(recipe['model'])
  # A knob that only one version has is no difference.
  changed = [k for k in a.keys() & b.keys() if a[k] != b[k]]
  return all(k.startswith(COMPUTED) for k in changed)


def shapes(rows: Sequence[Row]) -> list[str]:
  """-> 'scale=test: 2 layers of width 32, 68k parameters, 15k tokens a run', ..."""
  texts = []
  for row in rows:
    c, point = row.cell.points[0].point.config, row.cell.points[0]
    tokens = c['steps'] * c['batch'] * c['data']['length']
    sizes = [f'{c["model"]["depth"]} layers of width {c["model"]["width"]}']
    if point.parameters is not None:
      sizes.append(f'{short(point.parameters, "kMBT", 2)} parameters')
    sizes.append(f'{short(tokens, "kMBT", 2)} tokens a run')
    texts.append(f'scale={row.scale}: {", ".join(sizes)}')
  return list(dict.fromkeys(texts))


def table(rows: Sequence[Row]) -> Table:
  """The paper's results beside ours.

  Differences are to the row that the recipe names as the baseline, at the same learning
  rate and with the same other labels.
  """
  own = {(row.key, row.context, row.cell.lr): row for row in rows}
  records = []
  for row in rows:
    start = own.get((row.start, row.context, row.cell.lr))
    printed = row.paper['published']
    record = {
      'table': row.paper['table'],
      'row': ', '.join([row.paper['row'], *row.context]),
      'scale': row.scale,
      'lr': rate(row.cell.lr),
    }
    for key, (name, title, form) in PROBES.items():
      if any(key in x.paper['published'] for x in rows):
        record[f'{title}, paper'] = format(printed[key], form) if key in printed else None
        value = probed.value(row.cell, name)
        record[f'{title}, ours'] = None if value is None else format(value, form)
    record['ppl, paper'] = f'{printed["ppl"]:.3f}' if 'ppl' in printed else None
    record['nats, paper'] = _nats(printed, start)
    record['loss, ours'] = loss_text(row.cell)
    record['nats, ours'] = _difference(row.cell, start)
    records.append(record)
  kept = [name for name in records[0] if any(r[name] is not None for r in records)]
  return Table(kept, [[r[name] for name in kept] for r in records])


def _nats(printed: Mapping[str, float], start: Row | None) -> str | None:
  base = start.paper['published'].get('ppl') if start else None
  own = printed.get('ppl')
  return f'{math.log(own / base):+.4f}' if own and base else None


def _difference(cell: Cell, start: Row | None) -> str | None:
  if not start or cell.diverged or start.cell.diverged:
    return None
  if not (cell.finals and start.cell.finals):
    return None
  return f'{cell.mean - start.cell.mean:+.4f}'
