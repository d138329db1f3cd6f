"""How a process ends early: signals, errors of a run, and lost peers."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from gated import data, storage
from gated.data import cache, workers
from gated.run import checkpoint, exit_codes, metrics, weights, workdir

CODES: dict[type[Exception], int] = {
  workdir.InUse: exit_codes.REFUSED,
  metrics.Damaged: exit_codes.REFUSED,
  weights.Removed: exit_codes.REFUSED,
  data.Damaged: exit_codes.FAILED,
  data.Unreadable: exit_codes.FAULT,
  FloatingPointError: exit_codes.UNSTABLE,
  checkpoint.SaveFailed: exit_codes.NOT_SAVED,
  workdir.TakenOver: exit_codes.TAKEN_OVER,
}

MEMORY = 'a smaller config.batch or a larger config.accum or config.mesh.fsdp need less'

# All processes of a run raise these at the same place, so each can return by itself.
_COLLECTIVE = workdir.InUse, FloatingPointError
# After these the workdir belongs to another run.
_FOREIGN = exit_codes.REFUSED, exit_codes.TAKEN_OVER


# Announcements of an end: by spot machines and schedulers (SIGUSR2: LSF, Grid Engine), a
# closed terminal, Ctrl-C, a limit of CPU time.
SIGNALS = signal.SIGTERM, signal.SIGINT, *workers.IGNORED


class Sigterm(contextlib.ExitStack):
  """`with Sigterm() as sigterm:` handles SIGNALS: ask `sigterm.received`.

  In a run of several processes, a signal to one of them stops all of them at the same
  step: JAX's preemption service, started by `processes.start`, forwards a SIGTERM, and
  the other signals become one. A second Ctrl-C exits at once; any other second signal has
  no effect. A signal that is ignored, as SIGHUP is below nohup, stays ignored.
  """

  def __init__(self):
    super().__init__()
    self.name = signal.SIGTERM.name  # Of the first signal.
    self._received, self._asked = False, 0
    self._listen()
    for number in SIGNALS if jax.process_count() == 1 else SIGNALS[1:]:
      if signal.getsignal(number) != signal.SIG_IGN:
        self.callback(self._restore, number, signal.signal(number, self._handle))

  def received(self) -> bool:
    """Whether to stop here; all processes call it equally often, at the same places."""
    if jax.process_count() > 1:
      self._asked += 1
      self._received |= multihost_utils.reached_preemption_sync_point(self._asked)
    return self._received

  def _handle(self, number: int, _) -> None:
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    elif not self._received:
      self._received, self.name = True, signal.Signals(number).name

  def _restore(self, number: int, handler) -> None:
    # After a signal the process is stopping: another one must not interrupt that.
    if not self._received:
      signal.signal(number, handler)

  def _listen(self) -> None:
    """Answers Ctrl-C in a thread: Python calls no handler while XLA compiles."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(reader,), daemon=True).start()

    def end() -> None:
      if not self._received:
        signal.set_wakeup_fd(before)
        os.close(writer)

    self.callback(end)


def _answer(reader: int) -> None:
  """Reads the numbers of signals until the end of the pipe: one line, then the exit."""
  interrupted = False
  while numbers := os.read(reader, 1):
    if numbers[0] == signal.SIGINT:
      if interrupted:
        os._exit(128 + signal.SIGINT)
      interrupted = True
      # Not print: its lock may be held.
      with contextlib.suppress(OSError):
        os.write(2, b'Ctrl-C: stops after this step and its save; again: at once\n')
  os.close(reader)


@contextlib.contextmanager
def leaving() -> Generator[None]:
  """Before a run handles signals: one removes half-made files and ends the process.

  The exit code is the usual one of the signal; Ctrl-C prints one line. In a run of
  several processes JAX handles SIGTERM, and the next one removes what a killed one left.
  """

  def leave(number: int, _) -> NoReturn:
    # No exception: it would be lost in a callback of the garbage collector.
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_IGN)
      with contextlib.suppress(OSError):
        os.write(2, f'{os.path.basename(sys.argv[0])}: stopped by Ctrl-C\n'.encode())
    cache.remove_drafts()
    os._exit(128 + number)

  numbers = (signal.SIGTERM, signal.SIGHUP) if jax.process_count() == 1 else ()
  usual = signal.SIG_DFL, signal.default_int_handler
  before = {n: signal.getsignal(n) for n in (*numbers, signal.SIGINT)}
  free = {n: handler for n, handler in before.items() if handler in usual}
  try:
    for number in free:
      signal.signal(number, leave)
    yield
  finally:
    for number, handler in free.items():
      signal.signal(number, handler)


def exit_code(train: Callable[[], int], path: storage.Path, *, program: str) -> int:
  """Calls `train` -> the exit code of the process; writes WORKDIR/outcome.json.

  An error that `explain` knows becomes one line on standard error; any other is recorded
  and raised. If other processes may be waiting for this one, it exits at once.
  """
  try:
    code = train()
    workdir.conclude(path, code, exit_codes.MEANING[code])
    return code
  except Exception as error:
    known = explain(error, path)
    code, reason = known or (exit_codes.FAILED, str(error))
    if code not in _FOREIGN:
      workdir.conclude(path, code, reason)
    if not known:
      raise
    print(f'{program}: {reason}', file=sys.stderr)
    if not isinstance(error, _COLLECTIVE):
      exit_now(code)
    return code


def explain(error: Exception, path: storage.Path) -> tuple[int, str] | None:
  """An error of a run in the workdir `path` -> its exit code and one line, or None."""
  if type(error) in CODES:
    return CODES[type(error)], str(error)
  if _is_within(error, path):
    return exit_codes.NOT_SAVED, f'--workdir={path} cannot be written: {error}'
  if storage.is_passing(error):
    return exit_codes.FAULT, f'{error}, outside of --workdir={path}'
  if 'RESOURCE_EXHAUSTED' in str(error):
    line = str(error).partition('\n')[0]
    return exit_codes.FAILED, f'out of memory: {line}; {MEMORY}'
  return None


def _is_within(error: Exception, folder: storage.PathLike) -> bool:
  """Whether an error of the system belongs to a file in that folder."""
  name = getattr(error, 'filename', None)
  if not isinstance(name, (str, os.PathLike)) or storage.is_remote(folder):
    return False
  root, path = (os.path.abspath(x) for x in (folder, name))
  return os.path.commonpath([root, path]) == root


def _is_collective(error: BaseException | None) -> bool:
  """Whether an error is that of a broken collective, or a save that one ended."""
  if isinstance(error, checkpoint.SaveFailed):
    error = error.__cause__
  if isinstance(error, jax.errors.JaxRuntimeError):
    return 'RESOURCE_EXHAUSTED' not in str(error)
  return 'Gloo' in str(error)


@contextlib.contextmanager
def without_peers(timeout: float, path: storage.Path) -> Generator[None]:
  """In a run of several processes, exits after an error that the others may not have.

  It raises an error that `explain` knows.

  They would wait for this process in a collective. A broken collective means that another
  process is lost: JAX's runtime detects it within `timeout` seconds, names the process
  and aborts this one; otherwise this one exits with LOST_PEER. After any other error the
  exit code is FAILED, with the traceback on standard error.
  """
  try:
    yield
  except Exception as error:
    broken = _is_collective(error)
    if jax.process_count() == 1 or (explain(error, path) and not broken):
      raise
    if not broken:
      traceback.print_exception(error)
      exit_now(exit_codes.FAILED)
    process = f'process {jax.process_index()} of {jax.process_count()}'
    reason = str(error).partition('\n')[0]
    print(f'{process} lost another one: {reason}', file=sys.stderr, flush=True)
    time.sleep(timeout + 10)
    exit_now(exit_codes.LOST_PEER)


def exit_now(code: int) -> NoReturn:
  """Exits without waiting for threads, some of which may never end."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
