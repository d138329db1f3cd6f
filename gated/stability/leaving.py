"""How a process leaves: told to by SIGTERM, or by itself, waiting for nobody."""

import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils


class Leaving:
  """`with Leaving() as leaving:` turns SIGTERM into an answer of `leaving.now(step)`.

  By that signal spot machines and schedulers announce their end.

  In a run of several processes one signal to one of them is enough: all are told to leave
  at the same step. There JAX's own service takes the signal, from `processes.start` on. A
  second signal changes nothing.
  """

  def __init__(self):
    self._told = False
    self._before: Any = None

  def now(self, step: int) -> bool:
    """Whether to leave after this step; all processes ask after every step."""
    if jax.process_count() > 1:
      self._told |= multihost_utils.reached_preemption_sync_point(step)
    return self._told

  def _tell(self, *_) -> None:
    self._told = True

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_) -> None:
    # Who was told is on the way out, and a second signal is not to end that.
    if self._before is not None and not self._told:
      signal.signal(signal.SIGTERM, self._before)


def leave(code: int) -> NoReturn:
  """Leaves at once with the code; threads that wait for what will not come are left."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def end(error: Exception, *, lost: int, timeout: float) -> NoReturn:
  """Ends one process of several by what it met alone, and waits for no other.

  Where a collective broke, another process is gone. JAX's runtime finds that out within
  `timeout` seconds, names it, and ends this one; otherwise the code is `lost`.
  Any other error is told in full, and the code is 1.
  """
  if not isinstance(error, jax.errors.JaxRuntimeError) and 'Gloo' not in str(error):
    traceback.print_exception(error)
    leave(1)
  this = f'process {jax.process_index()} of {jax.process_count()}'
  told = str(error).partition('\n')[0]
  print(f'{this} lost another one: {told}', file=sys.stderr, flush=True)
  time.sleep(timeout + 10)
  leave(lost)
