"""Documents -> rows: token streams on disk, then rows by arithmetic on the stream.

First, each unit of input becomes a unit of tokens. Then the documents of a domain and
split are ordered by a hash of the seed and their names, and form one stream; row r holds
its tokens r*T to r*T + T. The bytes of the result depend neither on the number of
processes nor on the order in which they work.

N tokens of a stream  R rows  T tokens  C = T + 1 columns of a stored row.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gated import config, storage
from gated.data import pool, shards, tokenizer, units

PLACE = np.dtype([('unit', '<u4'), ('start', '<u8'), ('offset', '<u8')])
CHUNK = 1 << 20  # Tokens packed at a time, which bounds the memory of a process.


class Job(NamedTuple):
  """One shard: rows `first` to `stop` of a stream."""

  path: str
  stream: str
  first: int
  stop: int
  length: int
  vocab: int
  pad: int


def pack(
  out: str,
  paths: dict[str, list[str]],
  token: tokenizer.Tokenizer,
  *,
  length: int,
  seed: int,
  shard_rows: int,
  made: dict[str, Any],
  work: str,
  run: pool.Run,
  dedup: str = 'none',
) -> shards.Manifest:
  """Units by domain -> shards, tokenizer and manifest in `out`.

  `dedup` other than 'none' leaves out copies, and made['counts'] has their numbers by
  domain. Reuses the complete shards of an interrupted call, as recorded in `work`.
  ValueError if no training row can be made.
  """
  jobs: list[Job] = []
  portions = {}  # (split, domain) -> documents, shards.
  chosen: dict[str, np.ndarray] = {}
  if dedup != 'none':
    chosen, copies = units.chosen(paths, dedup)
    made = made | {'counts': made.get('counts', {}) | copies}
  for domain, split in itertools.product(sorted(paths), shards.SPLITS):
    stream, tokens, documents = _write_stream(
      work, paths[domain], split, chosen.get(domain)
    )
    rows = max(0, -(-(tokens - 1) // length))
    count = -(-rows // shard_rows)
    portions[split, domain] = documents, count
    for i in range(count):
      job = Job(
        path=os.path.join(out, f'{domain}-{split}-{i:05d}-of-{count:05d}.array_record'),
        stream=stream,
        first=i * shard_rows,
        stop=min((i + 1) * shard_rows, rows),
        length=length,
        vocab=token.vocab,
        pad=token.eos,
      )
      jobs.append(job)
  notes = iter(run(_pack_shard, jobs, 'packing'))
  splits: dict[str, dict[str, shards.Portion]] = {split: {} for split in shards.SPLITS}
  for (split, domain), (documents, count) in portions.items():
    group = list(itertools.islice(notes, count))
    splits[split][domain] = shards.Portion(
      shards=tuple(shards.Shard(**note['shard']) for note in group),
      rows=sum(note['shard']['rows'] for note in group),
      documents=documents,
      tokens=sum(note['tokens'] for note in group),
      bytes=sum(note['bytes'] for note in group),
      segments=max((note['segments'] for note in group), default=0),
    )
  if not any(portion.rows for portion in splits['train'].values()):
    raise ValueError('the input has too little text for a training row')
  manifest = shards.Manifest(
    format=shards.FORMAT,
    length=length,
    seed=seed,
    tokenizer=_copy_tokenizer(out, token),
    made=made,
    splits=splits,
  )
  shards.write_manifest(out, manifest)
  return manifest


def _copy_tokenizer(out: str, token: tokenizer.Tokenizer) -> shards.Vocabulary:
  """Copies the file of a tokenizer into the dataset."""
  name = token.name
  if token.path:
    name = 'tokenizer' + os.path.splitext(token.path)[1]
    storage.write(os.path.join(out, name), pathlib.Path(token.path).read_bytes())
  return shards.Vocabulary(
    name=name,
    vocab=token.vocab,
    eos=token.eos,
    eos_token=token.eos_token,
    sha256=token.fingerprint,
  )


def _write_stream(
  work: str, paths: list[str], split: str, chosen: np.ndarray | None
) -> tuple[str, int, int]:
  """Orders the documents of a split -> path, tokens and documents of their stream."""
  tables = [units.opened(path)[1] for path in paths]
  unit_D = np.repeat(np.arange(len(paths)), [len(table) for table in tables])
  table_D = np.concatenate([np.zeros(0, units.DOCUMENT), *tables])
  chosen_D = table_D['heldout'] == (split == 'heldout')
  chosen_D &= True if chosen is None else chosen
  unit_D, table_D = unit_D[chosen_D], table_D[chosen_D]
  order_D = np.argsort(table_D['key'], kind='stable')
  places: np.ndarray = np.zeros(len(table_D) + 1, PLACE)
  places['unit'][:-1] = unit_D[order_D]
  places['start'][:-1] = table_D['start'][order_D]
  places['offset'][1:] = np.cumsum(table_D['tokens'][order_D])
  content = places.tobytes()
  # Equal names mean equal streams, for the cache of _stream and for finished shards.
  name = config.digest([paths, hashlib.sha256(content).hexdigest()])
  path = os.path.join(work, name[:24])
  storage.write(f'{path}.order', content)
  storage.write_json(f'{path}.units', paths)
  return path, int(places['offset'][-1]), len(table_D)


@functools.lru_cache(maxsize=4)
def _stream(path: str) -> tuple[np.ndarray, list[str]]:
  return np.memmap(f'{path}.order', PLACE, 'r'), units.read_json(f'{path}.units')


def _pack_shard(job: Job) -> dict[str, Any]:
  """Writes a shard unless an interrupted call has finished it -> its sizes."""
  path = f'{job.stream}-{config.digest(job)[:24]}.json'
  note = units.read_json(path)
  exists = note and os.path.isfile(job.path)
  if exists and shards.sha256(job.path) == note['shard']['sha256']:
    return note
  counts = {'tokens': 0, 'bytes': 0, 'segments': 0}

  def chunks() -> Iterator[np.ndarray]:
    step = max(1, CHUNK // job.length)
    for first in range(job.first, job.stop, step):
      rows_R = _rows(job, first, min(first + step, job.stop))
      counts['tokens'] += int((rows_R['weights'] > 0).sum())
      counts['bytes'] += int(rows_R['bytes'].sum())
      counts['segments'] = max(counts['segments'], shards.segments(rows_R))
      yield rows_R

  shard = shards.write_shard(job.path, chunks())
  note = counts | {'shard': dataclasses.asdict(shard)}
  storage.write_json(path, note)
  return note


def _rows(job: Job, first: int, stop: int) -> np.ndarray:
  """Rows `first` to `stop` of a stream."""
  places, paths = _stream(job.stream)
  offsets = places['offset']
  low, high = first * job.length, min(stop * job.length + 1, int(offsets[-1]))
  pieces_N = np.empty(high - low, units.TOKEN)
  begins_N = np.zeros(high - low, bool)
  i, j = np.searchsorted(offsets, low, 'right') - 1, np.searchsorted(offsets, high)
  for place, end in zip(places[i:j], offsets[i + 1 : j + 1]):
    begin = int(place['offset'])
    start, until = max(begin, low), min(int(end), high)
    source = int(place['start']) + start - begin
    tokens_N = units.opened(paths[place['unit']])[0]
    pieces_N[start - low : until - low] = tokens_N[source : source + until - start]
    if begin >= low:
      begins_N[begin - low] = True
  row = shards.layout(job.length, job.vocab)
  return cut(pieces_N, begins_N, stop - first, row=row, pad=job.pad)


def cut(
  pieces_N: np.ndarray, begins_N: np.ndarray, count: int, *, row: np.dtype, pad: int
) -> np.ndarray:
  """Consecutive tokens of a stream -> `count` rows, the last one padded.

  begins_N marks the first token of each document, which is not a target.
  """
  C = row['tokens'].shape[0]
  at_RC = np.arange(count)[:, None] * (C - 1) + np.arange(C)
  real_RC = at_RC < len(pieces_N)
  at_RC = np.minimum(at_RC, len(pieces_N) - 1)
  begins_RC = begins_N[at_RC]
  weighted_RC = real_RC & ~begins_RC
  weighted_RC[:, 0] = False  # Column 0 is a target of the previous row.
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
