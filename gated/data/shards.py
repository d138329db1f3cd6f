"""Rows on disk: the fixed layout of a row, ArrayRecord shards of rows, the manifest.

A row holds T + 1 tokens of a stream of documents; the next row starts T tokens later, so
that every token but the stream's first is a target exactly once. A dataset is a directory
that explains itself: shards, the tokenizer's file, and manifest.json, written last.

Nothing here trusts what it reads: records have one size, numbers are checked before they
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
from typing import Any, NamedTuple

import numpy as np

from gated import config, storage
from gated.data import tokenizer

FORMAT = 1
MANIFEST = 'manifest.json'
SPLITS = ('train', 'heldout')
MAX_MANIFEST = 1 << 26  # Bytes.
MAX_DEPTH = 32  # Of lists and objects in each other.
MAX_LENGTH = 1 << 24  # Tokens.
MAX_COUNT = 1 << 62
COUNTS = ('rows', 'documents', 'tokens', 'bytes', 'segments')
NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]*')


class Batch(NamedTuple):
  """What a model is fed: int32, and float32 weights of the targets. A pytree of arrays.

  A weight is zero where the target belongs to another document, or to padding. Segments
  count from 1 in each row, 0 is padding; positions restart with each segment.
  """

  tokens: np.ndarray  # (B, T), like all five.
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
      ('bytes', '<u4'),  # Of text, covered by the targets whose weight is not zero.
      ('tokens', token, C),
      ('segments', index, C),
      ('positions', index, C),
      ('weights', '<f4', C),  # Of each token as a target; the first is none here.
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
  """Rows -> Batch: targets shifted, weights zero across a document's end."""
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
  """The most segments that one of the rows holds; padding counts as one."""
  segments_RC = rows_R['segments']
  return int((segments_RC.max(1) + (segments_RC == 0).any(1)).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """One ArrayRecord file, as the manifest vouches for it."""

  file: str  # Relative to the dataset.
  rows: int
  size: int  # Bytes of the file.
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portion:
  """One domain's share of a split."""

  shards: tuple[Shard, ...]
  rows: int
  documents: int
  tokens: int  # Targets whose weight is not zero.
  bytes: int  # Of text, covered by them.
  segments: int  # The most that one row holds.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What is in a dataset, and what it was made from."""

  format: int
  length: int
  seed: int
  tokenizer: dict[str, Any]  # name, vocab, eos, eos_token, sha256.
  made: dict[str, Any]  # The options it was made with, and a digest of the input.
  splits: dict[str, dict[str, Portion]]  # split -> domain -> portion.

  @property
  def digest(self) -> str:
    """SHA-256 of the content, the same wherever the directory lies."""
    return hashlib.sha256(canonical(dataclasses.asdict(self)).encode()).hexdigest()

  @property
  def shards(self) -> list[Shard]:
    """Those of all splits and domains."""
    portions = (portion for split in self.splits.values() for portion in split.values())
    return [shard for portion in portions for shard in portion.shards]

  @property
  def row(self) -> np.dtype:
    return layout(self.length, self.tokenizer['vocab'])


def canonical(content: Any) -> str:
  return json.dumps(content, sort_keys=True, separators=(',', ':'), ensure_ascii=True)


def write_shard(path: str, chunks: Iterable[np.ndarray]) -> Shard:
  """Chunks of rows -> one ArrayRecord file that appears whole or not at all."""
  from array_record.python import array_record_module

  draft = f'{path}.{os.getpid()}'
  # Random access wants one record a group; equal rows give equal files.
  writer = array_record_module.ArrayRecordWriter(draft, 'group_size:1,zstd:3')
  rows = 0
  for rows_R in chunks:
    for row in rows_R:
      writer.write(row.tobytes())
    rows += len(rows_R)
  writer.close()
  shard = Shard(
    file=os.path.basename(path),
    rows=rows,
    size=os.path.getsize(draft),
    sha256=sha256(draft),
  )
  os.replace(draft, path)
  return shard


def write_manifest(directory: str, manifest: Manifest) -> None:
  path = os.path.join(directory, MANIFEST)
  storage.write_json(path, dataclasses.asdict(manifest), indent=1, sort_keys=True)


def sha256(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def inside(directory: str, name: str) -> str:
  """A name from a manifest -> its path, which lies in the directory, links followed."""
  try:
    return os.fspath(storage.inside(directory, name))
  except ValueError as error:
    raise ValueError(f'a manifest names a file elsewhere: {error}') from error


def read_manifest(directory: str) -> Manifest:
  """A dataset's directory -> Manifest, every field checked.

  FileNotFoundError where there is none; ValueError names the directory and the field.
  """
  content = storage.read(os.path.join(directory, MANIFEST), MAX_MANIFEST)
  return parse_manifest(content, directory)


def parse_manifest(content: bytes, directory: str) -> Manifest:
  """The bytes of a manifest.json, and where it lies -> Manifest, every field checked."""
  path = os.path.join(directory, MANIFEST)
  try:
    return _manifest(json.loads(content))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  except _Malformed as error:
    raise ValueError(f'{path}: {error}') from error


class _Malformed(Exception):
  """A manifest's field that is not what it must be."""


def _field(
  content: Any, name: str, kind: type, limits: tuple[int, int] = (0, MAX_COUNT)
) -> Any:
  """A mapping's field of this type, and for a number within the limits, both allowed."""
  if not isinstance(content, dict) or name not in content:
    raise _Malformed(f'has no field {name!r}')
  value = content[name]
  if type(value) is not kind:
    raise _Malformed(f'{name}={value!r} is not of type {kind.__name__}'[:200])
  if kind is int and not limits[0] <= value <= limits[1]:
    raise _Malformed(f'{name}={value}, but {limits[0]} to {limits[1]} are allowed')
  return value


def _manifest(content: Any) -> Manifest:
  version = _field(content, 'format', int)
  if version != FORMAT:
    raise _Malformed(f'format={version}, but this code reads {FORMAT}')
  token = _field(content, 'tokenizer', dict)
  vocab = _field(token, 'vocab', int, (1, 1 << 31))
  kinds = dict(name=str, eos=int, eos_token=str, sha256=str)
  splits = _field(content, 'splits', dict)
  if config.nests(content, MAX_DEPTH):
    raise _Malformed(f'nests deeper than {MAX_DEPTH} levels')
  return Manifest(
    format=version,
    length=_field(content, 'length', int, (1, MAX_LENGTH)),
    seed=_field(content, 'seed', int),
    tokenizer={'vocab': vocab}
    | {name: _field(token, name, kind, (0, vocab - 1)) for name, kind in kinds.items()},
    made=_field(content, 'made', dict),
    splits={split: _portions(_field(splits, split, dict)) for split in SPLITS},
  )


def _portions(content: dict) -> dict[str, Portion]:
  portions = {}
  for domain in content:
    if not NAME.fullmatch(domain):
      raise _Malformed(f'{domain!r} is no name of a domain')
    portion = _field(content, domain, dict)
    shards = []
    for entry in _field(portion, 'shards', list):
      file, digest = _field(entry, 'file', str), _field(entry, 'sha256', str)
      rows, size = (
        _field(entry, 'rows', int, (1, MAX_COUNT)),
        _field(entry, 'size', int, (1, MAX_COUNT)),
      )
      shards.append(Shard(file=file, rows=rows, size=size, sha256=digest))
    counts = {name: _field(portion, name, int) for name in COUNTS}
    if sum(shard.rows for shard in shards) != counts['rows']:
      raise _Malformed(f'rows={counts["rows"]} of {domain!r}, but its shards hold others')
    portions[domain] = Portion(shards=tuple(shards), **counts)
  return portions


def open_tokenizer(directory: str, manifest: Manifest) -> tokenizer.Tokenizer:
  """The tokenizer a dataset was made with, from the dataset's own copy."""
  stated = manifest.tokenizer
  name = stated['name']
  spec = name if name == 'bytes' else inside(directory, name)
  found = tokenizer.load(spec, eos=stated['eos_token'])
  if (found.fingerprint, found.vocab, found.eos) != (
    stated['sha256'],
    stated['vocab'],
    stated['eos'],
  ):
    raise ValueError(f'{directory}: {name} is not the tokenizer that the manifest names')
  return found


def faults(
  directory: str, shards: Iterable[Shard], how: str
) -> Iterator[tuple[Shard, str]]:
  """-> the shards that are missing or not what the manifest says, and what is wrong."""
  shards = list(shards)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = pool.map(lambda shard: CHECKS[how](directory, shard), shards)
    yield from ((shard, fault) for shard, fault in zip(shards, found) if fault)


def verify(directory: str, shards: Iterable[Shard], how: str) -> None:
  """ValueError names the first shard that is missing or not what the manifest says."""
  for _, fault in faults(directory, shards, how):
    raise ValueError(fault)


def _check_size(directory: str, shard: Shard) -> str:
  path = inside(directory, shard.file)
  if not os.path.isfile(path):
    return f'{path} is missing'
  size = os.path.getsize(path)
  if size != shard.size:
    return f'{path} has {size} bytes, but the manifest says {shard.size}'
  return ''


def _check_sha256(directory: str, shard: Shard) -> str:
  path = inside(directory, shard.file)
  fault = _check_size(directory, shard)
  if not fault and sha256(path) != shard.sha256:
    return f'{path} is damaged: its SHA-256 is not what the manifest says'
  return fault


CHECKS = {'sha256': _check_sha256, 'size': _check_size}
