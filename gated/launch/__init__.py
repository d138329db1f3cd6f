"""Hands the points of a sweep to a scheduler that exists already.

A target turns points into files and commands; here they are checked, written, called and
recorded in SWEEP/launched.json, so that what was created can be listed and deleted. Each
point is the same plain command everywhere, run by the same `job.sh`; whether it has ended
is told by its workdir alone, so that nothing runs twice.
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

from gated import storage
from gated.launch import jobset, machines, skypilot, slurm, tpu, work
from gated.launch.work import Options, Point, Work, label

RECORD = 'launched.json'
FOLDER = 'launch'  # In a sweep's: the files that were submitted.
LIMIT = 1 << 24  # Bytes of a launched.json.


class Target(NamedTuple):
  """A scheduler."""

  module: ModuleType  # files, submit, listing, states, delete
  command: str  # That speaks with it.
  install: str
  needs: tuple[str, ...]  # Options that it cannot do without.
  takes: tuple[str, ...]  # Those that mean something to it.
  stores: tuple[str, ...]  # What a sweep's folder may begin with; () is anywhere.


_GOOGLE = 'https://cloud.google.com/sdk/docs/install'
TARGETS = {
  'slurm': Target(
    slurm,
    'sbatch',
    'run this where SLURM is, on a login node of the cluster',
    ('partition',),
    ('nodes', 'restarts', 'partition', 'time', 'processes', 'at_once', 'sbatch'),
    (),
  ),
  'skypilot': Target(
    skypilot,
    'sky',
    "pip install 'skypilot[gcp]' (or aws, kubernetes, ...) in an environment of its own, "
    'then sky check',
    (),
    ('nodes', 'restarts', 'spot', 'infra'),
    ('gs://', 's3://'),
  ),
  'jobset': Target(
    jobset,
    'kubectl',
    'https://kubernetes.io/docs/tasks/tools, and JobSet and Kueue in the cluster (xpk '
    'makes such a one)',
    ('queue',),
    (
      *('nodes', 'slices', 'restarts', 'spot', 'queue', 'namespace', 'image'),
      'service_account',
    ),
    ('gs://', 's3://'),
  ),
  'tpu': Target(
    tpu,
    'gcloud',
    _GOOGLE,
    ('zone', 'project'),
    ('slices', 'restarts', 'spot', 'service_account', 'zone', 'project', 'runtime'),
    ('gs://',),
  ),
}
_ALL_TAKE = ('on', 'accelerator', 'interpreter', 'cache', 'unlocked')


class Submission(NamedTuple):
  """What would be submitted: nothing is written or called yet."""

  work: Work
  files: dict[str, str]  # By their names in `work.files`.
  commands: list[list[str]]

  def __str__(self) -> str:
    """All of it, to be read."""
    text = ''
    for name, content in self.files.items():
      text += f'# {self.work.files}/{name}\n{content.rstrip()}\n\n'
    return text + '\n'.join(shlex.join(command) for command in self.commands)


def check(options: Options, folder: str) -> None:
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
    if name not in (*_ALL_TAKE, *target.takes):
      others = ', '.join(on for on, t in TARGETS.items() if name in t.takes)
      raise ValueError(f'--{name}={value} with --on={options.on}, but it is for {others}')
  for name in ('nodes', 'slices', 'processes'):
    if getattr(options, name) < 1:
      raise ValueError(f'--{name}={getattr(options, name)} must be positive')
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


def check_installed(on: str) -> None:
  """ValueError, saying how to install it, where a scheduler's command is not here."""
  target = TARGETS[on]
  if not shutil.which(target.command):
    raise ValueError(
      f'--on={on} calls {target.command}, which is not installed here: {target.install}'
    )


def check_writable(folder: str) -> None:
  """Writes a few bytes to a folder and removes them; ValueError if it cannot."""
  probe = storage.path(folder) / f'.can-be-written-{secrets.token_hex(4)}'
  try:
    storage.write(probe, b'yes\n')
    storage.remove(probe)
  except OSError as error:
    raise ValueError(
      f'--dir={folder} cannot be written from here, so no job could: {error}'
    ) from error


def local(folder: str) -> str:
  """A sweep's folder -> where what is submitted lies: in it, or in the cache."""
  if not storage.is_remote(folder):
    return os.path.join(folder, FOLDER)
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'gated', FOLDER, label(folder))


def prepare(
  options: Options, folder: str, points: Sequence[Point], *, sha256: str, python: str
) -> Submission:
  """Points that have not ended -> what would be submitted for them."""
  w = Work(
    label=label(folder),
    folder=folder,
    files=local(folder),
    sha256=sha256,
    python=python,
    points=tuple(points),
    options=options,
  )
  module = TARGETS[options.on].module
  return Submission(w, module.files(w), module.submit(w))


Call = Callable[[list[str]], str]


def call(command: list[str]) -> str:
  """Runs a scheduler's command -> what it printed; ValueError with its complaint."""
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    told = (done.stderr.strip() or done.stdout.strip())[-2000:]
    raise ValueError(f'{shlex.join(command)[:300]} failed: {told}')
  return done.stdout


def write(s: Submission) -> None:
  """Writes the files that are submitted, and a copy into a sweep that is in a bucket."""
  for name, content in s.files.items():
    storage.write(os.path.join(s.work.files, name), content.encode())
    if storage.is_remote(s.work.folder):
      storage.write(storage.path(s.work.folder) / FOLDER / name, content.encode())


def submit(s: Submission, call: Call = call) -> dict:
  """Writes the files, calls the scheduler, and records each job as it was taken.

  ValueError if a sweep is submitted already, or the scheduler refuses; what it took until
  then stays recorded, and can be deleted.
  """
  w = s.work
  before = read(w.folder)
  if before:
    raise ValueError(
      f'{w.folder} is submitted already, {len(before["jobs"])} jobs to '
      f'--on={before["on"]}: look with `scripts/sweep.py list`; `scripts/sweep.py '
      'delete` ends them, and then the points that have not ended can be submitted again'
    )
  write(s)
  record = {'on': w.options.on, 'label': w.label, 'jobs': [], 'told': []}
  record['options'] = dict(work.changed(w.options))
  # An array is one command for all, else each point has its own.
  whole = len(s.commands) == 1
  jobs = [{'job': p.job, 'point': p.name, 'workdir': p.workdir} for p in w.points]
  for command, some in zip(s.commands, [jobs] if whole else [[job] for job in jobs]):
    told = call(command)
    record['told'].append(told.strip())
    record['jobs'] += some
    _record(w.folder, record)
  return record


def read(folder: str) -> dict | None:
  """A sweep's folder -> what was launched for it; None if nothing is."""
  try:
    return json.loads(storage.read(storage.path(folder) / RECORD, LIMIT))
  except FileNotFoundError:
    return None


def _record(folder: str, record: dict) -> None:
  text = json.dumps(record, indent=2) + '\n'
  storage.write(storage.path(folder) / RECORD, text.encode())


def states(record: dict, call: Call = call) -> dict[str, str]:
  """What was launched -> job: its scheduler's state; without those that it forgot."""
  module = TARGETS[record['on']].module
  return module.states(record, call(module.listing(record)))


def delete(folder: str, record: dict, call: Call = call) -> list[str]:
  """Ends and removes all that was launched -> what could not be, in words.

  Then the record goes too, unless something is left. Workdirs and checkpoints stay.
  """
  left = []
  for command in TARGETS[record['on']].module.delete(record):
    try:
      call(command)
    except ValueError as error:
      gone = ('not found', 'NOT_FOUND', 'No matching', 'Invalid job id')
      if not any(words in str(error) for words in gone):
        left.append(str(error))
  if not left:
    storage.remove(storage.path(folder) / RECORD)
  return left


def renew(w: Work, record: dict, call: Call = call) -> list[str]:
  """Asks again for what was taken back -> the jobs that were. For --on=tpu.

  `w` has the points that have not ended.
  """
  commands = tpu.renew(w, record, states(record, call))
  for command in commands:
    call(command)
  return [command[5] for command in commands if command[4] == 'create']


__all__ = ['Options', 'Point', 'Submission', 'Work', 'label']
