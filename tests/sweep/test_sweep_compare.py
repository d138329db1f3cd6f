"""Runs and sweeps are compared: differences, losses, exit codes."""

import json
import types

import pytest

from gated import storage, sweep
from gated.sweep import compare

SESSION = {
  'git': {'commit': 'c' * 40, 'dirty': False},
  'versions': {'jax': '0.10.2'},
  'python': '3.11.2',
  'platform': 'Linux',
  'backend': 'cpu',
  'device_kind': 'cpu',
  'devices': 1,
  'processes': 1,
  'environment': {},
  'deterministic': False,
}


def trained(workdir, *, losses=(3.0, 2.0), lr=1e-3, data='d', knobs=None, **session):
  workdir.mkdir()
  for i, loss in enumerate(losses):
    message = {'step': i + 1, 'kind': 'train', 'loss': loss, 'grad_norm': 1.0}
    with open(workdir / 'metrics.jsonl', 'a') as file:
      file.write(json.dumps(message) + '\n')
  c = {'optim': {'lr': lr}} | (knobs or {})
  run = {'config': c, 'data': {'sha256': data}, 'sessions': [SESSION | session]}
  (workdir / 'run.json').write_text(json.dumps(run))
  return storage.Path(workdir)


def test_identical_runs_are_comparable_and_the_same(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', platform='another kernel')
  exit_code, message = sweep.folders(a, b)
  assert exit_code == 0 and 'the same to the last bit, all 2 steps' in message


def test_the_first_different_step_and_the_largest_difference_are_reported(tmp_path):
  a = trained(tmp_path / 'a', losses=(3.0, 2.0, 1.0))
  b = trained(tmp_path / 'b', losses=(3.0, 2.5, 1.25))
  comparison = sweep.runs(a, b)
  assert comparison.comparable and not comparison.losses.same
  assert (comparison.losses.first, comparison.losses.most) == (2, 0.5)
  assert (comparison.losses.a, comparison.losses.b) == (2.0, 2.5)
  assert sweep.folders(a, b)[0] == 1


def test_a_run_may_be_the_working_directory(tmp_path, monkeypatch):
  (tmp_path / 'points').mkdir()
  made = {'sha256': 's' * 64, 'git': None}
  monkeypatch.setattr(compare.sweeps, 'open', lambda _: types.SimpleNamespace(made=made))
  (tmp_path / 'sweep.json').touch()
  a, b = (trained(tmp_path / 'points' / name, git=None) for name in 'ab')
  monkeypatch.chdir(a)
  assert sweep.folders(storage.Path('.'), b)[0] == 0


def test_a_shorter_run_is_the_same_in_the_common_steps_only(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', losses=(3.0,))
  exit_code, message = sweep.folders(a, b)
  assert exit_code == 1 and 'in all common steps' in message


def test_non_finite_losses_are_compared(tmp_path):
  a = trained(tmp_path / 'a', losses=(3.0, 'NaN'))
  assert sweep.runs(a, trained(tmp_path / 'b', losses=(3.0, 'NaN'))).losses.same
  assert sweep.runs(a, trained(tmp_path / 'c', losses=(3.0, 9.0))).losses.first == 2


@pytest.mark.parametrize(
  'name, changes',
  [
    ('config.optim.lr', dict(lr=2e-3)),
    ('data', dict(data='e')),
    ('code', dict(git={'commit': 'e' * 40, 'dirty': False})),
    ('code', dict(git=None)),
    ('code', dict(git={'commit': 'c' * 40, 'dirty': True})),
    ('jax', dict(versions={'jax': '0.12.0'})),
    ('device', dict(device_kind='NVIDIA H200')),
    ('devices', dict(devices=2)),
    ('processes', dict(processes=2)),
    ('--deterministic', dict(deterministic=True)),
    ('$XLA_FLAGS --xla_x', dict(environment={'XLA_FLAGS': '--xla_dump_to=/x --xla_x=1'})),
    ('$NVIDIA_TF32_OVERRIDE', dict(environment={'NVIDIA_TF32_OVERRIDE': '0'})),
    ('$JAX_ENABLE_X64', dict(environment={'JAX_ENABLE_X64': '1'})),
  ],
)
def test_a_difference_that_may_change_a_loss_makes_runs_not_comparable(
  name, changes, tmp_path
):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', **changes)
  comparison = sweep.runs(a, b)
  assert [d.name for d in comparison.differences if d.matters] == [name]
  exit_code, message = sweep.folders(a, b)
  assert exit_code == 3 and message.startswith('NOT comparable') and name in message


def test_differences_that_change_no_loss_are_listed_apart(tmp_path):
  a = trained(tmp_path / 'a', knobs={'log': {'every': 1}, 'data': {'mixture': '/a'}})
  memory = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.4'}
  b = trained(
    tmp_path / 'b',
    knobs={'log': {'every': 2}, 'data': {'mixture': '/b'}},
    environment=memory,
  )
  comparison = sweep.runs(a, b)
  assert comparison.comparable and len(comparison.differences) == 3


@pytest.mark.parametrize(
  'variables',
  [
    {'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '1'},
    {'JAX_LOG_COMPILES': '1', 'NCCL_DEBUG': 'INFO', 'JAX_PLATFORMS': 'cpu'},
    {'XLA_FLAGS': '--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=1'},
  ],
)
def test_variables_that_change_no_number_keep_runs_comparable(variables, tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', environment=variables)
  comparison = sweep.runs(a, b)
  assert comparison.comparable and comparison.differences


def test_a_run_with_sessions_on_different_machines_is_not_comparable(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b')
  run = json.loads((b / 'run.json').read_text())
  run['sessions'].insert(0, SESSION | {'device_kind': 'NVIDIA H100'})
  (b / 'run.json').write_text(json.dumps(run))
  [difference] = sweep.runs(a, b).differences
  assert difference.name == 'device of the sessions of b'


def test_a_folder_without_a_run_is_refused(tmp_path):
  a = trained(tmp_path / 'a')
  with pytest.raises(ValueError, match=r'run\.json is missing'):
    sweep.folders(a, storage.Path(tmp_path))
  (a / 'run.json').write_text('{"config": 3}')
  with pytest.raises(ValueError, match='is damaged'):
    sweep.folders(a, a)
