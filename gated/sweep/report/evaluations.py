"""What eval.py measured of a run: tasks, domains, copying and RULER.

Its reports lie in WORKDIR/evals. A report also holds the run with YaRN, or with other
caches, as 'NAME yarn=4'; other runs of --beside are left out.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gated import storage

LIMIT = 1 << 27  # Bytes of a report.


class Number(NamedTuple):
  """One result of an evaluation."""

  evaluation: str  # the report's file name, which begins with the step
  measure: str
  value: float
  stderr: float | None


def read(workdir: storage.Path) -> list[Number]:
  """A workdir -> the numbers of its reports; ValueError for a file that is none."""
  numbers, name = [], workdir.name
  for file in storage.names(workdir / 'evals'):
    if file.endswith('.json'):
      path = workdir / 'evals' / file
      try:
        report = json.loads(storage.read(path, LIMIT))
        first = {report.get('label', name): report}
        for label, part in (first | report.get('beside', {})).items():
          if label == name or label.startswith(f'{name} '):
            how = label.removeprefix(name)
            numbers += [Number(file[:-5], m + how, *x) for m, *x in _numbers(part)]
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a report of eval.py: {error!r}') from error
  return numbers


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
  """A report -> (measure, value, stderr). NaN is stored as a text, which float reads."""
  for task, own in report.get('results', {}).items():
    for name, value in own.items():
      metric, _, chosen = name.partition(',')
      if chosen and not metric.endswith('_stderr'):
        error = own.get(f'{metric}_stderr,{chosen}')
        known = isinstance(error, float)  # Otherwise N/A.
        yield f'{task} {metric}', float(value), error if known else None
  for domain, own in report.get('domains', {}).items():
    value, error = (float(own[f'nats_per_token{end}']) for end in ('', '_stderr'))
    yield f'{domain} nats per token', value, error
  for distance, own in report.get('copying', {}).get('distances', {}).items():
    yield f'copy gain at {distance}', float(own['gain']), float(own['gain_stderr'])
  for length, tasks in report.get('lengths', {}).items():
    for name in ('score', 'loss'):
      if tasks and tasks['mean'][name] is not None:
        yield f'RULER at {length}, mean {name}', float(tasks['mean'][name]), None
