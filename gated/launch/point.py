"""Whether a point is to be run: `python -P gated/launch/point.py WORKDIR`, for job.sh.

Prints 'ended' if it finished or diverged, 'held' if a run that may live has its workdir,
and 'due' otherwise. It is run as a file, for the package would bring in all of JAX.
"""

import json
import sys

from gated import lock, storage

ENDED = (0, 3)  # Exit codes of train.py: done, and not finite.
LIMIT = 1 << 20


def state(workdir: storage.Path) -> str:
  """A workdir -> 'ended', 'held' or 'due'."""
  try:
    outcome = json.loads(storage.read(workdir / 'outcome.json', LIMIT))
    if outcome['code'] in ENDED:
      return 'ended'
  except FileNotFoundError:
    pass
  return 'held' if storage.exists(workdir / lock.NAME) else 'due'


if __name__ == '__main__':
  print(state(storage.path(sys.argv[1])))
