"""The suite can fail: each mutation breaks the code, and a test must fail.

  python tests/faults/mutations.py [--only 2]

Each mutation is made in a copy of the checkout, where its tests run. The same tests pass
in the checkout itself, as `make test` shows.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns('.git', '.venv*', 'runs', '__pycache__', '.*_cache')


class Mutation(NamedTuple):
  change: str
  file: str
  old: str
  new: str
  test: str  # The test that must fail.


MUTATIONS = (
  Mutation(
    'resume one batch late',
    'train.py',
    'corpus.train(int(state.data_step), ',
    'corpus.train(int(state.data_step) + (int(state.step) > 0), ',
    'tests/test_train.py::test_a_killed_run_goes_on_to_the_last_bit',
  ),
  Mutation(
    'drop the segment mask',
    'gated/kernels/attention/contract.py',
    'mask = mask & (segment_BT[:, :, None] == segment_BT[:, None, :])',
    'pass',
    'tests/model/test_decoder.py',
  ),
  Mutation(
    'make the gate independent of its input',
    'gated/model/gate.py',
    "logit = self.logit(y if self.cfg.source == 'value' else x_BTD)",
    "logit = self.logit(jnp.ones_like(y if self.cfg.source == 'value' else x_BTD))",
    'tests/model/test_gate.py',
  ),
  Mutation(
    'multiply in the guard instead of selecting',
    'gated/train/guard.py',
    'lambda u: jnp.where(bad, -0.0, u)',
    'lambda u: u * (1.0 - bad)',
    'tests/train/test_guard.py::test_a_step_that_is_not_finite_changes_no_bit',
  ),
  Mutation(
    'save before checking that the step is finite',
    'train.py',
    'saved = owed and finite',
    'saved = owed',
    'tests/test_train.py::test_a_step_that_is_not_finite_is_never_saved',
  ),
)


def failing_test(mutation: Mutation) -> str:
  """Makes a mutation in a copy -> the first test that failed; '' if none did."""
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / 'copy'
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    path = copy / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, f'{mutation.file} has changed'
    path.write_text(source.replace(mutation.old, mutation.new))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    env = os.environ | {'PYTHONPATH': str(copy)}
    done = subprocess.run(
      [*command, mutation.test], cwd=copy, env=env, capture_output=True, text=True
    )
  assert 'error' not in done.stdout.splitlines()[-1], done.stdout[-2000:]
  failed = [line for line in done.stdout.splitlines() if line.startswith('FAILED')]
  return failed[0].split()[1] if done.returncode == 1 and failed else ''


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', type=int, action='append', help='from 1 on')
  only = parser.parse_args().only
  passed = True
  for number, mutation in enumerate(MUTATIONS, 1):
    if only and number not in only:
      continue
    started = time.monotonic()
    test = failing_test(mutation)
    passed &= bool(test)
    result = f'failed: {test}' if test else 'NO TEST FAILED'
    print(
      f'{number} {mutation.change}: {result} ({time.monotonic() - started:.0f} s)',
      flush=True,
    )
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
