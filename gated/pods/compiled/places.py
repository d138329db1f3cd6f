"""Where in our source an instruction comes from.

The text of a program opens with tables of files, functions, locations and stack frames;
an instruction names its innermost frame.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gated.pods.compiled.hlo import Computation, Instruction

# The package's own folder: a clone, and what is installed in it, may be called gated too.
PACKAGE = f'{Path(__file__).resolve().parents[2]}/'

_TABLE = re.compile(r'^(FileNames|FunctionNames|FileLocations|StackFrames)\s*$')
_TEXT = re.compile(r'^(\d+) "(.*)"$')
_ROW = re.compile(r'^(\d+) {(.*)}$')
_FRAME = re.compile(r'stack_frame_id=(\d+)')


@dataclass(frozen=True)
class Place:
  """'gated/model/moe/dropless.py', 203, 'Experts.__call__'."""

  file: str  # from gated/ on, where it is one of ours
  line: int
  function: str

  def __str__(self) -> str:
    return f'{self.file}:{self.line} {self.function}' if self.file else ''


NOWHERE = Place('', 0, '')


class Places:
  """A program's text -> the places of its instructions."""

  def __init__(self, text: str):
    self._tables: dict[str, dict[int, str]] = {}
    table = None
    for line in text.splitlines():
      if line.startswith(('%', 'ENTRY')):
        break
      header = _TABLE.match(line)
      if header:
        table = self._tables.setdefault(header[1], {})
      row = _TEXT.match(line) or _ROW.match(line)
      if row and table is not None:
        table[int(row[1])] = row[2]

  @cached_property
  def _ours(self) -> dict[int, Place]:
    """Frame -> the innermost of it and its callers that is in gated/."""
    names = {key: self._tables.get(key, {}) for key in ('FileNames', 'FunctionNames')}
    found: dict[int, Place] = {}
    for frame, row in sorted(self._tables.get('StackFrames', {}).items()):
      fields = _fields(row)
      at = _fields(self._tables['FileLocations'][fields['file_location_id']])
      file = names['FileNames'].get(at['file_name_id'], '')
      if file.startswith(PACKAGE):
        inside = f'gated/{file.removeprefix(PACKAGE)}'
        function = names['FunctionNames'].get(at['function_name_id'], '')
        found[frame] = Place(inside, at['line'], function.replace('.<locals>', ''))
      else:
        # The text's numbers of parents are one too high: 1 stands for none.
        found[frame] = found.get(fields['parent_frame_id'] - 1, NOWHERE)
    return found

  def of(self, computation: Computation, op: Instruction) -> Place:
    """The innermost line of gated/ that an instruction comes from.

    One without a frame, such as a copy that the compiler added, is from where its first
    operand is, or else its first user.
    """
    seen = set()
    at: Instruction | None = op
    while at is not None and at.name not in seen:
      seen.add(at.name)
      frame = _FRAME.search(at.words)
      if frame:
        return self._ours.get(int(frame[1]), NOWHERE)
      before = next((n for n in at.operands if n in computation.body), None)
      at = computation.body[before] if before else None
    for user in computation.users.get(op.name, ()):
      frame = _FRAME.search(user.words)
      if frame:
        return self._ours.get(int(frame[1]), NOWHERE)
    return NOWHERE


def _fields(row: str) -> dict[str, int]:
  return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', row)}
