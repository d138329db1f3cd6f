"""A host thread that ends a process whose steps no longer come.

A collective waits for a hanging peer for ever, and so do all other processes: nothing in
JAX ends that (jax#38503). What helps whoever looks is where every thread stood.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from typing import Self

_GRACE = 10.0  # Seconds that telling what happened may take.
_STDERR = 2  # Written to by number: whoever is stuck may hold the lock of sys.stderr.


class Pulse:
  """Leaves the process when no beat came for so many seconds; 0 does nothing at all.

  `with Pulse(600.0, code=6, details=...) as pulse:` is around the loop, whose steps call
  `pulse.beat(step)`. When they do not, standard error gets how long it was and the stacks
  of all threads, then what `details` returns (it may raise or
  hang), and the process leaves with `code`, whatever its main thread is at. If that keeps
  Python's lock, so that no other thread runs, faulthandler leaves with 1 after twice the
  time.
  """

  def __init__(self, seconds: float, *, code: int, details: Callable[[], str]):
    self._seconds, self._code, self._details = seconds, code, details
    self._last, self._beaten = 'none', time.monotonic()
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='pulse', daemon=True)

  def beat(self, step: int) -> None:
    """A step was finished; its number is told if it was the last."""
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
    # A thread of its own, as the telling may hang.
    teller = threading.Thread(target=self._tell, args=(silent,), daemon=True)
    teller.start()
    teller.join(_GRACE)
    os._exit(self._code)

  def _arm(self) -> None:
    """Sets faulthandler's timer anew; it runs out if this is not called again."""
    faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=_STDERR)

  def _tell(self, silent: float) -> None:
    knob = f'config.stability.stuck_after={self._seconds:g}'
    told = f'no step was finished for {silent:.1f} s ({knob}); the last was {self._last}'
    os.write(_STDERR, f'{told}. All threads:\n'.encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    try:
      more = self._details()
    except Exception as error:
      more = f'what else there is to tell could not be found out: {error!r}'
    os.write(_STDERR, f'{told}. {more}\nLeaving with {self._code}.\n'.encode())
