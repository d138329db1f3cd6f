"""Units of tokens: the documents of one unit of input, on disk, with their hashes.

N tokens of a piece  D documents.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from gated import storage
from gated.data import content, faults, progress, shards, tokenizer
from gated.data.documents import Document

TOKEN = np.dtype([('token', '<u4'), ('bytes', '<u4')])
DOCUMENT = np.dtype(
  [
    ('key', '<u8'),
    ('start', '<u8'),
    ('tokens', '<u8'),
    ('heldout', 'u1'),
    ('content', '<u8'),  # Hash of the words.
  ]
)


def write_unit(
  path: str,
  documents: Iterable[tuple[str, Document]],
  token: tokenizer.Tokenizer,
  *,
  seed: int,
  heldout: float,
  bos: bool,
  dedup: str = 'none',
  report: faults.Report = faults.refuse,
) -> dict[str, int]:
  """(name, document) pairs -> a unit: tokens, a table of its documents, their SHA-256.

  Documents without a token are skipped; those that cannot be read, or that the tokenizer
  refuses, are reported. The split of a document depends only on its name, or with `dedup`
  on its content; its place in the stream depends on its name and the seed. With
  dedup='near', the unit includes a sketch of each document. Returns counts: documents,
  those held out, those without a token, tokens, and unknown tokens.
  """
  table: list[tuple] = []
  sketches: list[np.ndarray] = []
  counts = dict(documents=0, heldout=0, empty=0, tokens=0, unknown=0)
  with storage.draft(path) as draft, open(draft, 'wb') as file:
    start = 0
    for name, document in documents:
      words = content.Words()
      sketch = content.Sketch() if dedup == 'near' else None
      pieces = document.encode(token, _Watch(name, words, sketch))
      try:
        tokens, unknown = _write_document(file, pieces, token, begin=int(bos))
      except ValueError as error:
        file.seek(start * TOKEN.itemsize)
        file.truncate()
        is_fault = isinstance(error, faults.Fault)
        text = f'{name}: {faults.describe(error)}'
        report(error if is_fault else faults.Fault('refused by the tokenizer', text))
        continue
      counts['empty'] += not tokens
      counts['tokens'] += tokens
      counts['unknown'] += unknown
      if not tokens:
        continue
      split = _hash(name) if dedup == 'none' else words.number()
      is_apart, size = split < heldout * 2.0**64, tokens + 1 + int(bos)
      table.append((_hash(str(seed), name), start, size, is_apart, words.number()))
      sketches += [sketch.values()] if sketch else []
      counts['documents'] += 1
      counts['heldout'] += is_apart
      start += size
  storage.write(f'{path}.documents', np.array(table, DOCUMENT).tobytes())
  if dedup == 'near':
    storage.write(f'{path}.sketches', np.array(sketches, np.uint32).tobytes())
  storage.write_json(f'{path}.json', _digests(path))
  return counts


class _Watch:
  """Hands the blocks of a document's text to its hash and sketch; shows long ones."""

  def __init__(self, name: str, words: content.Words, sketch: content.Sketch | None):
    self._name, self._takers = name, [words, sketch] if sketch else [words]
    self._size, self._next = 0, time.monotonic() + progress.EVERY

  def __call__(self, block: str) -> None:
    for taker in self._takers:
      taker.add(block)
    self._size += len(block)
    if time.monotonic() > self._next:
      done = f'{faults.shown(self._name)}: {self._size:,} characters'
      print(done, file=sys.stderr, flush=True)
      self._next = time.monotonic() + progress.EVERY


def _write_document(
  file: BinaryIO, pieces: Iterable[Any], token: tokenizer.Tokenizer, *, begin: int
) -> tuple[int, int]:
  """Writes a document unless it has no token -> its tokens and its unknown ones."""
  tokens = unknown = 0

  def write(ids_N: Any, bytes_N: Any) -> None:
    pieces_N: np.ndarray = np.zeros(len(ids_N), TOKEN)
    pieces_N['token'], pieces_N['bytes'] = ids_N, bytes_N
    file.write(pieces_N.tobytes())

  for ids_N, bytes_N in pieces:
    if begin and not tokens and len(ids_N):
      write([token.bos], [0])
    write(ids_N, bytes_N)
    tokens += len(ids_N)
    unknown += int((ids_N == token.unk).sum())
  if tokens:
    write([token.eos], [0])
  return tokens, unknown


def split_number(name: str, blocks: Iterable[str], dedup: str) -> int:
  """-> 64 bits that decide the split of a document: of its name, or its words."""
  if dedup == 'none':
    return _hash(name)
  words = content.Words()
  for block in blocks:
    words.add(block)
  return words.number()


def is_heldout(name: str, heldout: float) -> bool:
  """Whether a document whose name decides belongs to the held-out fraction."""
  return _hash(name) < heldout * 2.0**64


def _hash(*words: str) -> int:
  # The name of a file may not be UTF-8.
  digest = hashlib.sha256('\0'.join(words).encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big')


def unit_is_complete(path: str) -> bool:
  """Whether the files of a unit exist and have the SHA-256 that its writer recorded."""
  return read_json(f'{path}.json') == _digests(path)


def _digests(path: str) -> list[str]:
  files = [path, f'{path}.documents', f'{path}.sketches']
  return [shards.sha256(file) for file in files if os.path.isfile(file)]


def read_json(path: str) -> Any:
  """-> the content of a JSON file; None if it is missing or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except (FileNotFoundError, ValueError):
    return None


@functools.lru_cache(maxsize=512)
def opened(path: str) -> tuple[np.ndarray, np.ndarray]:
  """A unit -> its tokens (memory-mapped) and its documents."""
  documents = np.fromfile(f'{path}.documents', DOCUMENT)
  tokens = np.memmap(path, TOKEN, 'r') if len(documents) else np.zeros(0, TOKEN)
  return tokens, documents


def chosen(
  units: dict[str, list[str]], dedup: str
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
  """Units by domain -> which of their documents are kept, and counts of the others.

  The first of all documents with the same words is kept, in the order of the domains'
  names; with dedup='near' also the first of similar ones.
  """
  names = sorted(units)
  tables = {name: [opened(path)[1] for path in units[name]] for name in names}
  sizes = [sum(map(len, tables[name])) for name in names]
  table_D = np.concatenate([table for name in names for table in tables[name]])
  kept_D = content.first_copies(table_D['content'])
  steps = {'duplicates': kept_D}
  if dedup == 'near':
    paths = (path for name in names for path in units[name])
    steps['near-duplicates'] = content.first_alike(_sketches(paths), kept_D)
  counts: dict[str, dict[str, int]] = {}
  before_D = np.ones_like(kept_D)
  for step, kept_D in steps.items():
    parts = np.split(before_D & ~kept_D, np.cumsum(sizes)[:-1])
    counts[step] = {name: int(part.sum()) for name, part in zip(names, parts)}
    before_D = kept_D
  return dict(zip(names, np.split(kept_D, np.cumsum(sizes)[:-1]))), counts


def _sketches(paths: Iterable[str]) -> Iterator[np.ndarray]:
  for path in paths:
    values = np.fromfile(f'{path}.sketches', np.uint32)
    yield from values.reshape(-1, content.HASHES)


def seen(units: dict[str, list[str]]) -> tuple[int, int]:
  """Units by domain -> held-out documents, and how many of them are training text."""
  tables = [opened(path)[1] for group in units.values() for path in group]
  table_D = np.concatenate(tables)
  is_apart_D = table_D['heldout'] > 0
  apart_D = table_D['content'][is_apart_D]
  return len(apart_D), int(np.isin(apart_D, table_D['content'][~is_apart_D]).sum())
