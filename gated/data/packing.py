"""Documents -> rows: token streams on disk, then rows by arithmetic on the stream.

First each unit of input becomes a unit file of tokens. Then the documents of a domain and
split are put in an order that depends on the seed and their names alone, and row r is
tokens r*T to r*T + T of the stream they make. Either step can be done by any number of
processes, in any order, with the same bytes as a result.

N tokens of a stream  R rows  T tokens  C = T + 1 columns of a stored row.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated import storage
from gated.data import shards, tokenizer

TOKEN = np.dtype([('token', '<u4'), ('bytes', '<u4')])
DOCUMENT = np.dtype(
  [('key', '<u8'), ('start', '<u8'), ('tokens', '<u8'), ('heldout', 'u1')]
)
PLACE = np.dtype([('unit', '<u4'), ('start', '<u8'), ('offset', '<u8')])
TRAILER = struct.Struct(
  '<8sQQ32s'
)  # Magic, tokens, documents, SHA-256 of what is before.
MAGIC = b'gated-u1'
CHUNK = 1 << 20  # Tokens packed at a time, which bounds the memory of a process.

# run(function, jobs, label) -> the results, in order; maybe done by several processes.
Run = Callable[[Callable[[Any], Any], Sequence[Any], str], list]


def run_here(function: Callable[[Any], Any], jobs: Sequence[Any], label: str) -> list:
  """A Run without processes and without a progress bar."""
  del label
  return [function(job) for job in jobs]


def write_unit(
  path: str,
  documents: Iterable[tuple[str, str]],
  token: tokenizer.Tokenizer,
  *,
  seed: int,
  heldout: float,
  bos: bool,
) -> None:
  """(name, text) pairs -> a unit file; a document without a token is left out.

  A document's split hangs on its name alone, its place in the stream also on the seed.
  """
  table, start, digest = [], 0, hashlib.sha256()
  draft = f'{path}.{os.getpid()}'
  with open(draft, 'wb') as file:

    def put(data: bytes) -> None:
      digest.update(data)
      file.write(data)

    for name, text in documents:
      ids_N, bytes_N = token.encode(text)
      if not len(ids_N):
        continue
      ends = int(bos), len(ids_N) + int(bos)
      pieces_N: np.ndarray = np.zeros(ends[1] + 1, TOKEN)
      pieces_N[0] = token.bos, 0
      pieces_N['token'][slice(*ends)] = ids_N
      pieces_N['bytes'][slice(*ends)] = bytes_N
      pieces_N[-1] = token.eos, 0
      put(pieces_N.tobytes())
      key = _hash(str(seed), name)
      table.append((key, start, len(pieces_N), is_heldout(name, heldout)))
      start += len(pieces_N)
    put(np.array(table, DOCUMENT).tobytes())
    file.write(TRAILER.pack(MAGIC, start, len(table), digest.digest()))
  os.replace(draft, path)


def is_heldout(name: str, heldout: float) -> bool:
  """Whether a document of this name is among the fraction `heldout` that is held out."""
  return _hash(name) < heldout * 2.0**64


def _hash(*words: str) -> int:
  return int.from_bytes(hashlib.sha256('\0'.join(words).encode()).digest()[:8], 'big')


def unit_is_whole(path: str) -> bool:
  """Whether a unit file is there and its SHA-256 is the one it ends with."""
  if not os.path.isfile(path) or os.path.getsize(path) < TRAILER.size:
    return False
  digest, left = hashlib.sha256(), os.path.getsize(path) - TRAILER.size
  with open(path, 'rb') as file:
    while left:
      data = file.read(min(left, 1 << 20))
      digest.update(data)
      left -= len(data)
    magic, _, _, stated = TRAILER.unpack(file.read(TRAILER.size))
  return magic == MAGIC and stated == digest.digest()


@functools.lru_cache(maxsize=512)
def _unit(path: str) -> tuple[np.ndarray, np.ndarray]:
  """A unit file -> its tokens (memory-mapped) and its documents."""
  with open(path, 'rb') as file:
    file.seek(-TRAILER.size, os.SEEK_END)
    _, tokens, documents, _ = TRAILER.unpack(file.read())
    file.seek(tokens * TOKEN.itemsize)
    table = np.frombuffer(file.read(documents * DOCUMENT.itemsize), DOCUMENT)
  if not tokens:
    return np.zeros(0, TOKEN), table
  return np.memmap(path, TOKEN, 'r', shape=(tokens,)), table


class _Job(NamedTuple):
  """One shard: rows `first` to `stop` of the stream at `stream`."""

  path: str
  note: str  # Where the finished shard's Shard, tokens and bytes are noted.
  stream: str
  first: int
  stop: int
  length: int
  vocab: int
  pad: int


def pack(
  out: str,
  units: dict[str, list[str]],
  token: tokenizer.Tokenizer,
  *,
  length: int,
  seed: int,
  shard_rows: int,
  made: dict[str, Any],
  work: str,
  run: Run,
) -> shards.Manifest:
  """Unit files by domain -> shards and tokenizer in `out`; a manifest, not yet written.

  What lies finished in `out` from an earlier try is used if it is what `work` noted.
  """
  splits: dict[str, dict[str, shards.Portion]] = {split: {} for split in shards.SPLITS}
  jobs, owners, documents = [], [], {}
  for domain in sorted(units):
    for split in shards.SPLITS:
      stream = os.path.join(work, f'{domain}-{split}')
      tokens, documents[split, domain] = _write_stream(stream, units[domain], split)
      rows = max(0, -(-(tokens - 1) // length))
      count = -(-rows // shard_rows)
      for i in range(count):
        name = f'{domain}-{split}-{i:05d}-of-{count:05d}.array_record'
        job = _Job(
          path=os.path.join(out, name),
          note=os.path.join(work, f'{name}.json'),
          stream=stream,
          first=i * shard_rows,
          stop=min((i + 1) * shard_rows, rows),
          length=length,
          vocab=token.vocab,
          pad=token.eos,
        )
        jobs.append(job)
        owners.append((split, domain))
  notes = run(_pack_shard, jobs, 'packing')
  for split, domain in documents:
    own = [note for note, owner in zip(notes, owners) if owner == (split, domain)]
    splits[split][domain] = _portion(own, documents[split, domain])
  stated = {
    'name': _copy_tokenizer(out, token),
    'vocab': token.vocab,
    'eos': token.eos,
    'eos_token': token.eos_token,
    'sha256': token.fingerprint,
  }
  return shards.Manifest(
    format=shards.FORMAT,
    length=length,
    seed=seed,
    tokenizer=stated,
    made=made,
    splits=splits,
  )


def _portion(notes: list[dict[str, Any]], documents: int) -> shards.Portion:
  return shards.Portion(
    shards=tuple(shards.Shard(**note['shard']) for note in notes),
    rows=sum(note['shard']['rows'] for note in notes),
    documents=documents,
    tokens=sum(note['tokens'] for note in notes),
    bytes=sum(note['bytes'] for note in notes),
    segments=max((note['segments'] for note in notes), default=0),
  )


def _copy_tokenizer(out: str, token: tokenizer.Tokenizer) -> str:
  """The tokenizer's file goes into the dataset, which then needs nothing else."""
  if not token.path:
    return token.name
  name = 'tokenizer' + os.path.splitext(token.path)[1]
  with open(token.path, 'rb') as file:
    content = file.read()
  draft = os.path.join(out, f'{name}.{os.getpid()}')
  with open(draft, 'wb') as file:
    file.write(content)
  os.replace(draft, os.path.join(out, name))
  return name


def _write_stream(path: str, units: list[str], split: str) -> tuple[int, int]:
  """The order of a split's documents, on disk -> tokens and documents of the stream."""
  tables = [_unit(unit)[1] for unit in units]
  which = np.repeat(np.arange(len(units)), [len(table) for table in tables])
  table = np.concatenate([np.zeros(0, DOCUMENT), *tables])
  mine = table['heldout'] == (split == 'heldout')
  which, table = which[mine], table[mine]
  order = np.argsort(table['key'], kind='stable')
  places: np.ndarray = np.zeros(len(table) + 1, PLACE)
  places['unit'][:-1] = which[order]
  places['start'][:-1] = table['start'][order]
  places['offset'][1:] = np.cumsum(table['tokens'][order])
  draft = f'{path}.{os.getpid()}'
  with open(draft, 'wb') as file:
    file.write(places.tobytes())
  os.replace(draft, f'{path}.order')
  storage.write_json(f'{path}.units', units, indent=1, sort_keys=True)
  return int(places['offset'][-1]), len(table)


@functools.lru_cache(maxsize=4)
def _stream(path: str, digest: str) -> tuple[np.ndarray, list[str]]:
  del digest  # A stream written anew is another stream.
  with open(f'{path}.units', encoding='utf-8') as file:
    units = json.load(file)
  return np.memmap(f'{path}.order', PLACE, 'r'), units


def _pack_shard(job: _Job) -> dict[str, Any]:
  """Writes a shard, or finds it finished -> its note."""
  digest = shards.sha256(f'{job.stream}.order') + shards.sha256(f'{job.stream}.units')
  stated = {'job': list(job[3:]), 'stream': digest}
  note = _read_note(job.note)
  if (
    note
    and all(note[name] == value for name, value in stated.items())
    and os.path.isfile(job.path)
    and shards.sha256(job.path) == note['shard']['sha256']
  ):
    return note
  counts = {'tokens': 0, 'bytes': 0, 'segments': 0}

  def chunks() -> Iterator[np.ndarray]:
    step = max(1, CHUNK // job.length)
    for first in range(job.first, job.stop, step):
      stop = min(first + step, job.stop)
      rows_R = _rows(job, digest, first, stop)
      counts['tokens'] += int((rows_R['weights'] > 0).sum())
      counts['bytes'] += int(rows_R['bytes'].sum())
      counts['segments'] = max(counts['segments'], shards.segments(rows_R))
      yield rows_R

  shard = shards.write_shard(job.path, chunks())
  note = stated | counts | {'shard': dataclasses.asdict(shard)}
  storage.write_json(job.note, note, indent=1, sort_keys=True)
  return note


def _read_note(path: str) -> dict[str, Any] | None:
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except (FileNotFoundError, ValueError):
    return None


def _rows(job: _Job, digest: str, first: int, stop: int) -> np.ndarray:
  """Rows `first` to `stop` of a stream."""
  places, units = _stream(job.stream, digest)
  low, high = first * job.length, stop * job.length + 1
  high = min(high, int(places['offset'][-1]))
  pieces_N = np.empty(high - low, TOKEN)
  begins_N = np.zeros(high - low, bool)
  at = int(np.searchsorted(places['offset'], low, 'right')) - 1
  while at + 1 < len(places) and places['offset'][at] < high:
    begin, end = int(places['offset'][at]), int(places['offset'][at + 1])
    begin_here, end_here = max(begin, low), min(end, high)
    source = int(places['start'][at]) + begin_here - begin
    tokens_N = _unit(units[places['unit'][at]])[0]
    taken = slice(begin_here - low, end_here - low)
    pieces_N[taken] = tokens_N[source : source + end_here - begin_here]
    if begin >= low:
      begins_N[begin - low] = True
    at += 1
  row = shards.layout(job.length, job.vocab)
  return cut(pieces_N, begins_N, stop - first, row=row, pad=job.pad)


def cut(
  pieces_N: np.ndarray, begins_N: np.ndarray, count: int, *, row: np.dtype, pad: int
) -> np.ndarray:
  """A stretch of a stream -> `count` rows; what the last one lacks is padding.

  begins_N marks the first token of each document, which nothing predicts.
  """
  C = row['tokens'].shape[0]
  at_RC = np.arange(count)[:, None] * (C - 1) + np.arange(C)
  real_RC = at_RC < len(pieces_N)
  at_RC = np.minimum(at_RC, len(pieces_N) - 1)
  begins_RC = begins_N[at_RC]
  weighted_RC = real_RC & ~begins_RC
  weighted_RC[:, 0] = False  # It is a target of the row before.
  edges_RC = begins_RC.copy()
  edges_RC[:, 0] = True
  edge_RC = np.maximum.accumulate(np.where(edges_RC, np.arange(C), 0), axis=1)
  rows_R = np.zeros(count, row)
  rows_R['bytes'] = (pieces_N['bytes'][at_RC] * weighted_RC).sum(1)
  rows_R['tokens'] = np.where(real_RC, pieces_N['token'][at_RC], pad)
  rows_R['segments'] = np.where(real_RC, np.cumsum(edges_RC, axis=1), 0)
  rows_R['positions'] = np.where(real_RC, np.arange(C) - edge_RC, 0)
  rows_R['weights'] = weighted_RC
  return rows_R
