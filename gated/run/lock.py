"""One run owns a workdir: WORKDIR/lock.json says which, and that it still lives.

An object store can neither lock nor create a file only if it is missing, so the lock is
a note, and good manners: read it; if nobody lives in it write your name; wait; read it
again; whoever's name stands there then is the owner. The owner renews the note (its
beat) and looks each time whether it is still there.

Whose note it is decides how a dead owner is told from a living one:

  this machine      no process has the owner's pid and start time: dead, at once
  another machine   its beat is older than `stale_after` seconds, and does not change
                    while we look on for one of its periods, so that no two clocks need
                    agree: dead. A beat from the future counts as fresh.
  not readable      judged by when it was written, as if from another machine

A machine here is what shares process ids: a boot of a kernel, a host name and a pid
namespace, so that two containers with one name do not take each other's pids for theirs.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from typing import Any, NamedTuple, Self

from gated import storage

NAME = 'lock.json'
MAX_BYTES = 1 << 16
MAX_PERIOD = 30.0  # Seconds between two beats, at most.

_log = logging.getLogger('gated')


class Note(NamedTuple):
  """What a lock.json says."""

  host: str
  machine: str  # A digest of what two processes share that see each other's pids.
  pid: int
  started: int  # Of the process, in ticks since boot; 0 where the platform hides it.
  since: float  # When the lock was taken; seconds since 1970, as `beat`.
  beat: float
  period: float  # Seconds until the next beat.
  token: str

  def __str__(self) -> str:
    if not self.pid:
      return f'somebody whose {NAME} cannot be read, last written {_when(self.beat)}'
    return (
      f'process {self.pid} on {self.host} since {_when(self.since)}, last heard of '
      f'{_when(self.beat)}'
    )


class Lock:
  """Holds a workdir for this process, from `acquire` (or `with`) to `release`."""

  def __init__(self, workdir: storage.PathLike, *, stale_after: float, settle: float):
    """`stale_after` seconds of silence make another machine's lock stale.

    `settle` seconds pass before a note is believed: longer than a write takes to show.
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
    """'' while the workdir is ours, else a sentence: who has it. For a loop to ask."""
    return self._lost

  def acquire(self) -> None:
    """Takes the workdir. ValueError if it can't be used, or a run that lives has it."""
    try:
      self._acquire()
    except OSError as error:
      raise ValueError(f'--workdir={self._workdir} cannot be used: {error}') from error

  def _acquire(self) -> None:
    found = self._read()
    if found:
      self._refuse_living(found)
      _log.warning('%s was left locked by %s: taking it over', self._workdir, found)
    now = time.time()
    mine = Note(
      host=platform.node(),
      machine=machine(),
      pid=os.getpid(),
      started=started(os.getpid()) or 0,
      since=now,
      beat=now,
      period=self._period,
      token=secrets.token_hex(16),
    )
    self._write(mine)
    time.sleep(self._settle)
    found = self._read()
    if not found or found.token != mine.token:
      other = found or 'somebody who is gone already'
      raise ValueError(f'--workdir={self._workdir} was taken at the same time by {other}')
    self._note, self._lost = mine, ''
    self._ended.clear()
    self._thread = threading.Thread(target=self._keep, name='lock', daemon=True)
    self._thread.start()

  def release(self) -> None:
    """Gives the workdir back, if it is still ours; a second call does nothing."""
    if not self._note or not self._thread:
      return
    self._ended.set()
    self._thread.join()
    try:
      found = self._read()
      if found and found.token == self._note.token:
        storage.remove(self._path)
    except OSError as error:
      _log.warning('%s could not be removed: %s', self._path, error)
    self._note = self._thread = None

  def __enter__(self) -> Self:
    self.acquire()
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def _refuse_living(self, found: Note) -> None:
    """ValueError if who left the note may live; returns once it is surely dead."""
    living = _living(found, self._stale_after)
    if not living and found.machine != machine():
      # Its clock may be far behind ours; its next beat would tell.
      time.sleep(found.period + self._settle)
      living = self._read() != found
    if living:
      raise ValueError(
        f'--workdir={self._workdir} is in use by {found}: wait for it, end it, or name '
        f'another workdir; if it is surely gone, remove {self._path}'
      )

  def _keep(self) -> None:
    """Renews the note until the end, or until it is another's."""
    hiccup = ''
    while not self._ended.wait(self._period):
      assert self._note
      try:
        found = self._read()
        self._lost = self._taken(found, self._note.token)
        if self._lost:
          return
        self._write(self._note._replace(beat=time.time()))
        hiccup = ''
      except OSError as error:
        # A storage that does not answer is no reason to end a run, and told once.
        if not hiccup:
          _log.warning('%s could not be renewed, and will be: %s', self._path, error)
        hiccup = str(error)

  def _taken(self, found: Note | None, token: str) -> str:
    if found and found.token == token:
      return ''
    if found:
      return f'{self._workdir} was taken over by {found}'
    if not storage.is_remote(self._workdir) and not storage.exists(self._workdir):
      raise FileNotFoundError(f'{self._workdir} is not there')  # Not mounted, perhaps.
    return f'{self._path} is gone: another run may have taken {self._workdir} since'

  def _write(self, note: Note) -> None:
    storage.write_json(self._path, note._asdict())

  def _read(self) -> Note | None:
    return _read(self._path, self._period)


def _read(path: storage.Path, period: float = MAX_PERIOD) -> Note | None:
  """The note that is there; one that cannot be read tells its time of writing alone."""
  try:
    try:
      return _parse(json.loads(storage.read(path, MAX_BYTES)))
    except (ValueError, RecursionError):
      at = storage.modified(path)
      return Note('', '', 0, 0, at, at, period, f'written at {at}')
  except FileNotFoundError:
    return None


def _living(note: Note, stale_after: float) -> bool:
  """By the process, on this machine; else by how long its beat is past."""
  if note.machine == machine():
    return lives(note.pid, note.started)
  return time.time() - note.beat < stale_after


def _parse(content: Any) -> Note:
  """A stranger's JSON -> Note; ValueError if it is none."""
  if not isinstance(content, dict) or content.keys() != set(Note._fields):
    raise ValueError('not the fields of a lock')
  for name, kind in Note.__annotations__.items():
    value = content[name]
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):
      raise ValueError(f'{name}={value!r}')
  note = Note(**content)
  # Ranges that the sleep, the calendar and the kernel take.
  if not (0 <= note.period <= 3600 and note.pid > 0 and note.started >= 0):
    raise ValueError('out of range')
  if not all(0 <= at < 1 << 34 for at in (note.since, note.beat)):
    raise ValueError('out of range')
  return note


def living(workdir: storage.PathLike, *, stale_after: float) -> bool:
  """Whether a run that lives has the workdir, as far as its note tells at one look."""
  found = _read(storage.Path(workdir) / NAME)
  return found is not None and _living(found, stale_after)


def machine() -> str:
  """-> a digest that two processes share if and while each sees the other's pid."""
  known = [platform.node()]
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      known.append(file.read().strip())
    known.append(os.readlink('/proc/self/ns/pid'))
  except OSError:
    pass  # No Linux: the name alone.
  return hashlib.sha256('\n'.join(known).encode()).hexdigest()[:32]


def started(pid: int) -> int | None:
  """A process here -> when it started, in ticks since boot.

  0 where that is not told; None if no such process lives.
  """
  try:
    with open(f'/proc/{pid}/stat', 'rb') as file:
      # The name stands in parentheses and may hold anything, parentheses too.
      fields = file.read().rpartition(b')')[2].split()
    return None if fields[0] in (b'Z', b'X') else int(fields[19])
  except OSError:
    pass  # Gone, or a platform or a user that /proc says nothing to.
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass
  return 0


def lives(pid: int, start: int) -> bool:
  """Whether the process of that id that started then is still there."""
  now = started(pid)
  return now is not None and (now == start or not now or not start)


def _when(at: float) -> str:
  return time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(at))
