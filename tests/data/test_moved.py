"""A run whose dataset has moved: eval.py --data, and train.py at the new place."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from faults import process

from tests.test_fixtures import EXPECTED, FOLDER, SAVED


@pytest.mark.full
def test_a_run_goes_on_and_is_evaluated_after_its_dataset_has_moved(tmp_path, run_python):
  with tarfile.open(FOLDER / 'folders.tar.gz') as archive:
    archive.extractall(tmp_path, filter='data')
  (tmp_path / 'dataset').rename(tmp_path / 'moved')
  shutil.copytree(tmp_path / 'moved', tmp_path / 'other')
  manifest = json.loads((tmp_path / 'other/manifest.json').read_text())
  manifest['made']['seed'] = 99  # Another digest: as far as we know, other data.
  (tmp_path / 'other/manifest.json').write_text(json.dumps(manifest))

  def run(script, *args):
    return run_python([process.ROOT / script, *args], cwd=tmp_path)

  def evaluated(*args):
    flags = f'--workdir=workdir:{SAVED}', '--rows=4', '--yardsticks=bigram', *args
    done = run('eval.py', *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    table, report = done.stdout.rstrip().rpartition('\n')[::2]
    report = json.loads(report)
    loss = dict(EXPECTED['heldout'])[SAVED]
    np.testing.assert_allclose(report['loss'], loss, rtol=1e-5)
    return table, report

  # The same data elsewhere: the bigram model is fitted to what the run has seen.
  _, report = evaluated('--data=moved')
  assert 'without' not in report
  assert all(d['bigram_bits_per_byte'] > 0 for d in report['domains'].values())
  # Other data: the run's own are not there, and the table says so.
  table, report = evaluated('--data=other')
  reason = "config.data.mixture='dataset': no such dataset 'dataset'"
  assert report['without']['bigram'].startswith(reason)
  assert f'without bigram: {reason}' in table

  # Without the flag, and in training, the message says what to do.
  done = run('eval.py', f'--workdir=workdir:{SAVED}', '--rows=4')
  assert done.returncode == 2 and reason in done.stderr
  assert 'if it has moved, name its new place (eval.py: --data)' in done.stderr
  command = json.loads((tmp_path / 'workdir/run.json').read_text())['sessions'][0]
  knobs = command['command'][2:]
  train = 'train.py', f'--config={process.ROOT}/configs/tiny.py', *knobs, '--dry_run'
  for place, code, message in (
    ('dataset', 2, reason),
    ('other', 2, 'belongs to a run that differs in\n  data: '),
    ('moved', 0, ''),
  ):
    done = run(*train, f'--config.data.mixture={place}')
    assert done.returncode == code and message in done.stderr, done.stderr
