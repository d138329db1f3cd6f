"""The lock of a workdir: WORKDIR/lock.json names its owner and carries a heartbeat.

An object store offers neither locks nor exclusive creation, so the protocol is: read the
note; if its owner is dead, write a new one; wait; read it back. The token read back
decides the owner, who then renews the note (its beat) and checks that it is unchanged.

An owner is dead if its note is from

  this machine      and no process has its pid and start time
  another machine   and its beat is older than `stale_after` seconds and does not change
                    within one more period, so the clocks need not agree. A beat in the
                    future counts as fresh.
  an unknown one    (a damaged note) by the same rule, with the time of the last write

A machine is one kernel boot, host name and pid namespace, because pids are comparable
only there: two containers with the same name are two machines.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from typing import Any, NamedTuple

from gated import storage

NAME = 'lock.json'
MAX_BYTES = 1 << 16
MAX_PERIOD = 30.0  # Seconds between two beats, at most.

_log = logging.getLogger('gated')


class Note(NamedTuple):
  """The fields of lock.json."""

  host: str
  machine: str  # A digest, equal for processes that share pids.
  pid: int
  started: int  # Start of the process in ticks since boot; 0 if unknown.
  since: float  # When the lock was taken; seconds since 1970, as `beat`.
  beat: float
  period: float  # Seconds until the next beat.
  token: str

  def __str__(self) -> str:
    if not self.pid:
      return f'an unknown process ({NAME} is damaged, last written {_when(self.beat)})'
    return (
      f'process {self.pid} on {self.host} since {_when(self.since)}, last beat '
      f'{_when(self.beat)}'
    )


class Lock:
  """Holds a workdir for this process, from `acquire` to `release`."""

  def __init__(self, workdir: storage.PathLike, *, stale_after: float, settle: float):
    """Another machine's lock is stale `stale_after` seconds after its last beat.

    `settle` is the delay in seconds before a note is read back: longer than the storage
    needs to show a write.
    """
    self._path = storage.Path(workdir) / NAME
    self._workdir, self._stale_after, self._settle = workdir, stale_after, settle
    self._period = min(stale_after / 4, MAX_PERIOD)
    self._note: Note | None = None
    self._lost = ''
    self._ended = threading.Event()
    self._thread: threading.Thread | None = None

  @property
  def lost(self) -> str:
    """'' while this process owns the workdir, else a message with the new owner."""
    return self._lost

  def acquire(self) -> None:
    """Takes the lock. ValueError if another run holds it or the storage fails."""
    try:
      self._acquire()
    except OSError as error:
      raise ValueError(f'--workdir={self._workdir} cannot be used: {error}') from error

  def _acquire(self) -> None:
    if note := self._read():
      self._refuse_living(note)
      _log.warning('%s was left locked by %s: taking it over', self._workdir, note)
    now = time.time()
    own = Note(
      host=platform.node(),
      machine=machine(),
      pid=os.getpid(),
      started=started(os.getpid()) or 0,
      since=now,
      beat=now,
      period=self._period,
      token=secrets.token_hex(16),
    )
    self._write(own)
    time.sleep(self._settle)
    note = self._read()
    if not note or note.token != own.token:
      other = note or 'another process, which has ended'
      raise ValueError(f'--workdir={self._workdir} was taken at the same time by {other}')
    self._note, self._lost = own, ''
    self._ended.clear()
    self._thread = threading.Thread(target=self._keep, name='lock', daemon=True)
    self._thread.start()

  def release(self) -> None:
    """Removes the lock if this process still owns it; a second call does nothing."""
    if not self._note or not self._thread:
      return
    self._ended.set()
    self._thread.join()
    try:
      note = self._read()
      if note and note.token == self._note.token:
        storage.remove(self._path)
    except OSError as error:
      _log.warning('%s could not be removed: %s', self._path, error)
    self._note = self._thread = None

  def _refuse_living(self, note: Note) -> None:
    """Raises ValueError unless the owner of the note is dead."""
    alive = _alive(note, self._stale_after)
    if not alive and note.machine != machine():
      # Its clock may be far behind: wait for another beat.
      time.sleep(note.period + self._settle)
      alive = self._read() != note
    if alive:
      raise ValueError(
        f'--workdir={self._workdir} is in use by {note}: wait for it, stop it, or choose '
        f'another workdir; if that process no longer exists, remove {self._path}'
      )

  def _keep(self) -> None:
    """Renews the note until `release`, or until another process owns the workdir."""
    failing = False
    while not self._ended.wait(self._period):
      assert self._note
      try:
        self._lost = self._takeover(self._read(), self._note.token)
        if self._lost:
          return
        self._write(self._note._replace(beat=time.time()))
        failing = False
      except OSError as error:
        # A storage outage does not end the run, and is logged once.
        if not failing:
          _log.warning('%s could not be renewed, will retry: %s', self._path, error)
        failing = True

  def _takeover(self, note: Note | None, token: str) -> str:
    """The note in the workdir -> '' if it has our token, else a message."""
    if note:
      taken = note.token != token
      return f'{self._workdir} was taken over by {note}' if taken else ''
    if not storage.is_remote(self._workdir) and not storage.exists(self._workdir):
      raise FileNotFoundError(f'{self._workdir} does not exist')  # Perhaps unmounted.
    return f'{self._path} is missing: another run may have taken over {self._workdir}'

  def _write(self, note: Note) -> None:
    storage.write_json(self._path, note._asdict())

  def _read(self) -> Note | None:
    return _read(self._path, self._period)


def _read(path: storage.Path, period: float = MAX_PERIOD) -> Note | None:
  """Reads lock.json -> Note; for a damaged one, a note with only the time of writing."""
  try:
    try:
      return _parse(json.loads(storage.read(path, MAX_BYTES)))
    except (ValueError, RecursionError):
      written = storage.modified(path)
      return Note('', '', 0, 0, written, written, period, f'written at {written}')
  except FileNotFoundError:
    return None


def _alive(note: Note, stale_after: float) -> bool:
  """Checks the process on this machine, or the age of the beat on another one."""
  if note.machine == machine():
    return lives(note.pid, note.started)
  return time.time() - note.beat < stale_after


def _parse(content: Any) -> Note:
  """Untrusted JSON -> Note; ValueError if its fields are wrong."""
  if not isinstance(content, dict) or content.keys() != set(Note._fields):
    raise ValueError('wrong field names')
  for name, kind in Note.__annotations__.items():
    value = content[name]
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):
      raise ValueError(f'{name}={value!r}')
  note = Note(**content)
  # Ranges that time.sleep, time.gmtime and os.kill accept.
  if not (0 <= note.period <= 3600 and note.pid > 0 and note.started >= 0):
    raise ValueError('out of range')
  if not all(0 <= at < 1 << 34 for at in (note.since, note.beat)):
    raise ValueError('out of range')
  return note


def living(workdir: storage.PathLike, *, stale_after: float) -> bool:
  """Tests if a running process holds the workdir, from one read of its note."""
  note = _read(storage.Path(workdir) / NAME)
  return note is not None and _alive(note, stale_after)


def machine() -> str:
  """-> a digest, equal for processes that share a kernel boot and a pid namespace."""
  parts = [platform.node()]
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      parts.append(file.read().strip())
    parts.append(os.readlink('/proc/self/ns/pid'))
  except OSError:
    pass  # Not Linux: use only the host name.
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:32]


def started(pid: int) -> int | None:
  """A pid on this machine -> its start time in ticks since boot.

  0 if the start time is unknown; None if the process does not exist.
  """
  try:
    with open(f'/proc/{pid}/stat', 'rb') as file:
      # The name is in parentheses and may itself contain parentheses.
      fields = file.read().rpartition(b')')[2].split()
    return None if fields[0] in (b'Z', b'X') else int(fields[19])
  except OSError:
    pass  # No such process, or /proc is not readable.
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass
  return 0


def lives(pid: int, start: int) -> bool:
  """Tests if the process with that pid and start time still exists."""
  now = started(pid)
  return now is not None and (now == start or not now or not start)


def _when(seconds: float) -> str:
  return time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(seconds))
