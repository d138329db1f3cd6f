"""Datasets of the Hugging Face hub, or folders in its layout, by the package `datasets`.

hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT] is streamed, shard by shard. A revision such as
main is resolved to its commit once; a later call of the same dataset reads that commit.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from gated.data import lines, tokenizer
from gated.data.faults import Fault, Report, describe
from gated.data.pieces import Piece, Reading, Span

PREFIX = 'hf:'
SPLIT = 'train'
TIMEOUT = 20  # Seconds.


class Source(NamedTuple):
  """A resolved source: `str` is its name, and `parse` reads it."""

  place: str  # OWNER/NAME, or a local folder.
  revision: str  # A commit, or a digest of the folder.
  config: str
  split: str

  def __str__(self) -> str:
    return f'{PREFIX}{self.place}@{self.revision}:{self.config}:{self.split}'

  @classmethod
  def parse(cls, text: str) -> 'Source':
    head, config, split = text.removeprefix(PREFIX).rsplit(':', 2)
    place, _, revision = head.rpartition('@')
    return cls(place, revision, config, split)


def survey(text: str, reading: Reading, pins: dict[str, str]) -> list[Piece]:
  """hf:... -> one piece per shard; adds the resolved source to `pins`.

  ValueError if the package, the network, the dataset, its config or split is missing.
  """
  library = _library(text)
  try:
    source = _resolve(text, library, pins)
    stream = _stream(source, library)
    names = stream.column_names or []
    shards = int(stream.num_shards)
  except ValueError as error:
    raise ValueError(f'{text}: {describe(error)}') from error
  except Exception as error:  # The libraries have many.
    kind = type(error).__name__
    text = f'{text} cannot be opened (is there a network?): {kind}: {describe(error)}'
    raise ValueError(text[:500]) from error
  if names and reading.field.partition('.')[0] not in names:
    raise ValueError(f'{text}: --field={reading.field!r} is no column; it has {names}')
  if not os.path.isdir(source.place):
    pins[text] = str(source)
  place = source.place
  place = os.path.basename(os.path.abspath(place)) if os.path.isdir(place) else place
  name = f'{place}/{source.config}/{source.split}'
  return [Piece(str(source), name, 'hub', reading, i, i + 1) for i in range(shards)]


def _library(text: str) -> Any:
  needs = f"{text} needs: pip install 'datasets>=4'"
  try:
    library = tokenizer.optional('datasets')
  except ValueError as error:
    raise ValueError(needs) from error
  if int(library.__version__.partition('.')[0]) < 4:  # They may execute a dataset's code.
    raise ValueError(f'{needs}; {library.__version__} is installed')
  return library


def _resolve(text: str, library: Any, pins: dict[str, str]) -> Source:
  if text in pins:
    return Source.parse(pins[text])
  head, *chosen = text.removeprefix(PREFIX).split(':')
  place, _, revision = head.partition('@')
  if not place or not all(chosen) or len(chosen) > 2:
    raise ValueError('it must be hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]')
  if os.path.isdir(os.path.expanduser(place)):
    place = os.path.expanduser(place)
    revision, settings = _digest(place), {}
  else:
    api = tokenizer.optional('huggingface_hub').HfApi()
    info = api.dataset_info(place, revision=revision or None, timeout=TIMEOUT)
    revision, settings = info.sha, {'revision': info.sha}
  configs = library.get_dataset_config_names(place, **settings)
  config = chosen[0] if len(chosen) == 2 or {*chosen} & {*configs} else ''
  config = config or (
    'default' if 'default' in configs or len(configs) > 1 else configs[0]
  )
  if config not in configs:
    raise ValueError(f'no config {config!r}, but allowed are {configs}')
  split = chosen[-1] if chosen and (len(chosen) == 2 or chosen[0] != config) else SPLIT
  splits = library.get_dataset_split_names(place, config, **settings)
  if split not in splits:
    raise ValueError(f'no split {split!r} of {config!r}, but allowed are {splits}')
  return Source(place, revision, config, split)


def _digest(folder: str) -> str:
  """A folder -> SHA-256 of the names and contents of its files, without hidden ones."""
  sha = hashlib.sha256()
  for place, folders, names in os.walk(folder, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    for name in sorted(name for name in names if not name.startswith('.')):
      path = os.path.join(place, name)
      with open(path, 'rb') as file:
        content = hashlib.file_digest(file, 'sha256').hexdigest()
      sha.update(f'{os.path.relpath(path, folder)}\0{content}\0'.encode())
  return sha.hexdigest()


def _stream(source: Source, library: Any) -> Any:
  settings = {} if os.path.isdir(source.place) else {'revision': source.revision}
  return library.load_dataset(
    source.place, source.config, split=source.split, streaming=True, **settings
  )


def spans(file: BinaryIO, piece: Piece) -> list[Span]:
  raise AssertionError('a dataset of the hub is no file')


def read(piece: Piece, report: Report) -> Iterator[tuple[str, Any]]:
  """A shard -> its documents; ValueError, not a fault, if the connection is lost."""
  source, row = Source.parse(piece.path), 0
  library = _library(piece.path)
  try:
    shards = _stream(source, library)
    for entry in shards.shard(shards.num_shards, piece.start):
      name = f'{piece.name}:{piece.start}:{row}'
      row += 1
      try:
        yield from lines.entries(name, entry, piece)
      except Fault as fault:
        report(Fault(fault.reason, f'{name}: {fault}'))
  except (Fault, GeneratorExit):
    raise
  except Exception as error:
    text = f'{piece.path}, shard {piece.start}, row {row}: {describe(error)}'
    raise ValueError(f'{text}; the same command continues') from error
