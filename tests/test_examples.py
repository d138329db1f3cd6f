"""The examples run, each as its first lines say."""

import json
from pathlib import Path

import pytest
from test_train import command, ok

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'


@pytest.fixture(scope='module')
def runs(run_python, tmp_path_factory):
  """Two runs of four steps, with a gate and without."""
  folder = tmp_path_factory.mktemp('examples')
  for gate in ('elementwise', 'none'):
    recipe, knobs = f'configs/tiny.py:gate={gate}', dict(steps=4, eval__every=2)
    ok(run_python(command(folder / gate, recipe=recipe, **knobs)))
  return folder


@pytest.mark.full
def test_the_notebook_looks_at_the_gates_of_a_run(runs, run_python):
  pytest.importorskip('matplotlib')
  notebook = json.loads((EXAMPLES / 'look_at_gates.ipynb').read_text())
  cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  pictures = [out for cell in cells for out in cell['outputs'] if 'data' in out]
  assert pictures and 'image/png' in pictures[0]['data']
  source = '\n'.join(''.join(cell['source']) for cell in cells)
  assert "'runs/demo'" in source
  source = source.replace('runs/demo', str(runs / 'elementwise'))
  done = run_python(['-c', source], env={'MPLBACKEND': 'Agg'})
  assert done.returncode == 0, done.stderr
  assert 'layers, heads, tokens, channels = (2, 4,' in done.stdout


@pytest.mark.full
def test_a_gate_of_ones_own_trains_beside_the_baseline(run_python):
  done = run_python(['examples/add_a_gate.py', '--steps=10'])
  assert done.returncode == 0, done.stderr
  *_, last = done.stdout.splitlines()
  step, *losses = map(float, last.split())
  assert step == 10 and len(set(losses)) == 3 and all(0 < loss < 6 for loss in losses)


@pytest.mark.full
def test_two_runs_are_compared(runs, run_python):
  done = run_python(['examples/compare_runs.py', runs / 'none', runs / 'elementwise'])
  assert done.returncode == 0, done.stderr
  assert 'gate scores: mean 0.' in done.stdout
  assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ['2', '4']
