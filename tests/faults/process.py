"""Child processes: start, watch, signal, kill and wait for them."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_SAVED = 7  # The exit code of a run that could not write.
PATIENCE = 240.0  # Seconds that a process may take.

# The variables that a child inherits. HOME and XDG_CACHE_HOME keep the real cache, where
# the embedded corpus was built once; no variable of JAX or of a logger is inherited.
KEPT = ('PATH', 'HOME', 'XDG_CACHE_HOME', 'TMPDIR', 'LANG', 'LC_ALL', 'LD_LIBRARY_PATH')
# Variables with the addresses and credentials of stores, as a test set them.
STORES = ('AWS_', 'GOOGLE_', 'GCE_', 'GCSFS_', 'NO_GCE_', 'STORAGE_', 'TENSORSTORE_')
PROXY = ('no_proxy', 'NO_PROXY')


class Done(NamedTuple):
  """A process that ended."""

  code: int  # The exit code; -9 after SIGKILL.
  out: str
  err: str

  def expect(self, code: int, *messages: str) -> 'Done':
    """Returns itself; AssertionError for another code or a missing message."""
    assert self.code == code, f'exit code {self.code}, not {code}: {self.tail()}'
    for text in messages:
      assert text in self.err, f'no {text!r} on stderr: {self.tail()}'
    if code == NOT_SAVED:  # Orbax prints tracebacks of its own.
      assert re.search(r'^train\.py: ', self.err, re.M), (
        f'no line of train.py: {self.tail()}'
      )
    elif code not in (0, 4):
      assert 'Traceback' not in self.err, f'traceback on stderr: {self.tail()}'
    return self

  def tail(self) -> str:
    """The last lines of its output, without tracebacks."""
    lines = [x for x in self.err.splitlines() if not re.match(r'\s|Traceback', x)]
    return self.out[-300:] + '\n'.join(line[:300] for line in lines[-6:])


class Forks:
  """A process that has imported the packages and starts programs as its forks.

  It starts at the first program, with the environment `env`.
  """

  # The only variables that may differ from `env`. No import reads them.
  LATE = frozenset({'XLA_FLAGS', 'PJRT_NPROC', 'GATED_FAULT', 'HOME', 'XDG_CACHE_HOME'})

  def __init__(self, env: Mapping[str, str]):
    self._env, self._lock = dict(env), threading.Lock()
    self._requests: socket.socket | None = None
    self._server: subprocess.Popen
    self._output: BinaryIO

  def can(self, args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether `python ARGS` with `env` can be a fork: a script of this checkout."""
    script = Path(args[0])
    differ = {name for name, _ in set(env.items()) ^ set(self._env.items())}
    own = script.suffix == '.py' and script.is_relative_to(ROOT)
    return sys.platform == 'linux' and own and differ <= self.LATE

  def start(
    self, args: Sequence[str], *, cwd: Path, env: Mapping[str, str], group: bool, **files
  ) -> 'Fork':
    """Starts `python ARGS` -> it; `group` makes it lead a process group of its own.

    `files` are those of its output, `out` and `err`.
    """
    with self._lock:
      if self._requests is None:
        self._requests = self._serve()
    request = dict(args=[*args], env=dict(env), cwd=str(cwd), group=group)
    pipe, end = os.pipe()
    given = [files['out'].fileno(), files['err'].fileno(), end]
    socket.send_fds(self._requests, [json.dumps(request).encode()], given)
    os.close(end)
    return Fork(pipe)

  def _serve(self) -> socket.socket:
    """Starts the server, which Ctrl-C does not reach -> the socket of its requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor, name = tempfile.mkstemp()
    os.remove(name)
    self._output = os.fdopen(descriptor, 'w+b')
    with theirs:
      self._server = subprocess.Popen(
        [sys.executable, 'tests/faults/forks.py', str(theirs.fileno())],
        cwd=ROOT,
        env=self._env,
        stdin=subprocess.DEVNULL,
        stdout=self._output,
        stderr=self._output,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
      )
    return ours

  def close(self) -> None:
    """Ends the server; its programs go on. AssertionError if an import printed."""
    if self._requests is not None:
      self._requests.close()
      self._server.wait(60)
      with self._output:
        self._output.seek(0)
        assert not (printed := self._output.read()), printed.decode()


class Fork:
  """A program that `Forks` started, with the methods of Popen that are used here."""

  def __init__(self, pipe: int):
    self._pipe = os.fdopen(pipe, encoding='ascii')
    self.pid = self._number(PATIENCE)
    self.returncode: int | None = None

  def _number(self, timeout: float | None) -> int:
    if not select.select([self._pipe], [], [], timeout)[0]:
      raise subprocess.TimeoutExpired('a fork', timeout or 0)
    line = self._pipe.readline()
    assert line, 'the server of forks has ended (`Forks.close` shows what it printed)'
    return int(line)

  def poll(self) -> int | None:
    """The exit code, None while the program runs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.wait(0)
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    """Waits -> the exit code; subprocess.TimeoutExpired after `timeout` seconds."""
    if self.returncode is None:
      self.returncode = self._number(timeout)
      self._pipe.close()
    return self.returncode

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


class Child:
  """A running process. Its output goes to files: a pipe could fill up."""

  def __init__(
    self,
    args: Sequence[str],
    env: Mapping[str, str],
    stem: Path,
    *,
    group: bool = False,
    cwd: Path = ROOT,
    forks: Forks | None = None,
  ):
    if args[0].endswith('.py'):  # A path from the root of the checkout.
      args = [str(ROOT / args[0]), *args[1:]]
    self.args = args
    self._out, self._err = stem.with_suffix('.out'), stem.with_suffix('.err')
    self.started = time.monotonic()
    with self._out.open('wb') as out, self._err.open('wb') as err:
      if forks and forks.can(args, env):
        given = dict(cwd=cwd, env=env, group=group)
        self.process = forks.start(args, **given, out=out, err=err)
      else:
        self.process = subprocess.Popen(
          [sys.executable, *args],
          cwd=cwd,
          env=env,
          stdin=subprocess.DEVNULL,
          stdout=out,
          stderr=err,
          start_new_session=group,
        )
    self.pid = self.process.pid

  @property
  def err(self) -> str:
    return self._err.read_text(errors='replace')

  @property
  def out(self) -> str:
    return self._out.read_text(errors='replace')

  def lives(self) -> bool:
    return self.process.poll() is None

  def signal(self, number: int) -> None:
    self.process.send_signal(number)

  def kill(self) -> Done:
    """Sends SIGKILL -> the ended process."""
    self.process.kill()
    return self.wait()

  def wait(self, seconds: float = PATIENCE) -> Done:
    """Waits -> the ended process; AssertionError with its stacks after `seconds`."""
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks.
      with contextlib.suppress(subprocess.TimeoutExpired):
        self.process.wait(10)
      self.kill()
      raise AssertionError(
        f'no exit of {self.args} within {seconds} s: {self.out[-2000:]}{self.err[-4000:]}'
      ) from None
    return Done(code, self.out, self.err)

  def until(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Waits for a true result of `condition` -> it; None if the process ended before."""
    end = time.monotonic() + seconds
    while not (result := condition()):
      if not self.lives():
        return condition() or None
      assert time.monotonic() < end, (
        f'the condition is false after {seconds} s: {self.err[-1500:]}'
      )
      time.sleep(0.003)
    return result


# Options of XLA for programs that run for milliseconds: most of LLVM's optimizations are
# left out.
EXACT: dict[str, Any] = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
# Fusions are compiled by the older emitters, in a third of the time. With them, two
# programs that differ in a constant may differ in their last bits.
HURRY = dict(EXACT)
if metadata.version('jaxlib').startswith('0.10.'):  # XLA stops at a flag that it lacks.
  HURRY['xla_cpu_use_fusion_emitters'] = False


def xla_flags(devices: int, platform: str = 'cpu', *, exact: bool = False) -> str:
  """The value of XLA_FLAGS for a number of simulated devices.

  `exact` for programs whose bits are compared with those of another program.
  """
  hurry = (EXACT if exact else HURRY) if platform == 'cpu' else {}
  flags = {'xla_force_host_platform_device_count': devices} | hurry
  return ' '.join(f'--{name}={str(value).lower()}' for name, value in flags.items())


# Simulated devices meet in collectives while they hold threads of XLA's pool. With one
# thread a core, all may be held by devices that wait for one without a thread.
THREADS = {'PJRT_NPROC': '16'}


def environment(
  cache: Path, devices: int, platform: str = 'cpu', *, exact: bool = False
) -> dict[str, str]:
  """The environment of a child with a compilation cache and a number of devices.

  `exact` is as in `xla_flags`.
  """
  clean = {name: os.environ[name] for name in KEPT + PROXY if name in os.environ}
  clean |= {k: v for k, v in os.environ.items() if k.startswith(STORES)}
  return clean | {
    'JAX_PLATFORMS': platform,
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    'XLA_FLAGS': xla_flags(devices, platform, exact=exact),
    **(THREADS if devices > 1 else {}),
    'PYTHONFAULTHANDLER': '1',
    'PYTHONPATH': str(ROOT),
  }


def start(
  args: Sequence[Any], env: Mapping[str, str], stem: Path, **options: Any
) -> Child:
  """Starts `python ARGS`; its output goes to STEM.out and STEM.err.

  With `group`, it leads a process group of its own; with `forks`, it is one of them if
  it can be; `cwd` is the checkout's root.
  """
  return Child([*map(str, args)], env, stem, **options)


def outputs(children: Sequence[Child], timeout: float) -> list[tuple[str, str]]:
  """Each child's standard output and error; AssertionError unless all exit with 0."""
  with futures.ThreadPoolExecutor(len(children)) as pool:
    ended = [pool.submit(child.wait, timeout) for child in children]
  errors = [str(error) for future in ended if (error := future.exception())]
  report = ''.join(
    f'\nprocess {i}: {child.process.returncode}\n{child.out[-2000:]}{child.err[-6000:]}'
    for i, child in enumerate(children)
  )
  assert not errors and not any(child.process.returncode for child in children), report
  return [(child.out, child.err) for child in children]


def free_port() -> int:
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]
