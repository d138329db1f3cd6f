"""How a process ends early; tests that end a process start their own."""

import signal

import pytest

from gated.run import shutdown


def test_sigterm_is_reported_after_the_step_and_a_second_one_has_no_effect():
  before = signal.getsignal(signal.SIGTERM)
  try:
    with shutdown.Sigterm() as sigterm:
      assert not sigterm.received(1)
      signal.raise_signal(signal.SIGTERM)
      assert sigterm.received(2)
      signal.raise_signal(signal.SIGTERM)
      assert sigterm.received(3)
    # The process is stopping: another signal does not interrupt that.
    signal.raise_signal(signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)


def test_the_signal_handler_is_restored_without_a_sigterm():
  before = signal.getsignal(signal.SIGTERM)
  with shutdown.Sigterm():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize(
  ('error', 'code', 'message'),
  [
    ("ValueError('UNKNOWN: Gloo all-reduce failed')", 5, 'process 0 of 2 lost another'),
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
threading.Thread(target=threading.Event().wait).start()
jax.process_count = lambda: 2
with shutdown.without_peers(-10):
  raise {error}
"""
  done = run_python(['-c', source], timeout=60)
  assert done.returncode == code
  assert message in done.stderr
  assert code == 1 or 'Traceback' not in done.stderr
