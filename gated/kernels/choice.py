"""Chooses a contract's backend: the named one, or the first that supports the case."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any


def run(
  contract: str, knob: str, backend: str, table: Mapping[str, Callable], *args
) -> Any:
  """Calls `table[backend]`, or with 'auto' the first backend that supports `args`.

  A backend raises NotImplementedError with the reason if it does not support them. With
  'auto' the choice is logged once; if all fail, the error lists each reason.
  """
  if backend != 'auto':
    try:
      return table[backend](*args)
    except NotImplementedError as error:
      raise NotImplementedError(f'{knob}={backend!r}, but {backend} {error}') from error
  reasons = []
  for name, call in table.items():
    try:
      out = call(*args)
    except NotImplementedError as error:
      reasons.append(f'{name} {error}')
    else:
      log(contract, name, '; '.join(reasons))
      return out
  raise NotImplementedError(f'no backend supports this {contract}: ' + '; '.join(reasons))


@functools.cache
def log(contract: str, name: str, reasons: str) -> None:
  """Logs once the chosen backend, and why the earlier ones do not support the case."""
  detail = f' ({reasons})' if reasons else ''
  logging.getLogger('gated').info('%s runs on the %s backend%s', contract, name, detail)
