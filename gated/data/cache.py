"""Folders in the cache: one process fills a folder, the others wait and read it."""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator

log = logging.getLogger(__name__)

_drafts: set[str] = set()  # Unfinished folders of this process, which no call resumes.


def default() -> str:
  """The cache folder: in XDG_CACHE_HOME, or in the platform's folder for caches."""
  home = '~/Library/Caches' if sys.platform == 'darwin' else '~/.cache'
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser(home)
  return os.path.join(base, 'gated')


def remove_drafts() -> None:
  """Removes what this process has half made: a signal ends it."""
  for draft in _drafts:
    shutil.rmtree(draft, ignore_errors=True)


def make(
  folder: str,
  is_complete: Callable[[], bool],
  fill: Callable[[str], None],
  *,
  resumes: bool,
) -> None:
  """Makes a folder unless it is complete: `fill` writes a draft, then it is renamed.

  If `fill` is interrupted, its draft is kept only if the next call `resumes` it.
  """
  if is_complete():
    return
  cache, name = os.path.split(folder)
  os.makedirs(cache, exist_ok=True)
  with _lock(os.path.join(cache, f'.{name}.lock')) as locked:
    if is_complete():
      return
    # Only the process with the lock may resume an interrupted draft.
    draft = os.path.join(cache, f'.{name}.partial')
    if not locked:
      draft = tempfile.mkdtemp(prefix=f'.{name}.', dir=cache)
    os.makedirs(draft, exist_ok=True)
    if not (locked and resumes):
      _drafts.add(draft)
    try:
      fill(draft)
    except BaseException:
      if draft in _drafts:
        shutil.rmtree(draft, ignore_errors=True)
      raise
    finally:
      _drafts.discard(draft)
    if not is_complete():
      shutil.rmtree(folder, ignore_errors=True)  # A damaged folder, without manifest.
    try:
      os.rename(draft, folder)
    except OSError:
      if not is_complete():
        raise
      shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Generator[bool, None, None]:
  """Waits for the lock; yields False if the file system does not support locks."""
  with open(path, 'w') as file:
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        log.info('waiting for the process that locks %s', path)
        fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked
