"""How a process ends early. What ends a process is tried in one of its own."""

import signal

import pytest

from gated.run import shutdown


def test_sigterm_is_an_answer_after_the_step_and_a_second_one_changes_nothing():
  before = signal.getsignal(signal.SIGTERM)
  try:
    with shutdown.Sigterm() as sigterm:
      assert not sigterm.received(1)
      signal.raise_signal(signal.SIGTERM)
      assert sigterm.received(2)
      signal.raise_signal(signal.SIGTERM)
      assert sigterm.received(3)
    # The process is about to leave: a signal now does not cut that short.
    signal.raise_signal(signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)


def test_who_was_not_told_to_leave_gets_its_signal_handler_back():
  before = signal.getsignal(signal.SIGTERM)
  with shutdown.Sigterm():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
  ('error', 'code', 'told'),
  [
    ("ValueError('UNKNOWN: Gloo all-reduce failed')", 5, 'process 0 of 2 lost another'),
    ("KeyError('loss')", 1, "KeyError: 'loss'"),
  ],
)
def test_one_of_several_processes_ends_by_its_error_at_once(
  error, code, told, run_python
):
  """Though a thread is left that waits."""
  source = f"""
import threading
import jax
from gated.run import shutdown
threading.Thread(target=threading.Event().wait).start()
jax.process_count = lambda: 2
with shutdown.without_peers(-10):
  raise {error}
"""
  done = run_python(['-c', source], timeout=60)
  assert done.returncode == code
  assert told in done.stderr
  assert code == 1 or 'Traceback' not in done.stderr
