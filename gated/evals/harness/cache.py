"""Finished requests on disk, so that a killed evaluation goes on.

A folder holds files of JSON lines, [key, answer]; each session writes its own. A file in
an object store cannot grow: there, a session writes a file every SECONDS. A last line
that a kill cut off is dropped. Process 0 reads and writes, and shares what it has read.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gated import storage
from gated.devices import processes

SECONDS = 30.0  # The most seconds before an answer is written to a store.
LARGEST = 1 << 32  # The most bytes of a file.

_log = logging.getLogger('gated')


def key(kind: str, *parts: Any) -> str:
  """The kind of a request, arrays of token ids and options -> its key."""
  digest = hashlib.sha256(kind.encode())
  for part in parts:
    is_text = isinstance(part, str)
    content = part.encode() if is_text else np.asarray(part, '<i4').tobytes()
    digest.update(f'|{"text" if is_text else "ids"} {len(content)}|'.encode() + content)
  return digest.hexdigest()[:32]


class Answers:
  """Answers by key: those of earlier sessions, and those added. None: in memory only."""

  def __init__(self, folder: storage.Path | None):
    self._folder = folder if jax.process_index() == 0 else None
    content = _read(self._folder) if self._folder else {}
    if jax.process_count() > 1:
      content = json.loads(processes.share(json.dumps(content).encode()))
    self._known: dict[str, Any] = content
    self._waiting: list[bytes] = []
    self._since = time.monotonic()
    self._file = self._next()

  def __len__(self) -> int:
    return len(self._known)

  def __contains__(self, key: str) -> bool:
    return key in self._known

  def __getitem__(self, key: str) -> Any:
    return self._known[key]

  def add(self, answers: Mapping[str, Any]) -> None:
    """Adds finished requests. An error of the disk is a warning, the first time."""
    self._known |= answers
    if self._folder is None or not answers:
      return
    self._waiting += [(json.dumps(pair) + '\n').encode() for pair in answers.items()]
    if not storage.is_remote(self._folder) or time.monotonic() - self._since > SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what waits."""
    content, self._waiting, self._since = b''.join(self._waiting), [], time.monotonic()
    if not content or self._folder is None or self._file is None:
      return
    try:
      if storage.is_remote(self._folder):
        storage.write(self._file, content)
        self._file = self._next()
      else:
        storage.make(self._folder)
        with storage.named(self._file), open(self._file, 'ab') as file:
          file.write(content)
    except OSError as error:
      _log.warning('finished requests are no longer stored: %s', error)
      self._folder = None

  def _next(self) -> storage.Path | None:
    """A file that no session has written."""
    if self._folder is None:
      return None
    numbers = [int(name[:-6]) for name in _names(self._folder)]
    return self._folder / f'{max(numbers, default=-1) + 1:06}.jsonl'


def _names(folder: storage.Path) -> list[str]:
  return [
    name
    for name in storage.names(folder)
    if name.endswith('.jsonl') and name[:-6].isdigit()
  ]


def _read(folder: storage.Path) -> dict[str, Any]:
  """A folder -> its answers; lines that are not whole are dropped."""
  answers = {}
  for name in _names(folder):
    for line in storage.read(folder / name, LARGEST).split(b'\n'):
      try:
        key, answer = json.loads(line)
        answers[str(key)] = answer
      except (ValueError, TypeError):
        continue
  return answers
