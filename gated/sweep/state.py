"""What became of a point: told by its workdir alone, whoever launched it."""

from typing import NamedTuple

from gated import storage
from gated.run import exit_codes, lock, metrics, outcome
from gated.run import workdir as workdirs

# What a finished or a diverged point came to is not to be computed again.
ENDED = 'finished', 'diverged'
STATES = 'absent', 'partial', *ENDED, 'failed'
# Of train.py's exit codes; after any other, a point has failed.
CODES = {
  exit_codes.FINISHED: 'finished',
  exit_codes.UNSTABLE: 'diverged',
  exit_codes.PREEMPTED: 'partial',
}


class State(NamedTuple):
  """Where a point stands."""

  state: str  # One of STATES.
  step: int  # The last that its metrics tell of; 0 for none.
  told: str = ''  # What its last session said as it ended.


def state(workdir: storage.Path, steps: int) -> State:
  """A workdir and the steps of its whole run -> State.

  A point is `partial` if the same command goes on with it, and `failed` if its last
  session ended in an error, after which the same command tries again. ValueError if what
  a workdir says is damaged.
  """
  found = outcome.read(workdir)
  if found is None:
    step = metrics.last_step(workdir / 'metrics.jsonl')
    there = step or storage.exists(workdir / 'run.json')
    return State('partial' if there else 'absent', step)
  name = CODES.get(found.code, 'failed')
  if name == 'finished' and found.step < steps:
    name = 'partial'
  return State(name, found.step, found.told)


def living(workdir: storage.Path) -> bool:
  """Whether a run that lives, as far as its lock tells, has the workdir."""
  return lock.living(workdir, stale_after=workdirs.STALE_AFTER)
