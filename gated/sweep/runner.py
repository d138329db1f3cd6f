"""Runs points here, several at a time, each in a process of its own.

A point is owned through its workdir's lock, which train.py holds: so several runners may
share a sweep's folder, on one machine or on many. What another has is waited for, and
what it left undone is taken up.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gated import storage
from gated.sweep.follow import Follower
from gated.sweep.grid import Point, Sweep
from gated.sweep.machine import Slot
from gated.sweep.state import ENDED, living, state

SECONDS = 0.5  # Between two looks at the processes.
TAIL = 15  # Lines of a failed point's log that are told.
_DIES = 1  # PR_SET_PDEATHSIG of prctl(2).


@dataclass
class Row:
  """A point as it is shown."""

  point: Point
  state: str  # One of state.STATES, or running, elsewhere.
  step: int
  follower: Follower
  slot: str = ''
  code: int | None = None  # Of its last process here.
  took: float = 0.0  # Seconds from its start to its end here, if it was run whole.

  @property
  def steps(self) -> int:
    return self.point.config['steps']

  @property
  def ended(self) -> bool:
    return self.state in ENDED


@dataclass
class _Job:
  row: Row
  process: subprocess.Popen
  slot: Slot
  fresh: bool  # Whether it began at step 0.
  begun: float = field(default_factory=time.monotonic)


def rows(swept: Sweep, points: Sequence[Point]) -> list[Row]:
  """Points -> where they stand."""
  found = []
  for point in points:
    workdir = swept.workdir(point)
    at = state(workdir, point.config['steps'])
    row = Row(point, at.state, at.step, Follower(workdir))
    row.follower.look()
    if row.state not in ENDED and living(workdir):
      row.state, row.step = 'elsewhere', max(row.step, row.follower.step)
    found.append(row)
  return found


class Runner:
  """`run` brings all points to their end, or as far as they go."""

  def __init__(
    self,
    swept: Sweep,
    points: Sequence[Point],
    *,
    slots: Sequence[Slot],
    code: Path,
    show: Callable[[Sequence[Row]], None],
    keep_checkpoints: bool,
  ):
    """`code` is where the sweep's sources are; `show` is called about twice a second."""
    self._swept, self._code, self._show = swept, code, show
    self._keep = keep_checkpoints
    self.rows = rows(swept, points)
    self._free = list(slots)
    self._jobs: list[_Job] = []
    self._told = 0

  def leave(self, *_) -> None:
    """Starts nothing more, and tells what runs to save and leave; a second time: kills.

    A handler of signals.
    """
    self._told += 1
    for job in self._jobs:
      job.process.send_signal(signal.SIGTERM if self._told == 1 else signal.SIGKILL)

  @property
  def leaving(self) -> bool:
    return self._told > 0

  def run(self) -> None:
    """Until every point has ended, failed or been left; their rows tell which."""
    self._show(self.rows)
    while True:
      self._reap()
      if not self.leaving:
        self._start()
      for job in self._jobs:
        job.row.follower.look()
        job.row.step = max(job.row.step, job.row.follower.step)
      self._show(self.rows)
      waiting = [row for row in self.rows if row.state == 'elsewhere']
      if not self._jobs and (self.leaving or not waiting):
        return
      time.sleep(SECONDS)

  def _start(self) -> None:
    """Fills the free slots with points that are due."""
    for row in self.rows:
      if not self._free:
        return
      if row.state == 'elsewhere':
        self._look_elsewhere(row)
      if row.code is None and row.state in ('absent', 'partial', 'failed'):
        self._launch(row, self._free.pop(0))

  def _look_elsewhere(self, row: Row) -> None:
    """Sees whether a point that another has is still its."""
    workdir = self._swept.workdir(row.point)
    row.follower.look()
    row.step = max(row.step, row.follower.step)
    if not living(workdir):
      row.state, row.step = state(workdir, row.steps)

  def _launch(self, row: Row, slot: Slot) -> None:
    log = self._swept.log(row.point)
    storage.make(log.parent)
    given = {'PYTHONUNBUFFERED': '1', **self.environment, **slot.environment}
    told = ' '.join(f'{k}={v}' for k, v in given.items())
    command = [sys.executable, *row.point.command]
    with open(log, 'ab') as out, warnings.catch_warnings():
      out.write(f'$ {told} {shlex.join(command)}\n'.encode())
      out.flush()
      # JAX minds a fork of a process with threads; what runs in it before exec is ours.
      warnings.simplefilter('ignore', RuntimeWarning)
      process = subprocess.Popen(
        command,
        cwd=self._code,
        env=os.environ | given,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # A terminal's Ctrl-C is for us, who pass it on.
        preexec_fn=_dies_with(os.getpid()),
      )
    row.follower = Follower(self._swept.workdir(row.point), since=time.time())
    row.state, row.slot = 'running', slot.name
    self._jobs.append(_Job(row, process, slot, fresh=not row.step))

  @property
  def environment(self) -> Mapping[str, str]:
    """Of every point, wherever it runs again."""
    return self._swept.made['environment']

  def _reap(self) -> None:
    """Takes note of the processes that have ended."""
    for job in [job for job in self._jobs if job.process.poll() is not None]:
      self._jobs.remove(job)
      self._free.append(job.slot)
      row, workdir = job.row, self._swept.workdir(job.row.point)
      row.code, row.slot = job.process.returncode, ''
      row.follower.look()
      try:
        row.state, row.step = state(workdir, row.steps)
      except ValueError:
        row.state = 'failed'  # Its log says so as well.
      if row.ended:
        row.took = time.monotonic() - job.begun if job.fresh else 0.0
        if not self._keep:
          storage.remove(workdir / 'checkpoints')
      elif living(workdir):
        row.state, row.code = 'elsewhere', None
      elif not self.leaving:
        row.state = 'failed'


def tail(path: storage.Path) -> str:
  """A log -> its last lines, since the last command in it."""
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, os.path.getsize(path) - (1 << 16)))
      lines = file.read().decode(errors='replace').splitlines()
  except OSError:
    return ''
  starts = [i for i, line in enumerate(lines) if line.startswith('$ ')]
  return '\n'.join(lines[starts[-1] + 1 if starts else 0 :][-TAIL:])


def _dies_with(parent: int) -> Callable[[], None] | None:
  """-> what a new process does first: to be told to leave when its parent dies."""
  if sys.platform != 'linux':
    return None
  prctl = ctypes.CDLL(None, use_errno=True).prctl

  def ask() -> None:
    prctl(_DIES, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
      os._exit(143)  # It died before.

  return ask
