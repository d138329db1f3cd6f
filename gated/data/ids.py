"""Token ids that exist already: .bin files of nanoGPT, llm.c and Megatron, lists of ids.

  nanoGPT    .bin: ids without a header, uint16 or uint32
  llm.c      .bin: 256 int32 (magic, version, number of ids), then uint16 or uint32
  Megatron   .idx: magic, version, dtype, sizes and places of sequences, first sequence
             of each document (core/datasets/indexed_dataset.py of Megatron-LM); .bin: ids

The end-of-text token divides a file into documents; Megatron's .idx does so too.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gated.data import pieces, tokenizer
from gated.data.documents import Document, Ids
from gated.data.faults import Fault, Report, describe
from gated.data.pieces import Piece, Reading, Span, Split

DTYPES = ('uint16', 'uint32')
HEADER = 1024  # Bytes of llm.c's header.
HEADERS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}  # Magic -> version, dtype.
MEGATRON = b'MMIDIDX\x00\x00'
CODES = {1: '<u1', 2: '<i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}  # Of Megatron.
SAMPLE = 1 << 12  # Ids that are compared with the tokenizer.
AGREE = 0.95  # Share of their pairs that its encoding of their text must have.
DAMAGED = 'damaged ids'


class _Stream(NamedTuple):
  """The ids of a .bin file."""

  ids_N: np.ndarray
  base: int  # The first byte.


def _opened(path: str, reading: Reading) -> _Stream:
  """A .bin file of nanoGPT or llm.c -> its ids, memory-mapped."""
  size = os.path.getsize(path)
  with open(path, 'rb') as file:
    head = np.frombuffer(file.read(12).ljust(12, b'\0'), '<i4')
  version, dtype = HEADERS.get(int(head[0]), (0, ''))
  base, count = 0, None
  if dtype and head[1] == version and size >= HEADER:
    base, count = HEADER, int(head[2])
  else:
    dtype = {'uint16': '<u2', 'uint32': '<u4'}[reading.ids]
  width = np.dtype(dtype).itemsize
  if (size - base) % width or (count is not None and count * width != size - base):
    said = '' if count is None else f', and its header says {count} ids'
    raise Fault(
      DAMAGED, f'{path} has {size - base} bytes of ids of {width} bytes each{said}'
    )
  if size == base:
    return _Stream(np.zeros(0, dtype), base)
  ids_N: np.ndarray = np.memmap(path, dtype, 'r', base)
  sample_N = ids_N[: SAMPLE // 2 * 2]
  if base == 0 and width == 2 and len(sample_N) > 64 and not sample_N[1::2].any():
    raise Fault(DAMAGED, f'{path}: every second uint16 is 0: use --ids=uint32')
  return _Stream(ids_N, base)


def split(path: str, reading: Reading) -> Split:
  ids_N, _ = _opened(path, reading)
  step = max(1, pieces.UNIT // ids_N.itemsize)
  starts = range(0, len(ids_N), step)
  stops = [min(i + step, len(ids_N)) for i in starts]
  return [(i, j, (j - i) * ids_N.itemsize) for i, j in zip(starts, stops)]


def spans(file: BinaryIO, piece: Piece) -> list[Span]:
  ids_N, base = _opened(piece.path, piece.reading)
  start, stop = _documents(ids_N, piece)
  return [(base + start * ids_N.itemsize, base + stop * ids_N.itemsize)]


def _documents(ids_N: np.ndarray, piece: Piece) -> Span:
  """-> the ids of the documents that start in a piece."""
  start = _next(ids_N, piece.start, piece.stop, piece.reading.eos)
  if start == piece.stop:
    return start, start
  return start, _next(ids_N, piece.stop, len(ids_N), piece.reading.eos)


def _next(ids_N: np.ndarray, start: int, stop: int, eos: int) -> int:
  """-> where the first document from `start` on begins, or `stop`."""
  if start == 0:
    return 0
  i, size = start - 1, 1 << 9
  while i < stop - 1:
    ends = np.flatnonzero(ids_N[i : min(i + size, stop - 1)] == eos)
    if len(ends):
      return i + int(ends[0]) + 1
    i, size = i + size, min(2 * size, pieces.BLOCK)
  return stop


@dataclasses.dataclass(frozen=True)
class _Range:
  """Ids from `start` to `stop` of a file, in blocks."""

  ids_N: np.ndarray
  start: int
  stop: int

  def __iter__(self) -> Iterator[np.ndarray]:
    for i in range(self.start, self.stop, pieces.BLOCK):
      yield np.asarray(self.ids_N[i : min(i + pieces.BLOCK, self.stop)])


def read(piece: Piece, report: Report) -> Iterator[tuple[str, Ids]]:
  ids_N, _ = _opened(piece.path, piece.reading)
  start, stop = _documents(ids_N, piece)
  while start < stop:
    end = _next(ids_N, start + 1, stop + 1, piece.reading.eos)
    # The last document of a file may lack its end.
    last = min(end - 1, stop)
    place = f'{piece.path} from id {start}'
    if last > start:
      yield f'{piece.name}:{start}', Ids(place, _Range(ids_N, start, last))
    start = end


def array(values: list[int], place: str) -> np.ndarray:
  try:
    return np.array(values, np.int64)
  except OverflowError as error:
    raise Fault('no ids of the tokenizer', f'{place}: {describe(error)}') from error


def divided(name: str, place: str, ids_N: np.ndarray, eos: int) -> Iterator[Any]:
  """A list of ids -> (name, Ids) of its documents, which end with `eos`."""
  ends = [*np.flatnonzero(ids_N == eos), len(ids_N)]
  starts = [0, *(end + 1 for end in ends)]
  for i, (start, end) in enumerate(zip(starts, ends)):
    if end > start or len(ends) == 1:
      yield f'{name}.{i}' if i else name, Ids(place, [ids_N[start:end]])


class _Index(NamedTuple):
  """Megatron's .idx."""

  dtype: np.dtype
  sizes_S: np.ndarray  # Ids of each sequence.
  places_S: np.ndarray  # Their first bytes.
  firsts_D: np.ndarray  # The first sequence of each document, and the end.


def megatron_index(path: str) -> str:
  """A .bin file -> the .idx beside it, or '' if it is none of Megatron's."""
  index = os.path.splitext(path)[0] + '.idx'
  if not os.path.isfile(index):
    return ''
  with open(index, 'rb') as file:
    return index if file.read(len(MEGATRON)) == MEGATRON else ''


def _index(path: str) -> _Index:
  index = megatron_index(path)
  try:
    data = pathlib.Path(index).read_bytes()
    version, code = np.frombuffer(data, '<u8', 1, 9)[0], data[17]
    sequences, documents = map(int, np.frombuffer(data, '<u8', 2, 18))
    dtype = np.dtype(CODES[code])
    if version != 1 or not 0 <= 34 + 12 * sequences + 8 * documents <= len(data):
      raise ValueError(f'version {version}, {sequences} sequences, {len(data)} bytes')
    sizes_S = np.frombuffer(data, '<i4', sequences, 34).astype(np.int64)
    places_S = np.frombuffer(data, '<i8', sequences, 34 + 4 * sequences)
    firsts_D = np.frombuffer(data, '<i8', documents, 34 + 12 * sequences)
    ends_S = places_S + sizes_S * dtype.itemsize
    size, bounds_D = os.path.getsize(path), np.append(firsts_D, sequences)
    if (sizes_S < 0).any() or (places_S < 0).any() or ends_S.max(initial=0) > size:
      raise ValueError(f'a sequence lies outside the {size} bytes of the .bin')
    if (np.diff(bounds_D) < 0).any() or bounds_D[0] < 0:
      raise ValueError('its documents are not in order')
  except (ValueError, LookupError, OverflowError) as error:
    text = f'{index} is not an index of Megatron: {describe(error)}'
    raise Fault(DAMAGED, text) from error
  return _Index(dtype, sizes_S, places_S, firsts_D)


def split_megatron(path: str, reading: Reading) -> Split:
  index = _index(path)
  bytes_S = np.concatenate([[0], np.cumsum(index.sizes_S * index.dtype.itemsize)])
  result, start = [], 0
  for stop in range(1, len(index.firsts_D)):
    size = int(bytes_S[index.firsts_D[stop]] - bytes_S[index.firsts_D[start]])
    if size >= pieces.UNIT or stop == len(index.firsts_D) - 1:
      result.append((start, stop, size))
      start = stop
  return result


def spans_megatron(file: BinaryIO, piece: Piece) -> list[Span]:
  index = _index(piece.path)
  first, last = index.firsts_D[piece.start], index.firsts_D[piece.stop]
  sizes_S = index.sizes_S[first:last] * index.dtype.itemsize
  return [(int(i), int(i + n)) for i, n in zip(index.places_S[first:last], sizes_S)]


def read_megatron(piece: Piece, report: Report) -> Iterator[tuple[str, Ids]]:
  index = _index(piece.path)
  data = np.memmap(piece.path, np.uint8, 'r')
  for document in range(piece.start, piece.stop):
    first, last = index.firsts_D[document : document + 2]
    sequences = []
    for start, size in zip(index.places_S[first:last], index.sizes_S[first:last]):
      sequences.append(data[start : start + size * index.dtype.itemsize])
    place = f'{piece.path}, document {document}'
    ids_N = np.concatenate([np.zeros(0, np.uint8), *sequences]).view(index.dtype)
    yield from divided(f'{piece.name}:{document}', place, ids_N, piece.reading.eos)


def check_sample(document: Document, token: tokenizer.Tokenizer) -> None:
  """Fault if a document's ids are hardly what the tokenizer makes of their text."""
  blocks: Iterable = document.blocks
  ids_N = next(iter(blocks), np.zeros(0, np.int32))[:SAMPLE]
  if not isinstance(document, Ids) or len(ids_N) < 32:
    return
  (ids_N, _), *_ = Ids(document.place, [ids_N]).encode(token, lambda block: None)
  try:
    again_N, _ = token.encode(token.decode(ids_N).decode('utf-8', 'ignore'))
  except ValueError:
    return
  pairs, again = (
    collections.Counter(itertools.pairwise(N.tolist())) for N in (ids_N, again_N)
  )
  if (share := (pairs & again).total() / pairs.total()) < AGREE:
    raise Fault(
      'no ids of the tokenizer',
      f'{document.place}: decoded by --tokenizer and encoded again, only {share:.0%} of '
      'its pairs of ids are the same, so they come from another tokenizer',
    )
