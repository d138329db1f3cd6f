"""The progress of long work: lines on standard error, from the sixth second on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

FIRST, EVERY = 6.0, 15.0  # Seconds before the first line, and between two lines.

T = TypeVar('T')


class Progress(contextlib.AbstractContextManager):
  """Prints lines such as 'tokenizing: 3 of 8 files, 21 s' while its `with` lasts.

  with Progress('reading the model'):
    ...
  with Progress('tokenizing', total=len(files), unit='files') as progress:
    for file in progress.over(files):
      ...

  A thread prints them, so the work may also be one call that takes long. Work that ends
  within FIRST seconds prints nothing.
  """

  def __init__(self, label: str, *, total: int = 0, unit: str = '', enabled: bool = True):
    self._label, self._total, self._unit = label, total, unit
    self._enabled, self._done = enabled, 0
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._print, name='progress', daemon=True)

  def add(self, count: int = 1) -> None:
    """Counts finished work."""
    self._done += count

  def over(self, items: Iterable[T]) -> Iterator[T]:
    """Yields the items and counts them."""
    for item in items:
      yield item
      self.add()

  def __enter__(self) -> Self:
    self._began = time.monotonic()
    if self._enabled:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._thread.is_alive():
      self._thread.join()

  def _print(self) -> None:
    wait = FIRST
    while not self._over.wait(wait):
      count = f' {self._done:,} of {self._total:,} {self._unit},' if self._total else ''
      seconds = time.monotonic() - self._began
      print(f'{self._label}:{count} {seconds:.0f} s', file=sys.stderr, flush=True)
      wait = EVERY
