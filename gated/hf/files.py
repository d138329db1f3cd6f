"""Folders of safetensors: headers first, then a tensor, or a row of one, at a time.

Nothing here is executed: a header is JSON, and a pickle is not read at all. A folder is
written tensor by tensor, one file's tensors in memory, and config.json last: without it
a folder is no checkpoint.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gated import storage
from gated.config import nests

CONFIG, INDEX, SINGLE = 'config.json', 'model.safetensors.index.json', 'model.safetensors'
MAX_JSON = 1 << 26  # Bytes; the index of a mixture of 100,000 tensors takes about 10 MB.
MAX_DEPTH = 32  # Of lists and objects in each other.

# Theirs -> ours.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16'}


class Tensor(NamedTuple):
  """What a header says of a tensor."""

  shape: tuple[int, ...]
  dtype: str  # Theirs: F32, BF16, or another that is not read.


def is_checkpoint(directory: str | Path) -> bool:
  """Whether a folder holds config.json and weights in safetensors."""
  folder = Path(directory)
  return (folder / CONFIG).is_file() and any(folder.glob('*.safetensors'))


def read_json(path: Path) -> dict[str, Any]:
  """A file -> its JSON object; ValueError names the path and the fault."""
  inside(path.parent, path.name)
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  if path.stat().st_size > MAX_JSON:
    raise ValueError(f'{path} is larger than {MAX_JSON} bytes')
  try:
    content = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  except RecursionError as error:
    raise ValueError(f'{path} nests deeper than {MAX_DEPTH} levels') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a JSON object')
  for key, value in content.items():
    if nests(value, MAX_DEPTH):
      raise ValueError(f'{path}: {key} nests deeper than {MAX_DEPTH} levels')
  return content


def inside(folder: Path, name: str) -> Path:
  """A name in a folder -> its path; ValueError where links lead out of the folder.

  The hub's cache is made of links: snapshots/REVISION/NAME leads to ../../blobs/HASH.
  """
  root, real = os.path.realpath(folder), os.path.realpath(folder / name)
  home = Path(root).parent
  roots = [root, str(home.parent / 'blobs')] if home.name == 'snapshots' else [root]
  if not any(real.startswith(each + os.sep) for each in roots):
    raise ValueError(f'{folder / name} is a link out of the folder')
  return folder / name


class Tensors:
  """The tensors of a folder; opening it reads headers only.

  Raises ValueError, naming the file, for a header that does not fit its file, an index
  that its files do not bear out, or a file of the index outside the folder.
  """

  def __init__(self, directory: str | Path):
    self.directory = Path(directory)
    self.headers: dict[str, Tensor] = {}
    self._files: dict[str, Any] = {}  # By tensor.
    for path, names in _files(self.directory).items():
      self._open(path, names)

  def _open(self, path: Path, promised: set[str] | None) -> None:
    inside(self.directory, str(path.relative_to(self.directory)))
    if not path.is_file():
      raise ValueError(f'{path}: no such file')
    try:
      file = safe_open(path, framework='numpy')
      names = file.keys()
      headers = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
      raise ValueError(f'{path} is no whole safetensors file: {error}') from error
    if promised is not None and promised != headers.keys():
      differ = ', '.join(sorted(promised ^ headers.keys())[:20])
      raise ValueError(f'{path} does not hold what {INDEX} says it does: {differ}')
    for name, header in headers.items():
      self.headers[name] = Tensor(tuple(header.get_shape()), header.get_dtype())
      self._files[name] = file

  def read(self, name: str, row: int | None = None) -> np.ndarray:
    """A tensor, or one row of its leading dim, in its own dtype; copied to memory."""
    file = self._files[name]
    return file.get_tensor(name) if row is None else file.get_slice(name)[row]


def _files(folder: Path) -> dict[Path, set[str] | None]:
  """A folder -> its files, each with the tensors that an index promises, or None."""
  if not (folder / INDEX).exists():
    found = sorted(folder.glob('*.safetensors'))
    if (folder / SINGLE).exists() or len(found) == 1:
      return {folder / SINGLE if (folder / SINGLE).exists() else found[0]: None}
    held = f'{len(found)} *.safetensors without {INDEX}' if found else 'no *.safetensors'
    raise ValueError(
      f'{folder} holds {held}; other formats, pickles above all, are not read'
    )
  where = read_json(folder / INDEX).get('weight_map')
  if not isinstance(where, dict) or not where:
    raise ValueError(f'{folder / INDEX} has no weight_map')
  files: dict[Path, set[str]] = {}
  for name, file in where.items():
    path = PurePosixPath(file) if isinstance(file, str) else PurePosixPath('')
    inside = not path.is_absolute() and '..' not in path.parts and '\\' not in str(path)
    if not inside or path.suffix != '.safetensors':
      raise ValueError(
        f'{folder / INDEX}: {name} is said to lie in {file!r}, but only a .safetensors '
        'file inside the folder is read'
      )
    files.setdefault(folder / path, set()).add(name)
  return dict(files)


def write(
  directory: str | Path,
  config: Mapping[str, Any],
  headers: Mapping[str, Tensor],
  arrays: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int,
) -> None:
  """Tensors, in the order of `headers`, -> a new folder, in files of about that size.

  Raises ValueError if the folder exists and is not empty, or cannot be made.
  """
  folder = Path(directory)
  check_new(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards = _shards(headers, shard_bytes)
  stream, index = iter(arrays), {}
  for i, names in enumerate(shards):
    file = SINGLE if len(shards) == 1 else _name(i, len(shards))
    # transformers reads a file only if it says of which framework it is.
    save_file(_next(stream, names), folder / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(names, file)
  if len(shards) > 1:
    total = {'total_size': sum(map(size, headers.values()))}
    content = {'metadata': total, 'weight_map': index}
    storage.write_json(folder / INDEX, content, sort_keys=True)
  storage.write_json(folder / CONFIG, config, sort_keys=True)


def check_new(folder: Path) -> None:
  """Raises ValueError unless the folder is empty, or can be made; and be written to."""
  there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
  if there != folder and not os.path.isdir(there):
    raise ValueError(f'{folder} cannot be made: {there} is not a folder')
  if os.path.isdir(there) and not os.access(there, os.R_OK | os.W_OK | os.X_OK):
    raise ValueError(f'{folder} cannot be written: {there} allows no writing')
  if there == folder and (not os.path.isdir(folder) or any(folder.iterdir())):
    raise ValueError(f'{folder} is not an empty folder, and nothing is overwritten')


def size(tensor: Tensor) -> int:
  """Bytes of a tensor's data."""
  return math.prod(tensor.shape) * jnp.dtype(DTYPES[tensor.dtype]).itemsize


def _next(stream: Iterator[tuple[str, np.ndarray]], names: list[str]) -> dict:
  """The next tensors of a stream, which come in the order of `names`."""
  found = dict(next(stream) for _ in names)
  assert list(found) == names, (list(found), names)
  # safetensors writes the memory of an array as it lies.
  return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _shards(headers: Mapping[str, Tensor], limit: int) -> list[list[str]]:
  """Names, in order, cut where a file would exceed the limit."""
  shards, room = [], -1
  for name, tensor in headers.items():
    room -= size(tensor)
    if room < 0:
      shards.append([])
      room = limit - size(tensor)
    shards[-1].append(name)
  return shards


def _name(i: int, count: int) -> str:
  return f'model-{i + 1:05d}-of-{count:05d}.safetensors'
