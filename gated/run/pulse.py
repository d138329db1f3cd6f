"""A watchdog thread that exits the process when its steps stop.

A collective waits for a hanging peer forever, and JAX has no timeout for that
(jax#38503). Before the exit, the stacks of all threads go to standard error.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from typing import Self

_GRACE = 10.0  # Seconds that the report before the exit may take.
_STDERR = 2  # A file descriptor: a stuck thread may hold the lock of sys.stderr.


class Pulse:
  """Exits the process after `seconds` without a beat; 0 disables it.

  `with Pulse(600.0, code=6, details=...) as pulse:` surrounds the loop, and each step
  calls `pulse.beat(step)`. After the timeout, standard error gets the stacks of all
  threads and the text of `details` (which may raise or hang), and the process exits with
  `code`. If the main thread holds the GIL, so that no other thread runs, faulthandler
  exits with code 1 after twice the timeout.
  """

  def __init__(self, seconds: float, *, code: int, details: Callable[[], str]):
    self._seconds, self._code, self._details = seconds, code, details
    self._last, self._beaten = 'none', time.monotonic()
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='pulse', daemon=True)

  def beat(self, step: int) -> None:
    """Restarts the timeout after a finished step."""
    self._last = str(step)
    self._beaten = time.monotonic()

  def __enter__(self) -> Self:
    self._beaten = time.monotonic()
    if self._seconds:
      self._arm()
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._thread.is_alive():
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while not self._over.wait(min(self._seconds / 4, 5.0)):
      silent = time.monotonic() - self._beaten
      if silent >= self._seconds:
        break
      self._arm()
    else:
      return
    faulthandler.dump_traceback_later(2 * _GRACE, exit=True, file=_STDERR)
    # A separate thread, because the report may hang.
    reporter = threading.Thread(target=self._report, args=(silent,), daemon=True)
    reporter.start()
    reporter.join(_GRACE)
    os._exit(self._code)

  def _arm(self) -> None:
    """Restarts the timer of faulthandler."""
    faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=_STDERR)

  def _report(self, silent: float) -> None:
    knob = f'config.stability.stuck_after={self._seconds:g}'
    summary = (
      f'no step was finished for {silent:.1f} s ({knob}); the last was {self._last}'
    )
    os.write(_STDERR, f'{summary}. All threads:\n'.encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    try:
      more = self._details()
    except Exception as error:
      more = f'further details are not available: {error!r}'
    os.write(_STDERR, f'{summary}. {more}\nExiting with code {self._code}.\n'.encode())
