"""Folders written by earlier code: this code still opens and continues them.

tests/fixtures/before/folders.tar.gz holds a workdir, a dataset and a sweep as commit
`written_by` of expected.json wrote them; expected.json has that commit's own numbers,
with its losses up to step 9 after it resumed the workdir itself.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faults import evidence, history, process

from gated import config, model

FOLDER = Path(__file__).parent / 'fixtures/before'
EXPECTED = json.loads((FOLDER / 'expected.json').read_text())
SAVED, STEPS = 6, 9


@pytest.fixture(scope='module')
def before(tmp_path_factory):
  folder = tmp_path_factory.mktemp('before')
  with tarfile.open(FOLDER / 'folders.tar.gz') as archive:
    archive.extractall(folder, filter='data')
  return folder


@pytest.fixture(scope='module')
def run(before, run_python):
  """Runs `python SCRIPT ARGS` in the unpacked folder, as its paths are relative."""

  def run(script, *args):
    done = run_python([process.ROOT / script, *args], cwd=before)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done

  return run


def test_the_dataset_keeps_its_fingerprint(before):
  knobs = dict(data__mixture=str(before / 'dataset'), data__length=64, batch=4)
  fingerprint = dict(history.corpus(**knobs).fingerprint)
  # Later code adds the ends of text, which no comparison of runs reads.
  assert fingerprint.pop('ends') == {'eos': 256}
  assert fingerprint == EXPECTED['dataset']


def test_its_models_build_though_knobs_were_added_since(before):
  """A knob that is missing in config.SINCE would leave every older run unreadable."""
  files = [before / 'workdir/run.json', *before.glob('sweep/points/*/run.json')]
  assert len(files) > 1
  for file in files:
    recipe = json.loads(file.read_text())['config']
    config.build(model.Config, recipe['model'], 'config.model')


@pytest.mark.parametrize('step', [3, SAVED])
def test_the_parameters_and_optimizer_state_are_restored_to_the_last_bit(before, step):
  assert evidence.digest(before / 'workdir', step) == EXPECTED['digests'][str(step)]


@pytest.mark.slow
def test_the_run_resumes_with_the_losses_that_it_would_have_had(before, run):
  """To 1e-5 of a loss, as processors differ in the last bits."""
  workdir = before / 'workdir'
  session = evidence.sessions(workdir)[0]
  script, recipe, *knobs = session['command']
  assert (script, recipe) == ('code/train.py', '--config=code/configs/tiny.py')
  recipe = f'--config={process.ROOT}/configs/tiny.py'
  run('train.py', recipe, *knobs, f'--config.steps={STEPS}')
  assert evidence.sessions(workdir)[-1]['restored_step'] == SAVED
  for kind in ('train', 'heldout'):
    steps, losses = zip(*evidence.losses(workdir, kind))
    expected_steps, expected = zip(*EXPECTED[kind])
    assert steps == expected_steps
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.full
def test_eval_measures_the_saved_held_out_loss(before, run):
  done = run('eval.py', '--workdir=workdir', f'--step={SAVED}', '--rows=4')
  loss = json.loads(done.stdout.splitlines()[-1])['loss']
  np.testing.assert_allclose(loss, dict(EXPECTED['heldout'])[SAVED], rtol=1e-5)


@pytest.mark.full
def test_the_sweep_is_reported_and_compared(before, run):
  run('scripts/sweep.py', 'report', 'sweep')
  report = (before / 'sweep/report/report.md').read_text()
  for point in (before / 'sweep/points').iterdir():
    final = evidence.losses(point, 'heldout')[-1][1]
    assert f'{final:.3f}' in report, report
  comparison = run('scripts/sweep.py', 'compare', 'sweep', 'sweep').stdout
  assert 'the same' in comparison
