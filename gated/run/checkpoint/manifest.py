"""What a saved step holds: manifest.json, written last, is the mark that it is whole.

It lists every file with its size and digest, every array with its dtype and shape, and
what the run says about the step. A step without one was never committed. Digests find
damage, not forgery: who can write the folder can write the manifest as well.

Nothing here trusts what it reads: sizes and types are checked before they are used, and
no name leaves the folder.
"""

import concurrent.futures
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from gated import config, storage

FORMAT = 1
NAME = 'manifest.json'
LIMIT = 1 << 28  # Bytes of a manifest.
DEPTH = 32  # Of lists and objects in each other.
PIECE = 1 << 22  # Bytes read at a time.
THREADS = 4


class Damaged(ValueError):
  """A step that is not what was saved; says which file, and how it differs."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
  step: int
  about: dict[str, Any]  # 'config', 'data', 'heldout_loss', and what else the run says.
  leaves: dict[str, dict[str, list]]  # item -> name of an array -> [dtype, *shape]
  files: dict[str, list]  # path in the step's folder -> [bytes, digest]


def files(folder: storage.Path) -> list[str]:
  """A step's folder -> the names of its payload, sorted."""
  return sorted(name for name in storage.sizes(folder) if name != NAME)


def survey(folder: storage.Path, names: Iterable[str]) -> dict[str, list]:
  """A folder and names in it -> name: [bytes, XXH3-128 in hexadecimal]."""
  names = list(names)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _survey(folder / name), names)))


def _survey(path: storage.Path) -> list:
  digest, size, piece = xxhash.xxh3_128(), 0, bytearray(PIECE)
  with path.open('rb') as opened:
    file: Any = opened
    while count := file.readinto(piece):
      digest.update(memoryview(piece)[:count])
      size += count
  return [size, digest.hexdigest()]


def write(folder: storage.Path, manifest: Manifest) -> None:
  content = {'format': FORMAT} | asdict(manifest)
  content |= {'sha256': config.digest(content)}
  storage.write(folder / NAME, json.dumps(content, allow_nan=False).encode())


def read(folder: storage.Path) -> Manifest:
  """A step's folder -> Manifest; Damaged, naming the fault, if there is none to trust."""
  path = folder / NAME
  try:
    content = json.loads(storage.read(path, LIMIT))
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Damaged(f'{path} is not there: the step was not saved to its end') from error
  except (ValueError, RecursionError, OSError) as error:
    if isinstance(error, OSError) and storage.is_remote(path):
      raise  # The network's fault, and not the step's.
    raise Damaged(f'{path} is not to be read: {error}'[:300]) from error
  if not isinstance(content, dict) or content.get('format') != FORMAT:
    found = content.get('format') if isinstance(content, dict) else content
    raise Damaged(f'{path}: format={found!r}, but this code reads {FORMAT}'[:300])
  if config.nests(content, DEPTH):
    raise Damaged(f'{path} nests deeper than {DEPTH} levels')
  sha256 = content.pop('sha256', None)
  try:
    if sha256 != config.digest(content):
      raise Damaged(f'{path} is damaged: its SHA-256 is not what it says')
    return _checked(folder, content)
  except Damaged:
    raise
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise Damaged(f'{path} is no manifest of a step: {error!r}'[:300]) from error


def _checked(folder: storage.Path, content: dict) -> Manifest:
  """JSON of the right format -> Manifest; every field looked at."""
  found = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
  whole = lambda value: type(value) is int and 0 <= value < 1 << 62
  if not whole(found.step):
    raise Damaged(f'{folder / NAME}: step={found.step!r} is no step')
  for name, entry in found.files.items():
    size, digest = entry
    if not whole(size) or not isinstance(digest, str):
      raise Damaged(f'{folder / NAME}: {name} has {entry!r}'[:300])
    try:
      storage.inside(folder, name)
    except ValueError as error:
      raise Damaged(f'{folder / NAME}: {error}') from error
  for item, leaves in found.leaves.items():
    for name, (dtype, *shape) in leaves.items():
      if not isinstance(dtype, str) or not all(map(whole, shape)) or len(shape) > 16:
        raise Damaged(f'{folder / NAME}: {item} has {name} of {dtype!r} {shape}'[:300])
  for name in ('config', 'data'):
    if not isinstance(found.about[name], dict):
      raise Damaged(f'{folder / NAME}: about.{name} is no group of values')
  loss = found.about['heldout_loss']
  if loss is not None and not isinstance(loss, (int, float)):
    raise Damaged(f'{folder / NAME}: heldout_loss={loss!r} is no loss'[:300])
  return found


def verify(folder: storage.Path, manifest: Manifest, names: Iterable[str]) -> None:
  """Raises Damaged, naming the first of the files that is not what the manifest says."""
  names, sizes = list(names), storage.sizes(folder)
  for name in names:
    said = manifest.files[name][0]
    if name not in sizes:
      raise Damaged(f'{folder / name} is missing')
    if sizes[name] != said:
      raise Damaged(f'{folder / name} has {sizes[name]} bytes, but {said} were saved')
  for name, found in survey(folder, names).items():
    if found != list(manifest.files[name]):
      raise Damaged(f'{folder / name} is damaged: its digest is not what was saved')
