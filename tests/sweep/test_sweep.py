"""Sweeps: their grids are checked, and their points run once."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import rows as trained
from faults import process

from configs import axes, base, lr_sweep, rows
from gated import config, model, storage, sweep
from gated.plan import Config as Recipe
from gated.run import workdir as workdirs
from gated.sweep import folder, judge, machine, runner, table

# ml_collections warns for each recipe that it loads.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

script = importlib.import_module('scripts.sweep')

LR = axes.axis('optim.lr', [1e-3, 4e-3])


def plan(grid, recipe='configs/tiny.py', **options):
  options.setdefault('rule', judge.Rule(**base.rule()))
  return sweep.plan(recipe, grid, resolve=script.resolve, **options)


@functools.cache
def count(knobs):
  """A model's knobs as JSON -> the number of its parameters."""
  cfg = config.build(model.Config, json.loads(knobs), 'config.model')
  return model.count(model.abstract(cfg))


# --- Grids ---


def test_a_point_is_a_plain_command():
  swept = plan(axes.product(LR, axes.seeds(2)), overrides=['--config.steps=7'])
  point = swept.points[3]
  assert point.name.startswith('lr0.004-seed1-')
  assert swept.command(point) == (
    'train.py',
    '--config=configs/tiny.py',
    '--config.steps=7',
    '--config.optim.lr=0.004',
    '--config.seed=1',
    f'--workdir={swept.workdir(point)}',
  )
  c = script.resolve(point.command[1:])
  assert c == point.config
  assert (c['steps'], c['optim']['lr'], c['seed']) == (7, 4e-3, 1)


def test_the_name_of_a_point_depends_on_its_changes_only():
  few, many = plan(LR), plan(axes.chain(axes.axis('optim.lr', [2e-3]), LR))
  assert [p.name for p in few.points] == [p.name for p in many.points[1:]]
  assert few.folder != many.folder


def test_a_command_line_keeps_values_of_all_types():
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


def test_an_axis_may_hold_numpy_scalars():
  numbers = [*np.logspace(-3, -1, 3), np.float64(0.5)]
  grid = axes.axis('optim.lr', numbers)
  assert [p.labels for p in grid] == [{'lr': x} for x in ('0.001', '0.01', '0.1', '0.5')]
  grid = axes.product(grid, axes.choice('size', large={'model.ffn': np.int32(64)}))
  assert plan(grid).points[3].config['optim']['lr'] == 0.5


def test_a_label_of_a_boolean_includes_its_knob():
  points = plan(axes.axis('model.tied', [True, False])).points
  assert [p.name[:6] for p in points] == ['tiedTr', 'tiedFa']


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  recipe = script.recipe([f'--config={process.ROOT}/configs/tiny.py:gate=none'])
  assert recipe.spec == 'configs/tiny.py:gate=none'
  swept = plan(LR, recipe.spec)
  assert swept.folder.is_relative_to(tmp_path / 'sweeps')


BAD_GRIDS = {
  'config.optim.lrr is not a knob; did you mean config.optim.lr?': axes.axis(
    'optim.lrr', [1.0]
  ),
  'config.optim is not a knob': axes.axis('optim', [1.0]),
  'its grid is empty': [],
  'are the same run': axes.axis('optim.lr', [1e-3, 1e-3]),
  'config.optim.warmup=-1, but it must be at least 0': axes.axis('optim.warmup', [-1]),
  "config.optim.lr='fast', but a value of type float": axes.axis('optim.lr', ['fast']),
  "config.optim.name='sgd', but allowed are": axes.axis('optim.name', ['sgd']),
  'config.optim.lr=inf is not finite': axes.axis('optim.lr', [float('inf')]),
  'have the same labels, but change': [
    axes.Point({'size': 'small'}, {'model.ffn': n}) for n in (32, 64)
  ],
  "config.data.mixture='web@a' has a relative path": axes.axis('data.mixture', ['web@a']),
}


@pytest.mark.parametrize('message', BAD_GRIDS, ids=str)
def test_a_bad_grid_is_refused_before_anything_is_written(message, tmp_path):
  with pytest.raises(ValueError) as error:
    plan(BAD_GRIDS[message], folder=str(tmp_path / 'sweep'))
  assert message in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
  'arg, varied',
  [
    ('scale=test,seeds=1', {'variant', 'lr'}),
    ('scale=test,seeds=1,optimizer=both', {'variant', 'lr', 'optimizer'}),
    ('scale=paper,seeds=1,precision=both', {'variant', 'lr', 'precision'}),
    ('scale=proxy,seeds=2', {'variant', 'lr', 'seed'}),
  ],
)
def test_the_learning_rate_sweep_has_the_expected_axes(arg, varied):
  recipe = f'configs/lr_sweep.py:{arg}'
  swept = plan(lr_sweep.get_grid(arg), recipe)
  values = {}
  for point in swept.points:
    assert point.config['optim']['floor'] <= point.config['optim']['lr']
    for name, value in point.labels.items():
      values.setdefault(name, set()).add(value)
  assert {name for name, texts in values.items() if len(texts) > 1} == varied


def test_the_variants_of_the_learning_rate_sweep_have_equal_parameter_counts():
  arg = 'scale=test,seeds=1'
  points = plan(lr_sweep.get_grid(arg), f'configs/lr_sweep.py:{arg}').points
  # The FFN of a gated variant is smaller by the gate's parameters.
  counts = [count(json.dumps(p.config['model'])) for p in points]
  assert max(counts) < 1.01 * min(counts)


def planned(*words):
  return script.planned(*script.parser().parse_known_args(['run', *words]))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('recipe', 'points', 'changes'),
  [
    (
      'gate_design.py:scale=test,seeds=1',
      19,
      {'decay': '10.0', 'init': 'closed', 'inputs': 'rank:4', 'variant': 'headwise'},
    ),
    ('gate_design.py:positions,scale=test', 15, {'variant': 'g1_late_g2'}),
    ('retrofit.py:scale=test,seeds=2', 14, {'way': 'gates_first'}),
    ('transfer.py:scale=test,seeds=1', 18, {'variant': 'wide_mup', 'lr': '0.032'}),
    ('transfer.py:optimizer=muon', 63, {'variant': 'narrow', 'lr': '0.008'}),
  ],
)
def test_the_grids_of_gates_are_recipes_that_build(recipe, points, changes):
  swept = planned(f'--config=configs/{recipe}', '--config.init_from=/baseline')
  assert len({config.digest(p.config) for p in swept.points}) == points
  assert any(p.labels.items() >= changes.items() for p in swept.points)
  for point in swept.points:
    config.build(Recipe, point.config, 'config')


def test_all_points_may_start_from_weights_of_another_function():
  allow = '--allow_change=config.model.attn.rope_base'
  knob = '--config.model.attn.rope_base=1e6'
  swept = planned('--config=configs/tiny.py', '--seeds=2', knob, '--deterministic', allow)
  assert swept.flags == ('--deterministic', allow)
  assert all(point.command[-2:] == swept.flags for point in swept.points)


@pytest.mark.slow
@pytest.mark.parametrize('name', trained.TABLES)
@pytest.mark.parametrize('scale', rows.SCALES)
def test_the_grid_of_a_table_has_its_rows_with_their_published_numbers(name, scale):
  swept = planned(f'--config=configs/{name}.py:scale={scale}', '--seeds=2')
  table = trained.TABLES[name]
  assert swept.name == f'{name}-{scale}'
  assert [(p.labels['row'], p.config['seed']) for p in swept.points] == [
    (row, seed) for row in table.ROWS for seed in (0, 1)
  ]
  for point in swept.points:
    own = table.get_config(f'{point.labels["row"]},scale={scale}').to_dict()
    assert point.config == own | {'seed': point.config['seed']}
    assert point.config['paper']['row'] == point.labels['row']


def test_an_argument_of_a_table_holds_for_all_its_rows():
  points = planned('--config=configs/table2.py:scale=test,match=none').points
  assert len({p.config['model']['ffn'] for p in points}) == 2  # 28 and 48 layers.
  assert points[1].command == (
    'train.py',
    '--config=configs/table2.py:28l_4e-3_elementwise,scale=test,match=none',
  )


def test_a_named_row_runs_alone():
  [point] = planned('--config=configs/table4.py:g1_headwise,scale=test').points
  assert point.config['paper']['row'] == 'g1_headwise'


def test_a_knob_of_the_grid_cannot_be_an_override():
  with pytest.raises(ValueError, match=r'config\.optim\.lr is given, but an axis'):
    plan(LR, overrides=['--config.optim.lr=1e-3'])


def test_only_selects_points_by_their_labels():
  points = plan(axes.product(LR, axes.seeds(3))).points
  selected = sweep.only(points, 'lr=1e-3,seed=0,seed=2')
  assert [p.labels['seed'] for p in selected] == ['0', '2']
  assert {p.labels['lr'] for p in selected} == {'0.001'}
  assert sweep.only(points, '') == list(points)


@pytest.mark.parametrize(
  'selection, message',
  [('variant=a', 'the labels are lr, seed'), ('lr=2', 'lr has the values 0.001, 0.')],
)
def test_only_refuses_unknown_labels_and_values(selection, message):
  with pytest.raises(ValueError, match=message):
    sweep.only(plan(axes.product(LR, axes.seeds(2))).points, selection)


# --- The command line ---


def run(*words, expect=0):
  assert script.main([*map(str, words)]) == expect


@pytest.mark.parametrize(
  'words, message',
  [
    (['--config=configs/tiny.py'], 'has no get_grid: name its axes'),
    (['--config=configs/tiny.py', '--axis=optim.lrr=1'], 'did you mean config.optim.lr?'),
    (['--config=configs/tiny.py', '--axis=optim.lr=fast'], "lr='fast', but a value of"),
    (['--config=configs/tiny.py', '--axis=optim.lr='], 'its grid is empty'),
    (['--config=configs/tiny.py', '--axis==1'], 'is not KNOB=VALUE,VALUE'),
    (['--config=configs/tiny.py', '--axis=optim.lr'], 'is not KNOB=VALUE,VALUE'),
    (['--config=configs/tiny.py', '--seeds=0'], '--seeds=0 must be positive'),
    (['--config=configs/tinny.py', '--seeds=2'], 'did you mean --config=configs/tiny'),
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
    (['tests'], "unknown argument 'tests'; did you mean --dir=tests?"),
    (['--dir=nowhere'], 'is not a sweep: sweep.json is missing'),
  ],
)
def test_a_bad_command_is_refused_in_one_line(words, message, capsys):
  run('run', *words, expect=2)
  error = capsys.readouterr().err
  assert error.startswith('sweep.py: ') and message in error and error.count('\n') == 1


def test_a_local_run_refuses_a_bucket(capsys, monkeypatch):
  monkeypatch.setattr(sweep, 'write', lambda *_: pytest.fail('a sweep was written'))
  run('run', '--config=configs/tiny.py', '--seeds=2', '--dir=gs://bucket/a', expect=2)
  assert 'a bucket is for `scripts/sweep.py submit`' in capsys.readouterr().err


def test_a_recipe_outside_the_packed_sources_is_refused(tmp_path, capsys):
  shutil.copy(process.ROOT / 'configs/tiny.py', tmp_path / 'mine.py')
  run('run', f'--config={tmp_path}/mine.py', '--seeds=2', expect=2)
  assert 'configs, so a sweep could not carry it' in capsys.readouterr().err


def test_an_interrupt_or_a_read_error_is_one_line(capsys, monkeypatch):
  for error, expect in (KeyboardInterrupt(), 130), (PermissionError('not yours'), 2):

    def fail(folder, error=error):
      raise error

    monkeypatch.setattr(sweep, 'open', fail)
    run('status', 'a', expect=expect)
  assert capsys.readouterr().err == 'sweep.py: interrupted\nsweep.py: not yours\n'


@pytest.mark.slow
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
  output = capsys.readouterr().out
  assert '1 points, 1 at a time' in output and "sweep's sources" not in output
  monkeypatch.setattr(folder, 'pack', lambda root: b'edited since')
  run('run', *command)
  assert "points use the sweep's sources" in capsys.readouterr().out


# --- The folder ---


def test_a_moved_folder_is_enough_to_open_a_sweep(tmp_path):
  before = sweep.write(plan(LR, folder=str(tmp_path / 'a')), {'NPROC': '1'})
  shutil.move(tmp_path / 'a', tmp_path / 'b')
  moved = sweep.open(tmp_path / 'b')
  assert moved == dataclasses.replace(before, folder=moved.folder)
  first = moved.points[0]
  assert moved.command(first)[-1] == f'--workdir={tmp_path}/b/points/{first.name}'
  assert moved.made['environment'] == {'NPROC': '1'}
  sources = sweep.unpacked(moved)
  assert (sources / 'train.py').read_bytes() == (process.ROOT / 'train.py').read_bytes()
  assert sources == sweep.unpacked(moved)


def test_the_same_sources_are_packed_to_the_same_bytes(tmp_path):
  for root in ('a', 'b'):
    (tmp_path / root / 'gated').mkdir(parents=True)
    (tmp_path / root / 'gated/x.py').write_text('x = 1\n')
    (tmp_path / root / 'train.py').write_text('pass\n')
    (tmp_path / root / 'gated/__pycache__').mkdir()
    (tmp_path / root / 'gated/__pycache__/x.pyc').write_text(root)
  os.utime(tmp_path / 'b/train.py', (1, 1))
  assert folder.pack(tmp_path / 'a') == folder.pack(tmp_path / 'b')


def test_sources_with_another_digest_are_refused(tmp_path):
  swept = sweep.write(plan(LR, folder=str(tmp_path)))
  (tmp_path / 'code.tar.gz').write_bytes(folder.pack(tmp_path))
  with pytest.raises(ValueError, match=r'does not match sweep\.json'):
    sweep.unpacked(swept)


def test_a_folder_of_another_sweep_is_refused_with_the_differences(tmp_path):
  before = sweep.write(plan(LR, folder=str(tmp_path)))
  assert sweep.write(plan(LR, folder=str(tmp_path))) == before
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


def test_a_forged_sweep_is_refused(tmp_path):
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


def test_labels_with_markup_are_shown_literally(tmp_path, capsys):
  grid = axes.choice('[red]', **{'[/x]': {'seed': 1}, '[bold]': {'seed': 2}})
  sweep.write(plan(grid, folder=str(tmp_path)))
  run('status', tmp_path)
  output = capsys.readouterr().out
  assert '[red]' in output and '[/x]' in output and '[bold]' in output


# --- The state of a point ---


def records(workdir, *steps, loss=3.0):
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / 'metrics.jsonl', 'ab') as file:
    for step in steps:
      record = {'step': step, 'kind': 'train', 'loss': loss, 'spikes': step // 4}
      file.write(json.dumps(record | {'step_seconds': 0.5}).encode() + b'\n')


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
def test_the_workdir_determines_the_state_of_a_point(code, step, state, tmp_path):
  if step:
    records(tmp_path, *range(1, step + 1))
  if code is not None:
    workdirs.conclude(storage.Path(tmp_path), code, 'a reason')
  message = '' if code is None else 'a reason'
  assert sweep.state(storage.Path(tmp_path), 9) == (state, step, message)


def test_skipped_updates_are_in_the_status(tmp_path, capsys):
  swept = plan(LR, folder=str(tmp_path))
  first, second = (
    runner.Row(p, swept.workdir(p), 'finished', 4) for p in swept.points[:2]
  )
  table.show([first, second], swept)
  assert 'spikes  left' in capsys.readouterr().out
  first.skipped, second.skipped = 3, 2
  table.show([first, second], swept)
  out = capsys.readouterr().out
  assert f'{first.point.name}: 3 of 4 updates were skipped' in out
  assert f'{second.point.name}: ' not in out and 'spikes  skipped  left' in out


def test_control_characters_of_a_workdir_are_shown_as_escapes(tmp_path, capsys):
  told = {'code': 7, 'step': 4, 'told': 'full \x1b[2J', 'time': 0.0}
  storage.write_json(storage.Path(tmp_path) / 'outcome.json', told)
  swept = plan(LR, folder=str(tmp_path / 'a\x1b[31m'))
  row = runner.Row(swept.points[0], storage.Path(tmp_path))
  row.update()
  assert row.message == 'full \\x1b[2J'
  table.show([row], swept)
  shown, _, message = capsys.readouterr().out.partition(' failed: ')
  assert '\x1b' not in shown and message.startswith('full \\x1b[2J')


def test_a_row_follows_the_last_training_record(tmp_path):
  records(tmp_path, 1, 2, 3, 4)
  row = runner.Row(plan(LR).points[0], storage.Path(tmp_path), 'running')
  row.follow()
  assert (row.step, row.loss, row.spikes, row.seconds) == (4, '3.0000', 1, 0.5)
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 9, "kind": "heldout"}\n{"step": 10, "ki')
  row.follow()
  assert row.step == 4
  (tmp_path / 'metrics.jsonl').unlink()
  records(tmp_path, 5, loss='NaN')
  row.follow()
  assert (row.step, row.loss) == (5, 'NaN')


# --- Points at the same time ---


def test_each_gpu_runs_one_point_and_more_points_share_its_memory(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6')
  rooms = {jobs: machine.room([], jobs) for jobs in (0, 1, 6)}
  visible = lambda room: [s.environment['CUDA_VISIBLE_DEVICES'] for s in room.slots]
  assert visible(rooms[0]) == ['4', '5', '6'] and visible(rooms[1]) == ['4,5,6']
  assert visible(rooms[6]) == ['4', '5', '6', '4', '5', '6']
  assert rooms[6].slots[0].environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.450'


def test_cores_and_memory_limit_the_points_on_a_cpu(monkeypatch):
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


# --- Points that run a fast train.py ---

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
  """A function: seeds -> a sweep of them and its runner, with TRAIN as train.py."""
  monkeypatch.setattr(runner, 'SECONDS', 0.02)
  (tmp_path / 'code').mkdir()
  (tmp_path / 'code/train.py').write_text(TRAIN)

  def make(*seeds, show=lambda rows: None, keep_checkpoints=True):
    options = dict(overrides=['--config.steps=9'], folder=str(tmp_path / 'sweep'))
    swept = sweep.write(plan(axes.axis('seed', seeds), **options), {'NPROC': '1'})
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


def test_a_failed_point_stops_no_other_and_is_retried(fast, capsys):
  swept, first = fast(0, 1, 2)
  first.run()
  assert states(first.rows) == {0: 'finished', 1: 'diverged', 2: 'failed'}
  assert sweep.conclude(first, swept) == 1
  output = capsys.readouterr().out
  assert 'failed with exit code 1' in output and '  | no luck' in output
  _, again = fast(0, 1, 2)
  again.run()
  assert states(again.rows) == {0: 'finished', 1: 'diverged', 2: 'finished'}
  assert counts(swept) == [1, 1, 2]
  assert sweep.conclude(again, swept) == 0


def test_a_stop_signal_reaches_the_points_and_the_sweep_resumes(fast):
  def show(rows):
    [row] = rows
    if os.path.exists(swept.workdir(row.point) / 'waits') and not first.leaving:
      first.leave(signal.SIGTERM, None)

  swept, first = fast(3, show=show)
  first.run()
  assert states(first.rows) == {3: 'partial'} and sweep.conclude(first, swept) == 4
  _, again = fast(3)
  again.run()
  assert states(again.rows) == {3: 'finished'} and counts(swept) == [2]


def test_checkpoints_of_ended_points_can_be_removed(fast):
  swept, small = fast(0, keep_checkpoints=False)
  small.run()
  [workdir] = map(swept.workdir, swept.points)
  assert not (workdir / 'checkpoints').exists() and (workdir / 'outcome.json').exists()


def test_a_runner_waits_for_a_point_of_another_runner(fast, monkeypatch):
  alive = [True]
  monkeypatch.setattr(runner, 'living', lambda workdir: alive[0])

  def show(rows):
    seen.append(states(rows)[0])
    if len(seen) == 3:
      workdirs.conclude(swept.workdir(rows[0].point), 4, 'a reason')
      alive[0] = False

  seen = []
  swept, waiting = fast(0, show=show)
  waiting.run()
  assert seen[:3] == ['elsewhere'] * 3 and states(waiting.rows) == {0: 'finished'}
  assert counts(swept) == [1]


def test_a_point_that_another_runner_ended_is_not_run(fast):
  def show(rows):
    if states(rows)[2] == 'absent' and states(rows)[0] == 'running':
      workdirs.conclude(swept.workdir(rows[2].point), 3, 'by another')

  swept, late = fast(0, 1, 2, show=show)
  late.run()
  assert states(late.rows) == {0: 'finished', 1: 'diverged', 2: 'diverged'}
  assert not (swept.workdir(late.rows[2].point) / 'count').exists()


def test_a_process_that_starts_during_a_stop_signal_gets_it_too(fast, monkeypatch):
  start = runner.subprocess.Popen

  def popen(*args, **options):
    process = start(*args, **options)
    if not leaving.leaving:
      leaving.leave()
    return process

  _, leaving = fast(3, 0)
  monkeypatch.setattr(runner.subprocess, 'Popen', popen)
  leaving.run()
  assert states(leaving.rows)[0] == 'absent' and states(leaving.rows)[3] != 'finished'
  assert all(row.state in ('absent', 'partial') for row in leaving.rows)


def test_a_damaged_workdir_is_reported_and_stops_no_other_point(fast, capsys):
  swept, second = fast(0, 1)
  workdir = swept.workdir(second.rows[0].point)
  storage.write(workdir / 'outcome.json', b'{')
  rows = sweep.rows(swept, swept.points)
  assert states(rows) == {0: 'failed', 1: 'absent'}
  assert 'outcome.json is damaged' in rows[0].message
  second.run()
  assert states(second.rows) == {0: 'finished', 1: 'diverged'}


# --- Points that train ---

TRIVIAL = {
  **{'config.batch': 1, 'config.data.length': 16, 'config.model.width': 8},
  **{'config.model.depth': 1, 'config.model.ffn': 8, 'config.model.attn.heads': 2},
  **{'config.model.attn.head_dim': 4, 'config.eval.every': 5000, 'config.eval.rows': 2},
  **{'config.checkpoint.every': 5000, 'config.log.tensorboard': 'false'},
}


@pytest.mark.slow
@pytest.mark.full
def test_a_killed_sweep_resumes_with_the_same_bits(tmp_path):
  env = process.environment(tmp_path / 'cache', 1)

  def start(folder, *words):
    command = ['scripts/sweep.py', 'run', f'--dir={folder}', '--jobs=2', *words]
    return process.start(command, env, tmp_path / f'{folder.name}-{time.time()}')

  # The short point has ended when the long one is killed.
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
  exit_code, report = sweep.folders(storage.Path(whole), storage.Path(killed))
  assert exit_code == 0, report
