"""head.json, beside the steps: the position of a run, and the steps that it discarded.

It is only a hint: the committed steps take precedence, and a damaged head.json is ignored
with a warning.
"""

import logging
from dataclasses import asdict, dataclass, fields, replace

from gated import storage
from gated.run.checkpoint import manifest

NAME = 'head.json'
LIMIT = 1 << 20  # Bytes.

_log = logging.getLogger('gated')


@dataclass(frozen=True, kw_only=True)
class Head:
  step: int | None = None  # The last step committed or returned to; None before any.
  discarded: tuple[int, ...] = ()  # Later steps on disk, discarded by a return to `step`.
  data_step: int | None = None  # The data step to continue from after a rollback.
  asked: str = ''  # The --restore_step of the last session.


def read(directory: storage.Path) -> Head:
  try:
    content = {'asked': ''} | manifest.load(directory / NAME, LIMIT)  # Once without it.
    head = Head(**{field.name: content[field.name] for field in fields(Head)})
    numbers = [
      *head.discarded,
      *(n for n in (head.step, head.data_step) if n is not None),
    ]
    whole = all(type(n) is int and n >= 0 for n in numbers)
    if not (whole and isinstance(head.asked, str)):
      raise ValueError(f'wrong values in {content!r}'[:200])
    return replace(head, discarded=tuple(head.discarded))
  except FileNotFoundError:
    return Head()
  except (ValueError, KeyError, TypeError) as error:
    _log.warning('%s is damaged and ignored: %s', directory / NAME, error)
    return Head()


def write(directory: storage.Path, head: Head) -> None:
  storage.write_json(directory / NAME, asdict(head), indent=None)
