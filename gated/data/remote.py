"""Datasets in an object store: copied once to this machine, and read there.

Rows are read in random order, some kilobytes at a time, which a disk does well and a
store does not. So a dataset on gs:// or s3:// is copied whole to the cache folder, under
its manifest's digest; whoever names the same rows again finds them. A dataset that is
larger than the disk can be mounted instead (gcsfuse, Mountpoint for S3) and named by the
folder where it is.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Generator

from gated import storage
from gated.data import shards, tokenizer

log = logging.getLogger(__name__)


def directory(url: str, cache: str) -> str:
  """A dataset's URL and the cache folder -> the directory of its copy, made if need be.

  FileNotFoundError where there is none; other OSError for a store that cannot be read or
  a cache that cannot be written; ValueError for a dataset that is not what its manifest
  says, or has no room here. The files of a new copy were held against their SHA-256.
  """
  content = storage.read(f'{url}/{shards.MANIFEST}', shards.MAX_MANIFEST)
  manifest = shards.parse_manifest(content, url)
  name = f'data-{manifest.digest[:32]}'
  target = os.path.join(cache, name)
  os.makedirs(cache, exist_ok=True)
  with _alone(os.path.join(cache, f'.{name}.lock')) as alone:
    if not _is_there(target, manifest):
      # A copy that was broken off is gone on with, where nobody else can be at it.
      draft = os.path.join(cache, f'.{name}.partial')
      if not alone:
        draft = tempfile.mkdtemp(prefix=f'.{name}.', dir=cache)
      _copy(url, draft, manifest)
      storage.write(os.path.join(draft, shards.MANIFEST), content)
      _put(draft, target, manifest)
  return target


def _put(draft: str, target: str, manifest: shards.Manifest) -> None:
  """Moves a copy to its place, unless another process came first."""
  if not _is_there(target, manifest):
    shutil.rmtree(target, ignore_errors=True)  # It lost its manifest since.
  try:
    os.rename(draft, target)
  except OSError:
    if not _is_there(target, manifest):
      raise
    shutil.rmtree(draft, ignore_errors=True)


def _is_there(target: str, manifest: shards.Manifest) -> bool:
  try:
    return shards.read_manifest(target).digest == manifest.digest
  except (OSError, ValueError):
    return False


def _copy(url: str, draft: str, manifest: shards.Manifest) -> None:
  """Brings the shards and the tokenizer, and holds them against the manifest."""
  files = {shard.file: shard for shard in manifest.shards}
  sizes = {name: shard.size for name, shard in files.items()}
  there = storage.sizes(url)
  if manifest.tokenizer['name'] != 'bytes':
    name = manifest.tokenizer['name']
    sizes[name] = there.get(name, 0)
    if not 0 < sizes[name] <= tokenizer.MAX_FILE:
      raise ValueError(
        f'{url}/{name} has {sizes[name]} bytes, but 1 to {tokenizer.MAX_FILE} are allowed'
      )
  for name, size in sizes.items():
    storage.inside(draft, name)
    if there.get(name) != size:
      has = f'has {there[name]} bytes' if name in there else 'is missing'
      raise ValueError(f'{url}/{name} {has}, but the manifest says {size}')
  os.makedirs(draft, exist_ok=True)
  here = storage.sizes(draft)
  for name in here.keys() - sizes.keys():
    storage.remove(os.path.join(draft, name))
  wanted = [name for name in sizes if here.get(name) != sizes[name]]
  needed, free = sum(sizes[name] for name in wanted), shutil.disk_usage(draft).free
  told = f'{needed / 1e9:.3f} GB'
  if needed > free:
    raise ValueError(
      f'{url}: {told} are to be copied to {os.path.dirname(draft)}, which has '
      f'{free / 1e9:.3f} GB left: name another config.data.cache, or mount the dataset '
      'and name its folder'
    )
  log.info('copying %s: %d files, %s, to %s', url, len(wanted), told, draft)
  storage.download(url, draft, wanted)
  bad = list(shards.faults(draft, files.values(), 'sha256'))
  for shard, _ in bad:  # The next try goes on with the others.
    storage.remove(os.path.join(draft, shard.file))
  if bad:
    raise ValueError(bad[0][1].replace(draft, url))
  try:
    shards.open_tokenizer(draft, manifest)
  except ValueError as error:
    storage.remove(os.path.join(draft, manifest.tokenizer['name']))
    raise ValueError(f'{error}'.replace(draft, url)) from error


@contextlib.contextmanager
def _alone(path: str) -> Generator[bool, None, None]:
  """Holds this machine's other processes off, so that one of them copies for all.

  -> whether it does: not every file system has locks.
  """
  with open(path, 'w') as file:
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        log.info('waiting for another process, which holds %s', path)
        fcntl.flock(file, fcntl.LOCK_EX)
      alone = True
    except OSError:
      alone = False
    yield alone
