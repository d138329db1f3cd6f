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
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated import config, storage
from gated.data import faults, shards, tokenizer

TOKEN = np.dtype([('token', '<u4'), ('bytes', '<u4')])
DOCUMENT = np.dtype(
  [
    ('key', '<u8'),
    ('start', '<u8'),
    ('tokens', '<u8'),
    ('heldout', 'u1'),
    ('content', '<u8'),  # Hash of the text; 0 without `dedup`.
  ]
)
PLACE = np.dtype([('unit', '<u4'), ('start', '<u8'), ('offset', '<u8')])
CHUNK = 1 << 20  # Tokens packed at a time, which bounds the memory of a process.

# run(function, jobs, label) -> the results, in order; may use several processes.
Run = Callable[[Callable[[Any], Any], Sequence[Any], str], list]


def write_unit(
  path: str,
  documents: Iterable[tuple[str, str]],
  token: tokenizer.Tokenizer,
  *,
  seed: int,
  heldout: float,
  bos: bool,
  dedup: bool = False,
  report: faults.Report = faults.refuse,
) -> dict[str, int]:
  """(name, text) pairs -> a unit: tokens, a table of its documents, and their SHA-256.

  Documents without a token are skipped, and reported if the tokenizer refuses them. The
  split of a document depends only on its name, or with `dedup` on its content; its place
  in the stream depends on its name and the seed. Returns counts: documents, those held
  out, those without a token, tokens, and unknown tokens.
  """
  table, start = [], 0
  counts = dict(documents=0, heldout=0, empty=0, tokens=0, unknown=0)
  with storage.draft(path) as draft, open(draft, 'wb') as file:
    for name, text in documents:
      try:
        ids_N, bytes_N = token.encode(text)
      except ValueError as error:
        text = f'{name}: {faults.describe(error)}'
        report(faults.Fault('refused by the tokenizer', text))
        continue
      counts['empty'] += not len(ids_N)
      counts['tokens'] += len(ids_N)
      counts['unknown'] += int((ids_N == token.unk).sum())
      if not len(ids_N):
        continue
      begin = int(bos)
      pieces_N: np.ndarray = np.zeros(begin + len(ids_N) + 1, TOKEN)
      pieces_N['token'][[0, -1]] = token.bos, token.eos
      pieces_N['token'][begin:-1] = ids_N
      pieces_N['bytes'][begin:-1] = bytes_N
      file.write(pieces_N.tobytes())
      key, split = _hash(str(seed), name), split_key(name, text, dedup)
      is_apart, content = is_heldout(split, heldout), _hash(split) if dedup else 0
      table.append((key, start, len(pieces_N), is_apart, content))
      counts['documents'] += 1
      counts['heldout'] += is_apart
      start += len(pieces_N)
  storage.write(f'{path}.documents', np.array(table, DOCUMENT).tobytes())
  storage.write_json(f'{path}.json', _digests(path))
  return counts


def split_key(name: str, text: str, dedup: bool) -> str:
  """-> what decides the split of a document: its name, or its words with `dedup`."""
  return ' '.join(text.split()) if dedup else name


def is_heldout(key: str, heldout: float) -> bool:
  """Whether a document with this `split_key` belongs to the held-out fraction."""
  return _hash(key) < heldout * 2.0**64


def _hash(*words: str) -> int:
  # The name of a file may not be UTF-8.
  content = '\0'.join(words).encode('utf-8', 'surrogateescape')
  return int.from_bytes(hashlib.sha256(content).digest()[:8], 'big')


def unit_is_complete(path: str) -> bool:
  """Whether the files of a unit exist and have the SHA-256 that its writer recorded."""
  return read_json(f'{path}.json') == _digests(path)


def _digests(path: str) -> list[str]:
  files = [path, f'{path}.documents']
  return [shards.sha256(file) for file in files if os.path.isfile(file)]


def read_json(path: str) -> Any:
  """-> the content of a JSON file; None if it is missing or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except (FileNotFoundError, ValueError):
    return None


@functools.lru_cache(maxsize=512)
def _unit(path: str) -> tuple[np.ndarray, np.ndarray]:
  """A unit -> its tokens (memory-mapped) and its documents."""
  documents = np.fromfile(f'{path}.documents', DOCUMENT)
  tokens = np.memmap(path, TOKEN, 'r') if len(documents) else np.zeros(0, TOKEN)
  return tokens, documents


class _Job(NamedTuple):
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
  units: dict[str, list[str]],
  token: tokenizer.Tokenizer,
  *,
  length: int,
  seed: int,
  shard_rows: int,
  made: dict[str, Any],
  work: str,
  run: Run,
  dedup: bool = False,
) -> shards.Manifest:
  """Units by domain -> shards, tokenizer and manifest in `out`.

  With `dedup`, the first of all documents with the same words is kept, and made['counts']
  has the number of the others by domain. Reuses the complete shards of an interrupted
  call, as recorded in `work`. ValueError if no training row can be made.
  """
  jobs: list[_Job] = []
  portions = {}  # (split, domain) -> documents, shards.
  first = _first_copies(units) if dedup else {}
  if repeated := {name: int((~first_D).sum()) for name, first_D in first.items()}:
    made = made | {'counts': made.get('counts', {}) | {'duplicates': repeated}}
  for domain, split in itertools.product(sorted(units), shards.SPLITS):
    chosen = first.get(domain)
    stream, tokens, documents = _write_stream(work, units[domain], split, chosen)
    rows = max(0, -(-(tokens - 1) // length))
    count = -(-rows // shard_rows)
    portions[split, domain] = documents, count
    for i in range(count):
      job = _Job(
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


def _first_copies(units: dict[str, list[str]]) -> dict[str, np.ndarray]:
  """Units by domain -> for each document whether it is the first with its content."""
  tables = {
    domain: [_unit(path)[1]['content'] for path in units[domain]]
    for domain in sorted(units)
  }
  content_D = np.concatenate([part for group in tables.values() for part in group])
  is_first_D = np.zeros(len(content_D), bool)
  is_first_D[np.unique(content_D, return_index=True)[1]] = True
  stops = np.cumsum([sum(map(len, group)) for group in tables.values()])
  return dict(zip(tables, np.split(is_first_D, stops[:-1])))


def _write_stream(
  work: str, units: list[str], split: str, chosen: np.ndarray | None
) -> tuple[str, int, int]:
  """Orders the documents of a split -> path, tokens and documents of their stream."""
  tables = [_unit(path)[1] for path in units]
  unit_D = np.repeat(np.arange(len(units)), [len(table) for table in tables])
  table_D = np.concatenate([np.zeros(0, DOCUMENT), *tables])
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
  name = config.digest([units, hashlib.sha256(content).hexdigest()])
  path = os.path.join(work, name[:24])
  storage.write(f'{path}.order', content)
  storage.write_json(f'{path}.units', units)
  return path, int(places['offset'][-1]), len(table_D)


@functools.lru_cache(maxsize=4)
def _stream(path: str) -> tuple[np.ndarray, list[str]]:
  return np.memmap(f'{path}.order', PLACE, 'r'), read_json(f'{path}.units')


def _pack_shard(job: _Job) -> dict[str, Any]:
  """Writes a shard unless an interrupted call has finished it -> its sizes."""
  path = f'{job.stream}-{config.digest(job)[:24]}.json'
  note = read_json(path)
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


def _rows(job: _Job, first: int, stop: int) -> np.ndarray:
  """Rows `first` to `stop` of a stream."""
  places, units = _stream(job.stream)
  offsets = places['offset']
  low, high = first * job.length, min(stop * job.length + 1, int(offsets[-1]))
  pieces_N = np.empty(high - low, TOKEN)
  begins_N = np.zeros(high - low, bool)
  i, j = np.searchsorted(offsets, low, 'right') - 1, np.searchsorted(offsets, high)
  for place, end in zip(places[i:j], offsets[i + 1 : j + 1]):
    begin = int(place['offset'])
    start, until = max(begin, low), min(int(end), high)
    source = int(place['start']) + start - begin
    tokens_N = _unit(units[place['unit']])[0]
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
