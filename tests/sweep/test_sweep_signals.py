"""What stops `sweep.py run` leaves its points resumable: real processes on a terminal."""

import importlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from faults import process

from gated import sweep
from gated.sweep import folder

# ml_collections warns for each recipe that it loads.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

script = importlib.import_module('scripts.sweep')

# A run of a minute that takes a second to save, as a real one may.
TRAIN = """
import json, os, signal, sys, time
workdir = sys.argv[-1].partition('=')[2]
os.makedirs(workdir, exist_ok=True)
def conclude(*_):
  time.sleep(1)
  with open(f'{workdir}/outcome.json', 'w') as file:
    json.dump({'code': 4, 'step': 4}, file)
  sys.exit(4)
signal.signal(signal.SIGTERM, conclude)
with open(f'{workdir}/started', 'w') as file:
  file.write(str(os.getpid()))
time.sleep(60)
"""
# Makes standard input the terminal of the session, as a shell does.
FOREGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, 'scripts/sweep.py', *sys.argv[1:]])
"""
PATIENCE = 120  # Seconds.


class Terminal:
  """`sweep.py run --dir=DIR` in the foreground of a terminal."""

  def __init__(self, swept, env):
    self.master, terminal = pty.openpty()
    self.process = subprocess.Popen(
      [sys.executable, '-c', FOREGROUND, 'run', f'--dir={swept.folder}', '--jobs=2'],
      cwd=process.ROOT,
      env=env,
      stdin=terminal,
      stdout=terminal,
      stderr=terminal,
      start_new_session=True,
    )
    os.close(terminal)

  def until(self, condition) -> None:
    """Reads the output, so that its buffer does not fill up, until a condition holds."""
    start = time.monotonic()
    while not condition():
      assert time.monotonic() - start < PATIENCE and self.process.poll() is None
      if select.select([self.master], [], [], 0.05)[0]:
        os.read(self.master, 1 << 16)

  def interrupt(self):
    os.write(self.master, b'\x03')  # Ctrl-C

  def terminate(self):
    self.process.terminate()

  def close(self):
    os.close(self.master)

  def close_as_a_session_ends(self):
    """A session that ends may send both signals, and the first one twice."""
    self.close()
    for number in (signal.SIGHUP, signal.SIGTERM):
      self.process.send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize(
  'stop',
  [
    Terminal.terminate,
    *(
      pytest.param(stop, marks=pytest.mark.full)
      for stop in (Terminal.interrupt, Terminal.close, Terminal.close_as_a_session_ends)
    ),
  ],
  ids=lambda stop: stop.__name__,
)
def test_a_stopped_sweep_leaves_resumable_points(stop, tmp_path, monkeypatch):
  monkeypatch.setattr(folder, 'ROOT', tmp_path / 'checkout')
  (tmp_path / 'checkout').mkdir()
  (tmp_path / 'checkout/train.py').write_text(TRAIN)
  words = ['run', '--config=configs/tiny.py', '--seeds=3', f'--dir={tmp_path}/sweep']
  swept = sweep.write(script.planned(*script.parser().parse_known_args(words)))
  env = process.environment(tmp_path / 'cache', 1) | {'JAX_PLATFORMS': 'cpu'}
  marks = [swept.workdir(p) / 'started' for p in swept.points[:2]]
  terminal = Terminal(swept, env)
  terminal.until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
  stop(terminal)
  assert terminal.process.wait(PATIENCE) == 4
  states = [sweep.state(swept.workdir(p), p.steps)[:2] for p in swept.points]
  assert states == [('partial', 4), ('partial', 4), ('absent', 0)]
  for mark in marks:
    with pytest.raises(ProcessLookupError):
      os.kill(int(mark.read_text()), 0)
