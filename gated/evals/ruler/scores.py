"""Results of items -> scores, losses and ranks: a report and a table.

A score is RULER's (scripts/eval/synthetic/constants.py): the share of the answers that
the generated text contains, whatever their case, or whether it contains any, times 100.
A result has a score (None if nothing was generated), the reference's loss in nats per
token and rank from 1, the depth of the needle or None, and the tokens of the prompt.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

EDGES = 0.0, 0.2, 0.4, 0.6, 0.8, 1.0  # Of the bins of the depth.
FORMATS = {'score': '.1f', 'loss': '.3f', 'rank': '.1f'}

Numbers = Mapping[str, Any]


def score(text: str, answers: Sequence[str], *, any_of: bool) -> float:
  """A generated text -> its score, from 0 to 100."""
  hits = [answer.lower() in text.lower() for answer in answers]
  return 100.0 * (any(hits) if any_of else sum(hits) / len(hits))


def summarize(results: Sequence[Numbers]) -> dict[str, Any]:
  """Results of a task -> means, standard errors, and means by the depth of the needle."""
  placed = [each for each in results if each['depth'] is not None]
  by_depth = []
  for low, high in itertools.pairwise(EDGES):
    group = [each for each in placed if low <= each['depth'] < high]
    by_depth.append({'depth': [low, high], 'items': len(group)} | means(group))
  return (
    {'items': len(results)}
    | means(results, (*FORMATS, 'tokens'))
    | {f'{name}_stderr': _error([each[name] for each in results]) for name in FORMATS}
    | {'by_depth': by_depth if placed else None}
  )


def means(
  rows: Collection[Numbers], names: Sequence[str] = (*FORMATS,)
) -> dict[str, float | None]:
  """Results, or summaries of tasks, which count the same as in RULER -> their means."""
  columns = {name: [row[name] for row in rows] for name in names}
  return {
    name: float(np.mean(column)) if column and None not in column else None
    for name, column in columns.items()
  }


def _error(column: list[Any]) -> float | None:
  if len(column) < 2 or None in column:
    return None
  return float(np.std(column, ddof=1)) / math.sqrt(len(column))


def table(reports: Mapping[str, Numbers], *, loss_only: bool) -> str:
  """{label: {'lengths': {length: {task: summary}}}} -> a line by task and model."""
  names = [*FORMATS][loss_only:]
  lengths = next(iter(reports.values()))['lengths']
  heads = [
    f'{length}' if name == names[0] else '' for length in lengths for name in names
  ]
  lines = [['', '', *heads], ['RULER', 'model', *names * len(lengths)]]
  every = (by_task for each in reports.values() for by_task in each['lengths'].values())
  for task in next(filter(None, every)):
    for label, report in reports.items():
      numbers = (
        (by_task and by_task[task][name], FORMATS[name])
        for by_task in report['lengths'].values()
        for name in names
      )
      cells = ('-' if number is None else format(number, f) for number, f in numbers)
      lines.append([task, label, *cells])
  widths = [max(map(len, column)) for column in zip(*lines)]
  align = ['<', '<', *('>' for _ in widths[2:])]
  rows = (zip(line, align, widths) for line in lines)
  return '\n'.join('  '.join(f'{c:{a}{w}}' for c, a, w in row).rstrip() for row in rows)
