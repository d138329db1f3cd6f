"""What a stranger could send is refused by name, and does nothing else (crafted.py)."""

import json
import re

import crafted
import pytest

CASES = [(family, case) for family, its in crafted.FAMILIES.items() for case in its.cases]
# Threads' arenas would be counted as memory that an input takes, and a module that is
# imported late would be seen as it is written to its cache.
LEAN = {'MALLOC_ARENA_MAX': '2', 'PYTHONDONTWRITEBYTECODE': '1', 'RUST_BACKTRACE': '0'}


@pytest.fixture(scope='session')
def outcomes(run_python, tmp_path_factory):
  """(family, case) -> what came of it, all in one process that has little memory."""
  home = tmp_path_factory.mktemp('crafted')
  done = run_python(['tests/crafted.py', home], env=LEAN, timeout=240)
  lines = map(json.loads, done.stdout.splitlines())
  found = {(line['family'], line['case']): line for line in lines}
  assert list(found) == CASES[: len(found)]
  if len(found) < len(CASES):
    family, case = CASES[len(found)]
    pytest.fail(f'{family}, {case}: the process died\n{done.stderr[-4000:]}')
  return found


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'case'), CASES)
def test_it_is_refused(family, case, outcomes):
  found = outcomes[family, case]
  told = found['told']
  assert found['kind'] == 'ValueError', f'{found["kind"]}: {told[:1000]}'
  assert re.search(crafted.FAMILIES[family].cases[case].told, told), told[:1000]
  assert found['seen'] == []
  assert found['seconds'] < crafted.SECONDS


def test_there_are_enough_of_each():
  counts = {family: len(its.cases) for family, its in crafted.FAMILIES.items()}
  assert min(counts.values()) >= 25, counts


@pytest.mark.slow
def test_a_command_line_is_refused_in_one_line_and_runs_nothing(run_python, tmp_path):
  (tmp_path / 'empty').mkdir()
  args = ['-W', 'ignore', 'tests/crafted.py', tmp_path, 'commands']
  done = run_python(args, env=LEAN, timeout=120)
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == len(crafted.COMMANDS), done.stderr[-4000:]
  for line in lines:
    assert line['code'] == 2, line
    # A run in a default workdir says first which one it is.
    told = [x for x in line['told'].splitlines() if not x.startswith('workdir: ')]
    assert len(told) == 1 and line['wanted'] in told[0], line
  assert list((tmp_path / 'empty').iterdir()) == []


@pytest.mark.full
def test_a_run_writes_no_credential_anywhere(run_python, tmp_path):
  names = ('WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'HF_TOKEN', 'JAX_X_PASSWORD')
  secrets = {name: f'hush-{name}' for name in names}
  small = ('model.width=32', 'model.ffn=64', 'model.depth=1', 'batch=8', 'steps=2')
  small += ('data.length=64', 'optim.warmup=1', 'eval.rows=8')
  knobs = [f'--config.{knob}' for knob in small]
  args = ['train.py', '--config=configs/tiny.py', f'--workdir={tmp_path}/run', *knobs]
  done = run_python(args, env=secrets)
  assert done.returncode == 0, done.stderr[-4000:]
  written = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert len(written) > 10
  for text in (done.stdout, done.stderr, *(p.read_bytes() for p in written)):
    assert (b'hush-' if isinstance(text, bytes) else 'hush-') not in text
