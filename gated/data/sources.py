"""Text, JSON lines, Parquet and folders of them -> named documents, in units of work.

A unit is about 16 MB of input: many small files, one file, or a range of a large one, so
that all processes can share one huge file. The units depend neither on the number of
processes nor on the location of the input.
"""

import codecs
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from gated.data import folders, hub, ids, lines, packed, pieces, table
from gated.data.documents import Document, Text
from gated.data.faults import Fault, Report, describe, refuse
from gated.data.pieces import Kind, Piece, Reading, Unit

log = logging.getLogger(__name__)

MAX_TEXT = 1 << 36  # Bytes of a document of text, unpacked.


def survey(
  paths: Sequence[str],
  reading: Reading,
  *,
  suffixes: Sequence[str] = (),
  report: Report = refuse,
  pins: dict[str, str] | None = None,
) -> list[Unit]:
  """Files, folders and datasets of the hub -> units.

  A file whose suffix is in `suffixes` but not in PLAIN is one document of text. If
  `suffixes` is not empty, only files with these suffixes are read from folders. The case
  of a suffix does not matter. Logs how many files of folders are passed over. Reports
  what cannot be read. ValueError for a missing path, an unknown suffix, or paths without
  input.
  """
  plain, pins = IDS if reading.ids else PLAIN, {} if pins is None else pins
  local = [path for path in paths if not path.startswith(hub.PREFIX)]
  listing = folders.Listing(local, suffixes or tuple(_endings(plain)), report)
  faults: list[Fault] = []
  found: list[tuple[Piece, int]] = []  # With its bytes.
  for name, file, is_named in listing.files:
    try:
      kind = _kind(file, reading, suffixes, is_named=is_named)
      splits = KINDS[kind].split(file, reading) if kind else []
    except Fault as fault:
      faults.append(fault)
      continue
    except OSError as error:
      faults.append(Fault('unreadable', f'{file}: {describe(error)}'))
      continue
    if not kind:
      listing.skip(file)
    elif not splits:
      listing.passed['empty files'] += 1
    if kind.endswith('lines') and '\n'.encode(reading.encoding) != b'\n':
      raise ValueError(
        f'--encoding={reading.encoding!r} is for text, but {file} has JSON lines'
      )
    for start, stop, size in splits:
      found.append((Piece(file, name, kind, reading, start, stop), size))
  passed = listing.passed_over()
  if passed:
    log.info('%s: passed over %s (--suffixes=... reads text)', ', '.join(paths), passed)
  for path in paths:
    if path.startswith(hub.PREFIX):
      found += [(piece, pieces.UNIT) for piece in hub.survey(path, reading, pins)]
  for fault in faults:
    report(fault)
  if not found:
    passed = f'; passed over {passed}' if passed else ''
    raise ValueError(f'{", ".join(paths)}: nothing to read{passed}')
  return _grouped(found)


def _grouped(found: list[tuple[Piece, int]]) -> list[Unit]:
  """Pieces and their bytes -> units of at most pieces.UNIT bytes, or of one piece."""
  units: list[Unit] = []
  group: list[Piece] = []
  total = 0
  for piece, size in found:
    if group and total + size > pieces.UNIT:
      units.append(tuple(group))
      group, total = [], 0
    group.append(piece)
    total += size
  return [*units, tuple(group)]


def describe_unit(unit: Unit) -> str:
  """-> the files of a unit, for messages."""
  files = list(dict.fromkeys(piece.path for piece in unit))
  return files[0] + (f' and {len(files) - 1} further files' if files[1:] else '')


def documents(unit: Unit, report: Report = refuse) -> Iterator[tuple[str, Document]]:
  """A unit -> (name, document) pairs, empty ones included; reports what cannot be read.

  The text of a file is read later, so its faults are raised by the document.
  """
  for piece in unit:
    try:
      for name, data in KINDS[piece.kind].read(piece, report):
        if not isinstance(data, (str, bytes)):
          yield name, data
          continue
        try:
          blocks = _Slices(data.decode() if isinstance(data, bytes) else data)
          for block in blocks:
            block.encode()  # JSON may have half of a character.
        except UnicodeError as error:
          report(_undecoded(piece, name, error))
          continue
        data = b''
        yield name, Text(blocks)
    except Fault as fault:
      report(fault)
    except OSError as error:
      report(Fault('unreadable', f'{piece.path}: {describe(error)}'))


def digest(unit: Unit) -> str:
  """SHA-256 of the content and the names of the unit's documents."""
  sha = hashlib.sha256(unit[0].reading.field.encode())
  for piece in unit:
    sha.update(f'\0{piece.name}\0{piece.kind}\0'.encode('utf-8', 'surrogateescape'))
    if piece.kind == 'hub':
      _, *pinned = hub.Source.parse(piece.path)
      sha.update(f'{pinned} {piece.start}'.encode())
      continue
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


def _kind(path: str, reading: Reading, suffixes: Sequence[str], *, is_named: bool) -> str:
  """-> a key of KINDS, or '' for a .json file of a folder without JSON lines.

  The name says whether a file holds text, JSON lines, Parquet or ids; the content says
  whether it is compressed, and whether a .json file holds JSON lines.
  """
  name, table = path.lower(), IDS if reading.ids else PLAIN
  plain = name.removesuffix(next(filter(name.endswith, packed.SUFFIXES), ''))
  kind = next((table[suffix] for suffix in table if plain.endswith(suffix)), '')
  is_wanted = name.endswith(tuple(suffix.lower() for suffix in suffixes))
  if not kind and not is_wanted:
    raise ValueError(
      f'{path!r}: unknown suffix, but allowed are {", ".join(table)}, also compressed as '
      f'{", ".join(packed.SUFFIXES)}; --suffixes reads it as one document of text, --ids '
      'reads .bin of token ids'
    )
  if kind == 'json':
    entry = lines.first_entry(path)
    is_lines = entry is not None and (is_named and not is_wanted)
    has_field = lines.find(entry, reading.field) is not lines.MISSING
    kind = 'lines' if is_lines or has_field else ''
    if not kind and is_named and not is_wanted:
      text = f'{path!r}: its first line is no JSON object, but one per line is needed'
      raise Fault('not a line of JSON', text)
    if not kind and not is_wanted:
      return ''
  kind = kind or ('ids' if reading.ids else 'text')
  if kind == 'ids' and ids.megatron_index(path):
    kind = 'Megatron'
  return f'packed {kind}' if kind in PACKABLE and packed.is_packed(path) else kind


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """The text of a file, in blocks."""

  piece: Piece

  def __iter__(self) -> Iterator[str]:
    path, encoding = self.piece.path, self.piece.reading.encoding
    decoder: Any = codecs.getincrementaldecoder(encoding)()
    before = 0  # Bytes that are decoded.
    with packed.unpacked(path) as file:
      while True:
        data = file.read(pieces.BLOCK)
        kept = decoder.getstate()[0]
        try:
          text = decoder.decode(data, not data)
        except UnicodeError as error:
          start = before - len(kept)
          raise _undecoded(self.piece, self.piece.name, error, start) from error
        before += len(data)
        if before > MAX_TEXT:
          raise pieces.too_large(path, f'more than {MAX_TEXT} bytes', MAX_TEXT)
        if text or not data:
          yield text
        if not data:
          return


@dataclasses.dataclass(frozen=True)
class _Slices:
  """A text in memory, in blocks that are copied one at a time."""

  text: str

  def __iter__(self) -> Iterator[str]:
    for start in range(0, len(self.text) or 1, pieces.BLOCK):
      yield self.text[start : start + pieces.BLOCK]


def _undecoded(piece: Piece, name: str, error: UnicodeError, before: int = 0) -> Fault:
  encoding = 'UTF-8' if piece.kind == 'parquet' else piece.reading.encoding.upper()
  behind = f' (behind {before:,} bytes)' if before else ''
  text = f'{piece.path}: {name} is not {encoding}: {describe(error)}{behind}'
  return Fault(f'not {encoding}', text)


def _read_text(piece: Piece, report: Report) -> Iterator[tuple[str, Text]]:
  yield piece.name, Text(_Blocks(piece))


KINDS = {
  'text': Kind(pieces.whole, pieces.whole_span, _read_text),
  'packed text': Kind(pieces.whole, pieces.whole_span, _read_text),
  'lines': Kind(lines.split, lines.span, lines.read),
  'packed lines': Kind(pieces.whole, pieces.whole_span, lines.read_packed),
  'parquet': Kind(table.split, table.spans, table.read),
  'ids': Kind(ids.split, ids.spans, ids.read),
  'Megatron': Kind(ids.split_megatron, ids.spans_megatron, ids.read_megatron),
  'hub': Kind(pieces.whole, hub.spans, hub.read),
}
PACKABLE = {kind.removeprefix('packed ') for kind in KINDS if kind.startswith('packed ')}
# 'json' holds JSON lines, or is passed over.
LINES = {'.jsonl': 'lines', '.ndjson': 'lines', '.json': 'json', '.parquet': 'parquet'}
PLAIN = {'.txt': 'text', '.md': 'text'} | LINES
IDS = {'.bin': 'ids'} | LINES


def _endings(plain: dict[str, str]) -> Iterator[str]:
  """Suffixes and kinds -> what is read from folders."""
  for suffix, kind in plain.items():
    yield suffix
    if kind in (*PACKABLE, 'json'):
      yield from (suffix + packing for packing in packed.SUFFIXES)
