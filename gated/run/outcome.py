"""How the last session in a workdir ended: WORKDIR/outcome.json.

train.py writes it as it leaves; who launched the run, here or on a cluster, reads it. It
needs few packages, for a host reads it before it has more.
"""

import json
from typing import Any, NamedTuple

from gated import storage
from gated.run import exit_codes

NAME = 'outcome.json'
LIMIT = 1 << 20  # Bytes.


class Outcome(NamedTuple):
  """What an outcome.json says."""

  code: int  # An exit code of train.py.
  step: int  # The last that its metrics tell of; 0 for none.
  told: str = ''  # Why, in words.
  time: float = 0.0  # Seconds since 1970.

  @property
  def ended(self) -> bool:
    return self.code in exit_codes.ENDED


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


def write(workdir: storage.Path, outcome: Outcome) -> None:
  storage.write_json(workdir / NAME, outcome._asdict())


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
