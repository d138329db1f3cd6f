"""What a preflight found once, kept: a later one may not need much more.

A kept case is a file of JSON: the `flags` that make it, the `needs` that it must meet and
what was `found`, null at first.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

# A share by which memory, FLOPs and traffic may grow.
GROWTH = 0.05
# Collectives below so many bytes of a step may do as they like.
SMALL = 2**20


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
  """What of a report is worth keeping: bytes, FLOPs and traffic of a chip."""
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
  """FLOPs in the program over those by arithmetic."""
  flops = report['flops']
  return flops['counted'] / sum(flops['expected'].values())


def faults(case: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
  """A kept case and a new report of it -> in what the new one is worse; none is well.

  Memory, FLOPs and the bytes of each kind of collective may grow by a twentieth. A kind
  that was not there may not come, if it is not small.
  """
  if 'flops' not in report:
    return [f'does not fit any more: {report["memory"]["total"]:,} bytes']
  old, new = case['found'], kept(report)
  found = list(report['offences'])
  if old is None:
    return [*found, 'nothing is kept yet: --write keeps what is found']
  for name in ('total', 'temporaries'):
    found += _grown(f'memory.{name}', old['memory'][name], new['memory'][name])
  found += _grown('flops', old['flops'], new['flops'])
  for name, size in new['received'].items():
    if size > SMALL:
      found += _grown(name, old['received'].get(name, 0), size)
  least = case['needs']['spare']
  if report['spare'] is not None and report['spare'] < least:
    found.append(f'{report["spare"]:.1%} of the memory is to spare, not {least:.0%}')
  if abs(new['of_expected'] - 1) > GROWTH:
    found.append(f'the FLOPs counted are {new["of_expected"]} of those by arithmetic')
  if case['needs']['counted'] and (report['uncounted'] or report['unknown_loops']):
    found.append(f'not counted: {report["uncounted"]}, {report["unknown_loops"]}')
  return found


def _grown(name: str, old: float, new: float) -> list[str]:
  if new <= old * (1 + GROWTH):
    return []
  by = f'by {new / old - 1:.1%}' if old else 'from nothing'
  return [f'{name} grew {by}: {old:,} was kept, {new:,} was found']
