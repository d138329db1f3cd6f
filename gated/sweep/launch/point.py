"""Whether job.sh runs a point: `python -P gated/sweep/launch/point.py WORKDIR`.

Prints 'ended' if it finished or diverged, 'held' if a run that may live has its workdir,
and 'due' otherwise. It is run as a file, for the package would bring in all of JAX.
"""

import sys

from gated import storage
from gated.run import lock, outcome


def state(workdir: storage.Path) -> str:
  """A workdir -> 'ended', 'held' or 'due'."""
  found = outcome.read(workdir)
  if found and found.ended:
    return 'ended'
  return 'held' if storage.exists(workdir / lock.NAME) else 'due'


if __name__ == '__main__':
  try:
    print(state(storage.path(sys.argv[1])))
  except (ValueError, OSError) as error:
    sys.exit(f'point.py: {error}')
