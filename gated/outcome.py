"""How the last session in a workdir ended: WORKDIR/outcome.json.

train.py writes it as it leaves; who launched the run, here or on a cluster, reads it. It
needs few packages, for a host reads it before it has more.
"""

import json
from typing import Any, NamedTuple

from gated import storage

NAME = 'outcome.json'
LIMIT = 1 << 20  # Bytes.

# Exit codes of train.py, which says what they are; FAILED is any error that has no other.
FINISHED, FAILED, REFUSED, UNSTABLE, TOLD_TO_LEAVE = range(5)
LOST_PEER, STUCK, NOT_SAVED, TAKEN = range(5, 9)
# What a run came to that is done or not finite is not to be computed again.
ENDED = FINISHED, UNSTABLE
# After these the same command goes on, also after what signals leave behind (SIGABRT,
# SIGKILL, SIGTERM); after FINAL ones it would only come to the same.
AGAIN = TOLD_TO_LEAVE, LOST_PEER, STUCK, 134, 137, 143
FINAL = FAILED, REFUSED, NOT_SAVED, TAKEN


class Outcome(NamedTuple):
  """What an outcome.json says."""

  code: int  # An exit code of train.py.
  step: int  # The last that its metrics tell of; 0 for none.
  told: str = ''  # Why, in words.
  time: float = 0.0  # Seconds since 1970.

  @property
  def ended(self) -> bool:
    return self.code in ENDED


def read(workdir: storage.Path) -> Outcome | None:
  """A workdir -> how its last session ended; None if that is not told.

  ValueError for a file that no run wrote.
  """
  path = workdir / NAME
  try:
    return _parse(json.loads(storage.read(path, LIMIT)))
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def write(workdir: storage.Path, found: Outcome) -> None:
  text = json.dumps(found._asdict(), indent=2) + '\n'
  storage.write(workdir / NAME, text.encode())


def _parse(content: Any) -> Outcome:
  """A stranger's JSON -> Outcome; ValueError if it is none."""
  if not isinstance(content, dict):
    raise ValueError('not an object')
  known = {name: content[name] for name in Outcome._fields if name in content}
  for name in ('code', 'step'):
    value = known.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise ValueError(f'{name}={value!r}')
  if not isinstance(known.get('told', ''), str):
    raise ValueError(f'told={known["told"]!r}')
  return Outcome(**known)
