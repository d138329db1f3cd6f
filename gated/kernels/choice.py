"""Which backend of a contract runs: the one that is named, or the first that can."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any


def run(what: str, knob: str, backend: str, table: Mapping[str, Callable], *args) -> Any:
  """Runs `table[backend]`, or with 'auto' the first of the table that can, on `args`.

  A backend that cannot raises NotImplementedError saying what it lacks. With 'auto' the
  choice is logged once; if none can, the error lists what each lacks.
  """
  if backend != 'auto':
    try:
      return table[backend](*args)
    except NotImplementedError as error:
      raise NotImplementedError(f'{knob}={backend!r}, but {backend} {error}') from error
  lacks = []
  for name, call in table.items():
    try:
      out = call(*args)
    except NotImplementedError as error:
      lacks.append(f'{name} {error}')
    else:
      log(what, name, '; '.join(lacks))
      return out
  raise NotImplementedError(f'no backend can do {what} here: ' + '; '.join(lacks))


@functools.cache
def log(what: str, name: str, lacks: str) -> None:
  """Says once which backend was chosen, and what those before it lack."""
  reason = f' ({lacks})' if lacks else ''
  logging.getLogger('gated').info('%s runs on the %s backend%s', what, name, reason)
