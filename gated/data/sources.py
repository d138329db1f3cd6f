"""Text, JSON lines, Parquet and folders of them -> named documents, in units of work.

A unit is some 16 MB of input: many small files, one file, or a range of a large one, so
that a single huge file still occupies every process. What a unit holds does not depend on
how many processes there are, nor on where the input lies.
"""

import functools
import gzip
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

UNIT = 1 << 24  # Bytes of input.
MAX_DOCUMENT = 1 << 30  # Bytes; a document is held in memory.

Documents = Iterator[tuple[str, str]]


class Piece(NamedTuple):
  """A file, or bytes (JSON lines) or row groups (Parquet) `start` to `stop` of it."""

  path: str
  name: str  # From the folder that was named on: the documents are called by it.
  kind: str  # A key of KINDS.
  start: int
  stop: int


class Unit(NamedTuple):
  """What one process takes at a time."""

  pieces: tuple[Piece, ...]
  field: str  # That holds the text, in JSON lines and Parquet.


def survey(paths: Sequence[str], *, field: str, suffixes: Sequence[str]) -> list[Unit]:
  """Files and folders -> units.

  A file whose suffix is not in SUFFIXES must be in `suffixes`, and is one document; where
  there are `suffixes`, folders are read for those alone. ValueError for a path that is
  missing, of an unknown suffix, or without anything to read.
  """
  units, together, size = [], [], 0
  for path in paths:
    for name, found in _files(path, suffixes):
      for piece, weight in _split(found, name, _kind(found, suffixes), field):
        if together and size + weight > UNIT:
          units.append(Unit(tuple(together), field))
          together, size = [], 0
        together.append(piece)
        size += weight
  if together:
    units.append(Unit(tuple(together), field))
  if not units:
    raise ValueError(f'{", ".join(paths)}: there is nothing to read')
  return units


def documents(unit: Unit) -> Documents:
  """A unit -> (name, text) pairs; an empty text is one, too."""
  for piece in unit.pieces:
    for name, data in KINDS[piece.kind].read(piece, unit.field):
      try:
        text = data.decode() if isinstance(data, bytes) else data
        text.encode()
      except UnicodeError as error:
        raise ValueError(f'{piece.path}: {name} is not UTF-8: {error}') from error
      yield name, text


def digest(unit: Unit) -> str:
  """SHA-256 of all that the unit's documents are made of."""
  sha = hashlib.sha256(unit.field.encode())
  for piece in unit.pieces:
    sha.update(f'\0{piece.name}\0{piece.kind}\0'.encode())
    with open(piece.path, 'rb') as file:
      for start, stop in KINDS[piece.kind].spans(file, piece, unit.field):
        sha.update(f'{start} {stop}\0'.encode())
        file.seek(start)
        left = stop - start
        while left and (block := file.read(min(left, 1 << 20))):
          sha.update(block)
          left -= len(block)
  return sha.hexdigest()


def _files(path: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
  """A file or folder -> (name, path) of what is to be read, in an order of names."""
  base = os.path.basename(os.path.normpath(path))
  if os.path.isfile(path):
    yield base, path
    return
  if not os.path.isdir(path):
    raise ValueError(f'{path!r}: no such file or folder')
  wanted = tuple(suffixes) or tuple(SUFFIXES)
  for folder, folders, names in os.walk(path):
    folders.sort()
    for name in sorted(names):
      found = os.path.join(folder, name)
      if name.endswith(wanted) and os.path.isfile(found):
        yield os.path.relpath(found, os.path.dirname(os.path.normpath(path))), found


def _kind(path: str, suffixes: Sequence[str]) -> str:
  for suffix, kind in SUFFIXES.items():
    if path.endswith(suffix):
      return kind
  if path.endswith(tuple(suffixes)):
    return 'text'
  raise ValueError(
    f'{path!r}: unknown suffix, but allowed are {", ".join(SUFFIXES)}; read it as one '
    'document of text with --suffixes'
  )


def _split(path: str, name: str, kind: str, field: str) -> Iterator[tuple[Piece, int]]:
  """A file -> its pieces and how many bytes each is."""
  edges = KINDS[kind].edges(path, field)
  for (start, low), (stop, high) in itertools.pairwise(edges):
    yield Piece(path, name, kind, start, stop), high - low


# An edge is a place where a file may be cut, and how many bytes lie before it.
Edges = list[tuple[int, int]]


def _whole(path: str, field: str) -> Edges:
  size = os.path.getsize(path)
  if size > MAX_DOCUMENT and not path.endswith(('.gz', '.zst')):
    raise ValueError(
      f'{path!r} is one document of {size} bytes, but {MAX_DOCUMENT} are allowed; cut it '
      'into files, or into JSON lines'
    )
  return [(0, 0), (size, size)] if size else []


def _whole_span(file: BinaryIO, piece: Piece, field: str) -> list[tuple[int, int]]:
  return [(0, piece.stop)]


def _read_text(piece: Piece, field: str) -> Iterator[tuple[str, bytes]]:
  with open(piece.path, 'rb') as file:
    yield piece.name, file.read()


def _line_edges(path: str, field: str) -> Edges:
  size = os.path.getsize(path)
  return [(at, at) for at in [*range(0, size, UNIT), size]] if size else []


def _line_span(file: BinaryIO, piece: Piece, field: str) -> list[tuple[int, int]]:
  """A line belongs to the range that it starts in."""

  def line_from(offset: int) -> int:
    if not offset:
      return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()

  return [(line_from(piece.start), line_from(piece.stop))]


def _read_lines(piece: Piece, field: str) -> Iterator[tuple[str, str]]:
  with open(piece.path, 'rb') as file:
    ((start, stop),) = _line_span(file, piece, field)
    file.seek(start)
    yield from _lines(file, piece, field, start=start, stop=stop)


def _read_packed_lines(piece: Piece, field: str) -> Iterator[tuple[str, str]]:
  try:
    with _decompress(piece.path) as file:
      yield from _lines(file, piece, field, start=0, stop=1 << 62)
  except ValueError:
    raise
  except Exception as error:  # Each way of compression has its own.
    raise ValueError(f'{piece.path} cannot be unpacked: {error}') from error


def _decompress(path: str) -> Any:
  if path.endswith('.gz'):
    return gzip.open(path, 'rb')
  return _need('zstandard').open(path, 'rb')


def _lines(
  file: Any, piece: Piece, field: str, *, start: int, stop: int
) -> Iterator[tuple[str, str]]:
  at = start
  while at < stop and (line := file.readline(MAX_DOCUMENT + 1)):
    where = f'{piece.path} at byte {at}'
    if len(line) > MAX_DOCUMENT:
      raise ValueError(f'{where}: a line of more than {MAX_DOCUMENT} bytes')
    if line.strip():
      try:
        entry = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: not a line of JSON: {error}') from error
      if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f'{where}: --field={field!r} is no text there, which has {has}')
      yield f'{piece.name}:{at}', entry[field]
    at += len(line)


@functools.lru_cache(maxsize=4)
def _parquet(path: str, field: str) -> Any:
  parquet = _need('pyarrow.parquet')
  try:
    file = parquet.ParquetFile(path)
  except Exception as error:
    raise ValueError(f'{path!r} is not a Parquet file: {error}') from error
  types = {column.name: str(column.type) for column in file.schema_arrow}
  if types.get(field) not in ('string', 'large_string'):
    raise ValueError(
      f'{path!r}: --field={field!r} is no column of text, but it has {types}'
    )
  return file


def _column(path: str, field: str, group: int) -> Any:
  row_group = _parquet(path, field).metadata.row_group(group)
  columns = (row_group.column(i) for i in range(row_group.num_columns))
  return next(column for column in columns if column.path_in_schema == field)


def _group_edges(path: str, field: str) -> Edges:
  edges, total, cut = [(0, 0)], 0, 0
  groups = _parquet(path, field).metadata.num_row_groups
  for group in range(groups):
    total += _column(path, field, group).total_uncompressed_size
    if total - cut >= UNIT or group == groups - 1:
      edges.append((group + 1, total))
      cut = total
  return edges


def _group_spans(file: BinaryIO, piece: Piece, field: str) -> list[tuple[int, int]]:
  spans = []
  for group in range(piece.start, piece.stop):
    column = _column(piece.path, field, group)
    start = column.dictionary_page_offset or column.data_page_offset
    spans.append((start, start + column.total_compressed_size))
  return spans


def _read_groups(piece: Piece, field: str) -> Iterator[tuple[str, str]]:
  file = _parquet(piece.path, field)
  for group in range(piece.start, piece.stop):
    row = 0
    for table in file.iter_batches(1024, row_groups=[group], columns=[field]):
      for text in table.column(0).to_pylist():
        # A null is an empty text.
        yield f'{piece.name}:{group}:{row}', text or ''
        row += 1


class Kind(NamedTuple):
  """How a kind of file is cut, what bytes a piece is made of, and how it is read."""

  edges: Callable[[str, str], Edges]
  spans: Callable[[BinaryIO, Piece, str], list[tuple[int, int]]]
  read: Callable[[Piece, str], Iterator[tuple[str, bytes | str]]]


KINDS = {
  'text': Kind(_whole, _whole_span, _read_text),
  'lines': Kind(_line_edges, _line_span, _read_lines),
  'packed lines': Kind(_whole, _whole_span, _read_packed_lines),
  'parquet': Kind(_group_edges, _group_spans, _read_groups),
}
SUFFIXES = {
  '.txt': 'text',
  '.md': 'text',
  '.jsonl': 'lines',
  '.jsonl.gz': 'packed lines',
  '.jsonl.zst': 'packed lines',
  '.parquet': 'parquet',
}


def _need(package: str) -> Any:
  """An optional package, imported only when a file asks for it."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    name = package.partition('.')[0]
    raise ValueError(f'this input needs a package: pip install {name}') from error
