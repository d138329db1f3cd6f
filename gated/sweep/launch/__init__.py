"""Hands the points of a sweep to a scheduler that exists already.

A target turns points into files and commands; here they are checked, written, called and
recorded in SWEEP/launched.json, so that what was created can be listed and deleted. Each
point is the same plain command everywhere, run by the same `job.sh`; whether it has ended
is told by its workdir alone, so that nothing runs twice.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from gated import storage, sweep
from gated.sweep.launch import checks, tpu, work
from gated.sweep.launch.targets import TARGETS
from gated.sweep.launch.work import Options, Point, Work, label

RECORD = 'launched.json'
FOLDER = 'launch'  # In a sweep's: the files that were submitted.
LIMIT = 1 << 24  # Bytes of a launched.json.


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


def local(folder: str) -> str:
  """A sweep's folder -> where what is submitted lies: in it, or in the cache."""
  if not storage.is_remote(folder):
    return os.path.join(folder, FOLDER)
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'gated', FOLDER, label(folder))


def check(options: Options, swept: sweep.Sweep) -> None:
  """ValueError for a sweep that could not be run so, of what can be told from here."""
  checks.meant(options, os.fspath(swept.folder))
  for p in swept.points:
    checks.reachable(p.config, options.on)


def every(swept: sweep.Sweep, chosen: Collection[str] | None = None) -> list[Point]:
  """A sweep -> its points, of those whose names are chosen."""
  named = label(os.fspath(swept.folder))
  return [
    Point(f'{named}-{index:03d}', p.name, p.command, os.fspath(swept.workdir(p)))
    for index, p in enumerate(swept.points)
    if chosen is None or p.name in chosen
  ]


def due(swept: sweep.Sweep, chosen: Collection[str] | None = None) -> list[Point]:
  """A sweep -> its points that have not ended, of those whose names are chosen."""
  steps = {p.name: p.config['steps'] for p in swept.points}
  ended = lambda p: (
    sweep.state(storage.path(p.workdir), steps[p.name]).state in sweep.ENDED
  )
  return [p for p in every(swept, chosen) if not ended(p)]


def prepare(
  options: Options, folder: str, points: Sequence[Point], *, sha256: str, python: str
) -> Submission:
  """A sweep's folder and its points -> what would be submitted for them.

  `sha256` is of the code.tar.gz there, `python` the version that the sweep was made with.
  """
  if not points:
    raise ValueError(f'{folder}: all of its points have ended, nothing is left to submit')
  w = Work(
    label=label(folder),
    folder=folder,
    files=local(folder),
    sha256=sha256,
    python='.'.join(python.split('.')[:2]),
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

  ValueError if the sweep is submitted already, or the scheduler refuses; what it took
  until then stays recorded, and can be deleted.
  """
  w = s.work
  if storage.exists(storage.path(w.folder) / RECORD):
    before = read(w.folder)
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
    # Before it is there, so that it can be deleted whatever happens here.
    before = record
    record = before | {
      'jobs': [*before['jobs'], *some],
      'told': [*before['told'], ''],
    }
    _record(w.folder, record)
    try:
      record['told'][-1] = call(command).strip()
    except ValueError:
      _record(w.folder, before)
      raise
    _record(w.folder, record)
  return record


def read(folder: storage.PathLike) -> dict:
  """A sweep's folder -> what was launched for it. ValueError if nothing is."""
  try:
    return json.loads(storage.read(storage.path(folder) / RECORD, LIMIT))
  except FileNotFoundError:
    raise ValueError(f'{folder} is not submitted: there is no {RECORD}') from None


def _record(folder: str, record: dict) -> None:
  """Writes what was launched; removes the record of nothing."""
  path = storage.path(folder) / RECORD
  if record['jobs']:
    storage.write_json(path, record)
  else:
    storage.remove(path)


def states(record: dict, call: Call = call) -> dict[str, str]:
  """What was launched -> job: its scheduler's state; without those that it forgot."""
  module = TARGETS[record['on']].module
  return module.states(record, call(module.listing(record)))


def listed(swept: sweep.Sweep, record: dict, call: Call = call) -> list[tuple[str, ...]]:
  """A sweep and what was launched for it -> a row for each job.

  Its name, its point, its scheduler's state ('' where that has forgotten it), and its
  workdir's, with the step.
  """
  there, rows = states(record, call), []
  points = {p.name: p for p in swept.points}
  for job in record['jobs']:
    point = points[job['point']]
    found = sweep.state(swept.workdir(point), point.config['steps'])
    step = f'{found.step}/{point.config["steps"]}'
    rows.append((job['job'], point.name, there.get(job['job'], ''), found.state, step))
  return rows


def delete(folder: storage.PathLike, record: dict, call: Call = call) -> list[str]:
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


__all__ = [
  'TARGETS',
  'Options',
  'Point',
  'Submission',
  'Work',
  'check',
  'checks',
  'delete',
  'due',
  'every',
  'label',
  'listed',
  'prepare',
  'read',
  'renew',
  'states',
  'submit',
]
