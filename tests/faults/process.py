"""Child processes: start, watch, signal, kill and wait for them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

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


class Child:
  """A running process. Its output goes to files: a pipe could fill up."""

  def __init__(
    self, command: Sequence[str], env: Mapping[str, str], stem: Path, *, group: bool
  ):
    self._out, self._err = stem.with_suffix('.out'), stem.with_suffix('.err')
    self.started = time.monotonic()
    with self._out.open('wb') as out, self._err.open('wb') as err:
      self.process = subprocess.Popen(
        command,
        cwd=ROOT,
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
    """Waits -> the ended process; SIGKILL and AssertionError after `seconds`."""
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
      raise AssertionError(
        f'no exit within {seconds} s: {Done(-9, "", self.err).tail()}'
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
  args: Sequence[Any], env: Mapping[str, str], stem: Path, *, group: bool = False
) -> Child:
  """Starts `python ARGS` from the checkout's root; its output goes to STEM.out, .err.

  With `group`, it leads a process group of its own.
  """
  return Child([sys.executable, *map(str, args)], env, stem, group=group)


def outputs(
  children: Sequence[subprocess.Popen], timeout: float
) -> list[tuple[str, str]]:
  """Each child's standard output and error; AssertionError unless all exit with 0.

  A child that still runs after `timeout` seconds is aborted, and its stack printed.
  """

  def output(child):
    try:
      return child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      child.send_signal(signal.SIGABRT)  # faulthandler prints the stacks.
      return child.communicate()

  with futures.ThreadPoolExecutor(len(children)) as pool:
    outputs = list(pool.map(output, children))
  report = ''.join(
    f'\nprocess {i}, exit code {child.returncode}\n{out[-2000:]}{err[-6000:]}'
    for i, (child, (out, err)) in enumerate(zip(children, outputs))
  )
  assert not any(child.returncode for child in children), report
  return outputs


def free_port() -> int:
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]
