"""How a process ends early; tests that end a process start their own."""

import errno
import signal

import pytest

from gated import data, storage
from gated.run import shutdown


@pytest.mark.parametrize('number', shutdown.SIGNALS, ids=lambda n: n.name)
def test_a_signal_is_reported_after_the_step_and_a_later_one_has_no_effect(number):
  before = {n: signal.getsignal(n) for n in shutdown.SIGNALS}
  try:
    with shutdown.Sigterm() as sigterm:
      assert not sigterm.received()
      signal.raise_signal(number)
      assert sigterm.received()
      signal.raise_signal(signal.SIGTERM)
      assert sigterm.received()
      assert sigterm.name == number.name
    # The process is stopping: another signal does not interrupt that.
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)
  finally:
    for n, handler in before.items():
      signal.signal(n, handler)


@pytest.mark.parametrize(
  'work',
  [
    pytest.param('time.sleep(60)', marks=pytest.mark.full),
    # As in XLA's compiler: Python's handlers wait for the end of a call.
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)",
  ],
)
def test_a_second_ctrl_c_exits_at_once(work, run_python):
  source = f"""
import hashlib, os, signal, threading, time
from gated.run import shutdown
def interrupt():
  for number in (signal.SIGTERM, signal.SIGINT):
    time.sleep(0.2)
    os.kill(os.getpid(), number)
with shutdown.Sigterm() as sigterm:
  signal.raise_signal(signal.SIGINT)
  print(sigterm.received(), flush=True)
  threading.Thread(target=interrupt).start()
  {work}
  print('went on')
"""
  done = run_python(['-c', source], timeout=60)
  assert (done.returncode, done.stdout) == (130, 'True\n'), done.stderr
  assert done.stderr.count('Ctrl-C: stops after this step') == 1


@pytest.mark.slow
def test_ctrl_c_is_answered_by_the_usual_handler_after_a_run(run_python):
  source = """
import os, signal
from gated.run import shutdown
with shutdown.Sigterm():
  pass
print(signal.set_wakeup_fd(-1), flush=True)
signal.raise_signal(signal.SIGINT)
"""
  done = run_python(['-c', source], timeout=60)
  assert done.stdout == '-1\n' and 'KeyboardInterrupt' in done.stderr
  assert 'Ctrl-C: stops' not in done.stderr


def test_a_hangup_that_nohup_ignores_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with shutdown.Sigterm() as sigterm:
      signal.raise_signal(signal.SIGHUP)
      assert not sigterm.received()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_signal_to_one_of_several_processes_becomes_a_sigterm(monkeypatch):
  """JAX's preemption service forwards only a SIGTERM."""
  sent = []
  monkeypatch.setattr(shutdown.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(shutdown.os, 'kill', lambda pid, number: sent.append(number))
  before = signal.getsignal(signal.SIGTERM)
  with shutdown.Sigterm():
    assert signal.getsignal(signal.SIGTERM) is before  # That of JAX.
    signal.raise_signal(signal.SIGHUP)
  assert sent == [signal.SIGTERM]


def test_the_signal_handler_is_restored_without_a_sigterm():
  before = signal.getsignal(signal.SIGTERM)
  with shutdown.Sigterm():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (data.Unreadable('a worker was killed'), 9, 'a worker was killed'),
    (data.Damaged('x.array_record has 4 bytes'), 1, 'x.array_record has 4 bytes'),
    (OSError(errno.ENOSPC, 'full', '/w/run/x'), 7, '--workdir=/w/run cannot be written'),
    (OSError(errno.EACCES, 'denied', '/w/run/x'), 7, "denied: '/w/run/x'"),
    (OSError(errno.ENOSPC, 'full', '/dev/shm/x'), 9, "'/dev/shm/x', outside of"),
    (OSError(errno.ENOSPC, 'full'), 9, 'full, outside of --workdir=/w/run'),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nmore'), 1, 'a larger config.accum'),
  ],
)
def test_an_error_has_one_line_the_right_place_and_a_code(error, code, line):
  known = shutdown.explain(error, storage.path('/w/run'))
  assert known and known[0] == code
  assert line in known[1] and '\n' not in known[1]


def test_an_error_of_ours_keeps_its_traceback():
  denied = OSError(errno.EACCES, 'denied', '/elsewhere')
  for error in (KeyError('loss'), denied, RuntimeError('a bug')):
    assert shutdown.explain(error, storage.path('/w/run')) is None


@pytest.mark.full
def test_a_signal_before_the_run_handles_signals_removes_what_is_half_made(
  run_python, tmp_path
):
  """Also in a callback of the garbage collector, which swallows exceptions."""
  source = f"""
import gc, signal, sys
from gated.data import cache
from gated.run import shutdown
def fill(draft):
  open(draft + '/half', 'w').close()
  gc.callbacks.append(lambda *_: signal.raise_signal(int(sys.argv[1])))
  gc.collect()
  print('went on')
with shutdown.leaving():
  cache.make({str(tmp_path / 'corpus')!r}, lambda: False, fill, resumes=False)
"""
  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    done = run_python(['-c', source, str(int(number))], timeout=60)
    assert (done.returncode, done.stdout) == (128 + number, ''), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['.corpus.lock']
  assert done.stderr == '-c: stopped by Ctrl-C\n'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('error', 'code', 'message'),
  [
    ("ValueError('UNKNOWN: Gloo all-reduce failed')", 5, 'process 0 of 2 lost another'),
    pytest.param(
      "SaveFailed('x') from ValueError('Gloo AllGather failed')",
      *(5, 'lost another'),
      marks=pytest.mark.full,
    ),
    ("KeyError('loss')", 1, "KeyError: 'loss'"),
  ],
)
def test_an_error_in_one_of_several_processes_exits_at_once(
  error, code, message, run_python
):
  """A waiting thread does not delay the exit."""
  source = f"""
import threading
import jax
from gated.run import shutdown
from gated.run.checkpoint import SaveFailed
threading.Thread(target=threading.Event().wait).start()
jax.process_count = lambda: 2
with shutdown.without_peers(-10, 'workdir'):
  raise {error}
"""
  done = run_python(['-c', source], timeout=60)
  assert done.returncode == code
  assert message in done.stderr
  assert code == 1 or 'Traceback' not in done.stderr
