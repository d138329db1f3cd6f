"""A watchdog that exits the process when its work stops.

A collective waits for a hanging peer forever, and JAX has no timeout for that
(jax#38503). Before the exit, the stacks of all threads go to standard error. Time in
which the process was suspended (SIGSTOP, a machine that sleeps) does not count.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

_GRACE = 10.0  # Seconds that the report before the exit may take.
_STDERR = 2  # A file descriptor: a stuck thread may hold the lock of sys.stderr.

# A second process, because no thread runs while another one holds the GIL. It counts its
# own short waits instead of reading a clock, and not while the process is stopped.
_GUARD = """
import os, select, signal, subprocess, sys
pid, seconds, period = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
def stopped():
  try:
    with open(f'/proc/{pid}/stat') as file:
      state = file.read().rpartition(')')[2].split()[0]
  except OSError:
    command = ['ps', '-o', 'stat=', '-p', str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout
  return state[:1] in 'Tt'
silent = 0.0
while silent < seconds and os.getppid() == pid:
  if select.select([0], [], [], period)[0]:
    if not os.read(0, 1 << 10):
      sys.exit()  # The pulse has ended.
    silent = 0.0
  elif not stopped():
    silent += period
if os.getppid() == pid:
  os.kill(pid, signal.SIGABRT)
"""


class Pulse:
  """Exits the process after `seconds` without a beat; 0 disables it.

  `with Pulse(600.0, code=6, details=...) as pulse:` surrounds the loop, and each piece of
  work that may take long calls `pulse.beat('step 42')` at its end. After the timeout,
  standard error gets the stacks of all threads and the text of `details` (which may raise
  or hang), and the process exits with `code`. If the main thread holds the GIL, so that
  no other thread runs, SIGABRT ends the process after twice the timeout, with its stacks.
  """

  def __init__(self, seconds: float, *, code: int, details: Callable[[], str]):
    self._seconds, self._code, self._details = seconds, code, details
    self._period = min(seconds / 4, 5.0)
    self._last, self._beaten = 'none', time.monotonic()
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='pulse', daemon=True)
    self._guard: subprocess.Popen | None = None

  def beat(self, work: str) -> None:
    """Restarts the timeout after finished work, such as 'step 42'."""
    self._last = work
    self._beaten = time.monotonic()

  def __enter__(self) -> Self:
    self._beaten = time.monotonic()
    if self._seconds:
      faulthandler.enable(_STDERR)
      arguments = [str(x) for x in (os.getpid(), 2 * self._seconds, self._period)]
      with contextlib.suppress(OSError):  # The thread alone detects most hangs.
        self._guard = subprocess.Popen(
          [sys.executable, '-I', '-S', '-c', _GUARD, *arguments],
          stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.DEVNULL,
          start_new_session=True,  # A Ctrl-C or Ctrl-Z is for the run.
        )
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._thread.is_alive():
      self._thread.join()
    if self._guard and self._guard.stdin:
      self._guard.stdin.close()
      self._guard.wait()

  def _watch(self) -> None:
    checked = time.monotonic()
    while not self._over.wait(self._period):
      now = time.monotonic()
      # A wait that took longer than asked for was suspended meanwhile.
      suspended = max(0.0, now - checked - self._period)
      self._beaten = min(now, self._beaten + suspended)
      checked, silent = now, now - self._beaten
      if silent >= self._seconds:
        break
      self._feed()
    else:
      return
    faulthandler.dump_traceback_later(2 * _GRACE, exit=True, file=_STDERR)
    # A separate thread, because the report may hang.
    reporter = threading.Thread(target=self._report, args=(silent,), daemon=True)
    reporter.start()
    reporter.join(_GRACE)
    os._exit(self._code)

  def _feed(self) -> None:
    """Shows the guard that threads run; one that was killed is not missed."""
    if self._guard and self._guard.stdin:
      with contextlib.suppress(OSError):
        os.write(self._guard.stdin.fileno(), b'.')

  def _report(self, silent: float) -> None:
    knob = f'config.stability.stuck_after={self._seconds:g}'
    summary = f'no progress for {silent:.1f} s ({knob}); the last was {self._last}'
    os.write(_STDERR, f'{summary}. All threads:\n'.encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    try:
      more = self._details()
    except Exception as error:
      more = f'further details are not available: {error!r}'
    os.write(_STDERR, f'{summary}. {more}\nExiting with code {self._code}.\n'.encode())
