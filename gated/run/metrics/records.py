"""Records: one JSON object a line, in a file, or in an object store in parts.

JSON lacks NaN and the infinities: they are the strings 'NaN', 'Infinity' and '-Infinity',
which `read` turns back into floats. Floats are written by `repr` and lose no bit.

An object store cannot append. There, the folder metrics.jsonl.parts/ holds the records of
metrics.jsonl in objects of about a thousand records; the last object is rewritten as it
grows. If both exist, the file comes before the parts, so that a workdir can be copied
from a disk to a store and back.
"""

import contextlib
import itertools
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
LARGEST = 1 << 32  # The most bytes of a file of records.
END = 1 << 20  # Bytes; more than the largest record.
PART = 1000  # About the number of records in a part.
SECONDS = 30.0  # The most seconds before a record is written to a store.

_log = logging.getLogger('gated')


class Damaged(ValueError):
  """A damaged file of records; names the file and the line."""


def plain(value: Any) -> Any:
  """Tree of Python, numpy and JAX values -> the same tree in the types of JSON."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, jax.Array):
    value = jax.device_get(value)
  if isinstance(value, (np.ndarray, np.generic)):
    # Python has no bf16 scalar; float64 holds every bit of it.
    exact = value.dtype.kind in 'biuf' or value.dtype.kind == 'U'
    return plain((value if exact else value.astype(np.float64)).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  if isinstance(value, pathlib.PurePath):
    return os.fspath(value)
  return value


def dumps(value: Any, *, indent: int | None) -> str:
  """Tree -> strict JSON that loses no bit of a float."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def line(record: Mapping[str, Any]) -> bytes:
  """Record -> its line."""
  return (dumps(record, indent=None) + '\n').encode()


def exists(path: storage.PathLike) -> bool:
  """Whether a metrics.jsonl exists, as a file or in parts."""
  return bool(_pieces(path))


def read(path: storage.PathLike) -> list[dict]:
  """metrics.jsonl -> its records; without a last line that a kill cut off."""
  pieces = _pieces(path)
  if not pieces:
    raise FileNotFoundError(f'{os.fspath(path)} does not exist')
  return [_decode(text, piece) for piece in pieces for text in _lines(_read(piece))]


def last(path: storage.PathLike, kind: str = '') -> dict | None:
  """metrics.jsonl -> its last record, of a kind if given; None for none.

  Reads only the end of a local file.
  """
  for piece in reversed(_pieces(path)):
    content = _read(piece) if storage.is_remote(piece) else _end(piece)
    for text in reversed(_lines(content)):
      record = _decode(text, piece)
      if kind in ('', record.get('kind')):
        return record
  return None


def last_step(path: storage.PathLike) -> int:
  """metrics.jsonl -> the step of its last record; 0 for none."""
  record = last(path)
  return record['step'] if record else 0


def truncate(path: storage.PathLike, step: int) -> None:
  """Drops every record after `step` and a cut-off last line; `step` -1 drops all.

  Of records of one kind and step, as two writers leave them, the last is kept. Each piece
  is sorted by step.
  """
  seen, repeated = set(), 0
  for piece in reversed(_pieces(path)):
    content, entries = _read(piece), []
    for text in reversed(_lines(content)):
      record = _decode(text, piece)
      key = record['step'], str(record.get('kind'))
      if record['step'] > step:
        continue
      repeated += key in seen
      entries += [] if key in seen else [(record['step'], text)]
      seen.add(key)
    entries = sorted(reversed(entries), key=lambda entry: entry[0])
    kept = b''.join(text for _, text in entries)
    if not kept and os.fspath(piece) != os.fspath(path):
      storage.remove(piece)
    elif kept != content:
      storage.write(piece, kept)
  if repeated:
    _log.warning('%s: %d repeated records were dropped', os.fspath(path), repeated)


def gaps(path: storage.PathLike, step: int, every: int) -> list[tuple[int, int]]:
  """metrics.jsonl of a run at `step` -> ranges of steps at its ends without a record.

  A record is due every `every` steps; an earlier session may have had another interval.
  """
  records = read(path) if exists(path) else []
  own = lambda r: r.get('kind') == 'train' and r['step'] <= step
  steps = sorted({0, *(r['step'] for r in records if own(r))})
  usual = max([every, *(b - a for a, b in itertools.pairwise(steps[1:]))])
  first, last = (*steps, step + 1)[1], steps[-1]
  missing = {(1, first - 1): first, (last + 1, step): step - last}
  return [ends for ends, distance in missing.items() if distance > usual]


def append(path: storage.PathLike, record: Mapping[str, Any]) -> None:
  """Adds a record to a small file, such as spikes.jsonl, which is rewritten atomically.

  A last line that a kill cut off is dropped.
  """
  content = _read(path) if storage.exists(path) else b''
  storage.write(path, b''.join(_lines(content)) + line(record))


class File:
  """Appends lines to a local file, each flushed at once.

  If another program renames or removes the file, as a rotation of logs does, `sync` and
  `close` write it again, with all its lines.
  """

  def __init__(self, path: storage.PathLike):
    _merge(path)
    self._path = path
    self._open()
    self._size = os.fstat(self._file.fileno()).st_size

  def _open(self) -> None:
    # Without a buffer: `close` would try again to write what a full disk rejected.
    self._file = open(self._path, 'a+b', buffering=0)  # noqa: SIM115

  def write(self, text: bytes) -> None:
    while text:
      with storage.named(self._path):
        count = self._file.write(text)
      text, self._size = text[count:], self._size + count

  def sync(self) -> None:
    """Forces the lines to the disk."""
    self._repair()
    with storage.named(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      with contextlib.suppress(OSError):  # A moved workdir.
        self._repair()
      self._file.close()

  def _repair(self) -> None:
    """Writes a file again that is no longer there; warns if lines were cut off."""
    size = os.fstat(self._file.fileno()).st_size
    if size < self._size:
      lost = self._size - size
      _log.warning('%s lost %d bytes to another program', self._path, lost)
      self._size = size
    if os.path.exists(self._path) or not os.path.isdir(os.path.dirname(self._path)):
      return
    self._file.seek(0)
    content = b''.join(iter(lambda: self._file.read(END), b''))
    storage.write(self._path, content)
    self._file.close()
    self._open()
    _log.warning('%s was removed or renamed while in use: written again', self._path)


class Parts:
  """Keeps lines in memory, and writes them to a store every SECONDS and at `sync`.

  If the store fails, the lines wait for the next time; `sync` and `close` raise OSError.
  The loop writes while a thread sends, so each uses `_lines` in single atomic operations.
  """

  def __init__(self, path: storage.PathLike):
    self._folder = _parts(path)
    heads = [name.partition('-')[0] for name in storage.names(self._folder)]
    self._number = max((int(n) for n in heads if n.isdecimal()), default=0)
    # A random name, so that two writers by mistake do not overwrite each other.
    self._session = secrets.token_hex(4)
    self._lines: list[bytes] = []  # The lines of the growing part.
    self._sent = 0  # The number of them in the store.
    self._sending = threading.Lock()
    self._wake, self._ended = threading.Event(), False
    self._thread = threading.Thread(target=self._keep, name='records', daemon=True)
    self._thread.start()

  def write(self, text: bytes) -> None:
    self._lines.append(text)
    if len(self._lines) - self._sent >= PART:
      self._wake.set()

  def sync(self) -> None:
    """Writes the lines to the store."""
    with self._sending:
      lines = list(self._lines)
      if len(lines) == self._sent:
        return
      name = f'{self._number + 1:08d}-{self._session}.jsonl'
      storage.write(self._folder / name, b''.join(lines))
      self._sent = len(lines)
      if self._sent >= PART:
        del self._lines[: self._sent]
        self._number, self._sent = self._number + 1, 0

  def close(self) -> None:
    self._ended = True
    self._wake.set()
    self._thread.join()
    self.sync()

  def _keep(self) -> None:
    failing = False
    while True:
      self._wake.wait(SECONDS)
      self._wake.clear()
      if self._ended:
        return
      try:
        self.sync()
        failing = False
      except OSError as error:
        if not failing:
          _log.warning('%s will be written later: %s', self._folder, error)
        failing = True


def sink(path: storage.PathLike) -> File | Parts:
  """metrics.jsonl -> an object that appends lines to it."""
  return Parts(path) if storage.is_remote(path) else File(path)


def _parts(path: storage.PathLike) -> storage.Path:
  return storage.Path(f'{os.fspath(path)}.parts')


def _pieces(path: storage.PathLike) -> list[storage.Path]:
  """The files that hold the records of `path`, in order."""
  names = [name for name in storage.names(_parts(path)) if name.endswith('.jsonl')]
  whole = [storage.Path(path)] if storage.exists(path) else []
  return whole + [_parts(path) / name for name in names]


def _merge(path: storage.PathLike) -> None:
  """Joins parts that were copied from a store into one file.

  A file with hard links is written anew: a copy made by `cp -al` keeps its records.
  """
  linked = os.path.exists(path) and os.stat(path).st_nlink > 1
  if linked or storage.exists(_parts(path)):
    storage.write(path, b''.join(b''.join(_lines(_read(p))) for p in _pieces(path)))
    storage.remove(_parts(path))


def _read(piece: storage.PathLike) -> bytes:
  return storage.read(piece, LARGEST)


def _end(piece: storage.PathLike) -> bytes:
  """The last END bytes of a local file, without the line that they begin in."""
  with open(piece, 'rb') as file:
    begins = max(0, os.path.getsize(piece) - END)
    file.seek(begins)
    content = file.read(END)
  return content.partition(b'\n')[2] if begins else content


def _lines(content: bytes) -> list[bytes]:
  """The complete lines; a kill may have cut off the last one."""
  return [text for text in content.splitlines(True) if text.endswith(b'\n')]


def _decode(text: bytes, piece: storage.PathLike) -> dict:
  """A line of a file -> its record; Damaged unless it has a step."""
  number = lambda value: ABSENT.get(value, value) if isinstance(value, str) else value
  try:
    record = {name: number(value) for name, value in json.loads(text).items()}
    if type(record['step']) is not int:
      raise TypeError(f'step={record["step"]!r}')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    fault = f'{os.fspath(piece)}: the line {text[:60]!r} is damaged ({error!r})'
    raise Damaged(f'{fault[:400]}; repair or remove it') from error
  return record
