"""Records: one JSON object a line, in a file, or in an object store in parts.

JSON has no NaN, so the three values that it lacks are the strings 'NaN', 'Infinity' and
'-Infinity', which `read` turns back into floats. Floats are written by `repr`, so that
they come back to the last bit.

A store cannot append. There, the records of metrics.jsonl lie in metrics.jsonl.parts/ in
objects of a thousand or so, of which the last is written again as it grows. A file comes
before the parts beside it: so a workdir may be copied from a disk to a store, and back.
"""

import json
import logging
import math
import os
import pathlib
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gated import storage

ABSENT = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}
LARGEST = 1 << 32  # Bytes of a file of records that are read at most.
END = 1 << 20  # Bytes that hold the last record of a file, with room to spare.
PART = 1000  # Records in a part, about: then the next begins.
SECONDS = 30.0  # That a record waits at most to be put into a store.

_log = logging.getLogger('gated')


class Damaged(ValueError):
  """A file of records that no run wrote so; names it, and the line."""


def plain(value: Any) -> Any:
  """Tree of Python, numpy and JAX values -> the same tree in what JSON can hold."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, jax.Array):
    value = jax.device_get(value)
  if isinstance(value, (np.ndarray, np.generic)):
    # A bf16 scalar has no Python twin; float64 holds every bit of it.
    exact = value.dtype.kind in 'biuf' or value.dtype.kind == 'U'
    return plain((value if exact else value.astype(np.float64)).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  if isinstance(value, pathlib.PurePath):
    return os.fspath(value)
  return value


def dumps(value: Any, *, indent: int | None) -> str:
  """Tree -> JSON that every parser takes and that loses no bit of a float."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def line(record: Mapping[str, Any]) -> bytes:
  """Record -> its line."""
  return (dumps(record, indent=None) + '\n').encode()


def exists(path: storage.PathLike) -> bool:
  """Whether there is a metrics.jsonl, whole or in parts."""
  return bool(_pieces(path))


def read(path: storage.PathLike) -> list[dict]:
  """metrics.jsonl -> its records; a last line torn by a kill is left out."""
  pieces = _pieces(path)
  if not pieces:
    raise FileNotFoundError(f'{os.fspath(path)} is not there')
  return [_decode(text, piece) for piece in pieces for text in _lines(_read(piece))]


def last_step(path: storage.PathLike) -> int:
  """metrics.jsonl -> the last step that it tells of; 0 for none. Reads its end alone."""
  for piece in reversed(_pieces(path)):
    content = _read(piece) if storage.is_remote(piece) else _end(piece)
    if lines := _lines(content):
      return _decode(lines[-1], piece)['step']
  return 0


def truncate(path: storage.PathLike, step: int) -> int:
  """Drops every record past `step`, and a torn last line -> how many bytes went.

  `step` -1 empties the file; a file that is not there is as good as empty.
  """
  dropped = 0
  for piece in _pieces(path):
    content = _read(piece)
    lines = _lines(content)
    kept = b''.join(text for text in lines if _decode(text, piece)['step'] <= step)
    dropped += len(content) - len(kept)
    if not kept and os.fspath(piece) != os.fspath(path):
      storage.remove(piece)
    elif kept != content:
      storage.write(piece, kept)
  return dropped


def append(path: storage.PathLike, record: Mapping[str, Any]) -> None:
  """Adds a record to a file that has few, such as spikes.jsonl; it is safe on return.

  In a store the whole file is written again. A last line torn by a kill goes.
  """
  content = _read(path) if storage.exists(path) else b''
  whole = b''.join(_lines(content))
  if storage.is_remote(path) or whole != content:
    storage.write(path, whole + line(record))
    return
  storage.make(os.path.dirname(path) or '.')
  file = File(path)
  file.write(line(record))
  file.sync()
  file.close()


class File:
  """Lines at the end of a local file, flushed as they are written."""

  def __init__(self, path: storage.PathLike):
    _merge(path)
    # Without a buffer: what a full disk did not take would be tried again by close.
    self._file = open(path, 'ab', buffering=0)  # noqa: SIM115

  def write(self, text: bytes) -> None:
    while text:
      text = text[self._file.write(text) :]

  def sync(self) -> None:
    """Forces what was written to the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class Parts:
  """Lines in a store: kept in memory, and put there every SECONDS, and at `sync`.

  A store that does not answer ends no run: the lines wait for the next time, but `sync`
  and `close` raise OSError.
  """

  def __init__(self, path: storage.PathLike):
    self._folder = _parts(path)
    heads = [name.partition('-')[0] for name in storage.names(self._folder)]
    self._number = max((int(n) for n in heads if n.isdecimal()), default=0)
    # Two writers, which should not be, would not overwrite each other.
    self._session = secrets.token_hex(4)
    self._lines: list[bytes] = []  # Of the part that grows.
    self._sent = 0  # So many of them are in the store.
    self._guard, self._sending = threading.Lock(), threading.Lock()
    self._wake, self._ended = threading.Event(), False
    self._thread = threading.Thread(target=self._keep, name='records', daemon=True)
    self._thread.start()

  def write(self, text: bytes) -> None:
    with self._guard:
      self._lines.append(text)
      due = len(self._lines) - self._sent >= PART
    if due:
      self._wake.set()

  def sync(self) -> None:
    """Puts what was written into the store."""
    with self._sending:
      with self._guard:
        lines = list(self._lines)
      if len(lines) == self._sent:
        return
      name = f'{self._number + 1:08d}-{self._session}.jsonl'
      storage.write(self._folder / name, b''.join(lines))
      with self._guard:
        self._sent = len(lines)
        if len(lines) >= PART:
          self._number, self._lines = self._number + 1, self._lines[len(lines) :]
          self._sent = 0

  def close(self) -> None:
    self._ended = True
    self._wake.set()
    self._thread.join()
    self.sync()

  def _keep(self) -> None:
    silent = False
    while True:
      self._wake.wait(SECONDS)
      self._wake.clear()
      if self._ended:
        return
      try:
        self.sync()
        silent = False
      except OSError as error:
        if not silent:
          _log.warning('%s will be written later: %s', self._folder, error)
        silent = True


def sink(path: storage.PathLike) -> File | Parts:
  """metrics.jsonl -> what adds lines to it."""
  return Parts(path) if storage.is_remote(path) else File(path)


def _parts(path: storage.PathLike) -> storage.Path:
  return storage.Path(f'{os.fspath(path)}.parts')


def _pieces(path: storage.PathLike) -> list[storage.Path]:
  """What holds the records of `path`, in their order."""
  names = [name for name in storage.names(_parts(path)) if name.endswith('.jsonl')]
  whole = [storage.Path(path)] if storage.exists(path) else []
  return whole + [_parts(path) / name for name in names]


def _merge(path: storage.PathLike) -> None:
  """Parts that were copied from a store -> one file."""
  if storage.exists(_parts(path)):
    storage.write(path, b''.join(b''.join(_lines(_read(p))) for p in _pieces(path)))
    storage.remove(_parts(path))


def _read(piece: storage.PathLike) -> bytes:
  return storage.read(piece, LARGEST)


def _end(piece: storage.PathLike) -> bytes:
  """The last END bytes of a local file, and of what they begin with only whole lines."""
  with open(piece, 'rb') as file:
    begins = max(0, os.path.getsize(piece) - END)
    file.seek(begins)
    content = file.read(END)
  return content.partition(b'\n')[2] if begins else content


def _lines(content: bytes) -> list[bytes]:
  """Lines that end in a newline: what follows the last one was torn by a kill."""
  return [text for text in content.splitlines(True) if text.endswith(b'\n')]


def _decode(text: bytes, piece: storage.PathLike) -> dict:
  """A line of a file -> its record, which has a step at least."""

  def number(value: Any) -> Any:
    return ABSENT[value] if isinstance(value, str) and value in ABSENT else value

  try:
    record = {name: number(value) for name, value in json.loads(text).items()}
    if type(record['step']) is not int:
      raise TypeError(f'step={record["step"]!r}')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    line = f'{os.fspath(piece)}: the line {text[:60]!r} is damaged ({error!r})'
    raise Damaged(f'{line[:400]}; mend or remove it') from error
  return record
