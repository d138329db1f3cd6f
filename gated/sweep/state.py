"""What became of a point: told by its workdir alone, whoever launched it."""

import json
import time
from typing import NamedTuple

from gated import lock, metrics, storage
from gated import workdir as workdirs

FINISHED, UNSTABLE, TOLD_TO_LEAVE = 0, 3, 4  # Of train.py's exit codes.
LIMIT = 1 << 20  # Bytes of an outcome.json or a lock.json.

# What a finished or a diverged point came to is not to be computed again.
ENDED = 'finished', 'diverged'
STATES = 'absent', 'partial', *ENDED, 'failed'


class State(NamedTuple):
  """Where a point stands."""

  state: str  # One of STATES.
  step: int  # The last that its metrics tell of; 0 for none.


def state(workdir: storage.Path, steps: int) -> State:
  """A workdir and the steps of its whole run -> State.

  A point is `partial` if the same command goes on with it, and `failed` if its last
  session ended in an error, after which the same command tries again.
  """
  found = workdirs.outcome(workdir)
  if found is None:
    step = _step(workdir)
    there = step or storage.exists(workdir / 'run.json')
    return State('partial' if there else 'absent', step)
  code, step = found['code'], found['step']
  if code == FINISHED:
    return State('finished' if step >= steps else 'partial', step)
  return State({UNSTABLE: 'diverged', TOLD_TO_LEAVE: 'partial'}.get(code, 'failed'), step)


def living(workdir: storage.Path) -> bool:
  """Whether a run that lives, as far as its lock tells, has the workdir."""
  try:
    note = json.loads(storage.read(workdir / lock.NAME, LIMIT))
    if note['machine'] == lock.machine():
      return lock.lives(note['pid'], note['started'])
    return time.time() - note['beat'] < workdirs.STALE_AFTER
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return False


def _step(workdir: storage.Path) -> int:
  path = workdir / 'metrics.jsonl'
  if not metrics.exists(path):
    return 0
  return max((r['step'] for r in metrics.read(path)), default=0)
