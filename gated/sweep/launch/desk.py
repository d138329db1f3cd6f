"""What `scripts/sweep.py` does for its commands submit, list and delete."""

import argparse
import hashlib
import itertools
import logging
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from gated import storage, sweep
from gated.sweep import code, folder, launch
from gated.sweep.launch import checks, work
from gated.sweep.launch.work import Options


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Gives a parser the flags of `submit`: one for each option, and when to act."""
  parser.add_argument('--dry_run', action='store_true', help='print what would be done')
  parser.add_argument(
    '--watch', type=float, default=0, help='tpu: seconds between looks for lost slices'
  )
  for option in fields(Options):
    default: Any = option.default
    opts: dict[str, Any] = {'type': type(default), 'default': default}
    if isinstance(default, bool):
      opts = {'action': 'store_true'}
    elif isinstance(default, tuple):
      opts = {'action': 'append', 'default': []}
    parser.add_argument(f'--{option.name}', help=option.metadata['help'], **opts)


def _options(args: argparse.Namespace) -> Options:
  """Parsed flags -> Options."""
  given: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(Options)}
  given['sbatch'] = tuple(given['sbatch'])
  return Options(**given)


def submit(
  args: argparse.Namespace, swept: sweep.Sweep, points: Sequence[sweep.Point]
) -> int:
  """Hands points of a sweep to a scheduler -> the exit code; ValueError if refused."""
  options = _options(args)
  launch.check(options, swept)
  if args.watch and options.on != 'tpu':
    raise ValueError(f'--watch={args.watch} is for --on=tpu: others watch by themselves')
  chosen = {p.name for p in points}
  if args.dry_run:
    print(rehearsed(options, swept, _imagined(swept, chosen)))
    return 0
  checks.installed(options.on)
  checks.writable(os.fspath(swept.folder))
  for line in submitted(options, sweep.write(swept), chosen, again=args.watch):
    print(line, flush=True)
  return 0


def rehearsed(
  options: Options, swept: sweep.Sweep, points: Sequence[launch.Point]
) -> launch.Submission:
  """What `submitted` would do first: printed, it is all files and commands."""
  made = swept.made or {
    'python': platform.python_version(),
    'sha256': hashlib.sha256(code.pack(folder.ROOT)).hexdigest(),
  }
  where = os.fspath(swept.folder)
  return launch.prepare(
    options, where, points, sha256=made['sha256'], python=made['python']
  )


def _imagined(swept: sweep.Sweep, chosen: Collection[str]) -> list[launch.Point]:
  """The points that are due; all of them where a bucket cannot be read, which is told."""
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # It tells what it then raises.
  try:
    return launch.due(swept, chosen)
  except OSError as error:
    told = f'{swept.folder} cannot be read from here, so no point is known to have ended'
    print(f'{told}: {error}', file=sys.stderr)
    return launch.every(swept, chosen)


def submitted(
  options: Options, swept: sweep.Sweep, chosen: Collection[str], *, again: float
) -> Iterator[str]:
  """Submits a sweep that is written, telling in lines what it does.

  For --on=tpu, of a sweep that was submitted before, what was taken back is asked for
  again; and so every `again` seconds until all points have ended, unless that is 0.
  """
  first = options.on != 'tpu' or not storage.exists(swept.folder / launch.RECORD)
  if first:
    record = launch.submit(rehearsed(options, swept, launch.due(swept, chosen)))
    yield f'{len(record["jobs"])} jobs are with {options.on}, named {record["label"]}-...'
  else:
    record = launch.read(swept.folder)
    now = dict(work.changed(options))
    if now != record['options']:
      raise ValueError(
        f'{swept.folder} was submitted with {record["options"]}, and now with {now}: '
        'delete it first, or give the same options'
      )
  mine = {job['point'] for job in record['jobs']}
  for look in itertools.count(int(first)) if again else range(int(first), 1):
    if look:
      time.sleep(again)
    try:
      points = launch.due(swept, mine)
      if not points:
        yield f'{swept.folder}: all points have ended'
        return
      yield _renewed(rehearsed(options, swept, points), record)
    except (ValueError, OSError) as error:
      if not again:
        raise
      yield f'not this time: {error}'  # Who watches for days meets a failing network.


def _renewed(s: launch.Submission, record: dict) -> str:
  """Asks again for what was taken back of the points that have not ended -> a line."""
  launch.write(s)
  fresh = ', '.join(launch.renew(s.work, record)) or 'none'
  return f'{len(s.work.points)} points to go; asked for again: {fresh}'


def show(swept: sweep.Sweep) -> int:
  """Prints where each job stands, by its scheduler and by its workdir."""
  table = Table('job', 'point', 'scheduler', 'workdir', 'step', box=None)
  for row in launch.listed(swept, launch.read(swept.folder)):
    table.add_row(*row)
  Console(soft_wrap=True).print(table)
  return 0


def delete(swept: sweep.Sweep) -> int:
  """Ends and removes what was submitted, telling what could not be."""
  record = launch.read(swept.folder)
  left = launch.delete(swept.folder, record)
  print('\n'.join(left) or f'deleted: {len(record["jobs"])} jobs of {swept.folder}')
  return 1 if left else 0


# The commands that take a sweep's folder alone.
COMMANDS = {'list': show, 'delete': delete}
