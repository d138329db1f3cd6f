"""scripts/replay.py: a recomputed step has the bits of the run."""

import json
import shutil

import pytest
import small
from test_train import command, ok

from gated import config, plan, storage
from gated.run import checkpoint, metrics
from gated.run import events as spikes
from scripts import replay

SAVES, STEPS = 4, 10


@pytest.fixture(scope='module')
def spiky(tmp_path_factory, run_python):
  """The workdir of a bfloat16 run whose threshold makes nearly every step a spike."""
  workdir = tmp_path_factory.mktemp('spiky') / 'run'
  knobs = {
    'model.depth': 1,
    'model.numerics.compute': 'bfloat16',
    'optim.lr': 1e-2,
    'stability.threshold': 0.01,
    'stability.window': 4,
    'checkpoint.keep': 9,
  }
  knobs |= {'steps': STEPS, 'checkpoint.every': SAVES}
  ok(run_python(command(workdir, **knobs)))
  return workdir


def events(workdir):
  return spikes.read(storage.path(workdir))


def refused(workdir, *flags):
  """The error message of a refused replay."""
  with pytest.raises(ValueError) as error:
    replay.prepare(replay.parse([f'--workdir={workdir}', *map(str, flags)]))
  return str(error.value)


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.full
def test_a_replay_has_the_loss_of_the_run_to_the_last_bit(spiky, run_python):
  event, before = events(spiky)[-1], contents(spiky)
  assert event['step'] % SAVES > 1  # There are steps to train before it.
  script = ['scripts/replay.py', f'--workdir={spiky}', f'--step={event["step"]}']
  done = ok(run_python([*script, '--rows=3']))
  report = json.loads(done.stdout.splitlines()[-1])
  for name in ('loss', 'grad_norm'):
    assert report['recomputed'][name] == report['recorded'][name] == event[name]
    assert report['float32'][name] != event[name]
    assert abs(report['float32'][name] - event[name]) < 1e-2
  assert report['same_bits'] and report['restored_step'] == SAVES * 2
  assert report['recomputed']['guard'] == report['float32']['guard'] == 'spike'
  assert report['verdict'] == 'the batch itself causes it' == done.stdout.splitlines()[-2]
  largest = report['float32']['largest']
  assert largest[0][1] == max(norm for _, norm in largest) <= event['grad_norm'] + 1e-2
  worst = report['worst']
  assert [w['record'] for w in worst] == [event['records'][w['row']] for w in worst]
  assert worst[0]['float32'] >= report['float32']['loss'] and len(worst) == 3
  assert all(w['text'] and repr(w['text']) in done.stdout for w in worst)
  assert contents(spiky) == before


def test_a_replay_in_float32_has_no_rounded_products():
  numerics = replay.widened(small.whole(model__numerics__matmul='fp8')).model.numerics
  assert (numerics.compute, numerics.matmul) == ('float32', 'compute')


@pytest.mark.slow
def test_a_step_that_is_not_in_spikes_jsonl_is_refused_with_the_steps_that_are(spiky):
  steps = ', '.join(str(event['step']) for event in events(spiky))
  message = refused(spiky, '--step=57')
  assert message == f'--step=57 is not in spikes.jsonl, which has {steps}'
  message = refused(spiky, '--step=9', '--data_step=3')
  assert message == '--data_step=3 is not in spikes.jsonl, which has 8'
  assert refused(f'{spiky}:best').startswith('--step=best is not in spikes.jsonl')
  assert 'names a step, and step 9 is given too' in refused(f'{spiky}:8', '--step=9')


@pytest.fixture
def copied(spiky, tmp_path):
  """A copy of the run, and a function that changes its last event."""
  shutil.copytree(spiky, tmp_path / 'run')

  def write(change):
    history = events(spiky)
    change(history[-1])
    path = tmp_path / 'run' / spikes.NAME
    path.write_text(''.join(metrics.dumps(e, indent=None) + '\n' for e in history))
    return history[-1]

  return tmp_path / 'run', write


@pytest.mark.full
def test_an_event_with_other_records_is_refused_with_the_first_difference(copied):
  workdir, write = copied
  event = write(lambda event: event['records'][3].__setitem__(2, 1 << 20))
  message = refused(workdir, f'--step={event["step"]}')
  assert 'row 3 was' in message and f'{1 << 20}]' in message
  assert f'--workdir={workdir}' in message


@pytest.mark.slow
def test_an_event_with_a_wrong_field_is_refused(copied):
  workdir, write = copied
  event = write(lambda event: event.update(records='none'))
  message = refused(workdir, f'--step={event["step"]}')
  assert f'--workdir={workdir}: spikes.jsonl is damaged' in message
  assert 'records' in message


@pytest.mark.full
def test_a_step_after_a_rollback_starts_past_the_skipped_batch(spiky):
  """Steps 9 and 10 ran twice from step 8; the second time past the batch of step 10."""
  c, _ = replay.recipe(storage.path(spiky), STEPS)
  c |= {'init_from': 'elsewhere'}  # The state of the seed is no start then.
  run_plan = plan.Plan(config.build(plan.Config, c, 'config'))
  back = {'step': 10, 'data_step': 9, 'action': 'rollback'}
  with checkpoint.Reader(spiky / 'checkpoints') as saved:
    for at, data_step, start in ((9, 8, 8), (10, 9, 8), (9, 10, 10), (10, 11, 10)):
      event = {'step': at, 'data_step': data_step}
      restored, state = replay.restore(saved, run_plan, event, [back])
      assert (restored, int(state.step), int(state.data_step)) == (8, 8, start)
    with pytest.raises(ValueError, match=r'data step 12; earlier ones: 8 .*\[4, 8, 10\]'):
      replay.restore(saved, run_plan, {'step': 10, 'data_step': 12}, [back])


@pytest.mark.slow
def test_a_recipe_is_that_of_the_session_that_ran_the_step(copied):
  workdir, _ = copied
  path = workdir / 'run.json'
  run = json.loads(path.read_text())
  changed = {'config.optim.lr': [1e-2, 5.0], 'data': ['abc', 'def']}
  run['config']['optim']['lr'] = 5.0
  run['sessions'].append({'restored_step': 8, 'changed': changed})
  path.write_text(json.dumps(run))
  for step, lr, data in ((8, 1e-2, 'abc'), (9, 5.0, run['data']['sha256'])):
    c, sha256 = replay.recipe(storage.path(workdir), step)
    assert (c['optim']['lr'], sha256) == (lr, data)
