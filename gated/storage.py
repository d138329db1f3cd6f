"""Files and folders, on a disk or in an object store, by the same few verbs.

  storage.path('runs/tiny')   storage.path('gs://bucket/runs/tiny')   's3://bucket/...'

An object store has no rename, no append and no lock, and a folder there is only a prefix
of names. So nothing here needs them: what is written is there whole or not at all, and
what is listed is what the store says now. `Path` is for spelling; its own methods that
touch a store (exists, iterdir, mkdir, ...) answer from a cache, so the verbs here stand
in for them.

Faults of a store, its network or its credentials are OSError; s3fs and gcsfs have tried
several times by then. Where a store's server is and who may use it are the environment's
business: AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...
"""

import concurrent.futures
import contextlib
import errno
import importlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from typing import Any

from etils import epath

Path = epath.Path
PathLike = str | os.PathLike[str]

# Scheme -> the package that speaks with its stores through fsspec.
STORES = {'gs': 'gcsfs', 's3': 's3fs'}
REMOTE = tuple(f'{scheme}://' for scheme in STORES)
THREADS = 8  # That copy at the same time.
# What a disk says that takes nothing more: full, over quota, read-only, or broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
PART = 1 << 24  # Bytes of a large file that go out at a time; THREADS * 4 are in memory.


def path(spec: PathLike) -> Path:
  """A local path, gs://BUCKET/... or s3://BUCKET/... -> Path.

  ValueError for another scheme, a bucket without a name, and where the package that
  reaches the store is not installed.
  """
  text = os.fspath(spec)
  scheme, colon, rest = text.partition('://')
  if not colon or not re.fullmatch(r'[A-Za-z][\w+.-]*', scheme):
    if re.match(r'(gs|s3):/', text):
      raise ValueError(
        f'{text!r} has one slash, but {text.replace(":/", "://", 1)!r} two'
      )
    return Path(text)
  if scheme not in STORES:
    raise ValueError(f'{text!r}, but allowed are a local path, {" and ".join(REMOTE)}')
  bucket, *parts = rest.split('/')
  if not bucket or '..' in (bucket, *parts) or '\0' in rest:
    raise ValueError(f'{text!r} is not {scheme}://BUCKET/PATH')
  try:
    importlib.import_module(STORES[scheme])
  except ImportError as error:
    raise ValueError(
      f'{text!r} needs the package {STORES[scheme]}: '
      'pip install -r requirements-cloud.txt'
    ) from error
  return Path(text)


def is_remote(path: PathLike) -> bool:
  """Whether a path lies in an object store."""
  return os.fspath(path).startswith(REMOTE)


def read(path: PathLike, limit: int) -> bytes:
  """A file -> its bytes. FileNotFoundError; ValueError if they are more than `limit`."""
  place = _Place(path)
  with place.faults():
    if place.store:
      size = place.store.info(place.key)['size']
      content = place.store.cat_file(place.key) if size <= limit else b''
    else:
      if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f'{place} is no file')  # A pipe would be waited for, for ever.
      with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b''
  size = max(size, len(content))  # It may have grown, or not know its size.
  if size > limit:
    raise ValueError(f'{place} has {size} bytes, but {limit} are allowed')
  return content


def write(path: PathLike, content: bytes) -> None:
  """Bytes -> a file that is there whole or not at all, whenever the power fails.

  The folders above it are made, where a file system has such.
  """
  place = _Place(path)
  with place.faults():
    if place.store:
      place.store.pipe_file(place.key, content)
      return
    folder, name = os.path.split(place.text)
    os.makedirs(folder or '.', exist_ok=True)
    draft = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.partial')
    try:
      with open(draft, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(draft, place.text)
    except BaseException:
      with contextlib.suppress(OSError):
        os.remove(draft)
      raise
    sync(folder or '.')


def write_json(
  path: PathLike, content: Any, *, indent: int = 2, sort_keys: bool = False
) -> None:
  """Writes JSON to a file, atomically as `write` does."""
  text = json.dumps(content, indent=indent, sort_keys=sort_keys, allow_nan=False)
  write(path, (text + '\n').encode())


def is_full(error: Exception) -> bool:
  """Whether an error is a disk's that takes nothing more."""
  return isinstance(error, OSError) and error.errno in FULL


def sync(folder: PathLike) -> None:
  """Forces a local folder's names to the disk."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def remove(path: PathLike) -> None:
  """Removes a file, or a folder and all that is in it; what is not there is no fault."""
  place = _Place(path)
  if place.store and '/' not in place.key:
    raise ValueError(f'{place} is a whole bucket, which nothing here removes')
  with place.faults():
    if not place.store:
      if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
      else:
        pathlib.Path(path).unlink(missing_ok=True)
      return
    # Names are taken as they are: fsspec's own rm would read [a-z] and * as patterns.
    found = place.store.find(place.key, detail=True)
    _together(lambda key: _gone(place.store, key), [place.key, *found])


def exists(path: PathLike) -> bool:
  """Whether a file is there, or a folder; in a store, a folder that holds something."""
  place = _Place(path)
  if not place.store:
    return os.path.exists(path)
  with place.faults():
    try:
      place.store.info(place.key)
    except FileNotFoundError:
      return False
    return True


def make(folder: PathLike) -> None:
  """Makes a folder and those above it, where a file system has such."""
  if not is_remote(folder):
    os.makedirs(folder, exist_ok=True)


def modified(path: PathLike) -> float:
  """A file -> when it was last written, in seconds since 1970 by its store's clock."""
  place = _Place(path)
  with place.faults():
    if place.store:
      return place.store.modified(place.key).timestamp()
    return os.path.getmtime(path)


def names(folder: PathLike) -> list[str]:
  """A folder -> the names directly in it, sorted; [] where there is none."""
  place = _Place(folder)
  with place.faults():
    try:
      if not place.store:
        return sorted(os.listdir(folder))
      found = place.store.ls(place.key, detail=True, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
      return []
    inner = (place.below(entry['name'].rstrip('/')) for entry in found)
    return sorted({name for name in inner if name})


def sizes(folder: PathLike) -> dict[str, int]:
  """A folder -> the bytes of each file below it, by its name relative to the folder."""
  place = _Place(folder)
  found: dict[str, int] = {}
  with place.faults():
    if place.store:
      for key, entry in place.store.find(place.key, detail=True).items():
        # A key that ends in a slash is how some tools draw an empty folder.
        if (name := place.below(key)) and entry['type'] == 'file' and key[-1] != '/':
          found[name] = entry['size']
      return found
    for top, _, files in os.walk(folder):
      for file in files:
        with contextlib.suppress(FileNotFoundError):
          full = os.path.join(top, file)
          name = pathlib.Path(full).relative_to(folder).as_posix()
          found[name] = os.path.getsize(full)
  return found


def upload(local: PathLike, remote: PathLike, names: Iterable[str]) -> None:
  """Copies files, by their names relative to a local folder, to a folder in a store.

  All of them, or an error; several at a time.
  """

  def put(name: str) -> None:
    place = _Place(Path(remote) / name)
    with place.faults():
      source = os.fspath(inside(local, name))
      place.store.put_file(source, place.key, chunksize=PART, max_concurrency=4)

  _together(put, [name for name in names if inside(local, name)])


def download(remote: PathLike, local: PathLike, names: Iterable[str]) -> None:
  """Copies files, by their names relative to a folder in a store, to a local folder.

  All of them, or an error; several at a time. ValueError for a name that would leave the
  folder, before anything is copied.
  """

  def get(name: str) -> None:
    place, target = _Place(Path(remote) / name), os.fspath(inside(local, name))
    draft = f'{target}.{secrets.token_hex(4)}.partial'
    with place.faults():
      os.makedirs(os.path.dirname(target), exist_ok=True)
      try:
        place.store.get_file(place.key, draft)
        os.replace(draft, target)
      finally:
        with contextlib.suppress(OSError):
          os.remove(draft)

  _together(get, [name for name in names if inside(local, name)])


def inside(folder: PathLike, name: str) -> Path:
  """A name that a stranger wrote -> its path, which lies in the folder, links followed.

  ValueError for any other.
  """
  pure = pathlib.PurePosixPath(name)
  inner = bool(pure.name) and '\0' not in name and not pure.is_absolute()
  inner = inner and '..' not in pure.parts
  if inner and not is_remote(folder):
    root = os.path.realpath(folder)
    inner = os.path.realpath(os.path.join(folder, name)).startswith(root + os.sep)
  if not inner:
    raise ValueError(f'{os.fspath(folder)}: {name!r} is outside of it')
  return Path(folder) / name


class _Place:
  """A path, with the fsspec file system that serves it; None for the local one."""

  def __init__(self, path: PathLike):
    self.text, self.key = os.fspath(path), ''
    self.store: Any = None
    if is_remote(path):
      scheme, _, key = self.text.partition('://')
      self.key = key.rstrip('/')
      self.store = _store(scheme)

  def __str__(self) -> str:
    return self.text

  def below(self, key: str) -> str:
    """The store's name of an object -> its name below this place; '' if it is not."""
    prefix = f'{self.key}/'
    return key.removeprefix(prefix) if key.startswith(prefix) else ''

  @contextlib.contextmanager
  def faults(self) -> Generator[None, None, None]:
    """Turns what a store's package raises into OSError that names the place."""
    try:
      yield
    except Exception as error:
      if not self.store:
        raise
      kind = type(error) if isinstance(error, _TELLING) else OSError
      raise kind(f'{self}: {error or repr(error)}') from error


_TELLING = (FileNotFoundError, PermissionError, IsADirectoryError)


def _store(scheme: str) -> Any:
  """Scheme -> its fsspec file system, which fsspec keeps one of for each process."""
  import fsspec

  return fsspec.filesystem(scheme, use_listings_cache=False)


def _gone(store: Any, key: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    store.rm_file(key)


def _together(do: Callable[[str], None], names: Iterable[str]) -> None:
  """Does it for every name, several at a time; the first error ends it."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    try:
      for _ in pool.map(do, names):
        pass
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
