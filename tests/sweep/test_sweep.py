"""Sweeps: their grids are checked, their points run once, and runs are compared."""

import functools
import importlib
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from faults import process

from configs import axes, base, lr_sweep
from gated import config, model, storage, sweep
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.sweep import code, follow, judge, machine, runner

# Of ml_collections, for each recipe that it loads.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

script = importlib.import_module('scripts.sweep')

LR = axes.axis('optim.lr', [1e-3, 4e-3])


def plan(grid, recipe='configs/tiny.py', **given):
  rule = given.pop('rule', judge.Rule(**base.rule()))
  return sweep.plan(recipe, grid, resolve=script.resolve, rule=rule, **given)


@functools.cache
def count(knobs):
  """How many parameters a model has, by its knobs as JSON."""
  cfg = config.build(model.Config, json.loads(knobs), 'config.model')
  return model.count(model.abstract(cfg))


# Grids.


def test_a_point_is_the_plain_command_that_makes_its_recipe():
  swept = plan(axes.product(LR, axes.seeds(2)), overrides=['--config.steps=7'])
  point = swept.points[3]
  assert point.name.startswith('lr0.004-seed1-')
  assert point.command == (
    'train.py',
    '--config=configs/tiny.py',
    '--config.steps=7',
    '--config.optim.lr=0.004',
    '--config.seed=1',
    f'--workdir={swept.workdir(point)}',
  )
  c = script.resolve(point.command[1:-1])
  assert c == point.config
  assert (c['steps'], c['optim']['lr'], c['seed']) == (7, 4e-3, 1)


def test_a_points_name_depends_on_its_own_changes_only():
  few, many = plan(LR), plan(axes.chain(axes.axis('optim.lr', [2e-3]), LR))
  assert [p.name for p in few.points] == [p.name for p in many.points[1:]]
  assert few.folder != many.folder


def test_values_of_all_types_come_back_from_a_command_line_as_they_were():
  changes = {
    'optim.lr': 0.1 + 0.2,
    'seed': 3,
    'model.tied': False,
    'model.layers': 'unroll',
    'paper.assumed': ('a', 'b'),
  }
  [point] = plan([axes.Point({}, changes)]).points
  assert point.config['optim']['lr'] == 0.1 + 0.2
  assert point.config['model']['tied'] is False
  assert tuple(point.config['paper']['assumed']) == ('a', 'b')


def test_an_axis_may_be_a_range_of_numpys():
  numbers = [*np.logspace(-3, -1, 3), np.float64(0.5)]
  grid = axes.axis('optim.lr', numbers)
  assert [p.labels for p in grid] == [{'lr': x} for x in ('0.001', '0.01', '0.1', '0.5')]
  grid = axes.product(grid, axes.choice('size', large={'model.ffn': np.int32(64)}))
  assert plan(grid).points[3].config['optim']['lr'] == 0.5


def test_a_name_tells_which_switch_it_means():
  points = plan(axes.axis('model.tied', [True, False])).points
  assert [p.name[:6] for p in points] == ['tiedTr', 'tiedFa']


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  recipe = script.recipe([f'--config={process.ROOT}/configs/tiny.py:gate=none'])
  assert recipe.spec == 'configs/tiny.py:gate=none'
  swept = plan(LR, recipe.spec)
  assert swept.folder.is_relative_to(tmp_path / 'sweeps')


BAD_GRIDS = {
  'config.optim.lrr is no knob; did you mean config.optim.lr?': axes.axis(
    'optim.lrr', [1.0]
  ),
  'config.optim is no knob': axes.axis('optim', [1.0]),
  'its grid is empty': [],
  'are the same run': axes.axis('optim.lr', [1e-3, 1e-3]),
  'config.optim.warmup=-1, but it must be at least 0': axes.axis('optim.warmup', [-1]),
  'could not convert': axes.axis('optim.lr', ['fast']),
  "config.optim.name='sgd', but allowed are": axes.axis('optim.name', ['sgd']),
  'config.optim.lr=inf is not finite': axes.axis('optim.lr', [float('inf')]),
  'have the same labels, but change': [
    axes.Point({'size': 'small'}, {'model.ffn': n}) for n in (32, 64)
  ],
  "config.data.mixture='web@a' has a relative path": axes.axis('data.mixture', ['web@a']),
}


@pytest.mark.parametrize('told', BAD_GRIDS, ids=str)
def test_a_bad_grid_is_refused_before_anything_is_written(told, tmp_path):
  with pytest.raises(ValueError) as error:
    plan(BAD_GRIDS[told], folder=str(tmp_path / 'it'))
  assert told in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arg, several',
  [
    ('scale=test,seeds=1', {'variant', 'lr'}),
    ('scale=test,seeds=1,optimizer=both', {'variant', 'lr', 'optimizer'}),
    ('scale=paper,seeds=1,precision=both', {'variant', 'lr', 'precision'}),
    ('scale=proxy,seeds=2', {'variant', 'lr', 'seed'}),
  ],
)
def test_the_sweep_of_learning_rates_can_be_planned(arg, several):
  recipe = f'configs/lr_sweep.py:{arg}'
  swept = plan(lr_sweep.get_grid(arg), recipe)
  values = {}
  for point in swept.points:
    assert point.config['optim']['floor'] <= point.config['optim']['lr']
    for name, value in point.labels.items():
      values.setdefault(name, set()).add(value)
  assert {name for name, seen in values.items() if len(seen) > 1} == several


def test_the_variants_of_the_sweep_of_learning_rates_have_as_many_parameters():
  arg = 'scale=test,seeds=1'
  points = plan(lr_sweep.get_grid(arg), f'configs/lr_sweep.py:{arg}').points
  # The gated variants' FFN gives up what the gate adds.
  counts = [count(json.dumps(p.config['model'])) for p in points]
  assert max(counts) < 1.01 * min(counts)


def test_what_the_grid_changes_cannot_be_given_for_all_points():
  with pytest.raises(ValueError, match=r'config\.optim\.lr is given, but an axis'):
    plan(LR, overrides=['--config.optim.lr=1e-3'])


def test_only_takes_points_by_their_labels():
  points = plan(axes.product(LR, axes.seeds(3))).points
  found = sweep.only(points, 'lr=1e-3,seed=0,seed=2')
  assert [p.labels['seed'] for p in found] == ['0', '2']
  assert {p.labels['lr'] for p in found} == {'0.001'}
  assert sweep.only(points, '') == list(points)


@pytest.mark.parametrize(
  'wanted, told',
  [('variant=a', 'the labels are lr, seed'), ('lr=2', 'lr has the values 0.001, 0.')],
)
def test_only_refuses_labels_that_no_point_has(wanted, told):
  with pytest.raises(ValueError, match=told):
    sweep.only(plan(axes.product(LR, axes.seeds(2))).points, wanted)


# The command line.


def run(*words, expect=0):
  got = script.main([*map(str, words)])
  assert got == expect
  return got


@pytest.mark.parametrize(
  'words, told',
  [
    (['--config=configs/tiny.py'], 'has no get_grid: name its axes'),
    (['--config=configs/tiny.py', '--axis=optim.lrr=1'], 'did you mean config.optim.lr?'),
    (['--config=configs/tiny.py', '--axis=optim.lr=fast'], 'could not convert'),
    (['--config=configs/tiny.py', '--axis=optim.lr='], 'its grid is empty'),
    (['--config=configs/tiny.py', '--axis==1'], 'is not KNOB=VALUE,VALUE'),
    (['--config=configs/tiny.py', '--axis=optim.lr'], 'is not KNOB=VALUE,VALUE'),
    (['--config=configs/tiny.py', '--seeds=0'], '--seeds=0 must be positive'),
    (['--config=configs/tinny.py', '--seeds=2'], 'is no recipe; recipes here'),
    (['--config=configs/tiny.py', '--seeds=2', '--config.optim.l=1'], 'did you mean'),
    (['--config=configs/tiny.py', '--seeds=2', '--jbos=3'], 'jbos'),
    (['--config=configs/tiny.py', '--seeds=2', '--jobs=-3'], '--jobs=-3 must not be'),
    (['--config=configs/lr_sweep.py:scale=test', '--seeds=2'], 'change config.seed'),
    ([], '--config=configs/RECIPE.py is missing'),
    (
      ['--config=configs/tiny.py', '--seeds=2', '--config.data.mixture=/no/data@code=2'],
      'config.data.mixture names /no/data, which does not exist',
    ),
    (['--config.steps=3'], '--config.steps=3 needs --config'),
    (['tests'], "unknown argument 'tests'; resume a sweep with --dir=DIR"),
    (['--dir=nowhere'], 'is not a sweep: sweep.json is missing'),
  ],
)
def test_a_bad_command_is_refused_in_one_line(words, told, capsys):
  run('run', *words, expect=2)
  said = capsys.readouterr().err
  assert said.startswith('sweep.py: ') and told in said and said.count('\n') == 1


def test_what_runs_here_is_not_begun_in_a_bucket(capsys, monkeypatch):
  monkeypatch.setattr(sweep, 'write', lambda *_: pytest.fail('it was written'))
  run('run', '--config=configs/tiny.py', '--seeds=2', '--dir=gs://bucket/it', expect=2)
  assert 'a bucket is for `scripts/sweep.py submit`' in capsys.readouterr().err


def test_a_recipe_that_a_sweep_would_not_carry_is_refused(tmp_path, capsys):
  shutil.copy(process.ROOT / 'configs/tiny.py', tmp_path / 'mine.py')
  run('run', f'--config={tmp_path}/mine.py', '--seeds=2', expect=2)
  assert 'configs, so a sweep could not carry it' in capsys.readouterr().err


def test_what_is_broken_off_or_cannot_be_read_is_told_in_one_line(capsys, monkeypatch):
  for error, expect in (KeyboardInterrupt(), 130), (PermissionError('not yours'), 2):

    def fail(folder, error=error):
      raise error

    monkeypatch.setattr(sweep, 'open', fail)
    run('status', 'it', expect=expect)
  assert capsys.readouterr().err == 'sweep.py: interrupted\nsweep.py: not yours\n'


def test_a_part_of_a_grid_has_the_environment_of_the_whole(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(4))
  monkeypatch.setattr(machine, 'available', lambda: 100 << 30)
  monkeypatch.setattr(sweep.Runner, 'run', lambda self: None)
  command = [
    '--config=configs/tiny.py',
    '--seeds=2',
    f'--dir={tmp_path}',
    '--only=seed=1',
  ]
  run('run', *command)
  assert sweep.open(tmp_path).made['environment'] == {'NPROC': '2'}
  said = capsys.readouterr().out
  assert '1 points, 1 at a time' in said and "sweep's sources" not in said
  monkeypatch.setattr(code, 'pack', lambda root: b'edited since')
  run('run', *command)
  assert "points use the sweep's sources" in capsys.readouterr().out


# The folder.


def test_a_sweep_is_opened_from_its_folder_alone_wherever_it_lies(tmp_path):
  made = sweep.write(plan(LR, folder=str(tmp_path / 'a')), {'NPROC': '1'})
  shutil.move(tmp_path / 'a', tmp_path / 'b')
  found = sweep.open(tmp_path / 'b')
  assert found == made.moved(found.folder)
  assert found.rule == made.rule
  assert (
    found.points[0].command[-1] == f'--workdir={tmp_path}/b/points/{made.points[0].name}'
  )
  assert found.made['environment'] == {'NPROC': '1'}
  folder = sweep.unpacked(found)
  assert (folder / 'train.py').read_bytes() == (process.ROOT / 'train.py').read_bytes()
  assert folder == sweep.unpacked(found)


def test_the_same_sources_are_packed_to_the_same_bytes(tmp_path):
  for root in ('a', 'b'):
    (tmp_path / root / 'gated').mkdir(parents=True)
    (tmp_path / root / 'gated/x.py').write_text('x = 1\n')
    (tmp_path / root / 'train.py').write_text('pass\n')
    (tmp_path / root / 'gated/__pycache__').mkdir()
    (tmp_path / root / 'gated/__pycache__/x.pyc').write_text(root)
  os.utime(tmp_path / 'b/train.py', (1, 1))
  assert code.pack(tmp_path / 'a') == code.pack(tmp_path / 'b')


def test_sources_that_are_not_the_recorded_ones_are_refused(tmp_path):
  swept = sweep.write(plan(LR, folder=str(tmp_path)))
  (tmp_path / 'code.tar.gz').write_bytes(code.pack(tmp_path))
  with pytest.raises(ValueError, match='is not what its sweep'):
    sweep.unpacked(swept)


def test_a_folder_of_another_sweep_is_refused_and_told_what_differs(tmp_path):
  there = sweep.write(plan(LR, folder=str(tmp_path)))
  assert sweep.write(plan(LR, folder=str(tmp_path))) == there
  other = plan(LR, folder=str(tmp_path), overrides=['--config.steps=7'])
  with pytest.raises(ValueError, match=r'config\.steps: 280 in the folder, 7 now'):
    sweep.write(other)
  with pytest.raises(ValueError, match=r'the rule of divergence: Rule\(multiple=1\.5'):
    sweep.write(
      plan(LR, folder=str(tmp_path), rule=judge.Rule(multiple=2.0, rise=0.5, tail=0.05))
    )
  with pytest.raises(ValueError, match=r'point seed0-\w+ is new'):
    sweep.write(plan(axes.seeds(2), folder=str(tmp_path)))


@pytest.mark.parametrize('content', ['', '{}', '[]', '{"format": 1, "points": 3}'])
def test_a_damaged_sweep_is_refused(content, tmp_path):
  (tmp_path / 'sweep.json').write_text(content)
  with pytest.raises(ValueError, match=r'sweep\.json'):
    sweep.open(tmp_path)


HOSTILE = {
  'name': ['', '..', '.x', 'a/b', 'a\0b', 'a\nb', 'a' * 300, 3],
  'labels': [{'lr': 3}, [], None],
  'command': [[], ['-c', 'print()', '--workdir=x'], ['train.py'], 'train.py'],
  'config': [{}, {'steps': 'x', 'seed': 0, 'optim': {'lr': 1.0}}, {'steps': 1}],
}


def test_a_sweep_that_no_sweep_wrote_is_refused(tmp_path):
  sweep.write(plan(LR, folder=str(tmp_path)))
  path = tmp_path / 'sweep.json'
  whole = json.loads(path.read_text())
  first, *rest = whole['points']
  points = [{'points': [first | {k: v}, *rest]} for k in HOSTILE for v in HOSTILE[k]]
  made = [{'made': whole['made'] | {k: 1}} for k in ('sha256', 'environment', 'time')]
  other = [{'points': []}, {'points': [first, first]}, {'made': {}}, {'flags': [1]}]
  for changes in [*points, *made, *other]:
    path.write_text(json.dumps(whole | changes))
    with pytest.raises(ValueError, match=r'sweep\.json is damaged'):
      sweep.open(tmp_path)


def test_labels_are_shown_as_they_are(tmp_path, capsys):
  grid = axes.choice('[red]', **{'[/x]': {'seed': 1}, '[bold]': {'seed': 2}})
  sweep.write(plan(grid, folder=str(tmp_path)))
  run('status', tmp_path)
  said = capsys.readouterr().out
  assert '[red]' in said and '[/x]' in said and '[bold]' in said


# Where points stand.


def records(workdir, *steps, loss=3.0, at=0.0):
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / 'metrics.jsonl', 'ab') as file:
    for step in steps:
      told = {'step': step, 'kind': 'train', 'time': at + step, 'spikes': step // 4}
      file.write(json.dumps(told | {'loss': loss, 'grad_norm': 1.0}).encode() + b'\n')


@pytest.mark.parametrize(
  'code, step, state',
  [
    (None, 0, 'absent'),
    (None, 4, 'partial'),
    (4, 4, 'partial'),
    (0, 9, 'finished'),
    (0, 4, 'partial'),
    (3, 4, 'diverged'),
    (7, 4, 'failed'),
    (1, 4, 'failed'),
  ],
)
def test_where_a_point_stands_is_told_by_its_workdir(code, step, state, tmp_path):
  if step:
    records(tmp_path, *range(1, step + 1))
  if code is not None:
    workdirs.conclude(storage.Path(tmp_path), code, 'so')
  told = '' if code is None else 'so'
  assert sweep.state(storage.Path(tmp_path), 9) == (state, step, told)


def test_a_follower_reads_on_and_begins_anew_where_a_file_was_cut(tmp_path):
  records(tmp_path, 1, 2, 3, 4)
  seen = follow.Follower(storage.Path(tmp_path), since=2.5)
  seen.look()
  assert (seen.step, seen.loss, seen.spikes, seen.seconds) == (4, '3.0000', 1, 1.0)
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 5, "ki')
  seen.look()
  assert seen.step == 4
  metrics.records.truncate(tmp_path / 'metrics.jsonl', 2)
  records(tmp_path, 3, loss='NaN')
  seen.look()
  assert (seen.step, seen.loss) == (3, 'NaN')


# What runs at a time.


def test_a_gpu_has_a_point_and_more_share_its_memory(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6')
  rooms = {jobs: machine.room([], jobs) for jobs in (0, 1, 6)}
  visible = lambda room: [s.environment['CUDA_VISIBLE_DEVICES'] for s in room.slots]
  assert visible(rooms[0]) == ['4', '5', '6'] and visible(rooms[1]) == ['4,5,6']
  assert visible(rooms[6]) == ['4', '5', '6', '4', '5', '6']
  assert rooms[6].slots[0].environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.450'


def test_cpus_are_shared_out_by_cores_and_memory(monkeypatch):
  points = plan(LR).points
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(8))
  monkeypatch.setattr(machine, 'available', lambda: 100 << 30)
  assert machine.room(points * 8, 0).environment == {'NPROC': '1'}
  two = machine.room(points, 0)
  assert len(two.slots) == 2 and two.environment == {'NPROC': '4'}
  monkeypatch.setattr(machine, 'available', lambda: 4 << 30)
  few = machine.room(points * 8, 0)
  assert 1 <= len(few.slots) <= 3 and 'memory for' in few.reason


# Points that run, with a train.py of our own that is fast.

TRAIN = """
import json, os, signal, sys, time
workdir = sys.argv[-1].partition('=')[2]
os.makedirs(workdir, exist_ok=True)
count = f'{workdir}/count'
times = int(open(count).read()) if os.path.exists(count) else 0
open(count, 'w').write(str(times + 1))
def conclude(code):
  with open(f'{workdir}/outcome.json', 'w') as file:
    json.dump({'code': code, 'step': 9 if code == 0 else 4}, file)
  sys.exit(code)
print('seed', SEED := int([a for a in sys.argv if 'seed' in a][0].partition('=')[2]))
signal.signal(signal.SIGTERM, lambda *_: conclude(4))
if SEED == 1:
  conclude(3)
if SEED == 2 and times == 0:
  raise SystemExit('no luck')
if SEED == 3 and times == 0:
  open(f'{workdir}/waits', 'w').close()
  time.sleep(60)
os.mkdir(f'{workdir}/checkpoints')
conclude(0)
"""


@pytest.fixture
def fast(tmp_path, monkeypatch):
  """A function: seeds -> a sweep of them and its runner, with that train.py."""
  monkeypatch.setattr(runner, 'SECONDS', 0.02)
  (tmp_path / 'code').mkdir()
  (tmp_path / 'code/train.py').write_text(TRAIN)

  def make(*seeds, show=lambda rows: None, keep_checkpoints=True):
    given = dict(overrides=['--config.steps=9'], folder=str(tmp_path / 'it'))
    swept = sweep.write(plan(axes.axis('seed', seeds), **given), {'NPROC': '1'})
    slots = [machine.Slot('CPU', {})] * 2
    return swept, runner.Runner(
      swept,
      swept.points,
      slots=slots,
      code=tmp_path / 'code',
      show=show,
      keep_checkpoints=keep_checkpoints,
    )

  return make


def states(rows):
  return {int(row.point.labels['seed']): row.state for row in rows}


def counts(swept):
  return [int((swept.workdir(p) / 'count').read_text()) for p in swept.points]


def test_a_failure_stops_no_other_point_and_is_tried_again(fast, capsys):
  swept, first = fast(0, 1, 2)
  first.run()
  assert states(first.rows) == {0: 'finished', 1: 'diverged', 2: 'failed'}
  assert sweep.conclude(first, swept) == 1
  said = capsys.readouterr().out
  assert 'failed with exit code 1' in said and '  | no luck' in said
  _, again = fast(0, 1, 2)
  again.run()
  assert states(again.rows) == {0: 'finished', 1: 'diverged', 2: 'finished'}
  assert counts(swept) == [1, 1, 2]
  assert sweep.conclude(again, swept) == 0


def test_who_is_told_to_leave_tells_the_points_and_goes_on_later(fast):
  def show(rows):
    [row] = rows
    if os.path.exists(swept.workdir(row.point) / 'waits') and not it.leaving:
      it.leave(signal.SIGTERM, None)

  swept, it = fast(3, show=show)
  it.run()
  assert states(it.rows) == {3: 'partial'} and sweep.conclude(it, swept) == 4
  _, again = fast(3)
  again.run()
  assert states(again.rows) == {3: 'finished'} and counts(swept) == [2]


def test_checkpoints_of_what_has_ended_can_be_dropped(fast):
  swept, it = fast(0, keep_checkpoints=False)
  it.run()
  [workdir] = map(swept.workdir, swept.points)
  assert not (workdir / 'checkpoints').exists() and (workdir / 'outcome.json').exists()


def test_a_point_that_another_has_is_waited_for(fast, monkeypatch):
  alive = [True]
  monkeypatch.setattr(runner, 'living', lambda workdir: alive[0])

  def show(rows):
    seen.append(states(rows)[0])
    if len(seen) == 3:
      workdirs.conclude(swept.workdir(rows[0].point), 4, 'so')
      alive[0] = False

  seen = []
  swept, it = fast(0, show=show)
  it.run()
  assert seen[:3] == ['elsewhere'] * 3 and states(it.rows) == {0: 'finished'}
  assert counts(swept) == [1]


def test_what_another_has_ended_meanwhile_is_not_begun_again(fast):
  def show(rows):
    if states(rows)[2] == 'absent' and states(rows)[0] == 'running':
      workdirs.conclude(swept.workdir(rows[2].point), 3, 'by another')

  swept, it = fast(0, 1, 2, show=show)
  it.run()
  assert states(it.rows) == {0: 'finished', 1: 'diverged', 2: 'diverged'}
  assert not (swept.workdir(it.rows[2].point) / 'count').exists()


def test_what_begins_as_the_runner_is_told_to_leave_is_told_too(fast, monkeypatch):
  begin = runner.subprocess.Popen

  def popen(*args, **given):
    process = begin(*args, **given)
    if not it.leaving:
      it.leave()
    return process

  _, it = fast(3, 0)
  monkeypatch.setattr(runner.subprocess, 'Popen', popen)
  it.run()
  assert states(it.rows)[0] == 'absent' and states(it.rows)[3] != 'finished'
  assert all(row.state in ('absent', 'partial') for row in it.rows)


def test_damage_in_a_workdir_is_told_and_stops_no_other_point(fast, capsys):
  swept, it = fast(0, 1)
  workdir = swept.workdir(it.rows[0].point)
  storage.write(workdir / 'outcome.json', b'{')
  rows = sweep.rows(swept, swept.points)
  assert states(rows) == {0: 'failed', 1: 'absent'}
  assert 'outcome.json is damaged' in rows[0].message
  it.run()
  assert states(it.rows) == {0: 'finished', 1: 'diverged'}


# Points that train.

TRIVIAL = {
  **{'config.batch': 1, 'config.data.length': 16, 'config.model.width': 8},
  **{'config.model.depth': 1, 'config.model.ffn': 8, 'config.model.attn.heads': 2},
  **{'config.model.attn.head_dim': 4, 'config.eval.every': 5000, 'config.eval.rows': 2},
  **{'config.checkpoint.every': 5000, 'config.log.tensorboard': 'false'},
}


@pytest.mark.slow
@pytest.mark.full
def test_a_killed_sweep_goes_on_and_ends_in_the_same_bits(tmp_path):
  env = process.environment(tmp_path / 'cache', 1)

  def start(folder, *words):
    command = ['scripts/sweep.py', 'run', f'--dir={folder}', '--jobs=2', *words]
    return process.start(command, env, tmp_path / f'{folder.name}-{time.time()}')

  # One point has ended when the other is killed, which begins with it.
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  recipe = ['--config=configs/tiny.py:gate=none', '--axis=steps=2,3000']
  recipe += [f'--{knob}={value}' for knob, value in TRIVIAL.items()]
  start(whole, *recipe).wait().expect(0)
  killed.mkdir()
  for name in ('sweep.json', 'code.tar.gz'):
    shutil.copy(whole / name, killed / name)

  swept = sweep.open(killed)
  short, long = map(swept.workdir, swept.points)
  first = start(killed)
  assert first.until((short / 'outcome.json').exists)
  assert first.until(lambda: sweep.state(long, 3000).step > 10)
  first.kill()
  before = (short / 'metrics.jsonl').stat().mtime
  start(killed).wait().expect(0)

  sessions = lambda workdir: json.loads((workdir / 'run.json').read_text())['sessions']
  assert len(sessions(short)) == 1 and len(sessions(long)) == 2
  assert (short / 'metrics.jsonl').stat().mtime == before
  assert sessions(long)[1]['restored_step'] > 0
  exit_code, told = sweep.folders(storage.Path(whole), storage.Path(killed))
  assert exit_code == 0, told
