"""The state of a point, read from its workdir alone."""

from typing import NamedTuple

from gated import storage
from gated.run import exit_codes, lock, metrics, outcome
from gated.run import workdir as workdirs

# Points in these states are never run again.
ENDED = 'finished', 'diverged'
STATES = 'absent', 'partial', *ENDED, 'failed'
# Exit codes of train.py; any other means that the point failed.
CODES = {
  exit_codes.FINISHED: 'finished',
  exit_codes.UNSTABLE: 'diverged',
  exit_codes.PREEMPTED: 'partial',
}


class State(NamedTuple):
  """The state of a point."""

  state: str  # One of STATES.
  step: int  # The last step in its metrics; 0 for none.
  message: str = ''  # The reason why its last session ended.


def state(workdir: storage.Path, steps: int) -> State:
  """A workdir and the steps of its whole run -> State.

  The same command resumes a `partial` point, and retries a `failed` one, whose last
  session ended in an error. ValueError for a damaged workdir.
  """
  last = outcome.read(workdir)
  if last is None:
    step = metrics.last_step(workdir / 'metrics.jsonl')
    started = step or storage.exists(workdir / 'run.json')
    return State('partial' if started else 'absent', step)
  name = CODES.get(last.code, 'failed')
  if name == 'finished' and last.step < steps:
    name = 'partial'
  return State(name, last.step, last.told)


def living(workdir: storage.Path) -> bool:
  """Whether a live run holds the workdir's lock."""
  return lock.living(workdir, stale_after=workdirs.STALE_AFTER)
