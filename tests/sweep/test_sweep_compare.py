"""Whether two runs are comparable, and what is told of two that are not."""

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
    told = {'step': i + 1, 'kind': 'train', 'loss': loss, 'grad_norm': 1.0}
    with open(workdir / 'metrics.jsonl', 'a') as file:
      file.write(json.dumps(told) + '\n')
  c = {'optim': {'lr': lr}} | (knobs or {})
  run = {'config': c, 'data': {'sha256': data}, 'sessions': [SESSION | session]}
  (workdir / 'run.json').write_text(json.dumps(run))
  return storage.Path(workdir)


def test_the_same_run_twice_is_comparable_and_the_same(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', platform='another kernel')
  exit_code, told = sweep.folders(a, b)
  assert exit_code == 0 and 'the same to the last bit, all 2 steps' in told


def test_the_first_step_that_differs_is_told_and_by_how_much(tmp_path):
  a = trained(tmp_path / 'a', losses=(3.0, 2.0, 1.0))
  b = trained(tmp_path / 'b', losses=(3.0, 2.5, 1.25))
  found = sweep.runs(a, b)
  assert found.comparable and not found.same
  assert (found.losses.first, found.losses.most) == (2, 0.5)
  assert (found.losses.a, found.losses.b) == (2.0, 2.5)
  assert sweep.folders(a, b)[0] == 1


def test_a_run_is_found_from_within_its_folder(tmp_path, monkeypatch):
  (tmp_path / 'points').mkdir()
  made = {'sha256': 's' * 64, 'git': None}
  monkeypatch.setattr(compare.sweeps, 'open', lambda _: types.SimpleNamespace(made=made))
  (tmp_path / 'sweep.json').touch()
  a, b = (trained(tmp_path / 'points' / name, git=None) for name in 'ab')
  monkeypatch.chdir(a)
  assert sweep.folders(storage.Path('.'), b)[0] == 0


def test_a_shorter_run_is_the_same_only_as_far_as_it_goes(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', losses=(3.0,))
  exit_code, told = sweep.folders(a, b)
  assert exit_code == 1 and 'as far as both go' in told


def test_losses_that_are_not_finite_are_compared_as_well(tmp_path):
  a = trained(tmp_path / 'a', losses=(3.0, 'NaN'))
  assert sweep.runs(a, trained(tmp_path / 'b', losses=(3.0, 'NaN'))).same
  assert sweep.runs(a, trained(tmp_path / 'c', losses=(3.0, 9.0))).losses.first == 2


@pytest.mark.parametrize(
  'what, given',
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
    ('$XLA_FLAGS', dict(environment={'XLA_FLAGS': '--xla_x=1'})),
  ],
)
def test_what_may_change_a_loss_makes_runs_not_comparable(what, given, tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b', **given)
  found = sweep.runs(a, b)
  assert [d.what for d in found.differences if d.matters] == [what]
  exit_code, told = sweep.folders(a, b)
  assert exit_code == 3 and told.startswith('NOT comparable') and what in told


def test_what_changes_no_loss_is_told_apart(tmp_path):
  a = trained(tmp_path / 'a', knobs={'log': {'every': 1}, 'data': {'mixture': '/a'}})
  memory = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.4'}
  b = trained(
    tmp_path / 'b',
    knobs={'log': {'every': 2}, 'data': {'mixture': '/b'}},
    environment=memory,
  )
  found = sweep.runs(a, b)
  assert found.comparable and len(found.differences) == 3


def test_sessions_of_one_run_on_different_machines_are_no_run_to_compare(tmp_path):
  a, b = trained(tmp_path / 'a'), trained(tmp_path / 'b')
  run = json.loads((b / 'run.json').read_text())
  run['sessions'].insert(0, SESSION | {'device_kind': 'NVIDIA H100'})
  (b / 'run.json').write_text(json.dumps(run))
  [difference] = sweep.runs(a, b).differences
  assert difference.what == 'device of the sessions of b'


def test_what_is_no_run_cannot_be_compared(tmp_path):
  a = trained(tmp_path / 'a')
  with pytest.raises(ValueError, match=r'there is no run\.json'):
    sweep.folders(a, storage.Path(tmp_path))
  (a / 'run.json').write_text('{"config": 3}')
  with pytest.raises(ValueError, match='is damaged'):
    sweep.folders(a, a)
