"""The result of the last session in a workdir: WORKDIR/outcome.json.

train.py writes it at exit; the launcher of the run reads it. This module imports few
packages, because a launcher may run before the others are installed.
"""

import json
from typing import Any, NamedTuple

from gated import storage
from gated.run import exit_codes

NAME = 'outcome.json'
LIMIT = 1 << 20  # Bytes.


class Outcome(NamedTuple):
  """The fields of outcome.json."""

  code: int  # An exit code of train.py.
  step: int  # The last step in metrics.jsonl; 0 for none.
  told: str = ''  # The reason, one sentence.
  time: float = 0.0  # Seconds since 1970.

  @property
  def ended(self) -> bool:
    return self.code in exit_codes.ENDED


def read(workdir: storage.Path) -> Outcome | None:
  """A workdir -> the outcome of its last session; None without outcome.json.

  ValueError if the file is damaged.
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
  """Untrusted JSON -> Outcome; ValueError if its fields are wrong."""
  if not isinstance(content, dict):
    raise ValueError('not a JSON object')
  fields = {name: content[name] for name in Outcome._fields if name in content}
  for name in ('code', 'step'):
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise ValueError(f'{name}={value!r}')
  if not isinstance(fields.get('told', ''), str):
    raise ValueError(f'told={fields["told"]!r}')
  return Outcome(**fields)
