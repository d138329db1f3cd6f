"""The line of our source that an instruction comes from.

The text of a program opens with tables of files, functions, locations and stack frames;
an instruction names its innermost frame.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gated.pods.compiled.hlo import Computation, Instruction

# The package's own folder; a clone, and its environment, may also be called gated.
PACKAGE = f'{Path(__file__).resolve().parents[2]}/'

_TABLE = re.compile(r'^(FileNames|FunctionNames|FileLocations|StackFrames)\s*$')
_ROW = re.compile(r'^(\d+) ["{](.*)["}]$')


@dataclass(frozen=True)
class Place:
  """'gated/model/moe/dropless.py', 203, 'Experts.__call__'."""

  file: str  # relative to the repository
  line: int
  function: str

  def __str__(self) -> str:
    return f'{self.file}:{self.line} {self.function}' if self.file else ''


NOWHERE = Place('', 0, '')


class Places:
  """A program's text -> the places of its instructions."""

  def __init__(self, text: str):
    self._tables: dict[str, dict[int, str]] = defaultdict(dict)
    table: dict[int, str] = {}
    for line in text.splitlines():
      if line.startswith(('%', 'ENTRY')):
        break
      header = _TABLE.match(line)
      if header:
        table = self._tables[header[1]]
      row = _ROW.match(line)
      if row:
        table[int(row[1])] = row[2]

  @cached_property
  def _ours(self) -> dict[int, Place]:
    """Frame -> its own place, or that of its innermost caller in gated/."""
    places = {0: NOWHERE}
    for frame, row in sorted(self._tables['StackFrames'].items()):
      fields = _fields(row)
      location = _fields(self._tables['FileLocations'][fields['file_location_id']])
      file = self._tables['FileNames'][location['file_name_id']]
      if file.startswith(PACKAGE):
        function = self._tables['FunctionNames'][location['function_name_id']]
        inside = f'gated/{file.removeprefix(PACKAGE)}'
        places[frame] = Place(inside, location['line'], function.replace('.<locals>', ''))
      else:
        # Parents are numbered from 2; 1 means no parent.
        places[frame] = places[fields['parent_frame_id'] - 1]
    return places

  def of(self, computation: Computation, op: Instruction) -> Place:
    """The innermost line of gated/ that an instruction comes from.

    An instruction without a frame, such as a copy that the compiler added, takes the
    place of its first operand, or else of its first user with a frame.
    """
    chain = [op]
    while chain[-1].operands and not _frame(chain[-1]):
      chain.append(computation.body[chain[-1].operands[0]])
    frames = map(_frame, [chain[-1], *computation.users[op.name]])
    return self._ours[next(filter(None, frames), 0)]


def _frame(op: Instruction) -> int:
  """The number of an instruction's innermost frame; 0 without one."""
  return int(op.find(r'stack_frame_id=(\d+)') or 0)


def _fields(row: str) -> dict[str, int]:
  return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', row)}
