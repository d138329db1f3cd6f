"""`python -P gated/sweep/launch/point.py WORKDIR` prints the state of a point.

'ended': the point finished or diverged. 'held': a lock exists and may belong to a live
run. 'due': neither. job.sh runs this file by its path, because importing the package
would import JAX.
"""

import sys

from gated import storage
from gated.run import lock, outcome


def state(workdir: storage.Path) -> str:
  """A workdir -> 'ended', 'held' or 'due'."""
  last = outcome.read(workdir)
  if last and last.ended:
    return 'ended'
  return 'held' if storage.exists(workdir / lock.NAME) else 'due'


if __name__ == '__main__':
  try:
    print(state(storage.path(sys.argv[1])))
  except (ValueError, OSError) as error:
    sys.exit(f'point.py: {error}')
