"""The commands submit, list and delete of `scripts/sweep.py`."""

import argparse
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from gated import storage, sweep
from gated.sweep import folder, launch
from gated.sweep.launch import targets
from gated.sweep.launch.work import Options


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `submit` to a parser: one for each option, --dry_run, --watch."""
  parser.add_argument(
    '--dry_run', action='store_true', help='print the files and commands, do nothing'
  )
  parser.add_argument(
    '--watch', type=float, default=0, help='tpu: seconds between checks for lost slices'
  )
  for option in fields(Options):
    default: Any = option.default
    opts: dict[str, Any] = {'type': type(default), 'default': default}
    if isinstance(default, bool):
      opts = {'action': 'store_true'}
    elif isinstance(default, tuple):
      opts = {'action': 'append', 'default': []}
    parser.add_argument(f'--{option.name}', help=option.metadata['help'], **opts)


def submit(
  args: argparse.Namespace, swept: sweep.Sweep, points: Sequence[sweep.Point]
) -> int:
  """Submits points of a sweep to a scheduler -> exit code; ValueError if refused."""
  values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(Options)}
  values['sbatch'] = tuple(args.sbatch)
  options = Options(**values)
  targets.check(options, os.fspath(swept.folder))
  for p in swept.points:
    targets.check_reachable(p.config, options.on)
  if args.watch and options.on != 'tpu':
    raise ValueError(f'--watch={args.watch} needs --on=tpu: other schedulers watch jobs')
  if args.dry_run:
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # It raises these errors too.
    try:
      points = launch.due(swept, points)
    except OSError as error:
      reason = f'{swept.folder} cannot be read from here, so every point is shown'
      print(f'{reason}: {error}', file=sys.stderr)
    # These are recorded when the sweep is written.
    sha256 = hashlib.sha256(folder.pack(folder.ROOT)).hexdigest()
    made = {'sha256': sha256, 'python': platform.python_version(), **swept.made}
    swept = replace(swept, made=made)
    print(launch.prepare(launch.Work(swept, points, options)))
    return 0
  targets.check_installed(options.on)
  targets.check_writable(os.fspath(swept.folder))
  swept = sweep.write(swept)
  if options.on != 'tpu' or not storage.exists(swept.folder / launch.RECORD):
    work = launch.Work(swept, launch.due(swept, points), options)
    record = launch.submit(launch.prepare(work))
    jobs = f'{len(record["jobs"])} jobs to {options.on}: {record["label"]}-...'
    print(f'submitted {jobs}', flush=True)
    if not args.watch:
      return 0
    time.sleep(args.watch)
  for line in _renewed(options, swept, args.watch):
    print(line, flush=True)
  return 0


def _renewed(options: Options, swept: sweep.Sweep, watch: float) -> Iterator[str]:
  """Creates lost TPU slices of a submitted sweep again -> lines for the user.

  A positive `watch` repeats this every `watch` seconds until all points have ended.
  """
  record = launch.read(swept.folder)
  current = options.changed()
  if current != record['options']:
    raise ValueError(
      f'{swept.folder} was submitted with {record["options"]}, and now with {current}: '
      'delete it first, or give the same options'
    )
  names = {job['point'] for job in record['jobs']}
  submitted = [p for p in swept.points if p.name in names]
  while True:
    try:
      work = launch.Work(swept, launch.due(swept, submitted), options)
      if not work.points:
        yield f'{swept.folder}: all points have ended'
        return
      launch.write(launch.prepare(work))
      created = ', '.join(launch.renew(work, record)) or 'none'
      yield f'{len(work.points)} points have not ended; created again: {created}'
    except (ValueError, OSError) as error:
      if not watch:
        raise
      yield f'trying again in {watch} s: {error}'  # A network may fail for a while.
    if not watch:
      return
    time.sleep(watch)


def show(swept: sweep.Sweep) -> int:
  """Prints each job with the scheduler's state and the workdir's state."""
  record = launch.read(swept.folder)
  known, points = launch.states(record), {p.name: p for p in swept.points}
  table = Table('job', 'point', 'scheduler', 'workdir', 'step', box=None)
  for job in record['jobs']:
    point = points[job['point']]
    state, step, _ = sweep.state(swept.workdir(point), point.steps)
    steps = f'{step}/{point.steps}'
    table.add_row(job['job'], point.name, known.get(job['job'], ''), state, steps)
  Console(soft_wrap=True).print(table)
  return 0


def delete(swept: sweep.Sweep) -> int:
  """Ends and removes the submitted jobs; prints the errors of those that remain."""
  record = launch.read(swept.folder)
  errors = launch.delete(swept.folder, record)
  print('\n'.join(errors) or f'deleted: {len(record["jobs"])} jobs of {swept.folder}')
  return 1 if errors else 0


# Commands with the sweep's folder as their only argument.
COMMANDS = {'list': show, 'delete': delete}
