"""Golden preflights: later compilations may not need much more than the kept ones.

A kept case is a JSON file: the `flags` of preflight.py, its limits (`needs`), and the
result (`found`), null at first.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

# Memory, FLOPs and traffic may grow by this share.
GROWTH = 0.05
# Collectives below this many bytes a step are not checked.
SMALL = 2**20


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
  """A report -> the part to keep: bytes, FLOPs and traffic of a chip."""
  sent: dict[str, float] = defaultdict(float)
  for t in report['collectives']:
    sent[f'{t["kind"]} ({t["network"]})'] += t['bytes']
  memory = {name: int(size) for name, size in report['memory'].items()}
  return {
    'jax': report['jax'],
    'mesh': report['mesh'],
    'memory': memory,
    'spare': report['spare'] and round(report['spare'], 4),
    'flops': report['flops']['counted'],
    'of_expected': round(of_expected(report), 4),
    'received': {name: int(size) for name, size in sorted(sent.items())},
    'step_seconds': round(report['seconds']['step'], 4),
    'mfu': round(report['mfu'], 4),
  }


def of_expected(report: Mapping[str, Any]) -> float:
  """FLOPs in the program, relative to those by arithmetic."""
  flops = report['flops']
  return flops['counted'] / sum(flops['expected'].values())


def faults(case: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
  """A kept case and a new report of it -> regressions; an empty list passes.

  Memory, FLOPs and the bytes of each kind of collective may grow by GROWTH. New kinds of
  collectives must be SMALL.
  """
  if 'flops' not in report:
    return [f'does not fit any more: {report["memory"]["total"]:,} bytes']
  old, new = case['found'], kept(report)
  regressions = list(report['offences'])
  if old is None:
    return [*regressions, 'nothing is kept yet: --write keeps what is found']
  for name in ('total', 'temporaries'):
    regressions += _grown(f'memory.{name}', old['memory'][name], new['memory'][name])
  regressions += _grown('flops', old['flops'], new['flops'])
  for name, size in new['received'].items():
    if size > SMALL:
      regressions += _grown(name, old['received'].get(name, 0), size)
  least = case['needs']['spare']
  if report['spare'] is not None and report['spare'] < least:
    regressions.append(
      f'{report["spare"]:.1%} of the memory is to spare, not {least:.0%}'
    )
  if abs(new['of_expected'] - 1) > GROWTH:
    regressions.append(
      f'the FLOPs counted are {new["of_expected"]} of those by arithmetic'
    )
  if case['needs']['counted'] and (report['uncounted'] or report['unknown_loops']):
    regressions.append(f'not counted: {report["uncounted"]}, {report["unknown_loops"]}')
  return regressions


def _grown(name: str, old: float, new: float) -> list[str]:
  if new <= old * (1 + GROWTH):
    return []
  by = f'by {new / old - 1:.1%}' if old else 'from nothing'
  return [f'{name} grew {by}: {old:,} was kept, {new:,} was found']
