"""Files and folders, on a disk or in an object store, with the same functions.

  storage.path('runs/tiny')   storage.path('gs://bucket/runs/tiny')   's3://bucket/...'

An object store has no rename, append or lock, and a folder there is only a prefix of
names. No function here needs them: writes are atomic, and listings are always fresh. Use
`Path` only to build paths; its methods that read a store (exists, iterdir, ...) use a
stale cache.

Errors of a store, its network or its credentials are OSError, after the retries of s3fs
and gcsfs. Server and credentials come from the environment: AWS_ENDPOINT_URL,
AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...
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

# Scheme -> the fsspec package for it.
STORES = {'gs': 'gcsfs', 's3': 's3fs'}
REMOTE = tuple(f'{scheme}://' for scheme in STORES)
THREADS = 8  # Concurrent copies.
# Errors of a disk that cannot be written: full, over quota, read-only, broken, away; and
# of a machine that lacks memory or files for a while.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
PASSING += (errno.ETIMEDOUT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
PART = 1 << 24  # Bytes per part of a multipart upload; memory holds THREADS * 4 parts.


def path(spec: PathLike) -> Path:
  """A local path, gs://BUCKET/... or s3://BUCKET/... -> Path.

  `~` at its start is the home folder, also where no shell expands it (--flag=~/x).
  ValueError for another scheme, a missing bucket name, or a missing package.
  """
  text = os.fspath(spec)
  scheme, colon, rest = text.partition('://')
  if not colon or not re.fullmatch(r'[A-Za-z][\w+.-]*', scheme):
    if re.match(r'[A-Za-z][\w+.-]*:/', text):
      raise ValueError(f'{text!r} has one slash: write {text.replace(":/", "://", 1)!r}')
    home = Path(os.path.expanduser(text))
    real = os.path.realpath(home)
    if '..' in home.parts and real != os.path.realpath(os.path.normpath(home)):
      return Path(real)  # Orbax removes LINK/.. as if it were FOLDER/..
    # A folder that is named like that, ./~, stays itself also when it is joined.
    return Path(os.path.abspath(home)) if os.fspath(home).startswith('~') else home
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
  """A file -> its bytes. Raises FileNotFoundError, or ValueError above `limit` bytes."""
  place = _Place(path)
  with place.faults():
    if place.store:
      size = place.store.info(place.key)['size']
      content = place.store.cat_file(place.key) if size <= limit else b''
    else:
      if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f'{place} is not a file')  # Reading a pipe could block forever.
      with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b''
  size = max(size, len(content))  # The file may have grown or report no size.
  if size > limit:
    raise ValueError(f'{place} has {size} bytes, but {limit} are allowed')
  return content


def write(path: PathLike, content: bytes) -> None:
  """Writes a file atomically, even on a power failure; creates its parent folders."""
  place = _Place(path)
  with place.faults():
    if place.store:
      place.store.pipe_file(place.key, content)
      return
    with draft(place.text) as temporary, open(temporary, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    # The new name is durable only after the folder is flushed as well.
    handle = os.open(os.path.dirname(place.text) or '.', os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


@contextlib.contextmanager
def draft(target: str) -> Generator[str]:
  """Yields a temporary file in the same folder, which replaces the target at the end."""
  folder, name = os.path.split(target)
  temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.partial')
  os.makedirs(folder or '.', exist_ok=True)
  try:
    yield temporary
    os.replace(temporary, target)
  finally:
    with contextlib.suppress(OSError):
      os.remove(temporary)


def read_json(path: PathLike, limit: int) -> Any:
  """A JSON file -> its content. Raises as `read`, and ValueError for bad JSON."""
  try:
    return json.loads(read(path, limit))
  except RecursionError as error:
    raise ValueError(f'{os.fspath(path)} is nested too deeply') from error


def write_json(
  path: PathLike, content: Any, *, indent: int | None = 2, sort_keys: bool = False
) -> None:
  """Writes JSON to a file, atomically as `write` does."""
  text = json.dumps(content, indent=indent, sort_keys=sort_keys, allow_nan=False)
  write(path, (text + '\n').encode())


def is_passing(error: Exception) -> bool:
  """Whether an error of this machine may be gone on the next try, or on another one."""
  return isinstance(error, OSError) and error.errno in PASSING


@contextlib.contextmanager
def named(path: PathLike) -> Generator[None]:
  """Adds a path to errors of the system that have none, such as those of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
    raise


def remove(path: PathLike) -> None:
  """Removes a file or a whole folder, if it exists."""
  place = _Place(path)
  if place.store and '/' not in place.key:
    raise ValueError(f'{place} is a whole bucket, which is never removed')
  with place.faults():
    if not place.store:
      folder = os.path.isdir(path) and not os.path.islink(path)
      return shutil.rmtree(path) if folder else pathlib.Path(path).unlink(True)

    def remove_key(key: str) -> None:
      with contextlib.suppress(FileNotFoundError):
        place.store.rm_file(key)

    # fsspec's rm would expand [a-z] and * in names as patterns.
    _for_each(remove_key, [place.key, *place.store.find(place.key)])


def exists(path: PathLike) -> bool:
  """Whether a file or folder exists; in a store, folders without files do not."""
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
  """Creates a local folder and its parents; does nothing for a store."""
  if not is_remote(folder):
    os.makedirs(folder, exist_ok=True)


def top(path: PathLike) -> pathlib.Path:
  """A local path -> its nearest part that exists, below which the rest can be made.

  OSError if a name of the rest is too long: `os.path.exists` is False for it.
  """
  whole = pathlib.Path(path).absolute()
  nearest = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
  for name in whole.relative_to(nearest).parts:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.lstat(nearest / name)
  return nearest


def modified(path: PathLike) -> float:
  """A file -> its modification time, in seconds since 1970 by the store's clock."""
  place = _Place(path)
  with place.faults():
    if place.store:
      return place.store.modified(place.key).timestamp()
    return os.path.getmtime(path)


def names(folder: PathLike) -> list[str]:
  """A folder -> its entries' names, sorted; [] if it does not exist."""
  place = _Place(folder)
  with place.faults():
    try:
      if not place.store:
        return sorted(os.listdir(folder))
      entries = place.store.ls(place.key, detail=True, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
      return []
    inner = (place.below(entry['name'].rstrip('/')) for entry in entries)
    return sorted({name for name in inner if name})


def sizes(folder: PathLike) -> dict[str, int]:
  """A folder -> {relative name: bytes} of all files below it."""
  place = _Place(folder)
  result: dict[str, int] = {}
  with place.faults():
    if place.store:
      for key, entry in place.store.find(place.key, detail=True).items():
        # Some tools mark an empty folder by a key that ends in a slash.
        if (name := place.below(key)) and entry['type'] == 'file' and key[-1] != '/':
          result[name] = entry['size']
      return result
    for top, _, files in os.walk(folder):
      for file in files:
        with contextlib.suppress(FileNotFoundError):
          full = os.path.join(top, file)
          name = pathlib.Path(full).relative_to(folder).as_posix()
          result[name] = os.path.getsize(full)
  return result


def upload(local: PathLike, remote: PathLike, names: Iterable[str]) -> None:
  """Copies the named files of a local folder to a folder in a store, in parallel."""

  def put(name: str) -> None:
    place = _Place(Path(remote) / name)
    with place.faults():
      source = os.fspath(inside(local, name))
      place.store.put_file(source, place.key, chunksize=PART, max_concurrency=4)

  _for_each(put, [name for name in names if inside(local, name)])


def download(remote: PathLike, local: PathLike, names: Iterable[str]) -> None:
  """Copies the named files of a folder in a store to a local folder, in parallel.

  ValueError for a name outside the folder, before any copy starts.
  """

  def get(name: str) -> None:
    place = _Place(Path(remote) / name)
    with place.faults(), draft(os.fspath(inside(local, name))) as target:
      place.store.get_file(place.key, target)

  _for_each(get, [name for name in names if inside(local, name)])


def inside(folder: PathLike, name: str) -> Path:
  """An untrusted name -> its path inside the folder.

  ValueError for a path outside the folder, also through symbolic links.
  """
  pure = pathlib.PurePosixPath(name)
  inner = bool(pure.name) and '\0' not in name and not pure.is_absolute()
  inner = inner and '..' not in pure.parts
  if inner and not is_remote(folder):
    root = os.path.realpath(folder)
    inner = os.path.realpath(os.path.join(folder, name)).startswith(root + os.sep)
  if not inner:
    raise ValueError(f'{os.fspath(folder)}: {name!r} is outside of the folder')
  return Path(folder) / name


class _Place:
  """A path and its fsspec file system, None for a local path."""

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
    """An object's key -> its name relative to this path; '' if it is outside."""
    prefix = f'{self.key}/'
    return key.removeprefix(prefix) if key.startswith(prefix) else ''

  @contextlib.contextmanager
  def faults(self) -> Generator[None]:
    """Adds this path to errors; those of the store's package become OSError."""
    try:
      with contextlib.nullcontext() if self.store else named(self.text):
        yield
    except Exception as error:
      if not self.store:
        raise
      kind = type(error) if isinstance(error, _SPECIFIC) else OSError
      raise kind(f'{self}: {error or repr(error)}') from error


_SPECIFIC = (FileNotFoundError, PermissionError, IsADirectoryError)


def _store(scheme: str) -> Any:
  """Scheme -> its fsspec file system; fsspec keeps one per process."""
  import fsspec

  return fsspec.filesystem(scheme, use_listings_cache=False)


def _for_each(do: Callable[[str], None], names: Iterable[str]) -> None:
  """Calls `do` for every name, in parallel; the first error cancels the rest."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    try:
      for _ in pool.map(do, names):
        pass
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
