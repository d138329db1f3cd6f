"""Results of items -> scores, losses and ranks: a report and a table.

A score is RULER's (scripts/eval/synthetic/constants.py): the share of the answers that
the generated text contains, whatever their case, or whether it contains any, times 100.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EDGES = 0.0, 0.2, 0.4, 0.6, 0.8, 1.0  # Of the bins of the depth.
MEANS = 'score', 'loss', 'rank'
FORMATS = {'score': '.1f', 'loss': '.3f', 'rank': '.1f'}
# Summaries by task; None for a length that a model was not prepared for.
Tasks = Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True, kw_only=True)
class Result:
  """An item's results: its loss is in nats per token, ranks count from 1."""

  score: float | None  # None if nothing was generated
  loss: float
  rank: float
  depth: float | None
  tokens: int  # of the prompt


def score(text: str, answers: Sequence[str], *, any_of: bool) -> float:
  """A generated text -> its score, from 0 to 100."""
  found = [answer.lower() in text.lower() for answer in answers]
  return 100.0 * (any(found) if any_of else sum(found) / len(found))


def summarize(results: Sequence[Result]) -> dict[str, Any]:
  """Results of a task -> means, standard errors, and means by the depth of the needle."""
  placed = [(each.depth, each) for each in results if each.depth is not None]
  by_depth = []
  for low, high in itertools.pairwise(EDGES):
    group = [each for depth, each in placed if low <= depth < high]
    by_depth.append({'depth': [low, high], 'items': len(group)} | _means(group))
  return (
    {'items': len(results), 'tokens': float(np.mean([each.tokens for each in results]))}
    | _means(results)
    | {f'{name}_stderr': _error(results, name) for name in MEANS}
    | {'by_depth': by_depth if placed else None}
  )


def _means(results: Sequence[Result]) -> dict[str, float | None]:
  columns = {name: [getattr(result, name) for result in results] for name in MEANS}
  return {
    name: None if not column or None in column else float(np.mean(column))
    for name, column in columns.items()
  }


def _error(results: Sequence[Result], name: str) -> float | None:
  column = [getattr(result, name) for result in results]
  if len(column) < 2 or None in column:
    return None
  return float(np.std(column, ddof=1)) / math.sqrt(len(column))


def mean(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
  """Summaries by task -> the mean over tasks, as RULER's: each counts the same."""
  columns = {name: [task[name] for task in tasks.values()] for name in MEANS}
  return {
    name: None if None in column else float(np.mean(column))
    for name, column in columns.items()
  }


def table(reports: Mapping[str, Mapping[str, Any]], *, loss_only: bool) -> str:
  """{label: {'lengths': {length: Tasks}}} -> a line for each task and model."""
  names = MEANS[1:] if loss_only else MEANS
  first = next(iter(reports.values()))['lengths']
  lines = [
    [
      '',
      '',
      *(f'{length}' if name == names[0] else '' for length in first for name in names),
    ]
  ]
  lines.append(['RULER', 'model', *(name for _ in first for name in names)])
  tasks = next(filter(None, first.values()))
  for task in tasks:
    for label, report in reports.items():
      cells = (
        '-'
        if by_task is None or by_task[task][name] is None
        else format(by_task[task][name], FORMATS[name])
        for by_task in report['lengths'].values()
        for name in names
      )
      lines.append([task, label, *cells])
  widths = [max(map(len, column)) for column in zip(*lines)]
  align = ['<', '<', *('>' for _ in widths[2:])]
  rows = (zip(line, align, widths) for line in lines)
  return '\n'.join('  '.join(f'{c:{a}{w}}' for c, a, w in row).rstrip() for row in rows)
