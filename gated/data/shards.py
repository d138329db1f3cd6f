"""Rows on disk: the fixed layout of a row, ArrayRecord shards of rows, the manifest.

A row holds T + 1 tokens of a stream of documents. The next row starts T tokens later, so
every token except the first of the stream is a target exactly once. A dataset is a
directory that describes itself: shards, the file of the tokenizer, and manifest.json,
which is written last.

Datasets are untrusted: all records must have one size, numbers are checked before they
are used, and no path leaves the directory.

B batch  T tokens  C = T + 1 columns of a stored row  R rows.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gated import config, storage
from gated.data import tokenizer

FORMAT = 1
MANIFEST = 'manifest.json'
SPLITS = ('train', 'heldout')
CHECKS = ('sha256', 'size')
MAX_MANIFEST = 1 << 26  # Bytes.
MAX_DEPTH = 32  # Levels of nested lists and objects.
MAX_LENGTH = 1 << 24  # Tokens.
MAX_COUNT = 1 << 62
NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]*')


class Batch(NamedTuple):
  """The input of a model: int32, and float32 weights of the targets. A pytree of arrays.

  The weight is 0 for a target in another document and for padding. Segments count from 1
  in each row, 0 is padding; positions restart with each segment.
  """

  tokens: np.ndarray  # All five arrays have the shape (B, T).
  targets: np.ndarray
  weights: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


def layout(length: int, vocab: int) -> np.dtype:
  """T and the vocabulary -> the dtype of one stored row, little-endian, no padding."""
  token = '<u2' if vocab <= 1 << 16 else '<u4'
  index = '<u2' if length + 1 < 1 << 16 else '<u4'
  C = (length + 1,)
  return np.dtype(
    [
      ('bytes', '<u4'),  # Bytes of text in the targets with a weight.
      ('tokens', token, C),
      ('segments', index, C),
      ('positions', index, C),
      ('weights', '<f4', C),  # Weight of each token as a target; 0 for the first.
    ]
  )


def parse(records: Iterable[bytes], row: np.dtype) -> np.ndarray:
  """Stored records -> a structured array of rows."""
  records = list(records)
  for record in records:
    if len(record) != row.itemsize:
      raise ValueError(f'a record has {len(record)} bytes, a row has {row.itemsize}')
  return np.frombuffer(b''.join(records), row)


def batch(rows_B: np.ndarray) -> Batch:
  """Rows -> Batch: targets shifted, weights zero across the end of a document."""
  segments_BC = rows_B['segments'].astype(np.int32)
  same_BT = (segments_BC[:, 1:] == segments_BC[:, :-1]) & (segments_BC[:, 1:] > 0)
  tokens_BC = rows_B['tokens'].astype(np.int32)
  return Batch(
    tokens=np.ascontiguousarray(tokens_BC[:, :-1]),
    targets=np.ascontiguousarray(tokens_BC[:, 1:]),
    weights=rows_B['weights'][:, 1:] * same_BT.astype(np.float32),
    segments=np.ascontiguousarray(segments_BC[:, :-1]),
    positions=rows_B['positions'][:, :-1].astype(np.int32),
  )


def segments(rows_R: np.ndarray) -> int:
  """The largest number of segments in a row; padding counts as one."""
  segments_RC = rows_R['segments']
  return int((segments_RC.max(1) + (segments_RC == 0).any(1)).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """One ArrayRecord file."""

  file: str  # Relative to the dataset.
  rows: int
  size: int  # Bytes of the file.
  sha256: str

  def __post_init__(self):
    config.within('rows', self.rows, 1, MAX_COUNT)
    config.within('size', self.size, 1, MAX_COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portion:
  """One domain of a split."""

  shards: tuple[Shard, ...]
  rows: int
  documents: int
  tokens: int  # Targets with a weight.
  bytes: int  # Bytes of text in these targets.
  segments: int  # The largest number of segments in one row.

  def __post_init__(self):
    for name in ('rows', 'documents', 'tokens', 'bytes', 'segments'):
      config.within(name, getattr(self, name), 0, MAX_COUNT)
    if (rows := sum(shard.rows for shard in self.shards)) != self.rows:
      raise ValueError(f'rows={self.rows}, but the shards of the domain have {rows}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The tokenizer of a dataset: 'bytes', or a file in the dataset."""

  name: str
  vocab: int
  eos: int
  eos_token: str
  sha256: str  # The fingerprint of the tokenizer.

  def __post_init__(self):
    config.within('vocab', self.vocab, 1, 1 << 31)
    config.within('eos', self.eos, 0, self.vocab - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """The content of a dataset, and its origin."""

  format: int
  length: int
  seed: int
  tokenizer: Vocabulary
  made: dict  # The options of the preparation, and a digest of the input.
  splits: dict[str, dict[str, Portion]]  # split -> domain -> portion.

  def __post_init__(self):
    config.within('length', self.length, 1, MAX_LENGTH)
    config.within('seed', self.seed, 0, MAX_COUNT)
    if sorted(self.splits) != sorted(SPLITS):
      raise ValueError(f'splits are {sorted(self.splits)}, but must be {SPLITS}')
    for domain in {*self.splits['train'], *self.splits['heldout']}:
      if not NAME.fullmatch(domain):
        raise ValueError(f'{domain!r} is no name of a domain')

  @property
  def digest(self) -> str:
    """SHA-256 of the content, independent of the directory."""
    return config.digest(dataclasses.asdict(self))

  @property
  def shards(self) -> list[Shard]:
    """The shards of all splits and domains."""
    portions = (portion for split in self.splits.values() for portion in split.values())
    return [shard for portion in portions for shard in portion.shards]

  @property
  def row(self) -> np.dtype:
    return layout(self.length, self.tokenizer.vocab)


def write_shard(path: str, chunks: Iterable[np.ndarray]) -> Shard:
  """Chunks of rows -> one ArrayRecord file, written atomically."""
  from array_record.python import array_record_module

  rows = 0
  with storage.draft(path) as draft:
    # One record per group makes random access fast; equal rows give equal files.
    writer = array_record_module.ArrayRecordWriter(draft, 'group_size:1,zstd:3')
    for rows_R in chunks:
      for row in rows_R:
        writer.write(row.tobytes())
      rows += len(rows_R)
    writer.close()
  return Shard(
    file=os.path.basename(path),
    rows=rows,
    size=os.path.getsize(path),
    sha256=sha256(path),
  )


def write_manifest(directory: str, manifest: Manifest) -> None:
  path = os.path.join(directory, MANIFEST)
  storage.write_json(path, dataclasses.asdict(manifest), indent=1, sort_keys=True)


def sha256(path: storage.PathLike) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_manifest(directory: str) -> Manifest:
  """The directory of a dataset -> Manifest, with every field checked.

  FileNotFoundError for a missing manifest; ValueError names the directory and the field.
  """
  content = storage.read(os.path.join(directory, MANIFEST), MAX_MANIFEST)
  return parse_manifest(content, directory)


def parse_manifest(content: bytes, directory: str) -> Manifest:
  """The bytes of a manifest.json in a directory -> Manifest, with every field checked."""
  path = os.path.join(directory, MANIFEST)
  try:
    fields = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  try:
    version = config.dig(fields, 'format')
    if version != FORMAT:
      raise ValueError(f'format={version!r}, but this code reads {FORMAT}')
    if config.nests(fields, MAX_DEPTH):
      raise ValueError(f'nests deeper than {MAX_DEPTH} levels')
    return config.build(Manifest, fields, 'manifest')
  except ValueError as error:
    raise ValueError(f'{path}: {str(error)[:300]}') from error


def open_tokenizer(directory: str, manifest: Manifest) -> tokenizer.Tokenizer:
  """The tokenizer in a dataset, checked against the manifest."""
  entry = manifest.tokenizer
  spec = entry.name
  if spec != 'bytes':
    spec = os.fspath(storage.inside(directory, spec))
  # The option --bos is a token, or whether the usual one is used.
  bos = manifest.made['bos'] if isinstance(manifest.made.get('bos'), str) else ''
  token = tokenizer.load(spec, eos=entry.eos_token, bos=bos)
  if (token.fingerprint, token.vocab, token.eos) != (
    entry.sha256,
    entry.vocab,
    entry.eos,
  ):
    raise ValueError(f'{directory}: {entry.name} is not the tokenizer in the manifest')
  return token


def faults(
  directory: str, shards: list[Shard], check: str
) -> Iterator[tuple[Shard, str]]:
  """-> (shard, fault) of each shard that is missing or differs from the manifest."""
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = pool.map(lambda shard: _fault(directory, shard, check), shards)
    yield from ((shard, fault) for shard, fault in zip(shards, results) if fault)


def verify(directory: str, shards: list[Shard], check: str) -> None:
  """ValueError names the first shard that is missing or differs from the manifest."""
  for _, fault in faults(directory, shards, check):
    raise ValueError(fault)


def _fault(directory: str, shard: Shard, check: str) -> str:
  path = storage.inside(directory, shard.file)
  if not os.path.isfile(path):
    return f'{path} is missing'
  size = os.path.getsize(path)
  if size != shard.size:
    return f'{path} has {size} bytes, but the manifest says {shard.size}'
  if check == 'sha256' and sha256(path) != shard.sha256:
    return f'{path} is damaged: its SHA-256 differs from the manifest'
  return ''
