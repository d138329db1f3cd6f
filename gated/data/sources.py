"""Text, JSON lines, Parquet and folders of them -> named documents, in units of work.

A unit is about 16 MB of input: many small files, one file, or a range of a large one, so
that all processes can share one huge file. The units depend neither on the number of
processes nor on the location of the input.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from gated.data import folders, packed, table
from gated.data.faults import Fault, Report, describe, refuse

log = logging.getLogger(__name__)

UNIT = 1 << 24  # Bytes of input.
MAX_DOCUMENT = 1 << 30  # Bytes; a document is held in memory.
MAX_HEAD = 1 << 26  # Bytes of the first line of a .json file that may hold JSON lines.

MISSING = object()

Span = tuple[int, int]


class Piece(NamedTuple):
  """A file, or bytes (JSON lines) or row groups (Parquet) `start` to `stop` of it."""

  path: str
  name: str  # Path relative to the parent of the input; document names start with it.
  kind: str  # A key of KINDS.
  field: str  # The field with the text, in JSON lines and Parquet.
  encoding: str  # Of text and JSON lines; Parquet is always UTF-8.
  start: int
  stop: int


Unit = tuple[Piece, ...]  # The input of one process at a time.


def survey(
  paths: Sequence[str],
  *,
  field: str,
  suffixes: Sequence[str],
  encoding: str = 'utf-8',
  report: Report = refuse,
) -> list[Unit]:
  """Files and folders -> units.

  A file whose suffix is in `suffixes` but not in SUFFIXES is one document of text. If
  `suffixes` is not empty, only files with these suffixes are read from folders. The case
  of a suffix does not matter. Logs how many files of folders are passed over. Reports
  what cannot be read. ValueError for a missing path, an unknown suffix, or paths without
  input.
  """
  listing = folders.Listing(paths, suffixes or tuple(SUFFIXES), report)
  units: list[Unit] = []
  pieces: list[Piece] = []
  size, faults = 0, []
  for name, file, is_named in listing.files:
    try:
      kind = _kind(file, field, suffixes, is_named=is_named)
      splits = KINDS[kind].split(file, field) if kind else []
    except Fault as fault:
      faults.append(fault)
      continue
    except OSError as error:
      faults.append(Fault('unreadable', f'{file}: {describe(error)}'))
      continue
    if not kind:
      listing.skip(file)
    if kind.endswith('lines') and '\n'.encode(encoding) != b'\n':
      raise ValueError(f'--encoding={encoding!r} is for text, but {file} has JSON lines')
    for start, stop, weight in splits:
      if pieces and size + weight > UNIT:
        units.append(tuple(pieces))
        pieces, size = [], 0
      pieces.append(Piece(file, name, kind, field, encoding, start, stop))
      size += weight
  passed = listing.passed_over()
  if passed:
    log.info('%s: passed over %s (--suffixes=... reads text)', ', '.join(paths), passed)
  for fault in faults:
    report(fault)
  if not pieces:
    passed = f'; passed over {passed}' if passed else ''
    raise ValueError(f'{", ".join(paths)}: nothing to read{passed}')
  return [*units, tuple(pieces)]


def documents(unit: Unit, report: Report = refuse) -> Iterator[tuple[str, str]]:
  """A unit -> (name, text) pairs, empty texts included; reports what cannot be read."""
  for piece in unit:
    try:
      for name, data in KINDS[piece.kind].read(piece, report):
        encoding = 'utf-8' if piece.kind == 'parquet' else piece.encoding
        try:
          text = data.decode(encoding) if isinstance(data, bytes) else data
          text.encode()
        except UnicodeError as error:
          reason = f'not {encoding.upper()}'
          report(Fault(reason, f'{piece.path}: {name} is {reason}: {error}'))
          continue
        yield name, text
    except Fault as fault:
      report(fault)
    except OSError as error:
      report(Fault('unreadable', f'{piece.path}: {describe(error)}'))


def digest(unit: Unit) -> str:
  """SHA-256 of the content and the names of the unit's documents."""
  sha = hashlib.sha256(unit[0].field.encode())
  for piece in unit:
    sha.update(f'\0{piece.name}\0{piece.kind}\0'.encode('utf-8', 'surrogateescape'))
    try:
      with open(piece.path, 'rb') as file:
        for start, stop in KINDS[piece.kind].spans(file, piece):
          sha.update(f'{start} {stop}\0'.encode())
          file.seek(start)
          remaining = stop - start
          while remaining and (block := file.read(min(remaining, 1 << 20))):
            sha.update(block)
            remaining -= len(block)
    except OSError:
      sha.update(b'unreadable')  # `documents` reports it.
  return sha.hexdigest()


def _kind(path: str, field: str, suffixes: Sequence[str], *, is_named: bool) -> str:
  """-> a key of KINDS, or '' for a .json file of a folder without JSON lines.

  The name says whether a file holds text, JSON lines or Parquet; the content says whether
  it is compressed, and whether a .json file holds JSON lines.
  """
  name = path.lower()
  plain = name.removesuffix(next(filter(name.endswith, packed.SUFFIXES), ''))
  kind = next((PLAIN[suffix] for suffix in PLAIN if plain.endswith(suffix)), '')
  is_wanted = name.endswith(tuple(suffix.lower() for suffix in suffixes))
  if not kind and not is_wanted:
    raise ValueError(
      f'{path!r}: unknown suffix, but allowed are {", ".join(PLAIN)}, also compressed as '
      f'{", ".join(packed.SUFFIXES)}; --suffixes reads it as one document of text'
    )
  if kind == 'json':
    entry = _first_entry(path)
    is_lines = entry is not None and (is_named and not is_wanted)
    kind = 'lines' if is_lines or _find(entry, field) is not MISSING else ''
    if not kind and is_named and not is_wanted:
      text = f'{path!r}: its first line is no JSON object, but one per line is needed'
      raise Fault('not a line of JSON', text)
    if not kind and not is_wanted:
      return ''
  kind = kind or 'text'
  is_packed = packed.is_packed(path) and kind != 'parquet'
  return f'packed {kind}' if is_packed else kind


def _first_entry(path: str) -> dict[str, Any] | None:
  """A .json file -> the JSON object of its first line; None for any other first line."""
  with packed.unpacked(path) as file:
    try:
      entry = json.loads(file.readline(MAX_HEAD))
    except (ValueError, RecursionError):
      return None
  return entry if isinstance(entry, dict) else None


# Start and stop of each piece of a file, and its size in bytes.
Split = list[tuple[int, int, int]]


def _whole(path: str, field: str) -> Split:
  size = os.path.getsize(path)
  return [(0, size, size)] if size else []


def _one_text(path: str, field: str) -> Split:
  if (size := os.path.getsize(path)) > MAX_DOCUMENT:
    raise _too_large(path, f'{size} bytes')
  return _whole(path, field)


def _too_large(path: str, size: str) -> Fault:
  return Fault(
    'too large',
    f'{path!r} is one document of {size}, but {MAX_DOCUMENT} are allowed; split it into '
    'files or JSON lines',
  )


def _whole_span(file: BinaryIO, piece: Piece) -> list[Span]:
  return [(0, piece.stop)]


def _read_text(piece: Piece, report: Report) -> Iterator[tuple[str, bytes]]:
  with packed.unpacked(piece.path) as file:
    text = file.read(MAX_DOCUMENT + 1)
  if len(text) > MAX_DOCUMENT:
    raise _too_large(piece.path, f'more than {MAX_DOCUMENT} bytes, unpacked')
  yield piece.name, text


def _split_lines(path: str, field: str) -> Split:
  size = os.path.getsize(path)
  starts = range(0, size, UNIT)
  return [(i, min(i + UNIT, size), min(UNIT, size - i)) for i in starts]


def _line_span(file: BinaryIO, piece: Piece) -> list[Span]:
  """A line belongs to the range in which it starts."""

  def next_line(offset: int) -> int:
    if not offset:
      return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()

  return [(next_line(piece.start), next_line(piece.stop))]


def _read_lines(piece: Piece, report: Report) -> Iterator[tuple[str, str]]:
  with open(piece.path, 'rb') as file:
    ((start, stop),) = _line_span(file, piece)
    file.seek(start)
    yield from _lines(file, piece, start, stop, report)


def _read_packed_lines(piece: Piece, report: Report) -> Iterator[tuple[str, str]]:
  with packed.unpacked(piece.path) as file:
    yield from _lines(file, piece, 0, 1 << 62, report)


def _lines(
  file: Any, piece: Piece, start: int, stop: int, report: Report
) -> Iterator[tuple[str, str]]:
  while start < stop and (line := file.readline(MAX_DOCUMENT + 1)):
    size = len(line)
    try:
      if size > MAX_DOCUMENT:
        while not line.endswith(b'\n') and (line := file.readline(MAX_DOCUMENT)):
          size += len(line)
        raise Fault('too large', f'a line of more than {MAX_DOCUMENT} bytes')
      if line.strip():
        yield f'{piece.name}:{start}', _text(line, piece)
    except Fault as fault:
      text = f'{piece.path} at byte {start}: {fault}'
      report(Fault(fault.reason, text))
    start += size


def _text(line: bytes, piece: Piece) -> str:
  """A line of JSON -> the text in its field; null is an empty text."""
  try:
    utf8 = piece.encoding == 'utf-8'
    entry = json.loads(line if utf8 else line.decode(piece.encoding))
  except (ValueError, RecursionError) as error:
    text = f'not a line of JSON: {describe(error)}'
    raise Fault('not a line of JSON', text) from error
  found = _find(entry, piece.field)
  if found is None:
    return ''
  if not isinstance(found, str):
    content = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
    text = f'--field={piece.field!r} is no text there, only {content}'
    raise Fault('no text in the field', text)
  return found


def _find(entry: Any, field: str) -> Any:
  """-> a field of a JSON object, by its name or a dotted path; MISSING without it."""
  if not isinstance(entry, dict):
    return MISSING
  for name in [field] if field in entry else field.split('.'):
    entry = entry.get(name, MISSING) if isinstance(entry, dict) else MISSING
    if entry is None:
      break
  return entry


def _split_groups(path: str, field: str) -> Split:
  pieces, start, size = [], 0, 0
  groups = table.opened(path, field).metadata.num_row_groups
  for group in range(groups):
    size += table.column(path, field, group).total_uncompressed_size
    if size >= UNIT or group == groups - 1:
      pieces.append((start, group + 1, size))
      start, size = group + 1, 0
  return pieces


def _group_spans(file: BinaryIO, piece: Piece) -> list[Span]:
  spans = []
  for group in range(piece.start, piece.stop):
    column = table.column(piece.path, piece.field, group)
    start = column.dictionary_page_offset or column.data_page_offset
    spans.append((start, start + column.total_compressed_size))
  return spans


def _read_groups(piece: Piece, report: Report) -> Iterator[tuple[str, bytes]]:
  groups = range(piece.start, piece.stop)
  for name, text in table.read(piece.path, piece.field, groups, report):
    yield f'{piece.name}:{name}', text


class Kind(NamedTuple):
  """A kind of file: where to split it, the bytes of a piece, and its documents."""

  split: Callable[[str, str], Split]
  spans: Callable[[BinaryIO, Piece], list[Span]]
  read: Callable[[Piece, Report], Iterator[tuple[str, bytes | str]]]


KINDS = {
  'text': Kind(_one_text, _whole_span, _read_text),
  'packed text': Kind(_whole, _whole_span, _read_text),
  'lines': Kind(_split_lines, _line_span, _read_lines),
  'packed lines': Kind(_whole, _whole_span, _read_packed_lines),
  'parquet': Kind(_split_groups, _group_spans, _read_groups),
}
# 'json' holds JSON lines, or is passed over.
PLAIN = {
  '.txt': 'text',
  '.md': 'text',
  '.jsonl': 'lines',
  '.ndjson': 'lines',
  '.json': 'json',
  '.parquet': 'parquet',
}
# Read from folders.
SUFFIXES = PLAIN | {
  suffix + packing: kind
  for suffix, kind in PLAIN.items()
  for packing in packed.SUFFIXES
  if kind != 'parquet'
}
