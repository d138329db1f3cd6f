"""Told to leave: SIGTERM, by which spot machines and schedulers announce their end."""

import signal
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Leaving:
  """`with Leaving() as leaving:` turns SIGTERM into an answer of `leaving.now(step)`.

  In a run of several processes one signal to one of them is enough: all are told to leave
  at the same step. There JAX's own service takes the signal, from `mesh.start` on. A
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
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
