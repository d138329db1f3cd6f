"""Runs points on this machine, several at a time, each in its own process.

train.py holds the lock of its workdir, so several runners, on one machine or many, can
share a sweep's folder. A runner waits for a point that another runner holds, and resumes
it if the other runner leaves it unfinished.
"""

import contextlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gated import storage
from gated.data import workers
from gated.sweep.grid import Point, Sweep
from gated.sweep.machine import Slot
from gated.sweep.state import ENDED, living, state

SECONDS = 0.5  # Between two checks of the processes.
TAIL = 15  # Lines of a failed point's log that are printed.
# Ctrl-C, a scheduler or `kill`, and a closed terminal.
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
END = 1 << 16  # Bytes at the end of a file that are read.


@dataclass
class Row:
  """The status of a point."""

  point: Point
  workdir: storage.Path
  state: str = 'absent'  # One of state.STATES, or running, elsewhere.
  step: int = 0
  message: str = ''  # The reason why its last session ended.
  # These come from the last training record of a local workdir.
  loss: str = ''
  spikes: int = 0
  skipped: int = 0  # updates
  seconds: float = 0.0  # Per step; 0 if unknown.
  slot: str = ''
  code: int | None = None  # The exit code of its last process on this machine.

  @property
  def steps(self) -> int:
    return self.point.steps

  @property
  def ended(self) -> bool:
    return self.state in ENDED

  def update(self) -> None:
    """Reads the state of the workdir, and whether another runner holds its lock."""
    try:
      self.state, self.step, self.message = state(self.workdir, self.steps)
    except ValueError as error:  # Damaged: train.py will report it.
      self.state, self.step, self.message = 'failed', 0, str(error)
    if not self.ended and living(self.workdir):
      self.state = 'elsewhere'
    self.follow()

  def follow(self) -> None:
    """Reads the last training record."""
    for line in reversed(_end(self.workdir / 'metrics.jsonl')):
      try:
        record = json.loads(line)
        if record['kind'] == 'train':
          step, loss, spikes = record['step'], record['loss'], int(record['spikes'])
          # A non-finite number is a string.
          self.loss = loss if isinstance(loss, str) else f'{loss:.4f}'
          # The first record may have no step_seconds: its only step was compiled.
          self.spikes, self.skipped = spikes, int(record.get('skipped', 0))
          self.seconds = record.get('step_seconds', 0.0)
          if self.state in ('running', 'elsewhere'):
            self.step = max(self.step, step)
          return
      except (ValueError, KeyError, TypeError):
        continue  # Incomplete or damaged; metrics.read reports damage.


def rows(swept: Sweep, points: Sequence[Point]) -> list[Row]:
  """Points -> their current status."""
  status = [Row(p, swept.workdir(p)) for p in points]
  for row in status:
    row.update()
  return status


@dataclass
class _Job:
  row: Row
  process: subprocess.Popen
  slot: Slot
  last: bool  # whether it runs the command that follows training
  stops: int = 0  # The number of stop signals sent to it.


class Runner:
  """`run` runs all points until they end."""

  def __init__(
    self,
    swept: Sweep,
    points: Sequence[Point],
    *,
    slots: Sequence[Slot],
    code: Path,
    show: Callable[[Sequence[Row]], None],
    keep_checkpoints: bool,
    after: Callable[[Point], Sequence[str]] = lambda point: (),
  ):
    """`code` is the folder of the sweep's sources; `show` runs about twice a second.

    Points start in the order of `rows`, which `show` may change; it may also remove rows
    that do not run. `after` returns the command that a finished point still needs, such
    as eval.py and its arguments; it runs in the point's slot, before its checkpoints are
    removed.
    """
    self._swept, self._code, self._show = swept, code, show
    self._keep, self._after = keep_checkpoints, after
    self.rows = rows(swept, points)
    self._free = list(slots)
    self._jobs: list[_Job] = []
    self._asked = 0  # Calls of `leave`, not counting SIGHUP.
    self._stops = 0  # 1: the points save and exit. 2: they are killed.

  def leave(self, number: int = signal.SIGTERM, *_) -> None:
    """A signal handler: starts no more points, and makes the running ones save and exit.

    A second call kills them. SIGHUP does not count: a terminal that is closed may send it
    more than once, or together with SIGTERM.
    """
    if number == signal.SIGHUP:
      _detach()
    else:
      self._asked += 1
    self._stops = max(1, self._asked)
    self._forward()

  @contextlib.contextmanager
  def signals(self) -> Generator[None]:
    """Inside, Ctrl-C, SIGTERM and a closed terminal call `leave`."""
    # `nohup` ignores SIGHUP, so that a run survives its terminal.
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = STOPS[:-1] if ignored else STOPS
    before = {number: signal.signal(number, self.leave) for number in numbers}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _forward(self) -> None:
    """Forwards the stop signal, also to a process that started at that moment."""
    for job in self._jobs:
      if job.stops < self._stops:
        job.stops = self._stops
        job.process.send_signal(signal.SIGTERM if job.stops == 1 else signal.SIGKILL)

  @property
  def leaving(self) -> bool:
    return self._stops > 0

  def run(self) -> None:
    """Returns when every point has ended or failed, or after `leave`."""
    try:
      self._run()
    except BaseException:
      # No process may remain. The points save first: perhaps only the output failed.
      self._stops = max(1, self._asked)
      self._forward()
      for job in self._jobs:
        job.process.wait()
      raise

  def _run(self) -> None:
    for row in self.rows:
      self._drop(row)
    self._show(self.rows)
    while True:
      if self._reap():
        self._show(self.rows)  # It may reorder what starts next.
      if not self.leaving:
        self._start()
      self._forward()
      waiting = [row for row in self.rows if row.state == 'elsewhere']
      for row in [*waiting, *(job.row for job in self._jobs)]:
        row.follow()
      self._show(self.rows)
      if not self._jobs and (self.leaving or not waiting):
        return
      time.sleep(SECONDS)

  def _start(self) -> None:
    """Starts pending points in the free slots."""
    for row in self.rows:
      if not self._free or self.leaving:
        return
      if row.state == 'running' or row.code is not None or self._done(row):
        continue
      if row.state == 'elsewhere' and living(row.workdir):
        continue
      row.update()  # Another runner may have started or finished it.
      if row.state != 'elsewhere' and not self._done(row):
        self._launch(row, self._free.pop(0))

  def _done(self, row: Row) -> bool:
    """Whether a point has ended and needs no further command."""
    return row.ended and not (row.state == 'finished' and self._after(row.point))

  def _launch(self, row: Row, slot: Slot) -> None:
    log = self._swept.log(row.point)
    storage.make(log.parent)
    # The sweep's environment is the same for every point, wherever it is resumed.
    common = self._swept.made['environment']
    environment = {'PYTHONUNBUFFERED': '1', **common, **slot.environment}
    prefix = ' '.join(f'{k}={v}' for k, v in environment.items())
    last = row.ended
    words = self._after(row.point) if last else self._swept.command(row.point)
    command = [sys.executable, *words]
    with open(log, 'ab') as out, warnings.catch_warnings():
      out.write(f'$ {prefix} {shlex.join(command)}\n'.encode())
      out.flush()
      # JAX warns of a fork with threads; here only our preexec_fn runs before the exec.
      warnings.simplefilter('ignore', RuntimeWarning)
      process = subprocess.Popen(
        command,
        cwd=self._code,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only this process, which forwards it.
        preexec_fn=workers.terminate_with_parent(),
      )
    row.state, row.slot = 'running', slot.name
    self._jobs.append(_Job(row, process, slot, last))

  def _reap(self) -> bool:
    """Updates the rows of the processes that have exited -> whether any has."""
    exited = [job for job in self._jobs if job.process.poll() is not None]
    for job in exited:
      self._jobs.remove(job)
      self._free.append(job.slot)
      row = job.row
      row.code, row.slot = job.process.returncode, ''
      row.update()
      self._drop(row)
      needs_more = row.state == 'finished' and not self._done(row)
      if row.state == 'elsewhere' or (needs_more and not job.last):
        row.code = None
      elif not self._done(row) and not self.leaving:
        row.state = 'failed'
    return bool(exited)

  def _drop(self, row: Row) -> None:
    """Removes the checkpoints of a point that is done, unless `keep_checkpoints`."""
    if self._done(row) and not self._keep:
      storage.remove(row.workdir / 'checkpoints')


def _detach() -> None:
  """Discards the output to a terminal that was closed, where writing would fail."""
  null = os.open(os.devnull, os.O_WRONLY)
  for number in (1, 2):
    with contextlib.suppress(OSError):
      if stat.S_ISCHR(os.fstat(number).st_mode):
        os.dup2(null, number)
  os.close(null)


def tail(log: storage.Path) -> str:
  """A log -> its last lines, after the last command in it."""
  lines = [line.decode(errors='replace') for line in _end(log)]
  starts = [i for i, line in enumerate(lines) if line.startswith('$ ')]
  return '\n'.join(lines[starts[-1] + 1 if starts else 0 :][-TAIL:])


def _end(path: storage.Path) -> list[bytes]:
  """A local file -> its last lines; none for a missing or remote file."""
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, os.path.getsize(path) - END))
      return file.read().splitlines()
  except OSError:
    return []
