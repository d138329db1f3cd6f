"""Points that are added to a sweep: more values of its axes, or a changed grid."""

import importlib
import re
import tarfile
from dataclasses import replace

import pytest
from faults import process

from configs import lr_sweep
from gated import sweep
from gated.sweep import folder, launch, machine, runner

# ml_collections warns for each recipe that it loads.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

script = importlib.import_module('scripts.sweep')

TRAIN = """
import json, os, sys
workdir = sys.argv[-1].partition('=')[2]
os.makedirs(workdir, exist_ok=True)
with open(f'{workdir}/starts', 'a') as file:
  file.write('x')
with open(f'{workdir}/outcome.json', 'w') as file:
  json.dump({'code': 0, 'step': 300}, file)
"""
TINY = '--config=configs/tiny.py', '--config.steps=9'
GRID = '--axis=optim.lr=1e-3,4e-3', '--seeds=3'


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A function: arguments of `sweep.py run` -> the sweep after it; train.py is TRAIN."""
  monkeypatch.setattr(folder, 'ROOT', tmp_path / 'checkout')
  monkeypatch.setattr(runner, 'SECONDS', 0.02)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  (tmp_path / 'checkout').mkdir()
  (tmp_path / 'checkout/train.py').write_text(TRAIN)

  def run(*words, expect=0):
    assert script.main(['run', f'--dir={tmp_path}/sweep', *words]) == expect
    return sweep.open(tmp_path / 'sweep')

  return run


def starts(swept):
  """How often each point was started; 0 for a point that was not."""
  files = [swept.workdir(p) / 'starts' for p in swept.points]
  return [len(f.read_text()) if f.exists() else 0 for f in files]


def values(swept, *names):
  return [tuple(p.labels.get(name) for name in names) for p in swept.points]


@pytest.mark.slow
def test_a_sweep_of_6_points_grown_to_10_runs_4(run, capsys):
  small = run(*TINY, *GRID)
  assert len(small.points) == 6 and starts(small) == [1] * 6
  capsys.readouterr()
  grown = run('--seeds=5')
  assert grown.points[:6] == small.points and starts(grown) == [1] * 10
  assert values(grown, 'lr', 'seed')[6:] == [
    ('0.001', '3'),
    ('0.001', '4'),
    ('0.004', '3'),
    ('0.004', '4'),
  ]
  assert 'added 4 points to 6: lr0.001-seed3-' in capsys.readouterr().out
  [addition] = grown.made['added']
  assert addition['points'] == [p.name for p in grown.points[6:]]


@pytest.mark.slow
def test_new_values_of_all_axes_are_combined(run):
  run(*TINY, *GRID)
  grown = run('--axis=optim.lr=1e-3,2e-3,4e-3', '--seeds=5')
  assert len(grown.points) == 15 and starts(grown) == [1] * 15
  assert set(values(grown, 'lr', 'seed')) == {
    (lr, str(seed)) for lr in ('0.001', '0.002', '0.004') for seed in range(5)
  }


@pytest.mark.slow
def test_an_axis_that_is_not_named_keeps_its_values(run):
  run(*TINY, *GRID)
  grown = run('--axis=optim.lr=2e-3')
  assert values(grown, 'lr', 'seed')[6:] == [('0.002', str(seed)) for seed in range(3)]


@pytest.mark.slow
def test_the_same_values_again_add_nothing(run, capsys):
  small = run(*TINY, *GRID)
  capsys.readouterr()
  assert run('--seeds=2', '--axis=optim.lr=1e-3') == small
  assert 'added' not in capsys.readouterr().out and starts(small) == [1] * 6


@pytest.mark.slow
def test_old_points_get_the_label_of_a_new_axis(run):
  run(*TINY, '--axis=optim.lr=1e-3,4e-3')
  grown = run('--axis=model.attn.qk_norm=True,False')
  assert values(grown, 'lr', 'qk_norm') == [
    ('0.001', 'True'),
    ('0.004', 'True'),
    ('0.001', 'False'),
    ('0.004', 'False'),
  ]
  assert [p.config['model']['attn']['qk_norm'] for p in grown.points[2:]] == [False] * 2
  # Points whose label is not among their changes can be extended as well.
  more = run('--axis=optim.lr=2e-3')
  assert values(more, 'lr', 'qk_norm')[4:] == [('0.002', 'True'), ('0.002', 'False')]


@pytest.mark.slow
def test_only_limits_the_points_that_are_added(run):
  run(*TINY, *GRID)
  grown = run('--seeds=4', '--only=lr=4e-3')
  assert values(grown, 'lr', 'seed')[6:] == [('0.004', '3')]


def test_a_changed_grid_of_the_same_recipe_adds_its_new_points(run, capsys):
  small = run(*TINY, '--axis=optim.lr=1e-3,4e-3')
  capsys.readouterr()
  grown = run(*TINY, '--axis=optim.lr=2e-3,4e-3', '--seeds=2')
  output = capsys.readouterr().out
  # lr=4e-3 with seed 0 is the old point.
  assert [p.name for p in grown.points[:2]] == [p.name for p in small.points]
  assert values(grown, 'lr', 'seed') == [
    ('0.001', '0'),
    ('0.004', '0'),
    ('0.002', '0'),
    ('0.002', '1'),
    ('0.004', '1'),
  ]
  assert 'added 3 points to 2' in output
  assert '1 points of the folder are not in this grid; they stay' in output
  assert starts(grown) == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
  'words, difference',
  [
    (
      ['--config=configs/tiny.py', '--config.steps=8'],
      'config.steps: 9 in the folder, 8',
    ),
    (
      ['--config=configs/lr_sweep.py:scale=test', '--only=lr=0.1'],
      r'--config: configs/tiny\.py in the folder, configs/lr_sweep\.py:scale=test now',
    ),
    ([*TINY, '--deterministic'], "flags: '' in the folder, '--deterministic' now"),
    (
      ['--config=configs/tiny.py:gate=none', TINY[1]],
      'position: .* in the folder, .none',
    ),
  ],
)
def test_points_of_another_recipe_are_refused(words, difference, run, capsys):
  small = run(*TINY, '--axis=optim.lr=1e-3,4e-3')
  more = [] if 'lr_sweep' in words[0] else ['--axis=optim.lr=8e-3']
  assert run(*words, *more, expect=2) == small
  error = capsys.readouterr().err
  assert 'holds another sweep; differences:' in error
  assert re.search(difference, error), error


@pytest.mark.slow
@pytest.mark.parametrize(
  'words, message',
  [
    (['--axis=optim.b1=0.8', '--config.steps=8'], 'needs --config: an existing sweep'),
    (['--axis=steps=8'], '--config.steps is given, but an axis of the grid changes it'),
    (['--axis=optim.lrr=8'], 'config.optim.lrr is not a knob'),
    (['--axis=optim.warmup=-1'], 'config.optim.warmup=-1, but it must be at least 0'),
    (['--seeds=5', '--only=seed=9'], 'seed has the values 0, 1, 2, 3, 4'),
  ],
)
def test_a_bad_addition_is_refused_and_nothing_is_written(words, message, run, capsys):
  small = run(*TINY, '--axis=optim.lr=1e-3,4e-3')
  assert run(*words, expect=2) == small
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_is_added_to_the_grid_of_its_recipe(run, monkeypatch, capsys):
  recipe = '--config=configs/lr_sweep.py:scale=test,seeds=1'
  some = '--only=lr=0.1,variant=baseline'
  small = run(recipe, some)
  run('--axis=model.attn.qk_norm=False', expect=2)
  assert 'but the point variant=no_qk_norm, lr=0.001' in capsys.readouterr().err
  run('--axis=variant=sandwich', expect=2)
  assert 'add one to the get_grid of the recipe' in capsys.readouterr().err
  more = (*lr_sweep.VARIANTS['test'], 'sandwich')
  monkeypatch.setitem(lr_sweep.VARIANTS, 'test', more)
  grown = run(recipe, some)
  assert grown.points[: len(small.points)] == small.points
  assert {p.labels['variant'] for p in grown.points[len(small.points) :]} == {'sandwich'}


@pytest.mark.slow
def test_a_table_grows_by_seeds_of_its_rows(run):
  run('--config=configs/table4.py:scale=test', '--only=row=baseline')
  grown = run('--seeds=2', '--only=row=g1_headwise')
  point = grown.points[-1]
  assert len(grown.points) == 8 and point.labels == {'row': 'g1_headwise', 'seed': '1'}
  assert point.command == (
    'train.py',
    '--config=configs/table4.py:g1_headwise,scale=test',
    '--config.seed=1',
  )
  assert point.config['paper']['published']['ppl'] == 5.792
  assert set(values(grown, 'seed')[:7]) == {('0',)}


def test_a_submitted_sweep_gets_no_points(run, tmp_path, capsys):
  small = run(*TINY, '--seeds=2')
  (tmp_path / 'sweep' / launch.RECORD).write_text('{}')
  words = ['submit', f'--dir={tmp_path}/sweep', '--seeds=3', '--on=slurm']
  assert script.main(words) == 2
  assert 'cannot get 1 more points' in capsys.readouterr().err
  assert sweep.open(tmp_path / 'sweep') == small


def test_points_that_two_processes_add_are_all_kept(run, tmp_path):
  run(*TINY, '--seeds=1')
  slow, fast = (
    script.requested(
      *script.parser().parse_known_args(['run', f'--dir={tmp_path}/sweep', words])
    )
    for words in ('--seeds=2', '--axis=seed=7')
  )
  sweep.write(fast.swept)
  sweep.write(slow.swept)
  assert values(sweep.open(tmp_path / 'sweep'), 'seed') == [('0',), ('7',), ('1',)]


def test_a_recipe_of_older_sources_does_not_stop_a_sweep(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  words = ['run', *TINY, '--seeds=2']
  swept = script.planned(*script.parser().parse_known_args(words))
  for point in swept.points:
    del point.config['log']['probes']
  assert machine.room(swept.points, 1).environment.keys() == {'NPROC'}


@pytest.mark.full
def test_new_points_are_resolved_with_the_sources_of_the_sweep(tmp_path, monkeypatch):
  # The sources of the sweep have other steps than the current ones.
  other = tmp_path / 'checkout'
  (tmp_path / 'packed').write_bytes(folder.pack(process.ROOT))
  with tarfile.open(tmp_path / 'packed') as archive:
    archive.extractall(other, filter='data')
  tiny = other / 'configs/tiny.py'
  tiny.write_text(tiny.read_text().replace('return c', 'c.steps = 77\n  return c'))
  words = [f'--dir={tmp_path}/sweep', '--axis=optim.lr=1e-3,4e-3']
  args = script.parser().parse_known_args(
    ['run', '--config=configs/tiny.py', '--config.steps=77', *words]
  )
  swept = script.planned(*args)
  points = [
    p._replace(command=tuple(w for w in p.command if w != '--config.steps=77'))
    for p in swept.points
  ]
  monkeypatch.setattr(folder, 'ROOT', other)
  sweep.write(replace(swept, points=tuple(points), overrides=()))
  monkeypatch.undo()
  grow = lambda *words: script.requested(
    *script.parser().parse_known_args(['run', f'--dir={tmp_path}/sweep', *words])
  )
  growth = grow('--seeds=2')
  assert [p.config['steps'] for p in growth.added] == [77, 77]
  with pytest.raises(ValueError, match=r'config\.steps: 77 in the folder, \d+ now'):
    grow('--config=configs/tiny.py', '--axis=optim.lr=2e-3')


@pytest.mark.slow
def test_a_report_spans_several_sweeps_or_says_what_differs(run, tmp_path, capsys):
  recipe = '--config=configs/tiny.py', '--axis=optim.lr=1e-3,4e-3'
  folders = [str(tmp_path / name) for name in ('a', 'b', 'longer')]
  for folder_of, words in zip(folders, [[], ['--seeds=2'], []], strict=True):
    steps = f'--config.steps={10 if folder_of.endswith("longer") else 9}'
    planned = script.planned(
      *script.parser().parse_known_args(
        ['run', *recipe, steps, f'--dir={folder_of}', *words]
      )
    )
    sweep.write(planned)
  capsys.readouterr()
  assert script.main(['report', *folders[:2]]) == 0
  page = tmp_path / 'report-a-b/index.html'
  assert page.exists() and str(page) in capsys.readouterr().out
  # The points of a are in b too.
  assert len((page.parent / 'points.csv').read_text().splitlines()) == 1 + 4
  assert script.main(['report', folders[0], folders[2]]) == 2
  error = capsys.readouterr().err
  assert 'not comparable' in error and 'config.steps: ' in error
