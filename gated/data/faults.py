"""Faults of the input: bad places, counted by reason; the first ten are kept by name."""

from collections.abc import Callable
from typing import Any

NAMED = 10  # Places that a message lists.


class Fault(ValueError):
  """A place of the input that cannot be read: Fault(reason, message)."""

  @property
  def reason(self) -> str:
    return self.args[0]

  def __str__(self) -> str:
    return self.args[1]


Report = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
  """A Report that raises the fault."""
  raise fault


def describe(error: BaseException) -> str:
  """An error -> its text in one line, or its type if it has none."""
  return ' '.join(str(error).split()) or type(error).__name__


def shown(name: str) -> str:
  """A file name, perhaps not UTF-8 -> text that can be printed and stored."""
  return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


class Tally:
  """Faults by reason, and the messages of the first ten. `add` is a Report."""

  def __init__(self):
    self.counts: dict[str, int] = {}
    self.named: list[str] = []

  def add(self, fault: Fault) -> None:
    self.merge({'counts': {fault.reason: 1}, 'named': [shown(str(fault))[:1000]]})

  def merge(self, plain: dict[str, Any]) -> None:
    """Adds the faults of `plain()` of another tally."""
    for reason, count in plain['counts'].items():
      self.counts[reason] = self.counts.get(reason, 0) + count
    self.named = (self.named + plain['named'])[:NAMED]

  def plain(self) -> dict[str, Any]:
    """-> plain JSON, for `merge`."""
    return {'counts': self.counts, 'named': self.named}

  def __bool__(self) -> bool:
    return bool(self.counts)

  def total(self) -> int:
    return sum(self.counts.values())

  def __str__(self) -> str:
    """One fault in one line; more with their counts, a line each for the first ten."""
    if self.total() == 1:
      return self.named[0]
    counts = ', '.join(f'{count:,} {reason}' for reason, count in self.counts.items())
    more = f', the first {NAMED}' if self.total() > NAMED else ''
    return '\n  '.join([f'{self.total():,} faults ({counts}){more}:', *self.named])
