"""The pulse, in a process of its own, since it ends it."""

import threading
import time

import pytest

from gated.run.pulse import Pulse

PULSE = """
import ctypes, os, sys, threading, time
from gated.run.pulse import Pulse
def told():
  {told}
with Pulse({seconds}, code=6, details=told) as pulse:
  {body}
print('came to its end')
"""


@pytest.fixture
def pulsed(run_python):
  """What happens under a pulse, as Python -> CompletedProcess, and how long it took."""

  def pulsed(body, *, seconds=0.4, told="return 'process 1 is missing'"):
    start = time.monotonic()
    source = PULSE.format(body=body, seconds=seconds, told=told)
    return run_python(['-c', source], timeout=60), time.monotonic() - start

  return pulsed


def test_a_sleeping_main_thread_is_ended_with_all_stacks_and_the_code(pulsed):
  done, _ = pulsed('pulse.beat(41); pulse.beat(42); time.sleep(60)')
  assert done.returncode == 6
  assert 'no step was finished for 0.' in done.stderr
  assert 'config.stability.stuck_after=0.4' in done.stderr
  assert 'the last was 42.' in done.stderr
  assert 'process 1 is missing' in done.stderr
  # The main thread, where it sleeps, and the pulse's own.
  assert 'File "<string>", line 7 in <module>' in done.stderr
  assert done.stderr.count('hread 0x') >= 2
  assert 'came to its end' not in done.stdout


@pytest.mark.parametrize(
  ('told', 'said'),
  [("raise OSError('no answer')", "OSError('no answer')"), ('time.sleep(60)', '')],
  ids=['raises', 'hangs'],
)
def test_what_is_asked_on_the_way_out_may_raise_or_hang(pulsed, told, said):
  setup = 'import gated.run.pulse as p; p._GRACE = 0.5; '
  done, seconds = pulsed(f'{setup}threading.Event().wait()', told=told)
  assert done.returncode == 6
  assert 'the last was none.' in done.stderr
  assert said in done.stderr
  assert seconds < 30


def test_a_main_thread_that_keeps_pythons_lock_is_ended_too(pulsed):
  done, _ = pulsed('ctypes.PyDLL(None).sleep(60)')
  assert done.returncode == 1
  assert 'File "<string>", line 7 in <module>' in done.stderr


@pytest.mark.slow
def test_beats_keep_a_process_alive(pulsed):
  body = """
  for step in range(20):
    time.sleep(0.1)
    pulse.beat(step)
time.sleep(1.0)"""
  done, _ = pulsed(body.lstrip(), seconds=0.8)
  assert (done.returncode, done.stdout) == (0, 'came to its end\n'), done.stderr
  assert done.stderr == ''


def test_a_pulse_of_no_seconds_does_nothing():
  before = threading.active_count()
  with Pulse(0.0, code=6, details=str) as pulse:
    pulse.beat(1)
    assert threading.active_count() == before


def test_a_pulse_leaves_when_its_loop_does():
  before = threading.active_count()
  with (
    pytest.raises(ZeroDivisionError),
    Pulse(600.0, code=6, details=str) as pulse,
  ):
    assert threading.active_count() == before + 1
    pulse.beat(1)
    1 / 0  # noqa: B018
  assert threading.active_count() == before
