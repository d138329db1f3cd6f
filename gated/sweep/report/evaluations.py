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
  numbers = []
  for name in storage.names(workdir / 'evals'):
    if name.endswith('.json'):
      path = workdir / 'evals' / name
      try:
        report = json.loads(storage.read(path, LIMIT))
        for label, part in ({workdir.name: report} | report.get('beside', {})).items():
          own, _, how = label.partition(' ')
          if own == workdir.name:
            numbers += [
              Number(name[:-5], f'{measure} {how}'.rstrip(), value, error)
              for measure, value, error in _numbers(part)
            ]
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a report of eval.py: {error!r}') from error
  return numbers


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
  for task, own in report.get('results', {}).items():
    for name, value in own.items():
      metric, _, chosen = name.partition(',')
      if isinstance(value, float) and not metric.endswith('_stderr'):
        error = own.get(f'{metric}_stderr,{chosen}')
        yield f'{task} {metric}', value, error if isinstance(error, float) else None
  for domain, own in report.get('domains', {}).items():
    yield f'{domain} nats per token', own['nats_per_token'], own['nats_per_token_stderr']
  for distance, own in report.get('copying', {}).get('distances', {}).items():
    yield f'gain of copying at {distance}', own['gain'], own['gain_stderr']
  for length, tasks in report.get('lengths', {}).items():
    for name in ('score', 'loss'):
      if tasks and tasks['mean'][name] is not None:
        yield f'RULER at {length}, mean {name}', tasks['mean'][name], None
