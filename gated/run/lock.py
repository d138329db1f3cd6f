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

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import secrets
import threading
import time
from typing import Any, NamedTuple

from gated import config, storage

NAME = 'lock.json'
MAX_BYTES = 1 << 16
MAX_PERIOD = 30.0  # Seconds between two beats, at most.

_log = logging.getLogger('gated')


class Note(NamedTuple):
  """The fields of lock.json."""

  host: str
  machine: str  # A digest, equal for processes with the same kernel and pid namespace.
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
  """Holds a workdir for this process, from `acquire` to `release`.

  `lost` is '' while this process owns the workdir, else a message with the new owner.
  """

  def __init__(self, workdir: storage.PathLike, *, stale_after: float, settle: float):
    """Another machine's lock is stale `stale_after` seconds after its last beat.

    `settle` is the delay in seconds before a note is read back: longer than the storage
    needs to show a write.
    """
    self.lost = ''
    self._path, self._workdir = storage.Path(workdir) / NAME, workdir
    self._stale_after, self._settle = stale_after, settle
    self._ended = threading.Event()
    self._owned: tuple[str, threading.Thread] | None = None  # Our token, its thread.

  def acquire(self) -> None:
    """Takes the lock. ValueError if another run holds it or the storage fails."""
    pid, now = os.getpid(), time.time()
    period, token = min(self._stale_after / 4, MAX_PERIOD), secrets.token_hex(16)
    owner = platform.node(), machine(), pid, started(pid) or 0
    own = Note(*owner, since=now, beat=now, period=period, token=token)
    try:
      if note := _read(self._path):
        self._refuse_living(note)
        _log.warning('%s was left locked by %s: taking it over', self._workdir, note)
      self._write(own)
      time.sleep(self._settle)
      note = _read(self._path)
    except OSError as error:
      raise ValueError(f'--workdir={self._workdir} cannot be used: {error}') from error
    if not note or note.token != token:
      other = note or 'another process, which has ended'
      raise ValueError(f'--workdir={self._workdir} was taken at the same time by {other}')
    self.lost = ''
    self._ended.clear()
    thread = threading.Thread(target=self._keep, args=(own,), name='lock', daemon=True)
    self._owned = token, thread
    thread.start()

  def release(self) -> None:
    """Removes the lock if this process still owns it; a second call does nothing."""
    if not self._owned:
      return
    (token, thread), self._owned = self._owned, None
    self._ended.set()
    thread.join()
    try:
      note = _read(self._path)
      if note and note.token == token:
        storage.remove(self._path)
    except OSError as error:
      _log.warning('%s could not be removed: %s', self._path, error)

  def check(self) -> None:
    """Reads the note now, rather than at the next beat: before a checkpoint is saved."""
    if self._owned and not self.lost:
      with contextlib.suppress(OSError):  # The thread reports it.
        self.lost = self._takeover(_read(self._path), self._owned[0])

  def _refuse_living(self, note: Note) -> None:
    """Raises ValueError unless the owner of the note is dead."""
    alive = _alive(note, self._stale_after)
    if not alive and note.machine != machine():
      # Its clock may be far behind: wait for another beat.
      time.sleep(note.period + self._settle)
      alive = _read(self._path) != note
    if alive:
      raise ValueError(
        f'--workdir={self._workdir} is in use by {note}: wait for it, stop it, or choose '
        f'another workdir; if that process no longer exists, remove {self._path}'
      )

  def _keep(self, own: Note) -> None:
    """Renews the note until `release`, or until another process owns the workdir."""
    failing = False
    while not self._ended.wait(own.period):
      try:
        self.lost = self._takeover(_read(self._path), own.token)
        if self.lost:
          return
        self._write(own._replace(beat=time.time()))
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


def _read(path: storage.Path) -> Note | None:
  """Reads lock.json -> Note; for a damaged one, a note with only the time of writing."""
  try:
    return _parse(storage.read_json(path, MAX_BYTES))
  except FileNotFoundError:
    return None
  except ValueError:
    pass
  with contextlib.suppress(FileNotFoundError):
    at = storage.modified(path)
    return Note('', '', 0, 0, at, at, MAX_PERIOD, f'written at {at}')
  return None


def _parse(content: Any) -> Note:
  """Untrusted JSON -> Note; ValueError if its fields are wrong."""
  if not isinstance(content, dict):
    raise ValueError('not a JSON object')
  note = config.build(Note, content, NAME)
  # Ranges that time.sleep, time.gmtime and os.kill accept.
  config.at_least('pid', note.pid, 1)
  config.at_least('started', note.started, 0)
  config.within('period', note.period, 0, 3600)
  for at in (note.since, note.beat):
    config.within('time', at, 0, 1 << 34)
  return note


def _alive(note: Note, stale_after: float) -> bool:
  """Checks the process on this machine, or the age of the beat on another one."""
  if note.machine == machine():
    return lives(note.pid, note.started)
  return time.time() - note.beat < stale_after


def living(workdir: storage.PathLike, *, stale_after: float) -> bool:
  """Whether a running process holds the workdir, from one read of its note."""
  note = _read(storage.Path(workdir) / NAME)
  return note is not None and _alive(note, stale_after)


def machine() -> str:
  """-> a digest, equal for processes that share a kernel boot and a pid namespace."""
  parts = [platform.node()]
  with contextlib.suppress(OSError):  # Not Linux: use only the host name.
    parts.append(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip())
    parts.append(os.readlink('/proc/self/ns/pid'))
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:32]


def started(pid: int) -> int | None:
  """A pid on this machine -> its start time in ticks since boot.

  0 if the start time is unknown; None if the process does not exist.
  """
  with contextlib.suppress(OSError):  # No such process, or /proc is not readable.
    # The name is in parentheses and may itself contain parentheses.
    stat = pathlib.Path(f'/proc/{pid}/stat').read_bytes()
    fields = stat.rpartition(b')')[2].split()
    return None if fields[0] in (b'Z', b'X') else int(fields[19])
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
