"""Datasets in an object store: copied once to this machine, then read from its disk.

Runs read rows in random order, a few kilobytes at a time. That is fast on a disk and slow
in a store, so a dataset on gs:// or s3:// is copied to the cache, in a folder named by
the digest of its manifest. A dataset larger than the disk can be mounted instead
(gcsfuse, Mountpoint for S3) and named by its folder.
"""

import logging
import os
import shutil

from gated import storage
from gated.data import cache, shards, tokenizer

log = logging.getLogger(__name__)


def directory(url: str, folder: str) -> str:
  """The URL of a dataset and the cache folder -> the directory of its verified copy.

  FileNotFoundError for a missing dataset; other OSError for a failing store or cache;
  ValueError for a dataset that differs from its manifest or does not fit on the disk.
  """
  content = storage.read(f'{url}/{shards.MANIFEST}', shards.MAX_MANIFEST)
  manifest = shards.parse_manifest(content, url)
  target = os.path.join(folder, f'data-{manifest.digest[:32]}')

  def is_complete() -> bool:
    try:
      return shards.read_manifest(target).digest == manifest.digest
    except (OSError, ValueError):
      return False

  def fill(draft: str) -> None:
    _copy(url, draft, manifest)
    storage.write(os.path.join(draft, shards.MANIFEST), content)

  cache.make(target, is_complete, fill, resumes=True)
  return target


def _copy(url: str, draft: str, manifest: shards.Manifest) -> None:
  """Copies the shards and the tokenizer, and verifies them."""
  sizes = {shard.file: shard.size for shard in manifest.shards}
  stored = storage.sizes(url)
  name = manifest.tokenizer.name
  if name != 'bytes':
    sizes[name] = stored.get(name, 0)
    if not 0 < sizes[name] <= tokenizer.MAX_FILE:
      raise ValueError(
        f'{url}/{name} has {sizes[name]} bytes, but 1 to {tokenizer.MAX_FILE} are allowed'
      )
  for name in sizes:
    storage.inside(draft, name)
  for name, size in sizes.items():
    if stored.get(name) != size:
      fact = f'has {stored[name]} bytes' if name in stored else 'is missing'
      raise ValueError(f'{url}/{name} {fact}, but the manifest says {size}')
  copied = storage.sizes(draft)
  for name in copied.keys() - sizes.keys():
    storage.remove(os.path.join(draft, name))
  missing = [name for name, size in sizes.items() if copied.get(name) != size]
  needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(draft).free
  if needed > free:
    raise ValueError(
      f'{url} needs {needed / 1e9:.3f} GB in {os.path.dirname(draft)}, which has only '
      f'{free / 1e9:.3f} GB: set config.data.cache to another folder, or mount the '
      'dataset and name its folder'
    )
  log.info('copying %s: %d files, %.3f GB, to %s', url, len(missing), needed / 1e9, draft)
  storage.download(url, draft, missing)
  faults = list(shards.faults(draft, manifest.shards, 'sha256'))
  for shard, _ in faults:  # The next call copies these again.
    storage.remove(os.path.join(draft, shard.file))
  if faults:
    raise ValueError(faults[0][1].replace(draft, url))
  try:
    shards.open_tokenizer(draft, manifest)
  except ValueError as error:
    storage.remove(os.path.join(draft, manifest.tokenizer.name))
    raise ValueError(f'{error}'.replace(draft, url)) from error
