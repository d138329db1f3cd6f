"""Checks before the first job. Each error names the flag and what to do."""

import re
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from gated import data, storage
from gated.data import mixture as mixtures
from gated.sweep.launch import machines, work
from gated.sweep.launch.targets import TARGETS
from gated.sweep.launch.work import Options

# Options of every scheduler.
COMMON = 'on', 'accelerator', 'interpreter', 'cache', 'unlocked'


def options(o: Options, folder: str) -> None:
  """ValueError if options are missing, invalid, or do not fit together or the folder."""
  if o.on not in TARGETS:
    raise ValueError(f'--on={o.on!r}, but allowed are {", ".join(TARGETS)}')
  target = TARGETS[o.on]
  missing = [name for name in ('accelerator', *target.needs) if not getattr(o, name)]
  if missing:
    flags = ', '.join(f'--{name}=...' for name in missing)
    raise ValueError(f'--on={o.on} needs {flags}')
  on_tpus = machines.accelerator(o.accelerator).kind == 'tpu'
  for name, value in work.changed(o).items():
    if name not in (*COMMON, *target.takes):
      others = ', '.join(on for on, t in TARGETS.items() if name in t.takes)
      raise ValueError(f'--{name}={value} with --on={o.on}, but it is for {others}')
  for name in ('nodes', 'slices', 'processes'):
    if getattr(o, name) < 1:
      raise ValueError(f'--{name}={getattr(o, name)} must be positive')
  for name in ('restarts', 'at_once'):
    if getattr(o, name) < 0:
      raise ValueError(f'--{name}={getattr(o, name)} must not be negative')
  for option in o.sbatch:
    if not re.fullmatch(r'--[a-z][a-z-]*(=[^\n]*)?', option):
      raise ValueError(f'--sbatch={option!r} must be an option of sbatch: --NAME=VALUE')
  if on_tpus and o.nodes > 1:
    raise ValueError(
      f'--nodes={o.nodes} with --accelerator={o.accelerator}: the slice sets the number '
      'of hosts; several slices are --slices=N'
    )
  if not on_tpus and o.slices > 1:
    raise ValueError(f'--slices={o.slices} is for TPUs; hosts are --nodes=N')
  if target.stores and not folder.startswith(target.stores):
    buckets = ' or '.join(f'{store}BUCKET/PATH' for store in target.stores)
    raise ValueError(
      f'--dir={folder} with --on={o.on}: its machines cannot read a local folder; give '
      f'a bucket, {buckets}'
    )


def installed(on: str) -> None:
  """ValueError with installation instructions if a scheduler's command is missing."""
  target = TARGETS[on]
  if not shutil.which(target.command):
    raise ValueError(
      f'--on={on} needs {target.command}, which is not installed: {target.install}'
    )


def writable(folder: str) -> None:
  """Writes and removes a small file in a folder; ValueError if that fails."""
  probe = storage.path(folder) / f'.can-be-written-{secrets.token_hex(4)}'
  try:
    storage.write(probe, b'yes\n')
    storage.remove(probe)
  except OSError as error:
    raise ValueError(f'--dir={folder} cannot be written from here: {error}') from error


def reachable(config: Mapping[str, Any], on: str) -> None:
  """ValueError if the machines of a scheduler cannot read a recipe's data or weights.

  They read object stores, and local folders only if they share a disk with this machine.
  """
  mixture, weights = config['data']['mixture'], config['init_from']
  terms = mixtures.terms(mixture) if mixture != data.STDLIB else []
  places = [(f'config.data.mixture={mixture}', term.directory) for term in terms]
  places += [('config.init_from', weights)] if weights else []
  for knob, place in places:
    if TARGETS[on].stores and not storage.is_remote(place):
      raise ValueError(
        f'{knob}: {place} is a local folder, which the machines of --on={on} cannot '
        'read: copy it to a bucket and name that'
      )
