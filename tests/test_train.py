"""The two stories end to end: real processes, real signals, real files."""

import json
import shutil
import time

import numpy as np
import pytest
from faults import evidence, process, world

from gated.run import checkpoint, metrics

STEPS = 20
SAVES = 6  # Steps 6, 12, 18, and the last.

SMALL = {
  'model.width': 32,
  'model.ffn': 64,
  'model.depth': 2,
  'model.attn.heads': 4,
  'model.attn.kv_heads': 2,
  'model.attn.head_dim': 8,
  'data.length': 64,
  'batch': 8,
  'steps': STEPS,
  'optim.warmup': 4,
  'optim.lr': 1e-3,
  'optim.schedule': 'constant',  # So that runs of any length share a compiled step.
  'checkpoint.every': SAVES,
  'eval.every': 8,
  'eval.rows': 8,
  'log.tensorboard': False,
}


def command(workdir, recipe='configs/tiny.py', **knobs):
  """The command line of a small run; a knob's dots are written as two underscores."""
  knobs = SMALL | {name.replace('__', '.'): value for name, value in knobs.items()}
  flags = [f'--config.{name}={value}' for name, value in knobs.items()]
  return ['train.py', f'--config={recipe}', f'--workdir={workdir}', *flags]


def ok(done):
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done


# Elementwise gates, in one batch, are killed by tests/test_faults.py.
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, run_python, spawn_python):
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  knobs = dict(recipe='configs/tiny.py:gate=headwise', accum=2, optim__schedule='cosine')
  ok(run_python(command(straight, **knobs)))
  # A step that never ends: a small run would be over before its save is.
  fault = {'do': 'stall', 'at': 'step', 'step': SAVES + 3}
  _, *args = command(killed, **knobs)
  child = spawn_python(
    ['tests/faults/faulty.py', *args], env={'GATED_FAULT': json.dumps(fault)}
  )
  saved = killed / f'checkpoints/{SAVES}/manifest.json'
  for _ in range(2400):
    assert child.lives(), child.err[-3000:]
    if saved.exists() and evidence.losses(killed)[-1][0] > SAVES:
      break
    time.sleep(0.1)
  child.kill()
  assert SAVES < evidence.losses(killed)[-1][0] <= SAVES + 3
  # Another order of sets, as in a process that is no fork of the same one.
  ok(run_python(command(killed, **knobs), env={'PYTHONHASHSEED': '1'}))
  assert [step for step, _ in evidence.losses(straight)] == list(range(1, STEPS + 1))
  assert evidence.losses(killed) == evidence.losses(straight)
  assert evidence.losses(killed, 'heldout') == evidence.losses(straight, 'heldout')
  assert evidence.digest(killed, STEPS) == evidence.digest(straight, STEPS)
  sessions = json.loads((killed / 'run.json').read_text())['sessions']
  assert [s['restored_step'] for s in sessions] == [-1, SAVES]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_never_saved(tmp_path, run_python):
  """Its save is put off to the next step that is."""
  workdir = tmp_path / 'run'
  fault = json.dumps({'do': 'nan', 'what': 'loss', 'steps': [SAVES, SAVES + 1]})
  _, *args = command(workdir, steps=SAVES + 3)
  ok(run_python(['tests/faults/faulty.py', *args], env={'GATED_FAULT': fault}))
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    assert saved.steps() == [SAVES + 2, SAVES + 3]
  records = metrics.read(workdir / 'metrics.jsonl')
  by_step = {r['step']: r['skipped'] for r in records if r['kind'] == 'train'}
  assert [by_step[SAVES + i] for i in (-1, 0, 1, 2)] == [0, 1, 2, 2]
  events = metrics.read(workdir / 'spikes.jsonl')
  assert [event['step'] for event in events] == [SAVES, SAVES + 1]
  assert all(len(event['records']) == 8 for event in events)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, run_python):
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  ok(run_python(command(workdir, steps=12, checkpoint__keep=9)))
  return workdir


@pytest.mark.slow
def test_one_device_eight_and_two_processes_have_the_same_losses(
  trained, tmp_path, run_python, spawn_python
):
  """Eight devices begin a run, two processes go on, and one device ends it."""
  relay, knobs = tmp_path / 'relay', dict(checkpoint__every=3)
  ok(
    run_python(
      command(relay, **knobs, steps=3, mesh__fsdp=2, mesh__tensor=2, mesh__context=2),
      devices=8,
    )
  )
  # Two devices each, the tokens of a row split between the two processes.
  split = command(relay, **knobs, steps=6, accum=2, mesh__context=4)
  where = [f'--coordinator=127.0.0.1:{process.free_port()}', '--processes=2']
  children = [
    spawn_python(
      [*split, *where, f'--process={i}'], devices=2, env={'PYTHONHASHSEED': str(i)}
    )
    for i in range(2)
  ]
  process.outputs(children, timeout=300)
  ok(run_python(command(relay, **knobs, steps=9)))

  expected, losses = (dict(evidence.losses(workdir)) for workdir in (trained, relay))
  assert list(losses) == list(range(1, 10))
  same = [expected[step] for step in losses]
  np.testing.assert_allclose(list(losses.values()), same, atol=1e-5)
  flops = [
    [r['flops_per_token'] for r in metrics.read(workdir / 'metrics.jsonl') if 'lr' in r]
    for workdir in (trained, relay)
  ]
  assert flops[1] == pytest.approx(flops[0][: len(flops[1])], rel=1e-6)
  records = metrics.read(relay / 'metrics.jsonl')
  rates = {r['step']: r['lr'] for r in records if r['kind'] == 'train'}
  jumps = [r for r in records if r['kind'] == 'resumed']
  assert [jump['step'] for jump in jumps] == [3, 6]
  for jump in jumps:
    assert jump['lr_last'] == pytest.approx(rates[jump['step']])
    assert jump['lr_next'] == pytest.approx(rates[jump['step'] + 1])
  sessions = json.loads((relay / 'run.json').read_text())['sessions']
  assert [s['restored_step'] for s in sessions] == [-1, 3, 6]
  assert [s['processes'] for s in sessions] == [1, 2, 1]
  assert [s['changed']['config.steps'] for s in sessions[1:]] == [[3, 6], [6, 9]]


@pytest.mark.full
def test_an_evaluation_prints_its_report_as_the_last_line(trained, run_python):
  done = ok(run_python(['eval.py', f'--workdir={trained}', '--rows=16'], devices=8))
  report = json.loads(done.stdout.splitlines()[-1])
  assert report == json.loads((trained / 'eval/12.json').read_text())
  assert report['step'] == 12
  assert set(report['domains']) == {'code', 'prose'}
  for summary in report['domains'].values():
    nats = summary['nats_per_token']
    np.testing.assert_allclose(summary['perplexity'], np.exp(nats), rtol=1e-9)
    assert 0 < summary['xz_bits_per_byte'] < 8
    assert 0 < summary['bigram_bits_per_byte'] < 8
    assert summary['tokens'] > 500 and summary['nats_per_token_stderr'] > 0


@pytest.mark.full
def test_an_evaluation_repeats_the_held_out_loss_of_the_run(trained, run_python):
  """Of a step that is not the last; the last one is evaluated above."""
  losses = dict(evidence.losses(trained, 'heldout'))
  assert {*losses} == {6, 8, 12} and np.isfinite([*losses.values()]).all()
  args = ['eval.py', f'--workdir={trained}', '--rows=8', '--step=6']
  report = json.loads(ok(run_python(args)).stdout.splitlines()[-1])
  np.testing.assert_allclose(report['loss'], losses[6], rtol=1e-6)


@pytest.mark.slow
def test_an_evaluation_refuses_a_step_that_is_not_there(trained, run_python):
  done = run_python(['eval.py', f'--workdir={trained}', '--step=7'])
  assert done.returncode == 2
  assert "--step='7'" in done.stderr and '6, 12' in done.stderr
  same = run_python(['eval.py', f'--workdir={trained}:7'])
  assert (same.returncode, same.stderr) == (2, done.stderr)


@pytest.mark.slow
@pytest.mark.full
def test_a_run_can_start_from_the_weights_of_another(trained, tmp_path, run_python):
  fresh = tmp_path / 'fresh'
  knobs = dict(init_from=f'{trained}:6', steps=3, seed=1)
  ok(run_python(command(fresh, **knobs)))
  first, at_six = evidence.losses(fresh)[0][1], dict(evidence.losses(trained))[6]
  at_start = evidence.losses(trained)[0][1]
  assert abs(first - at_six) < abs(first - at_start) / 3
  assert [step for step, _ in evidence.losses(fresh)] == [1, 2, 3]


@pytest.mark.full
def test_a_workdir_of_another_run_is_refused_and_left_as_it_was(trained, run_python):
  before = (trained / 'metrics.jsonl').read_bytes(), (trained / 'run.json').read_bytes()
  changes = dict(model__width=64, seed=3, optim__lr=2e-3, data__length=32, batch=16)
  changes |= dict(steps=12, checkpoint__keep=9, data__mixture='stdlib@code')
  done = run_python(command(trained, **changes))
  assert done.returncode == 2, done.stderr
  for told in (
    'config.model.width: 32 there, 64 here',
    'config.seed: 0 there, 3 here',
    'config.optim.lr: 0.001 there, 0.002 here',
    'config.data.length: 64 there, 32 here',
    'config.batch: 8 there, 16 here',
    'data: ',
  ):
    assert told in done.stderr
  now = (trained / 'metrics.jsonl').read_bytes(), (trained / 'run.json').read_bytes()
  assert now == before


@pytest.mark.full
def test_a_finished_run_does_nothing_and_needs_no_weights_to_start_from(
  trained, tmp_path, run_python
):
  source, fresh = tmp_path / 'source', tmp_path / 'fresh'
  shutil.copytree(trained, source)
  knobs = dict(init_from=str(source), steps=3)
  ok(run_python(command(fresh, **knobs)))
  first = json.loads((fresh / 'run.json').read_text())['sessions'][0]
  assert first['changed']['config.init_from'] == [str(source), f'{source}:12']
  shutil.rmtree(source)
  before = (fresh / 'metrics.jsonl').read_bytes()
  ok(run_python(command(fresh, **knobs)))
  assert (fresh / 'metrics.jsonl').read_bytes() == before


@pytest.mark.full
def test_data_without_anything_held_out_trains_and_saves(tmp_path, run_python):
  text, dataset, workdir = tmp_path / 'text', tmp_path / 'data', tmp_path / 'run'
  text.mkdir()
  for i in range(4):
    (text / f'{i}.txt').write_text(f'{i} green bottles hanging on the wall.\n' * 60)
  ok(
    run_python(
      [
        'scripts/prepare_data.py',
        f'--out={dataset}',
        '--length=64',
        '--tokenizer=bytes',
        f'--domain=song={text}',
        '--heldout=0',
        '--processes=1',
      ]
    )
  )
  knobs = dict(data__mixture=dataset, steps=3)
  done = ok(run_python(command(workdir, **knobs)))
  assert 'no held-out loss' in done.stderr
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    assert (saved.latest(), saved.best()) == (3, 3)
  refused = run_python(['eval.py', f'--workdir={workdir}'])
  assert refused.returncode == 2 and 'has no held-out rows' in refused.stderr


REFUSED = {
  'config.model.atn.heads': (3, 'did you mean config.model.attn.heads?'),
  'config.model.attn.gate.position': ('sdap', "allowed are 'none', 'query'"),
  'config.batch': (1e3, 'config.batch'),
  'config.accum': (3, 'config.batch=8 must be a multiple of config.accum=3'),
  'config.model.attn.heads': (3, 'must be a multiple of config.model.attn.kv_heads=2'),
  'config.mesh.tensor': (3, '1 device is available, but config.mesh.tensor=3 needs'),
  'config.data.mixture': ('/nowhere', 'no such dataset'),
  'config.optim.schedule': ('cosin', "allowed are 'cosine'"),
  'config.init_from': ('/nowhere', '/nowhere'),
  'config.log.wandb': ('project', 'pip install wandb'),
  'config.optim.lr': ('nan', 'a finite number'),
}


@pytest.fixture(scope='module')
def refused(tmp_path_factory):
  """A wrong knob -> its workdir, and how a run with it ended."""
  with world.World(tmp_path_factory.mktemp('refused')) as bench:
    workdirs = {knob: bench.path() for knob in REFUSED}
    commands = [
      [*command(workdir), f'--{knob}={REFUSED[knob][0]}']
      for knob, workdir in workdirs.items()
    ]
    ends = bench.many(commands)
  return dict(zip(REFUSED, zip(workdirs.values(), ends, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('knob', REFUSED)
def test_a_bad_knob_is_refused_by_name_before_any_work(knob, refused):
  workdir, done = refused[knob]
  assert done.code == 2, done.err
  assert knob in done.err and REFUSED[knob][1] in done.err
  assert 'Traceback' not in done.err
  assert not workdir.exists()


@pytest.mark.slow
def test_a_recipe_argument_that_does_not_exist_lists_those_that_do(run_python):
  done = run_python(['train.py', '--config=configs/dense_1b7.py:32l'])
  assert done.returncode == 2
  assert "'32l'" in done.stderr and '28l, 48l' in done.stderr


@pytest.mark.full
def test_the_dense_model_of_table_7_reports_its_parameters(run_python):
  done = ok(run_python(['train.py', '--config=configs/dense_1b7.py:28l', '--dry_run']))
  assert '1.72B parameters' in done.stderr


@pytest.fixture(scope='module')
def ungated(tmp_path_factory, run_python):
  """The workdir of an ungated run, and the same weights as Hugging Face has them."""
  folder = tmp_path_factory.mktemp('ungated')
  ok(run_python(command(folder / 'run', recipe='configs/tiny.py:gate=none', steps=6)))
  script = ['scripts/convert_hf.py', f'--from={folder}/run', f'--to={folder}/hf']
  ok(run_python(script))
  return folder / 'run', folder / 'hf'


@pytest.mark.full
def test_an_imported_checkpoint_is_evaluated_as_the_run_is(ungated, run_python):
  reports = []
  for workdir, more in zip(ungated, ([], ['--data=stdlib', '--length=64'])):
    before = sorted(workdir.iterdir())
    done = ok(
      run_python(
        ['eval.py', f'--workdir={workdir}', '--rows=8', '--bigram_rows=64', *more]
      )
    )
    reports.append(json.loads(done.stdout.splitlines()[-1]))
  assert sorted(workdir.iterdir()) == before
  assert reports[1]['step'] is None
  assert reports[0]['domains'].keys() == reports[1]['domains'].keys()
  np.testing.assert_allclose(reports[0]['loss'], reports[1]['loss'], rtol=1e-6)
  refused = run_python(['eval.py', f'--workdir={workdir}', '--step=6'])
  assert refused.returncode == 2 and 'has no steps' in refused.stderr


@pytest.mark.full
def test_a_gate_is_added_to_ungated_weights_without_changing_the_first_step(
  ungated, tmp_path, run_python
):
  """From a workdir and from Hugging Face: zero logits, twice their sigmoid is 1.

  Without a gate, both sources have the same loss: see the test above.
  """
  gate = {
    f'model.attn.gate.{k}': v
    for k, v in dict(position='sdpa', activation='2sigmoid', init='zero').items()
  }
  first = {}
  run, imported = ungated
  cases = dict(plain=(run, {}), gated=(run, gate), imported=(imported, gate))
  for name, (source, changes) in cases.items():
    workdir = tmp_path / name
    knobs = changes | dict(steps=2, init_from=str(source))
    done = run_python(command(workdir, recipe='configs/tiny.py:gate=none', **knobs))
    ok(done)
    assert ('gate.weight: initialized' in done.stderr) == bool(changes)
    first[name] = evidence.losses(workdir)
  for values in first.values():
    np.testing.assert_allclose(values[0][1], first['plain'][0][1], rtol=1e-6)
  # From there on the gate learns.
  assert len({first[name][1][1] for name in ('plain', 'gated')}) == 2


@pytest.mark.full
def test_weights_of_another_model_are_refused_by_their_knobs(
  ungated, tmp_path, run_python
):
  for knobs, told in (
    (dict(model__ffn=96), 'config.model.ffn=96, but the checkpoint has 64'),
    (
      dict(model__attn__qk_norm=False),
      'config.model.attn.qk_norm=False, but the checkpoint has True',
    ),
  ):
    knobs |= dict(init_from=str(ungated[1]))
    recipe = 'configs/tiny.py:gate=none'
    done = run_python(command(tmp_path / 'run', recipe=recipe, **knobs))
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.full
def test_experts_train_and_report_their_load(tmp_path, run_python):
  workdir = tmp_path / 'run'
  recipe = 'configs/moe_15b.py:gate=headwise,scale=test'
  args = ['train.py', f'--config={recipe}', f'--workdir={workdir}', '--config.accum=2']
  ok(run_python([*args, '--config.log.tensorboard=False', '--config.mesh.fsdp=1']))
  records = [r for r in metrics.read(workdir / 'metrics.jsonl') if r['kind'] == 'train']
  assert len(records) == 20 and records[-1]['loss'] < records[0]['loss'] - 0.1
  for record in records:
    assert 1 <= record['load_max'] <= 16
    assert 0 < record['load_entropy'] <= np.log(16) + 1e-6
    assert record['dropped'] == 0 and record['balance_loss'] >= 1 - 1e-3
    assert record['router_z_loss'] > 0
