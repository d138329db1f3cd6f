"""Compiled programs on disk: a program that was compiled once starts at once.

JAX keeps them (its persistent compilation cache). A file there is machine code: the
folder belongs to its user alone.
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

LIMIT = (
  8 << 30
)  # Bytes; at a start, the programs that were not used for longest go first.


def keep(cache: str, limit: int = LIMIT) -> None:
  """Keeps the programs of this process in CACHE/programs, after `processes.start`.

  It does nothing if the user chose JAX's own cache (JAX_COMPILATION_CACHE_DIR), if the
  folder cannot be written, or in a run of several processes: those compile together on
  GPUs, and would wait for ever for one that found its program.
  """
  settings: Any = jax.config
  if settings.jax_compilation_cache_dir or jax.process_count() > 1:
    return
  folder = Path(cache, 'programs', _machine())
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    prune(folder, limit)
  except OSError:
    return
  if os.access(folder, os.W_OK):
    settings.update('jax_compilation_cache_dir', str(folder))


def _machine() -> str:
  """The platform; for CPUs with their instructions, which JAX's keys do not include."""
  if (name := jax.default_backend()) != 'cpu':
    return name
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  flags = [line for line in lines if line.startswith(('flags', 'Features'))][:1]
  text = ' '.join([platform.machine(), platform.processor(), *flags])
  return f'cpu-{hashlib.sha256(text.encode()).hexdigest()[:8]}'


def prune(folder: Path, limit: int) -> None:
  """Removes the files that were read or written least recently, until `limit` bytes."""
  files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
  files.sort(key=lambda file: max(file[1].st_atime, file[1].st_mtime), reverse=True)
  total = 0
  for path, status in files:
    total += status.st_size
    if total > limit:
      path.unlink(missing_ok=True)
