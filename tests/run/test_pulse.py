"""The pulse exits its process, so each test starts one."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gated.run.pulse import Pulse

PULSE = """
import ctypes, os, sys, threading, time
from gated.run.pulse import Pulse
def details():
  {details}
with Pulse({seconds}, code=6, details=details) as pulse:
  {body}
print('reached the end')
"""


@pytest.fixture
def pulsed(run_python):
  """Runs Python code under a pulse -> (CompletedProcess, seconds)."""

  def pulsed(body, *, seconds=0.4, details="return 'process 1 is missing'"):
    start = time.monotonic()
    source = PULSE.format(body=body, seconds=seconds, details=details)
    return run_python(['-c', source], timeout=60), time.monotonic() - start

  return pulsed


def test_a_stuck_process_prints_all_stacks_and_exits_with_the_code(pulsed):
  done, _ = pulsed('pulse.beat("step 41"); pulse.beat("step 42"); time.sleep(60)')
  assert done.returncode == 6
  assert 'no progress for 0.' in done.stderr
  assert 'config.stability.stuck_after=0.4' in done.stderr
  assert 'the last was step 42.' in done.stderr
  assert 'process 1 is missing' in done.stderr
  # The stacks of the main thread and of the pulse's thread.
  assert 'File "<string>", line 7 in <module>' in done.stderr
  assert done.stderr.count('hread 0x') >= 2
  assert 'reached the end' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ('details', 'message'),
  [("raise OSError('no answer')", "OSError('no answer')"), ('time.sleep(60)', '')],
  ids=['raises', 'hangs'],
)
def test_the_details_may_raise_or_hang(pulsed, details, message):
  setup = 'import gated.run.pulse as p; p._GRACE = 0.5; '
  done, seconds = pulsed(f'{setup}threading.Event().wait()', details=details)
  assert done.returncode == 6
  assert 'the last was none.' in done.stderr
  assert message in done.stderr
  assert seconds < 30


def test_a_main_thread_that_holds_the_gil_exits_too(pulsed):
  done, _ = pulsed('ctypes.PyDLL(None).sleep(60)')
  assert done.returncode == -signal.SIGABRT
  assert 'File "<string>", line 7 in <module>' in done.stderr


@pytest.mark.slow
def test_time_in_which_the_process_is_suspended_does_not_count():
  """The suspension is longer than the timeouts of the thread and the second process."""
  body = "print('ready', flush=True); sys.stdin.readline(); time.sleep(60)"
  source = PULSE.format(body=body, seconds=0.5, details='return str()')
  pipes: dict = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  with subprocess.Popen(
    [sys.executable, '-c', source], stderr=subprocess.PIPE, **pipes
  ) as child:
    try:
      assert child.stdout and child.stdout.readline() == 'ready\n'
      os.kill(child.pid, signal.SIGSTOP)
      time.sleep(1.6)
      os.kill(child.pid, signal.SIGCONT)
      time.sleep(0.2)
      assert child.poll() is None
      # The timeout starts again: a process that is stuck afterwards still exits.
      assert child.wait(20) == 6
    finally:
      child.kill()


@pytest.mark.slow
def test_beats_keep_a_process_alive(pulsed):
  body = """
  for step in range(20):
    time.sleep(0.1)
    pulse.beat(str(step))
time.sleep(1.0)"""
  done, _ = pulsed(body.lstrip(), seconds=0.8)
  assert (done.returncode, done.stdout) == (0, 'reached the end\n'), done.stderr
  assert done.stderr == ''


def test_a_timeout_of_zero_disables_the_pulse():
  before = threading.active_count()
  with Pulse(0.0, code=6, details=str) as pulse:
    pulse.beat('step 1')
    assert threading.active_count() == before


def test_a_pulse_ends_with_its_loop():
  before = threading.active_count()
  with (
    pytest.raises(ZeroDivisionError),
    Pulse(600.0, code=6, details=str) as pulse,
  ):
    assert threading.active_count() == before + 1
    pulse.beat('step 1')
    1 / 0  # noqa: B018
  assert threading.active_count() == before
