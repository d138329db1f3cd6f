"""Golden preflights: a new compilation may not need much more than the recorded one.

.venv/tpu/bin/python tests/golden/make_preflight.py [--write] [NAME ...]

compiles the cases of tests/golden/preflight again and reports numbers that grew by more
than 5%; --write keeps the new results. A case is a JSON file: the `flags` of
preflight.py, its limits (`needs`), and the result (`found`), null at first. Exit code 1
if a case fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASES = {path.stem: path for path in sorted(ROOT.glob('tests/golden/preflight/*.json'))}
GIB = 2**30

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


def check(name: str, write: bool) -> bool:
  """Compiles a case in a process of its own -> whether it passes; prints its faults."""
  case = json.loads(CASES[name].read_text())
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / 'report.json'
    script = str(ROOT / 'scripts/preflight.py')
    command = [sys.executable, script, *case['flags'], f'--json={file}']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not file.exists():
      print(f'{name}: exit code {done.returncode}\n{done.stderr[-2000:]}')
      return False
    new = json.loads(file.read_text())
  if write and 'flops' in new:
    case['found'] = kept(new)
    CASES[name].write_text(json.dumps(case, indent=2) + '\n')
  regressions = faults(case, new)
  memory = f'{new["memory"]["total"] / GIB:.2f} GiB, {new["spare"]:.1%} free'
  print(f'{name}: {memory}, {new["compile_seconds"]:.0f} s')
  print(''.join(f'  ! {fault}\n' for fault in regressions), end='', flush=True)
  return not regressions


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', metavar='NAME', help='default: all cases')
  parser.add_argument('--write', action='store_true', help='record the results')
  args = parser.parse_args()
  unknown = [name for name in args.names if name not in CASES]
  if unknown:
    parser.error(f'{unknown[0]!r} is no case of {", ".join(CASES)}')
  return int(not all([check(name, args.write) for name in args.names or CASES]))


if __name__ == '__main__':
  sys.exit(main())
