"""The supported schedulers, and the checks before the first job.

Each error names the flag and what to do.
"""

import re
import secrets
import shutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from gated import storage
from gated.sweep import grid
from gated.sweep.launch import jobset, machines, skypilot, slurm, tpu
from gated.sweep.launch.work import Options


class Target(NamedTuple):
  """A scheduler."""

  module: ModuleType  # Has tasks, listing, states and delete.
  command: str  # Its command-line program.
  install: str  # How to install `command`.
  needs: tuple[str, ...]  # Required options, besides --accelerator.
  takes: tuple[str, ...]  # Its other options, besides COMMON.
  stores: tuple[str, ...] = ()  # Allowed prefixes of a sweep's folder; () allows any.


TARGETS = {
  'slurm': Target(
    slurm,
    'sbatch',
    'run this on a login node of the cluster',
    needs=('partition',),
    takes=('nodes', 'restarts', 'time', 'processes', 'at_once', 'sbatch'),
  ),
  'skypilot': Target(
    skypilot,
    'sky',
    "pip install 'skypilot[gcp]' (or aws, kubernetes, ...) in its own environment, then "
    'sky check',
    needs=(),
    takes=('nodes', 'restarts', 'spot', 'infra'),
    stores=('gs://', 's3://'),
  ),
  'jobset': Target(
    jobset,
    'kubectl',
    'https://kubernetes.io/docs/tasks/tools; the cluster needs JobSet and Kueue, as xpk '
    'sets them up',
    needs=('queue',),
    takes=(
      *('nodes', 'slices', 'restarts', 'spot', 'namespace', 'image', 'service_account'),
    ),
    stores=('gs://', 's3://'),
  ),
  'tpu': Target(
    tpu,
    'gcloud',
    'https://cloud.google.com/sdk/docs/install',
    needs=('zone', 'project'),
    takes=('slices', 'restarts', 'spot', 'service_account', 'runtime'),
    stores=('gs://',),
  ),
}
# Options of every scheduler.
COMMON = 'on', 'accelerator', 'interpreter', 'cache', 'unlocked'


def check(o: Options, folder: str) -> None:
  """ValueError if options are missing, invalid, or do not fit together or the folder."""
  if o.on not in TARGETS:
    raise ValueError(f'--on={o.on!r}, but allowed are {", ".join(TARGETS)}')
  target = TARGETS[o.on]
  missing = [name for name in ('accelerator', *target.needs) if not getattr(o, name)]
  if missing:
    flags = ', '.join(f'--{name}=...' for name in missing)
    raise ValueError(f'--on={o.on} needs {flags}')
  takes = {on: (*t.needs, *t.takes) for on, t in TARGETS.items()}
  for name, value in o.changed().items():
    if name not in (*COMMON, *takes[o.on]):
      others = ', '.join(on for on in TARGETS if name in takes[on])
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
  on_tpus = machines.accelerator(o.accelerator).kind == 'tpu'
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


def check_installed(on: str) -> None:
  """ValueError with installation instructions if a scheduler's command is missing."""
  target = TARGETS[on]
  if not shutil.which(target.command):
    raise ValueError(
      f'--on={on} needs {target.command}, which is not installed: {target.install}'
    )


def check_writable(folder: str) -> None:
  """Writes and removes a small file in a folder; ValueError if that fails."""
  probe = storage.path(folder) / f'.can-be-written-{secrets.token_hex(4)}'
  try:
    storage.write(probe, b'yes\n')
    storage.remove(probe)
  except OSError as error:
    raise ValueError(f'--dir={folder} cannot be written from here: {error}') from error


def check_reachable(config: Mapping[str, Any], on: str) -> None:
  """ValueError if the machines of a scheduler cannot read a recipe's data or weights.

  The machines read object stores, and local folders only on a disk shared with this one.
  """
  for knob, place in grid.inputs(config):
    if TARGETS[on].stores and not storage.is_remote(place):
      raise ValueError(
        f'config.{knob}: {place} is a local folder, which the machines of --on={on} '
        'cannot read: copy it to a bucket and name that'
      )
