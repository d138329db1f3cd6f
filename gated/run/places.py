"""The files and folders that a run writes in its workdir, checked before it starts.

A run with a wrong file in place of one of them would fail later, maybe at its first save.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gated import storage
from gated.run import events, lock, outcome
from gated.run.checkpoint import head

# Folders, and whether a run with these knobs of config.log writes them.
FOLDERS = {
  'checkpoints': lambda log: True,
  'tensorboard': lambda log: log['tensorboard'],
  'samples': lambda log: log['samples'] > 0,
  'profile': lambda log: log['profile_first'] >= 0,
  'wandb': lambda log: bool(log['wandb']),
}
APPENDED = 'metrics.jsonl'
REPLACED = 'run.json', events.NAME, lock.NAME, outcome.NAME


def check(workdir: storage.Path, log: Mapping[str, Any]) -> None:
  """ValueError, naming --workdir, unless a run can write its files there.

  `log` is config.log of its recipe.
  """
  saves = os.path.abspath(workdir) if not storage.is_remote(workdir) else str(workdir)
  if saves.startswith('s3://'):
    saves = tempfile.gettempdir()  # Checkpoints pass through a folder there.
  if odd := re.findall(r'[*?[\\\ud800-\udfff]', saves):
    raise ValueError(
      f'--workdir={workdir}: {saves!r} has {odd[0]!r}, but Orbax cannot save below a '
      'path with *, ?, [, a backslash or bytes that are not UTF-8: choose another name, '
      'or a symbolic link to that folder'
    )
  if storage.is_remote(workdir):
    return  # A store reports errors when the lock is written.
  path = Path(workdir).absolute()
  try:
    for parent in Path(os.path.realpath(path)).parents:
      if (parent / head.NAME).exists():
        raise ValueError(
          f'--workdir={workdir} lies within {parent}, where another run removes its old '
          'steps: choose another workdir'
        )
    top = storage.top(path)
    used = [path / name for name, writes in FOLDERS.items() if writes(log)]
    for folder in (top, *used):
      writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
      if os.path.lexists(folder) and not writable:
        raise ValueError(f'--workdir={workdir}: {folder} is not a writable folder')
    appended, inside = path / APPENDED, True
    if os.path.lexists(appended):
      target = Path(os.path.realpath(appended))
      inside = target.parent.is_dir()
      if target.exists():
        inside = target.is_file() and os.access(target, os.W_OK)
    # The others are replaced by a new file, whatever their mode.
    replaced = [path / name for name in REPLACED]
    wrong = [] if inside else [appended]
    wrong += [file for file in replaced if file.exists() and not file.is_file()]
    if wrong:
      raise ValueError(f'--workdir={workdir}: {wrong[0]} is not a writable file')
  except OSError as error:
    raise ValueError(f'--workdir={workdir}: {error.strerror}') from error
