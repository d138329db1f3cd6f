"""head.json, beside the steps: where a run stands, and which steps it went back from.

It is a hint. The steps are the truth, and a head that is damaged is passed over.
"""

import json
import logging
from dataclasses import asdict, dataclass, fields, replace

from gated import storage

NAME = 'head.json'
LIMIT = 1 << 20  # Bytes.

_log = logging.getLogger('gated')


@dataclass(frozen=True, kw_only=True)
class Head:
  step: int | None = None  # The last committed, or gone back to; None: nowhere yet.
  discarded: tuple[int, ...] = ()  # Steps past it, of a history that was left.
  data_step: int | None = None  # Where the data goes on after a rollback to `step`.


def read(directory: storage.Path) -> Head:
  path = directory / NAME
  try:
    found = json.loads(storage.read(path, LIMIT))
    return _checked(found)
  except (FileNotFoundError, NotADirectoryError):
    return Head()
  except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
    if isinstance(error, OSError) and storage.is_remote(path):
      raise
    _log.warning('%s is damaged, and passed over: %s', path, error)
    return Head()


def _checked(found: dict) -> Head:
  head = Head(**{field.name: found[field.name] for field in fields(Head)})
  numbers = [*head.discarded, *(n for n in (head.step, head.data_step) if n is not None)]
  if not all(type(n) is int and n >= 0 for n in numbers):
    raise ValueError(f'{found!r} is not where a run stands'[:200])
  return replace(head, discarded=tuple(head.discarded))


def write(directory: storage.Path, head: Head) -> None:
  storage.write(directory / NAME, (json.dumps(asdict(head)) + '\n').encode())
