"""Reads and writes folders of safetensors; no code from a file is executed.

Opening a folder reads headers only; `read` then returns one tensor, or one row of it.
Writing holds the tensors of one file in memory. config.json is written last, because a
folder without it is not a checkpoint.
"""

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
MAX_JSON = 1 << 26  # Bytes; an index of 100,000 tensors takes about 10 MB.
MAX_DEPTH = 32  # Nesting of lists and objects.

# Hugging Face dtype -> ours.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16'}


class Tensor(NamedTuple):
  """The header of a tensor."""

  shape: tuple[int, ...]
  dtype: str  # F32, BF16, or an unsupported one.


def is_checkpoint(directory: str | Path) -> bool:
  """Whether a folder holds config.json and weights in safetensors."""
  folder = Path(directory)
  return (folder / CONFIG).is_file() and any(folder.glob('*.safetensors'))


def read_json(path: Path) -> dict[str, Any]:
  """A file -> its JSON object; ValueError if the file is missing or invalid."""
  inside(path.parent, path.name)
  try:
    content = storage.read_json(path, MAX_JSON)
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} is not a readable file of JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a JSON object')
  for key, value in content.items():
    if nests(value, MAX_DEPTH):
      raise ValueError(f'{path}: {key} nests deeper than {MAX_DEPTH} levels')
  return content


def inside(folder: Path, name: str) -> Path:
  """A name in a folder -> its path; ValueError if a link leads out of the folder.

  Links of the hub's cache are allowed: snapshots/REVISION/NAME -> ../../blobs/HASH.
  """
  root, real = os.path.realpath(folder), os.path.realpath(folder / name)
  home = Path(root).parent
  roots = [root, str(home.parent / 'blobs')] if home.name == 'snapshots' else [root]
  if not real.startswith(tuple(root + os.sep for root in roots)):
    raise ValueError(f'{folder / name} is a link out of the folder')
  return folder / name


class Tensors:
  """The tensors of a folder; opening it reads headers only.

  Raises ValueError, with the file's name, if a file is damaged, if it does not match the
  index, or if the index names a file outside the folder.
  """

  def __init__(self, directory: str | Path):
    self.directory = Path(directory)
    self.headers: dict[str, Tensor] = {}
    self._files: dict[str, Any] = {}  # The open file of each tensor.
    for path, names in _files(self.directory).items():
      self._open(path, names)

  def _open(self, path: Path, indexed: set[str] | None) -> None:
    inside(self.directory, str(path.relative_to(self.directory)))
    if not path.is_file():
      raise ValueError(f'{path}: no such file')
    try:
      file = safe_open(path, framework='numpy')
      names = file.keys()
      headers = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
      raise ValueError(f'{path} is not a complete safetensors file: {error}') from error
    if indexed is not None and indexed != headers.keys():
      tensors = ', '.join(sorted(indexed ^ headers.keys())[:20])
      raise ValueError(f'{path} and {INDEX} differ in the tensors {tensors}')
    for name, header in headers.items():
      self.headers[name] = Tensor(tuple(header.get_shape()), header.get_dtype())
      self._files[name] = file

  def read(self, name: str, row: int | None = None) -> np.ndarray:
    """A tensor, or one row of its leading dim, copied to memory in its own dtype."""
    file = self._files[name]
    return file.get_tensor(name) if row is None else file.get_slice(name)[row]


def _files(folder: Path) -> dict[Path, set[str] | None]:
  """A folder -> each file with its tensors in the index; None without an index."""
  if not (folder / INDEX).exists():
    matches = sorted(folder.glob('*.safetensors'))
    if (folder / SINGLE).exists() or len(matches) == 1:
      return {folder / SINGLE if (folder / SINGLE).exists() else matches[0]: None}
    raise ValueError(
      f'{folder} holds {len(matches)} *.safetensors files and no {INDEX}; other formats, '
      'such as pickles, are not supported'
    )
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{folder / INDEX} has no weight_map')
  files: dict[Path, set[str]] = {}
  for name, file in weight_map.items():
    path = PurePosixPath(file) if isinstance(file, str) else PurePosixPath('')
    safe = not path.is_absolute() and '..' not in path.parts and '\\' not in str(path)
    if not safe or path.suffix != '.safetensors':
      raise ValueError(
        f'{folder / INDEX}: the file of {name} is {file!r}, but only a .safetensors '
        'file inside the folder is allowed'
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
  """Writes tensors, in the order of `headers`, to a new folder; see `check_new`."""
  folder = Path(directory)
  check_new(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards = _shards(headers, shard_bytes)
  stream, index = iter(arrays), {}
  for i, names in enumerate(shards):
    part = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    file = SINGLE if len(shards) == 1 else part
    # transformers needs the framework in the metadata.
    save_file(_next(stream, names), folder / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(names, file)
  if len(shards) > 1:
    total = {'total_size': sum(map(size, headers.values()))}
    content = {'metadata': total, 'weight_map': index}
    storage.write_json(folder / INDEX, content, sort_keys=True)
  storage.write_json(folder / CONFIG, config, sort_keys=True)


def check_new(folder: Path) -> None:
  """Raises ValueError unless the folder is new or empty, and writable."""
  parent = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
  if parent != folder and not os.path.isdir(parent):
    raise ValueError(f'{folder} cannot be created: {parent} is not a folder')
  if os.path.isdir(parent) and not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
    raise ValueError(f'{folder} cannot be written: {parent} is not writable')
  if parent == folder and (not os.path.isdir(folder) or any(folder.iterdir())):
    raise ValueError(f'{folder} is not an empty folder; choose a new one')


def size(tensor: Tensor) -> int:
  """Bytes of a tensor's data."""
  return math.prod(tensor.shape) * jnp.dtype(DTYPES[tensor.dtype]).itemsize


def _next(stream: Iterator[tuple[str, np.ndarray]], names: list[str]) -> dict:
  """The next tensors of a stream in the order of `names`."""
  arrays = dict(next(stream) for _ in names)
  assert list(arrays) == names, (list(arrays), names)
  # safetensors ignores strides.
  return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _shards(headers: Mapping[str, Tensor], limit: int) -> list[list[str]]:
  """Splits the names, in order, into files of at most `limit` bytes."""
  shards, room = [], -1
  for name, tensor in headers.items():
    room -= size(tensor)
    if room < 0:
      shards.append([])
      room = limit - size(tensor)
    shards[-1].append(name)
  return shards
