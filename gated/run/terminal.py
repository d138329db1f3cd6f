"""Standard output and error that never end a run: closed, full, or a broken pipe.

A run outlives its terminal. What cannot be written is dropped; the records of the run are
in its workdir. Control characters, which a file may have brought, are shown as escapes.
Ctrl-C is one line.
"""

import atexit
import codecs
import contextlib
import logging
import os
import signal
import sys
import types
from typing import Any

# The text for characters that a terminal's encoding lacks; others are escaped.
PLAIN = {'±': '+-', '\N{LEFT HALF BLOCK}': '|', '\N{RIGHT SINGLE QUOTATION MARK}': "'"}
# C0, DEL and C1, without the line feed and the tab, -> escapes.
CONTROLS = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160))}
CONTROLS = {c: escape for c, escape in CONTROLS.items() if chr(c) not in '\n\t'}
_RETURN = ord('\r')  # A progress bar needs it.


def visible(text: str) -> str:
  """Any text -> the same without control characters: for names and texts of files."""
  return text.translate(CONTROLS)


def drawing(stream: Any) -> Any:
  """A steady stream -> the one below it, for a program that draws on a terminal."""
  return stream.stream if isinstance(stream, Steady) else stream


class Steady:
  """A text stream whose writes do not fail; after a lost reader, they go nowhere."""

  def __init__(self, stream: Any):
    self.stream = stream

  def write(self, text: str) -> int:
    with self._losing():
      self.stream.write(text.translate(CONTROLS | {_RETURN: '\r'}))
    return len(text)

  def flush(self) -> None:
    with self._losing():
      self.stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stream, name)

  @contextlib.contextmanager
  def _losing(self):
    try:
      yield
    except OSError:
      # The buffer keeps its text, and Python would try to write it again at exit.
      _discard(self.stream.fileno())
    except ValueError:
      pass  # The stream is closed.


def steady(level: int = logging.WARNING) -> None:
  """Makes sys.stdout and sys.stderr steady, and Ctrl-C and each log message one line.

  Messages below `level` are not printed. A second call does nothing. A closed descriptor
  is opened on the null device: otherwise the next file of the run would become standard
  error, and get the messages of libraries.
  """
  codecs.register_error('gated', _plain)
  sys.excepthook = _report
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
    if number == 2:
      logging.basicConfig(format='%(message)s', level=level, force=True)


def _report(
  kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
  """Prints an error that nothing caught; for Ctrl-C, one line, and exits at once.

  Threads and the steps of a library at exit could take long, and print more.
  """
  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, trace)
    return
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  program = os.path.basename(sys.argv[0])
  print(f'{program}: stopped by Ctrl-C', file=sys.stderr)
  os._exit(128 + signal.SIGINT)


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
