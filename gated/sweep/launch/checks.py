"""What is refused before the first job, each time by the flag and with what to do."""

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

COMMON = (
  'on',
  'accelerator',
  'interpreter',
  'cache',
  'unlocked',
)  # Options that any scheduler takes.


def meant(options: Options, folder: str) -> None:
  """ValueError for options that cannot be meant, before anything else is looked at."""
  if options.on not in TARGETS:
    raise ValueError(f'--on={options.on!r}, but allowed are {", ".join(TARGETS)}')
  target = TARGETS[options.on]
  missing = [
    name for name in ('accelerator', *target.needs) if not getattr(options, name)
  ]
  if missing:
    flags = ', '.join(f'--{name}=...' for name in missing)
    raise ValueError(f'--on={options.on} needs {flags}')
  chosen = machines.accelerator(options.accelerator)
  for name, value in work.changed(options).items():
    if name not in (*COMMON, *target.takes):
      others = ', '.join(on for on, t in TARGETS.items() if name in t.takes)
      raise ValueError(f'--{name}={value} with --on={options.on}, but it is for {others}')
  for name in ('nodes', 'slices', 'processes'):
    if getattr(options, name) < 1:
      raise ValueError(f'--{name}={getattr(options, name)} must be positive')
  for option in options.sbatch:
    if not re.fullmatch(r'--[a-z][a-z-]*(=[^\n]*)?', option):
      raise ValueError(f'--sbatch={option!r} is no option of sbatch: --NAME=VALUE')
  for name in ('restarts', 'at_once'):
    if getattr(options, name) < 0:
      raise ValueError(f'--{name}={getattr(options, name)} must not be negative')
  if chosen.kind == 'tpu' and options.nodes > 1:
    raise ValueError(
      f'--nodes={options.nodes} with --accelerator={options.accelerator}: a slice says '
      'how many hosts there are; several slices are --slices=N'
    )
  if chosen.kind != 'tpu' and options.slices > 1:
    raise ValueError(f'--slices={options.slices} is for TPUs; hosts are --nodes=N')
  if target.stores and not folder.startswith(target.stores):
    raise ValueError(
      f'--dir={folder} with --on={options.on}, whose machines see no folder of this one: '
      f'give a bucket, {" or ".join(f"{store}BUCKET/PATH" for store in target.stores)}'
    )


def installed(on: str) -> None:
  """ValueError, saying how to install it, where a scheduler's command is not here."""
  target = TARGETS[on]
  if not shutil.which(target.command):
    raise ValueError(
      f'--on={on} calls {target.command}, which is not installed here: {target.install}'
    )


def writable(folder: str) -> None:
  """Writes a few bytes to a folder and removes them; ValueError if it cannot."""
  probe = storage.path(folder) / f'.can-be-written-{secrets.token_hex(4)}'
  try:
    storage.write(probe, b'yes\n')
    storage.remove(probe)
  except OSError as error:
    raise ValueError(
      f'--dir={folder} cannot be written from here, so no job could: {error}'
    ) from error


def reachable(config: Mapping[str, Any], on: str) -> None:
  """ValueError for a resolved recipe whose data or weights no job would find.

  Another machine has them in an object store, or where both share a disk.
  """
  mixture = config['data']['mixture']
  terms = mixtures.terms(mixture) if mixture != data.STDLIB else []
  places = [(f'config.data.mixture={mixture}', term.directory) for term in terms]
  places += [('config.init_from', config['init_from'])] * bool(config['init_from'])
  for knob, place in places:
    if TARGETS[on].stores and not storage.is_remote(place):
      raise ValueError(
        f'{knob}: {place} is a folder of this machine, which those of --on={on} do not '
        'see: copy it to a bucket and name that'
      )
