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
from gated.sweep.state import ENDED, State, living, state

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
  told: str = ''  # What its last session said as it ended.

  @property
  def steps(self) -> int:
    return self.point.config['steps']

  @property
  def ended(self) -> bool:
    return self.state in ENDED

  def look(self, workdir: storage.Path) -> None:
    """Sees where the point stands, and whether another has it."""
    self.state, self.step, self.told = _state(workdir, self.steps)
    self.follower.look()
    if not self.ended and living(workdir):
      self.state, self.step = 'elsewhere', max(self.step, self.follower.step)


@dataclass
class _Job:
  row: Row
  process: subprocess.Popen
  slot: Slot
  fresh: bool  # Whether it began at step 0.
  told: int = 0  # How often it was told to leave.
  begun: float = field(default_factory=time.monotonic)


def rows(swept: Sweep, points: Sequence[Point]) -> list[Row]:
  """Points -> where they stand."""
  found = []
  for point in points:
    workdir = swept.workdir(point)
    found.append(Row(point, 'absent', 0, Follower(workdir)))
    found[-1].look(workdir)
  return found


def _state(workdir: storage.Path, steps: int) -> State:
  """As `state` has it; where what is there is damaged, train.py is to judge and tell."""
  try:
    return state(workdir, steps)
  except ValueError as error:
    return State('failed', 0, str(error))


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
    self._tell()

  def _tell(self) -> None:
    """Passes on what the runner was told, also to what began at that very moment."""
    for job in self._jobs:
      if job.told < self._told:
        job.told = self._told
        job.process.send_signal(signal.SIGTERM if job.told == 1 else signal.SIGKILL)

  @property
  def leaving(self) -> bool:
    return self._told > 0

  def run(self) -> None:
    """Until every point has ended, failed or been left; their rows tell which."""
    try:
      self._run()
    except BaseException:
      self.leave()  # Nothing is left running that nobody looks after.
      for job in self._jobs:
        job.process.wait()
      raise

  def _run(self) -> None:
    if not self._keep:
      for row in self.rows:
        self._drop(row)
    self._show(self.rows)
    while True:
      self._reap()
      if not self.leaving:
        self._start()
      self._tell()
      waiting = [row for row in self.rows if row.state == 'elsewhere']
      for row in [*waiting, *(job.row for job in self._jobs)]:
        row.follower.look()
        row.step = max(row.step, row.follower.step)
      self._show(self.rows)
      if not self._jobs and (self.leaving or not waiting):
        return
      time.sleep(SECONDS)

  def _start(self) -> None:
    """Fills the free slots with points that are due."""
    for row in self.rows:
      if not self._free or self.leaving:
        return
      if row.state == 'running' or row.ended or row.code is not None:
        continue
      workdir = self._swept.workdir(row.point)
      if row.state == 'elsewhere' and living(workdir):
        continue
      row.look(workdir)  # Another may have begun or ended it.
      if row.state != 'elsewhere' and not row.ended:
        self._launch(row, self._free.pop(0))

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
      row.look(workdir)
      if row.ended:
        row.took = time.monotonic() - job.begun if job.fresh else 0.0
        if not self._keep:
          self._drop(row)
      elif row.state == 'elsewhere':
        row.code = None
      elif not self.leaving:
        row.state = 'failed'

  def _drop(self, row: Row) -> None:
    """Removes the checkpoints of a point that has ended."""
    if row.ended:
      storage.remove(self._swept.workdir(row.point) / 'checkpoints')


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
