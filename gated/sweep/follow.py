"""A point's metrics as they are written: the last loss, spikes, and how fast it goes."""

import json
import os

from gated import storage


class Follower:
  """Reads what a point's metrics.jsonl has more than when it was last looked at.

  For a local workdir; in a store nothing is followed.
  """

  def __init__(self, workdir: storage.Path, *, since: float = 0.0):
    """`since`, in seconds since 1970, is when the session began whose speed is told."""
    self._path, self._since = os.fspath(workdir / 'metrics.jsonl'), since
    self._remote = storage.is_remote(workdir)
    self._first: tuple[int, float] | None = None
    self._forget()

  def _forget(self) -> None:
    self._file, self._offset = 0, 0
    self.step, self.loss, self.spikes = 0, '', 0
    self.seconds = 0.0  # Of a step; 0 where it is not known yet.

  def look(self) -> None:
    """Reads on; a file that was cut is read anew."""
    if self._remote:
      return
    try:
      found = os.stat(self._path)
      if found.st_ino != self._file or found.st_size < self._offset:
        self._forget()
        self._file = found.st_ino
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
      # What is not finite is a word.
      self.loss = loss if isinstance(loss, str) else f'{loss:.4f}'
      self.spikes = int(record['spikes'])
    except (ValueError, KeyError, TypeError):
      return  # No record of ours: who reads the whole file tells.
    self.step = step
    if at < self._since:
      return
    self._first = self._first or (step, at)
    if step > self._first[0]:
      self.seconds = (at - self._first[1]) / (step - self._first[0])
