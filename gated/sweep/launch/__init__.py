"""Submits the points of a sweep to a scheduler; lists and deletes their jobs.

The scheduler's module turns points into files and commands. This module writes the files,
runs the commands, and records the jobs in SWEEP/launched.json. Every scheduler runs the
same command for a point, through `job.sh`. Only the workdir decides whether a point has
ended, so no point runs twice.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gated import storage, sweep
from gated.sweep.launch import tpu
from gated.sweep.launch.targets import TARGETS
from gated.sweep.launch.work import FOLDER, Options, Work, label

__all__ = ['TARGETS', 'Options', 'Work', 'label']

RECORD = 'launched.json'
LIMIT = 1 << 24  # The largest launched.json, in bytes.
# A scheduler's answers for a job that it no longer knows.
GONE = 'not found', 'NOT_FOUND', 'No matching', 'Invalid job id'


class Submission(NamedTuple):
  """The files and commands of a submission, before anything is written or called."""

  work: Work
  files: dict[str, str]  # Their contents by their names in `work.files`.
  commands: list[list[str]]

  def __str__(self) -> str:
    text = ''
    for name, content in self.files.items():
      text += f'# {self.work.files}/{name}\n{content.rstrip()}\n\n'
    return text + '\n'.join(shlex.join(command) for command in self.commands)


def due(swept: sweep.Sweep, points: Sequence[sweep.Point]) -> list[sweep.Point]:
  """The points of a sweep that have not ended."""
  state = lambda p: sweep.state(swept.workdir(p), p.steps).state
  return [p for p in points if state(p) not in sweep.ENDED]


def prepare(w: Work) -> Submission:
  """Points and their machines -> the files and commands that submit them."""
  if not w.points:
    raise ValueError(f'{w.folder}: nothing to submit, all points have ended')
  tasks = list(TARGETS[w.options.on].module.tasks(w))
  files = {name: content for name, content, _ in tasks}
  return Submission(w, files, [command for *_, command in tasks])


Call = Callable[[list[str]], str]


def call(command: list[str]) -> str:
  """Runs a scheduler's command -> its output; ValueError with its error message."""
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    message = (done.stderr.strip() or done.stdout.strip())[-2000:]
    raise ValueError(f'{shlex.join(command)[:300]} failed: {message}')
  return done.stdout


def write(s: Submission) -> None:
  """Writes the submitted files, and copies them to the sweep if it is in a bucket."""
  for name, content in s.files.items():
    for folder in {s.work.files, f'{s.work.folder}/{FOLDER}'}:
      storage.write(storage.path(folder) / name, content.encode())


def submit(s: Submission, call: Call = call) -> dict:
  """Writes the files, calls the scheduler, and records each job -> the record.

  ValueError if the sweep is already submitted or the scheduler refuses. Jobs accepted
  before a refusal stay recorded, so that `delete` finds them.
  """
  w = s.work
  if storage.exists(storage.path(w.folder) / RECORD):
    before = read(w.folder)
    raise ValueError(
      f'{w.folder} is already submitted ({len(before["jobs"])} jobs, '
      f'--on={before["on"]}): `scripts/sweep.py list` shows them; after '
      '`scripts/sweep.py delete` the points that have not ended can be submitted again'
    )
  write(s)
  record: dict = {'on': w.options.on, 'label': w.label, 'jobs': [], 'told': []}
  record['options'] = w.options.changed()
  path = lambda p: os.fspath(w.swept.workdir(p))
  jobs = [{'job': w.job(p), 'point': p.name, 'workdir': path(p)} for p in w.points]
  # A job array is one command for all points.
  batches = [jobs] if len(s.commands) == 1 else [[job] for job in jobs]
  for command, batch in zip(s.commands, batches, strict=True):
    # Recorded before the call: an interrupted submission can be deleted too.
    record['jobs'] += batch
    record['told'].append('')
    _record(w.folder, record)
    try:
      record['told'][-1] = call(command).strip()
    except ValueError:
      del record['jobs'][-len(batch) :], record['told'][-1]
      raise
    finally:
      _record(w.folder, record)
  return record


def read(folder: storage.PathLike) -> dict:
  """A sweep's folder -> the record of its jobs. ValueError if it is not submitted."""
  try:
    return json.loads(storage.read(storage.path(folder) / RECORD, LIMIT))
  except FileNotFoundError:
    raise ValueError(f'{folder} is not submitted: {RECORD} is missing') from None


def _record(folder: str, record: dict) -> None:
  """Writes the record of the jobs; removes the file if no jobs are left."""
  path = storage.path(folder) / RECORD
  if record['jobs']:
    storage.write_json(path, record)
  else:
    storage.remove(path)


def states(record: dict, call: Call = call) -> dict[str, str]:
  """A record -> job: the scheduler's state, for the jobs that it still knows."""
  module = TARGETS[record['on']].module
  return module.states(record, call(module.listing(record)))


def delete(folder: storage.PathLike, record: dict, call: Call = call) -> list[str]:
  """Ends and removes all recorded jobs -> the error messages of those that remain.

  Removes the record if no error occurs. Workdirs and checkpoints stay.
  """
  errors = []
  for command in TARGETS[record['on']].module.delete(record):
    try:
      call(command)
    except ValueError as error:
      if not any(words in str(error) for words in GONE):
        errors.append(str(error))
  if not errors:
    storage.remove(storage.path(folder) / RECORD)
  return errors


def renew(w: Work, record: dict, call: Call = call) -> list[str]:
  """Creates lost slices (--on=tpu) of the points in `w` again -> the created jobs."""
  commands = tpu.renew(w, states(record, call))
  for command in commands:
    call(command)
  return [command[5] for command in commands if command[4] == 'create']
