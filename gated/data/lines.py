"""JSON lines: one document per line, a text or a list of token ids in a field."""

import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from gated.data import ids, packed, pieces
from gated.data.faults import Fault, Report, describe
from gated.data.pieces import Piece, Reading, Span, Split

MAX_HEAD = 1 << 26  # Bytes of the first line of a .json file that may hold JSON lines.
MISSING = object()


def first_entry(path: str) -> dict[str, Any] | None:
  """A .json file -> the JSON object of its first line; None for any other first line."""
  with packed.unpacked(path) as file:
    try:
      entry = json.loads(file.readline(MAX_HEAD))
    except (ValueError, RecursionError):
      return None
  return entry if isinstance(entry, dict) else None


def split(path: str, reading: Reading) -> Split:
  size = os.path.getsize(path)
  starts = range(0, size, pieces.UNIT)
  return [(i, min(i + pieces.UNIT, size), min(pieces.UNIT, size - i)) for i in starts]


def span(file: BinaryIO, piece: Piece) -> list[Span]:
  """A line belongs to the range in which it starts."""

  def next_line(offset: int) -> int:
    if not offset:
      return 0
    file.seek(offset - 1)
    while (part := file.readline(pieces.BLOCK)) and not part.endswith(b'\n'):
      pass  # The rest of a long line is not held.
    return file.tell()

  return [(next_line(piece.start), next_line(piece.stop))]


def read(piece: Piece, report: Report) -> Iterator[tuple[str, Any]]:
  with open(piece.path, 'rb') as file:
    ((start, stop),) = span(file, piece)
    file.seek(start)
    yield from _lines(file, piece, start, stop, report)


def read_packed(piece: Piece, report: Report) -> Iterator[tuple[str, Any]]:
  with packed.unpacked(piece.path) as file:
    yield from _lines(file, piece, 0, 1 << 62, report)


def _lines(
  file: Any, piece: Piece, start: int, stop: int, report: Report
) -> Iterator[tuple[str, Any]]:
  while start < stop and (line := file.readline(pieces.MAX_DOCUMENT + 1)):
    size = len(line)
    try:
      if size > pieces.MAX_DOCUMENT:
        while not line.endswith(b'\n') and (line := file.readline(pieces.MAX_DOCUMENT)):
          size += len(line)
        raise Fault('too large', f'a line of more than {pieces.MAX_DOCUMENT} bytes')
      if not line.isspace():
        entry, line = _parse(line, piece), b''  # Of a long line one copy is kept.
        yield from entries(f'{piece.name}:{start}', entry, piece)
        entry = None
    except Fault as fault:
      text = f'{piece.path} at byte {start}: {fault}'
      report(Fault(fault.reason, text))
    start += size


def _parse(line: bytes, piece: Piece) -> Any:
  encoding = piece.reading.encoding
  try:
    return json.loads(line if encoding == 'utf-8' else line.decode(encoding))
  except (ValueError, RecursionError) as error:
    text = f'not a line of JSON: {describe(error)}'
    raise Fault('not a line of JSON', text) from error


def entries(name: str, entry: Any, piece: Piece) -> Iterator[tuple[str, Any]]:
  """A JSON object -> (name, text or ids in its field); null is an empty text."""
  reading = piece.reading
  found = find(entry, reading.field)
  if found is None:
    yield name, ''
  elif isinstance(found, str) and not reading.ids:
    yield name, found
  elif reading.ids and isinstance(found, list) and {*map(type, found)} <= {int}:
    place = f'{piece.path}: {name}'
    yield from ids.divided(name, place, ids.array(found, place), reading.eos)
  else:
    content = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
    wanted = 'list of ids' if reading.ids else 'text'
    text = f'--field={reading.field!r} is no {wanted} there, only {content}'
    raise Fault(f'no {wanted} in the field', text)


def find(entry: Any, field: str) -> Any:
  """-> a field of a JSON object, by its name or a dotted path; MISSING without it."""
  if not isinstance(entry, dict):
    return MISSING
  for name in [field] if field in entry else field.split('.'):
    entry = entry.get(name, MISSING) if isinstance(entry, dict) else MISSING
    if entry is None:
      break
  return entry
