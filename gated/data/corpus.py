"""An opened mixture: rows by global index, batches for a host, held-out text.

B batch  T tokens  N tokens of a text.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from gated.data import mixture, shards, tokenizer, workers
from gated.data.shards import Batch

THREADS = 4  # Readers per process; each reads whole batches.


class Unreadable(RuntimeError):
  """Rows that could be opened can no longer be read: a fault of this machine."""

  def saved(self, step: int | None) -> Self:
    """The same error, with the last saved step of the run that met it."""
    return type(self)(f'{self}; the last saved step is {step}')


class Damaged(Unreadable):
  """A shard differs from the manifest since it was opened."""


class Corpus:
  """An opened mixture, read lazily."""

  def __init__(
    self,
    parts: Sequence[mixture.Part],
    *,
    batch: int,
    seed: int,
    workers: int,
    prefetch: int,
  ):
    self._parts, self._batch = tuple(parts), batch
    self._workers, self._prefetch = workers, prefetch
    manifest = parts[0].manifest
    self.tokenizer = shards.open_tokenizer(parts[0].directory, manifest)
    self.vocab = self.tokenizer.vocab
    self._row = manifest.row
    self._records = _Records(self._parts, seed)
    self._heldout = mixture.heldout_domains(parts)
    self.domains = tuple(self._heldout)
    self.rows = sum(part.rows('train') for part in parts)  # Training rows.
    self.max_segments = max(part.segments() for part in parts)  # Per row.
    self.mean_segments = mixture.mean_segments(parts)
    # The ends of text, kept with a checkpoint for its export; no part of the SHA-256.
    ends = {'eos': self.tokenizer.eos}
    if self.tokenizer.bos_token:
      ends['bos'] = self.tokenizer.bos
    if manifest.made.get('bos'):  # Of prepare_data.py: documents begin with it.
      ends['begins'] = True
    self.fingerprint = mixture.fingerprint(parts) | {'ends': ends}

  def check_tokenizer(self, path: Path) -> None:
    """Raises ValueError unless the file, or the model beside it, is the data's tokenizer.

    The tokens that it puts around a text do not count: the data has its own.
    """
    ours = self.tokenizer
    if ours.path.endswith('.model') and path.with_suffix('.model').is_file():
      path = path.with_suffix('.model')  # An export has both.
    theirs = tokenizer.load(str(path), eos=ours.eos_token if ours.path else '')
    if theirs.fingerprint != ours.fingerprint and not _same_ids(path, Path(ours.path)):
      raise ValueError(
        f'the data has the tokenizer {ours.name!r}, not {path}: prepare it with python '
        f'scripts/prepare_data.py --tokenizer={path} ...'
      )

  def train(self, data_step: int, rows: Sequence[int]) -> Iterator[Batch]:
    """Endless batches from data_step on, each with the in-batch indices `rows`.

    config.data.workers and prefetch do not change the rows or their order. Unreadable or
    Damaged, with the reason in one line, if the rows can no longer be read.
    """
    import grain

    rows = [int(i) for i in rows]
    if not rows or not all(0 <= i < self._batch for i in rows):
      raise ValueError(f'rows={rows}, but they must lie in [0, {self._batch})')
    batches: Any = _Batches(self._records, self._row, data_step, self._batch, rows)
    ahead = self._prefetch
    options = grain.ReadOptions(
      num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead
    )
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if not self._workers:
      return self._checked(dataset)
    # Workers take batches in turn, so their number does not change the order.
    dataset = dataset.mp_prefetch(
      grain.multiprocessing.MultiprocessingOptions(
        num_workers=self._workers, per_worker_buffer_size=ahead
      ),
      worker_init_fn=workers.die_with_parent,
    )
    # Copy the batches out of the memory shared with the workers.
    return (Batch(*map(np.array, batch)) for batch in self._checked(dataset))

  def _checked(self, dataset: Any) -> Iterator[Any]:
    """The elements of a grain dataset; errors of reading as `train` raises them."""
    try:
      yield from dataset
    except Exception as error:
      files = ((part.directory, part.files('train')) for part in self._parts)
      faults = [fault for place in files for _, fault in shards.faults(*place, 'size')]
      lines = str(error).splitlines() or [repr(error)]
      if faults:
        raise Damaged(f'config.data.mixture: {faults[0]}') from error
      if isinstance(error, ValueError) or 'Riegeli' in lines[0]:
        raise Damaged(f'config.data.mixture: a row cannot be read: {lines[0]}') from error
      knob = f'config.data.workers={self._workers}'
      if isinstance(error, OSError):
        raise Unreadable(f'{knob}: {error}, in the shared memory of workers') from error
      if 'terminated unexpectedly' in lines[0]:
        killed = 'a data worker was killed, most likely for memory'
        raise Unreadable(f'{knob}: {killed} ({lines[0]})') from error
      raise

  def row(self, g: int) -> np.void:
    """The stored row with global index g; its fields are those of shards.layout."""
    return shards.parse([self._records[g]], self._row)[0]

  def packed(self, rows: Iterable[int]) -> Batch:
    """The stored rows with these global indices."""
    return shards.batch(shards.parse([self._records[g] for g in rows], self._row))

  def heldout_rows(self, domain: str, limit: int) -> int:
    """The number of rows that `heldout` reads."""
    part, name = self._heldout[domain]
    rows = part.portions('heldout')[name].rows
    return min(limit or rows, rows)

  def record_ids(self, data_step: int) -> list[list[Any]]:
    """[part of the mixture, shard, record] of each row of a step's batch."""
    ids = []
    for g in range(data_step * self._batch, (data_step + 1) * self._batch):
      i, record = self._records.place(g)
      for shard in self._parts[i].files('train'):
        if record < shard.rows:
          break
        record -= shard.rows
      ids.append([self._parts[i].label, shard.file, record])
    return ids

  def heldout(
    self, domain: str, *, batch: int, rows: Sequence[int], limit: int
  ) -> Iterator[tuple[Batch, np.ndarray]]:
    """The first `limit` held-out rows (0 is all), always the same -> (Batch, bytes_B).

    bytes_B counts the text bytes of a row's targets. Each batch holds only the in-batch
    indices `rows`; the last one is padded with rows of weight 0.
    """
    part, name = self._heldout[domain]
    portion = part.portions('heldout')[name]
    source, stop = part.source(portion.shards), self.heldout_rows(domain, limit)
    padding = np.zeros((), self._row)
    padding['tokens'] = self.tokenizer.eos
    for first in range(0, stop, batch):
      indices = [first + i for i in rows]
      records = [source[i] if i < stop else padding.tobytes() for i in indices]
      rows_B = shards.parse(records, self._row)
      yield shards.batch(rows_B), rows_B['bytes'].astype(np.int64)

  def heldout_text(self, domain: str, limit: int) -> bytes:
    """The text of the targets in the first `limit` held-out rows (0 is all)."""
    pieces = [np.zeros(0, np.int32)]
    for row, _ in self.heldout(domain, batch=1, rows=[0], limit=limit):
      ids_N = row.targets[row.weights > 0]
      pieces.append(ids_N[ids_N != self.tokenizer.eos])
    return self.tokenizer.decode(np.concatenate(pieces))


def _same_ids(*paths: Path) -> bool:
  """Whether two files tokenizer.json differ only in what they put around a text."""
  if {path.suffix for path in paths} != {'.json'}:
    return False
  a, b = (json.loads(path.read_bytes()) for path in paths)
  return a | {'post_processor': None} == b | {'post_processor': None}


class _Records:
  """The stored records of a mixture by global index."""

  def __init__(self, parts: Sequence[mixture.Part], seed: int):
    self._turns = mixture.Turns([part.term.weight for part in parts])
    self._sources = [part.source(part.files('train')) for part in parts]
    self._orders = [_order(part, seed) for part in parts]

  def __getitem__(self, g: int) -> bytes:
    i, record = self.place(g)
    return self._sources[i][record]

  def place(self, g: int) -> tuple[int, int]:
    """A global index -> (part, index of the record in the part)."""
    i, k = self._turns[g]
    return i, int(self._orders[i][k])


def _order(part: mixture.Part, seed: int) -> Any:
  """The order of a part's records in all epochs, as a grain dataset of indices.

  grain shuffles epoch e with seed + e, so seeds 1 and 2 would share all orders but one;
  hashing the seed first avoids that.
  """
  import grain

  words = f'{seed} {part.manifest.digest} {part.term.domain}'
  digest = hashlib.sha256(words.encode()).digest()
  indices = grain.MapDataset.range(part.rows('train'))
  return indices.shuffle(seed=int.from_bytes(digest[:4], 'big')).repeat()


@dataclasses.dataclass
class _Batches:
  """A data source of one host's batches, starting at a data step."""

  records: _Records
  row: np.dtype
  step: int  # The first data step.
  batch: int
  rows: list[int]  # In-batch indices of this host.

  def __len__(self) -> int:
    # Practically endless, and small enough that grain can round it up.
    return sys.maxsize >> 1

  def __getitem__(self, index: int) -> Batch:
    first = (self.step + int(index)) * self.batch
    records = (self.records[first + i] for i in self.rows)
    return shards.batch(shards.parse(records, self.row))
