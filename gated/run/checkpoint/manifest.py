"""manifest.json of a saved step: it is written last and commits the step.

It lists every file with its size and digest, every array with its dtype and shape, and
the metadata that the run recorded. Digests detect damage, not forgery: anyone who can
write the folder can also write the manifest.

All content is untrusted: sizes and types are checked before use, and file names must stay
inside the folder.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from gated import config, storage

FORMAT = 1
NAME = 'manifest.json'
LIMIT = 1 << 28  # Bytes of a manifest.
DEPTH = 32  # Levels of nested lists and objects.
THREADS = 4


class Damaged(ValueError):
  """A step differs from what was saved; names the file and the difference."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
  step: int
  about: dict[str, Any]  # 'config', 'data', 'heldout_loss', and more from the run.
  leaves: dict[str, dict[str, list]]  # item -> name of an array -> [dtype, *shape]
  files: dict[str, list]  # path in the step's folder -> [bytes, digest]


def files(folder: storage.Path) -> list[str]:
  """A step's folder -> the names of its files, sorted, without the manifest."""
  return sorted(name for name in storage.sizes(folder) if name != NAME)


def survey(folder: storage.Path, names: Iterable[str]) -> dict[str, list]:
  """A folder and names in it -> name: [bytes, XXH3-128 in hexadecimal]."""
  names = list(names)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _survey(folder / name), names)))


def _survey(path: storage.Path) -> list:
  with path.open('rb') as opened:
    file: Any = opened
    digest = hashlib.file_digest(file, xxhash.xxh3_128)
    return [file.tell(), digest.hexdigest()]


def write(folder: storage.Path, manifest: Manifest) -> None:
  content = {'format': FORMAT} | asdict(manifest)
  content |= {'sha256': config.digest(content)}
  storage.write(folder / NAME, json.dumps(content, allow_nan=False).encode())


def load(path: storage.Path, limit: int) -> Any:
  """A JSON file -> its content; FileNotFoundError, or ValueError for a damaged one.

  Other errors of an object store, and a denied permission, are raised as they are: the
  file may be good.
  """
  try:
    return storage.read_json(path, limit)
  except OSError as error:
    kept = FileNotFoundError, PermissionError
    if isinstance(error, kept) or storage.is_remote(path):
      raise
    raise ValueError(str(error)) from error


def read(folder: storage.Path) -> Manifest:
  """A step's folder -> its Manifest; Damaged, with the reason, if it is not valid."""
  path = folder / NAME
  try:
    return _parse(folder, load(path, LIMIT))
  except FileNotFoundError as error:
    raise Damaged(f'{path} is missing: the save was not completed') from error
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    reason = error if isinstance(error, ValueError) else repr(error)
    raise Damaged(f'{path} cannot be used: {reason}'[:300]) from error


def _parse(folder: storage.Path, content: Any) -> Manifest:
  """The content of a manifest -> Manifest, with every field checked."""
  form = content.get('format') if isinstance(content, dict) else content
  if form != FORMAT:
    raise ValueError(f'format={form!r}, but this code reads format={FORMAT}')
  if config.nests(content, DEPTH):
    raise ValueError(f'it nests deeper than {DEPTH} levels')
  if content.pop('sha256', None) != config.digest(content):
    raise ValueError('it is damaged: its SHA-256 does not match')
  manifest = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
  is_size = lambda value: type(value) is int and 0 <= value < 1 << 62
  if not is_size(manifest.step):
    raise ValueError(f'step={manifest.step!r} is not a step')
  for name, entry in manifest.files.items():
    size, digest = entry
    if not is_size(size) or not isinstance(digest, str):
      raise ValueError(f'files: {name} has {entry!r}')
    storage.inside(folder, name)
  for item, leaves in manifest.leaves.items():
    for name, (dtype, *shape) in leaves.items():
      if not isinstance(dtype, str) or not all(map(is_size, shape)) or len(shape) > 16:
        raise ValueError(f'leaves: {item} has {name} of {dtype!r} {shape}')
  for name in ('config', 'data'):
    if not isinstance(manifest.about[name], dict):
      raise ValueError(f'about.{name} is not an object')
  loss = manifest.about['heldout_loss']
  if loss is not None and not isinstance(loss, (int, float)):
    raise ValueError(f'heldout_loss={loss!r} is not a number')
  return manifest


def verify(folder: storage.Path, manifest: Manifest, names: Iterable[str]) -> None:
  """Raises Damaged for the first of the named files that differs from the manifest."""
  names, sizes = list(names), storage.sizes(folder)
  for name in names:
    saved = manifest.files[name][0]
    if name not in sizes:
      raise Damaged(f'{folder / name} is missing')
    if sizes[name] != saved:
      raise Damaged(f'{folder / name} has {sizes[name]} bytes, but {saved} were saved')
  try:
    actual = survey(folder, names)
  except FileNotFoundError as error:  # Removed since its size was read.
    raise Damaged(f'{error.filename} is missing') from error
  for name, entry in actual.items():
    if entry != list(manifest.files[name]):
      raise Damaged(f'{folder / name} is damaged: its digest does not match')
