"""Standard output and error that never end a run: closed, full, or a broken pipe.

A run outlives its terminal. What cannot be written is dropped; the records of the run are
in its workdir.
"""

import atexit
import codecs
import contextlib
import os
import sys
from typing import Any

# The text for characters that a terminal's encoding lacks; others are escaped.
PLAIN = {'±': '+-', '\N{LEFT HALF BLOCK}': '|', '\N{RIGHT SINGLE QUOTATION MARK}': "'"}


class Steady:
  """A text stream whose writes do not fail; after a lost reader, they go nowhere."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    with self._losing():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._losing():
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  @contextlib.contextmanager
  def _losing(self):
    try:
      yield
    except OSError:
      # The buffer keeps its text, and Python would try to write it again at exit.
      _discard(self._stream.fileno())
    except ValueError:
      pass  # The stream is closed.


def steady() -> None:
  """Makes sys.stdout and sys.stderr steady; a second call does nothing.

  A closed descriptor is opened on the null device: otherwise the next file of the run
  would become standard error, and get the messages of libraries.
  """
  codecs.register_error('gated', _plain)
  for name, number in (('stdin', 0), ('stdout', 1), ('stderr', 2)):
    try:
      os.fstat(number)
    except OSError:
      _discard(number)
    stream = getattr(sys, name)
    if number == 0 or isinstance(stream, Steady):
      continue
    if stream is None:
      stream = open(os.devnull, 'w')  # noqa: SIM115
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='gated')
    stream = Steady(stream)
    setattr(sys, name, stream)
    atexit.register(stream.flush)


def _discard(number: int) -> None:
  """Connects a file descriptor to the null device."""
  null = os.open(os.devnull, os.O_RDWR)
  if null != number:
    os.dup2(null, number)
    os.close(null)


def _plain(error: UnicodeError) -> tuple[str, int]:
  """Characters that cannot be encoded -> their text in ASCII."""
  assert isinstance(error, UnicodeEncodeError)
  lacking = error.object[error.start : error.end]
  escaped = lambda c: c.encode('ascii', 'backslashreplace').decode()
  return ''.join(PLAIN.get(c) or escaped(c) for c in lacking), error.end
