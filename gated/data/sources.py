"""Text, JSON lines, Parquet and folders of them -> named documents, in units of work.

A unit is about 16 MB of input: many small files, one file, or a range of a large one, so
that all processes can share one huge file. The units depend neither on the number of
processes nor on the location of the input.
"""

import functools
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from gated.data import tokenizer

UNIT = 1 << 24  # Bytes of input.
MAX_DOCUMENT = 1 << 30  # Bytes; a document is held in memory.

Span = tuple[int, int]


class Piece(NamedTuple):
  """A file, or bytes (JSON lines) or row groups (Parquet) `start` to `stop` of it."""

  path: str
  name: str  # Path relative to the parent of the input; document names start with it.
  kind: str  # A key of KINDS.
  field: str  # The field with the text, in JSON lines and Parquet.
  start: int
  stop: int


Unit = tuple[Piece, ...]  # The input of one process at a time.


def survey(paths: Sequence[str], *, field: str, suffixes: Sequence[str]) -> list[Unit]:
  """Files and folders -> units.

  A file whose suffix is in `suffixes` but not in SUFFIXES is one document of text. If
  `suffixes` is not empty, only files with these suffixes are read from folders.
  ValueError for a missing path, an unknown suffix, or paths without input.
  """
  units: list[Unit] = []
  pieces: list[Piece] = []
  size = 0
  for path in paths:
    for name, file in _files(path, suffixes):
      kind = _kind(file, suffixes)
      for start, stop, weight in KINDS[kind].split(file, field):
        if pieces and size + weight > UNIT:
          units.append(tuple(pieces))
          pieces, size = [], 0
        pieces.append(Piece(file, name, kind, field, start, stop))
        size += weight
  if not pieces:
    raise ValueError(f'{", ".join(paths)}: nothing to read')
  return [*units, tuple(pieces)]


def documents(unit: Unit) -> Iterator[tuple[str, str]]:
  """A unit -> (name, text) pairs, empty texts included."""
  for piece in unit:
    for name, data in KINDS[piece.kind].read(piece):
      try:
        text = data.decode() if isinstance(data, bytes) else data
        text.encode()
      except UnicodeError as error:
        raise ValueError(f'{piece.path}: {name} is not UTF-8: {error}') from error
      yield name, text


def digest(unit: Unit) -> str:
  """SHA-256 of the content and the names of the unit's documents."""
  sha = hashlib.sha256(unit[0].field.encode())
  for piece in unit:
    sha.update(f'\0{piece.name}\0{piece.kind}\0'.encode())
    with open(piece.path, 'rb') as file:
      for start, stop in KINDS[piece.kind].spans(file, piece):
        sha.update(f'{start} {stop}\0'.encode())
        file.seek(start)
        remaining = stop - start
        while remaining and (block := file.read(min(remaining, 1 << 20))):
          sha.update(block)
          remaining -= len(block)
  return sha.hexdigest()


def _files(path: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
  """A file or folder -> (name, path) of each file to read, sorted."""
  parent, base = os.path.split(os.path.normpath(path))
  if os.path.isfile(path):
    yield base, path
    return
  if not os.path.isdir(path):
    raise ValueError(f'{path!r}: no such file or folder')
  endings = tuple(suffixes) or tuple(SUFFIXES)
  for folder, folders, names in os.walk(path):
    folders.sort()
    for name in sorted(names):
      file = os.path.join(folder, name)
      if name.endswith(endings) and os.path.isfile(file):
        yield os.path.relpath(file, parent), file


def _kind(path: str, suffixes: Sequence[str]) -> str:
  for suffix, kind in SUFFIXES.items():
    if path.endswith(suffix):
      return kind
  if path.endswith(tuple(suffixes)):
    return 'text'
  raise ValueError(
    f'{path!r}: unknown suffix, but allowed are {", ".join(SUFFIXES)}; --suffixes reads '
    'it as one document of text'
  )


# Start and stop of each piece of a file, and its size in bytes.
Split = list[tuple[int, int, int]]


def _whole(path: str, field: str) -> Split:
  size = os.path.getsize(path)
  if size > MAX_DOCUMENT and not path.endswith(('.gz', '.zst')):
    raise ValueError(
      f'{path!r} is one document of {size} bytes, but {MAX_DOCUMENT} are allowed; split '
      'it into files or JSON lines'
    )
  return [(0, size, size)] if size else []


def _whole_span(file: BinaryIO, piece: Piece) -> list[Span]:
  return [(0, piece.stop)]


def _read_text(piece: Piece) -> Iterator[tuple[str, bytes]]:
  with open(piece.path, 'rb') as file:
    yield piece.name, file.read()


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


def _read_lines(piece: Piece) -> Iterator[tuple[str, str]]:
  with open(piece.path, 'rb') as file:
    ((start, stop),) = _line_span(file, piece)
    file.seek(start)
    yield from _lines(file, piece, start, stop)


def _read_packed_lines(piece: Piece) -> Iterator[tuple[str, str]]:
  is_gzip = piece.path.endswith('.gz')
  unpack = gzip.open if is_gzip else tokenizer.optional('zstandard').open
  try:
    with unpack(piece.path, 'rb') as file:
      yield from _lines(file, piece, 0, 1 << 62)
  except ValueError:
    raise
  except Exception as error:  # Each library raises its own.
    raise ValueError(f'{piece.path} cannot be unpacked: {error}') from error


def _lines(file: Any, piece: Piece, start: int, stop: int) -> Iterator[tuple[str, str]]:
  field = piece.field
  while start < stop and (line := file.readline(MAX_DOCUMENT + 1)):
    where = f'{piece.path} at byte {start}'
    if len(line) > MAX_DOCUMENT:
      raise ValueError(f'{where}: a line of more than {MAX_DOCUMENT} bytes')
    if line.strip():
      try:
        entry = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: not a line of JSON: {error}') from error
      if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        content = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f'{where}: --field={field!r} is no text there, only {content}')
      yield f'{piece.name}:{start}', entry[field]
    start += len(line)


@functools.lru_cache(maxsize=4)
def _parquet(path: str, field: str) -> Any:
  parquet = tokenizer.optional('pyarrow.parquet')
  try:
    file = parquet.ParquetFile(path)
  except Exception as error:
    raise ValueError(f'{path!r} is not a Parquet file: {error}') from error
  types = {column.name: str(column.type) for column in file.schema_arrow}
  if types.get(field) not in ('string', 'large_string'):
    raise ValueError(f'{path!r}: --field={field!r} is no column of text; it has {types}')
  return file


def _column(path: str, field: str, group: int) -> Any:
  row_group = _parquet(path, field).metadata.row_group(group)
  columns = (row_group.column(i) for i in range(row_group.num_columns))
  return next(column for column in columns if column.path_in_schema == field)


def _split_groups(path: str, field: str) -> Split:
  pieces, start, size = [], 0, 0
  groups = _parquet(path, field).metadata.num_row_groups
  for group in range(groups):
    size += _column(path, field, group).total_uncompressed_size
    if size >= UNIT or group == groups - 1:
      pieces.append((start, group + 1, size))
      start, size = group + 1, 0
  return pieces


def _group_spans(file: BinaryIO, piece: Piece) -> list[Span]:
  spans = []
  for group in range(piece.start, piece.stop):
    column = _column(piece.path, piece.field, group)
    start = column.dictionary_page_offset or column.data_page_offset
    spans.append((start, start + column.total_compressed_size))
  return spans


def _read_groups(piece: Piece) -> Iterator[tuple[str, str]]:
  file = _parquet(piece.path, piece.field)
  for group in range(piece.start, piece.stop):
    batches = file.iter_batches(1024, row_groups=[group], columns=[piece.field])
    texts = (text for batch in batches for text in batch.column(0).to_pylist())
    for row, text in enumerate(texts):
      yield f'{piece.name}:{group}:{row}', text or ''  # A null is an empty text.


class Kind(NamedTuple):
  """A kind of file: where to split it, the bytes of a piece, and its documents."""

  split: Callable[[str, str], Split]
  spans: Callable[[BinaryIO, Piece], list[Span]]
  read: Callable[[Piece], Iterator[tuple[str, bytes | str]]]


KINDS = {
  'text': Kind(_whole, _whole_span, _read_text),
  'lines': Kind(_split_lines, _line_span, _read_lines),
  'packed lines': Kind(_whole, _whole_span, _read_packed_lines),
  'parquet': Kind(_split_groups, _group_spans, _read_groups),
}
SUFFIXES = {
  '.txt': 'text',
  '.md': 'text',
  '.jsonl': 'lines',
  '.jsonl.gz': 'packed lines',
  '.jsonl.zst': 'packed lines',
  '.parquet': 'parquet',
}
