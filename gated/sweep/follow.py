"""Follows a point's metrics as they are written: last loss, spikes, speed."""

import json
import os

from gated import storage


class Follower:
  """Reads the new records of a point's metrics.jsonl, in a local workdir only."""

  def __init__(self, workdir: storage.Path, *, since: float = 0.0):
    """`since` is the start of the session that is timed, in seconds since 1970."""
    self._path, self._since = os.fspath(workdir / 'metrics.jsonl'), since
    self._remote = storage.is_remote(workdir)
    self._first: tuple[int, float] | None = None
    self._reset()

  def _reset(self) -> None:
    self._file, self._offset = 0, 0
    self.step, self.loss, self.spikes = 0, '', 0
    self.seconds = 0.0  # Per step; 0 until it is known.

  def look(self) -> None:
    """Reads the new records; a truncated or replaced file is read from its start."""
    if self._remote:
      return
    try:
      status = os.stat(self._path)
      if status.st_ino != self._file or status.st_size < self._offset:
        self._reset()
        self._file = status.st_ino
      with open(self._path, 'rb') as file:
        file.seek(self._offset)
        content = file.read()
    except OSError:
      return
    whole = content[: content.rfind(b'\n') + 1]
    self._offset += len(whole)
    for line in whole.splitlines():
      self._take(line)

  def _take(self, line: bytes) -> None:
    try:
      record = json.loads(line)
      if record['kind'] != 'train':
        return
      step, at, loss = record['step'], record['time'], record['loss']
      # A non-finite number is a string.
      self.loss = loss if isinstance(loss, str) else f'{loss:.4f}'
      self.spikes = int(record['spikes'])
    except (ValueError, KeyError, TypeError):
      return  # Not our record: metrics.read reports the damage.
    self.step = step
    if at < self._since:
      return
    self._first = self._first or (step, at)
    if step > self._first[0]:
      self.seconds = (at - self._first[1]) / (step - self._first[0])
