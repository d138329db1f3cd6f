"""The result of the last session in a workdir: WORKDIR/outcome.json.

train.py writes it at exit; the launcher of the run reads it. This module imports few
packages, because a launcher may run before the others are installed.
"""

from typing import NamedTuple

from gated import config, storage
from gated.run import exit_codes, terminal

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

  ValueError if the file is damaged. Unknown fields, of a later version, are ignored.
  """
  path = workdir / NAME
  try:
    content = storage.read_json(path, LIMIT)
    fields = {name: content[name] for name in Outcome._fields if name in content}
    outcome = config.build(Outcome, Outcome._field_defaults | fields, NAME)
    for name in ('code', 'step'):
      config.at_least(name, getattr(outcome, name), 0)
    return outcome._replace(told=terminal.visible(outcome.told))
  except FileNotFoundError:
    return None
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def write(workdir: storage.Path, outcome: Outcome) -> None:
  storage.write_json(workdir / NAME, outcome._asdict())
