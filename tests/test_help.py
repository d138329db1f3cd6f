"""--help of every program prints its docstring and its flags, and does nothing else."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('scripts', 'bench', 'examples')
PROGRAMS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob('*.py'))]
PROGRAMS += [ROOT / 'train.py', ROOT / 'eval.py', ROOT / 'tests/rows.py']
PROGRAMS = [path for path in PROGRAMS if '__main__' in path.read_text()]
# They define absl's flags, which a process can do once.
ABSL = [path for path in PROGRAMS if 'app.run' in path.read_text()]


def name(path):
  return str(path.relative_to(ROOT))


def check(path, printed):
  """The help must hold the docstring's first line and be short."""
  first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
  # argparse wraps the text of some programs.
  assert first in ' '.join(printed.split()), printed
  assert len(printed.splitlines()) <= 80
  assert 'Traceback' not in printed


def test_the_programs_are_all_there():
  names = {name(path) for path in PROGRAMS}
  assert {'bench/train_step.py', 'scripts/sweep.py', 'train.py'} <= names
  assert {name(path) for path in ABSL} == {'train.py', 'eval.py', 'scripts/preflight.py'}
  libraries = {'bench/timing.py', 'bench/torch_model.py'}
  every = {name(p) for folder in FOLDERS for p in (ROOT / folder).glob('*.py')}
  assert every - names == libraries


@pytest.mark.parametrize('flag', ['--help', '-h'])
@pytest.mark.parametrize('path', [p for p in PROGRAMS if p not in ABSL], ids=name)
def test_help_is_printed_and_nothing_is_done(path, flag, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(path.parent))
  monkeypatch.setattr('sys.argv', [str(path), flag])
  with pytest.raises(SystemExit) as left:
    runpy.run_path(str(path), run_name='__main__')
  assert left.value.code in (0, None)
  printed = capsys.readouterr()
  check(path, printed.out)
  assert not printed.err and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
  'path',
  [
    path if path.name == 'train.py' else pytest.param(path, marks=pytest.mark.full)
    for path in ABSL
  ],
  ids=name,
)
def test_help_of_a_program_with_absl_flags_is_printed(path, tmp_path, run_python):
  # The variable makes it a process that imports its packages itself.
  done = run_python([path, '--help'], cwd=tmp_path, env={'PYTHONHASHSEED': '0'})
  assert done.returncode == 0 and not done.stderr
  check(path, done.stdout)
  assert re.search(r'\n  --\w+ +[A-Z]', done.stdout)
  assert not list(tmp_path.iterdir())
