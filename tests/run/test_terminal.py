"""A process whose terminal is lost goes on; each test starts such a process."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """
import contextlib, logging, os, sys
from pathlib import Path
from gated.run import terminal
terminal.steady(logging.INFO); terminal.steady()
import tqdm
with open({path!r}, 'w') as record:
  for step in range(2000):
    print(f'step {{step}} of a run that is long enough for a pipe', file=sys.stderr)
    logging.info('a line of a logger')
    tqdm.tqdm.write('a line beside a bar', file=sys.stderr)
    with contextlib.suppress(OSError):  # A library in C does not look either.
      os.write(2, b'a line of a library: ')
  print('done', flush=True)
  record.write('all steps')
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'redirected',
  ['2>&1 | head -n 2', '2>/dev/full', '>/dev/full', '2>&-', '>&- 2>&-', '<&- >&- 2>&-'],
)
def test_a_process_survives_a_lost_terminal(redirected, tmp_path):
  record = tmp_path / 'record'
  program = tmp_path / 'program.py'
  program.write_text(SOURCE.format(path=str(record)))
  streams, bar, reader = redirected.partition('|')
  quoted = shlex.join([sys.executable, str(program)])
  command = f'({quoted} {streams}; echo $? >{tmp_path}/code) {bar} {reader}'
  subprocess.run(
    ['bash', '-c', command],
    timeout=60,
    check=False,
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
  )
  assert (tmp_path / 'code').read_text() == '0\n'
  # No library wrote into the file, which would have had the number of standard error.
  assert record.read_text() == 'all steps'


def test_characters_that_an_encoding_lacks_have_a_text(run_python):
  source = (
    'from gated.run import terminal; terminal.steady(); '
    "print('0.5 \\u00b1 0.1, \\u00e9, \\udcff')"
  )
  done = run_python(['-c', source], env={'PYTHONIOENCODING': 'ascii'}, timeout=60)
  assert (done.returncode, done.stdout) == (0, '0.5 +- 0.1, \\xe9, \\udcff\n'), (
    done.stderr
  )


def test_control_characters_are_escaped_and_a_progress_bar_is_not(run_python):
  source = (
    'import logging, sys; from gated.run import terminal; terminal.steady(); '
    "text = 'a\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\x7f\\tb'; print(text); "
    "logging.warning('%s', text); sys.stderr.write('\\r50%'); "
    "print(terminal.visible('over\\rwritten\\x00'))"
  )
  done = run_python(['-c', source], timeout=60)
  escaped = 'a\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\x7f\tb\n'
  assert done.stdout == escaped + 'over\\rwritten\\x00\n'
  assert done.stderr.endswith(f'{escaped}\n50%')  # Text mode reads \r as \n.


@pytest.mark.parametrize(
  ('raised', 'code', 'printed'),
  [
    ('KeyboardInterrupt', 130, '-c: stopped by Ctrl-C\n'),
    ('ValueError(1)', 1, 'Traceback'),
  ],
)
def test_ctrl_c_is_one_line_and_another_error_is_a_traceback(
  raised, code, printed, run_python
):
  source = f'from gated.run import terminal; terminal.steady(); raise {raised}'
  done = run_python(['-c', source], timeout=60)
  assert done.returncode == code
  assert done.stderr.startswith(printed), done.stderr
  assert ('Traceback' in done.stderr) == (code == 1)
