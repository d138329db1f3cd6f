"""Golden preflights: a new compilation may not need much more than the recorded one.

A case is a JSON file: the `flags` of preflight.py, its limits (`needs`), and the result
(`found`), null at first.
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
  received: dict[str, float] = defaultdict(float)
  for t in report['collectives']:
    received[f'{t["kind"]} ({t["network"]})'] += t['bytes']
  flops = report['flops']
  return {
    'jax': report['jax'],
    'mesh': report['mesh'],
    'memory': {name: int(size) for name, size in report['memory'].items()},
    'spare': report['spare'] and round(report['spare'], 4),
    'flops': flops['counted'],
    'of_expected': round(flops['counted'] / sum(flops['expected'].values()), 4),
    'received': {name: int(size) for name, size in sorted(received.items())},
    'step_seconds': round(report['seconds']['step'], 4),
    'mfu': round(report['mfu'], 4),
  }


def faults(case: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
  """A case and a new report of it -> regressions; an empty list passes.

  Memory, FLOPs and the bytes of each kind of collective may grow by GROWTH. New kinds of
  collectives must be SMALL.
  """
  if 'flops' not in report:
    return [f'does not fit any more: {report["memory"]["total"]:,} bytes']
  old, new = case['found'], kept(report)
  regressions = list(report['offences'])
  if old is None:
    return [*regressions, 'the case has no result yet: --write keeps this one']
  for name in ('total', 'temporaries'):
    regressions += _grown(f'memory.{name}', old['memory'][name], new['memory'][name])
  regressions += _grown('flops', old['flops'], new['flops'])
  received = dict.fromkeys(new['received'], 0) | old['received']
  for name, size in new['received'].items():
    if size > SMALL:
      regressions += _grown(name, received[name], size)
  least = case['needs']['spare']
  if report['spare'] is not None and report['spare'] < least:
    regressions.append(f'{report["spare"]:.1%} of the memory is free, not {least:.0%}')
  if abs(new['of_expected'] - 1) > GROWTH:
    regressions.append(f'counted FLOPs are {new["of_expected"]} of the expected FLOPs')
  if case['needs']['counted'] and (report['uncounted'] or report['unknown_loops']):
    regressions.append(f'not counted: {report["uncounted"]}, {report["unknown_loops"]}')
  return regressions


def _grown(name: str, old: float, new: float) -> list[str]:
  if new <= old * (1 + GROWTH):
    return []
  growth = f'by {new / old - 1:.1%}' if old else 'from nothing'
  return [f'{name} grew {growth}: from {old:,} to {new:,}']
