"""Campaigns: the order of their points, what they refuse, and what a kill leaves."""

import csv
import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import made
import pytest
from faults import process

from configs import base
from experiments.sink import recipe
from gated import config, storage, sweep
from gated.evidence import campaign, experiment, result, summary
from gated.run import outcome
from gated.sweep import judge, machine

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = Path(__file__).resolve().parents[2]
sweeps = importlib.import_module('scripts.sweep')
script = importlib.import_module('scripts.campaign')


def opened(root, name='sink', **settings):
  """The experiment `sink` at test scale under another name, with results in `root`."""
  swept = sweep.plan(
    'experiments/sink/recipe.py:scale=test',
    recipe.get_grid('scale=test'),
    resolve=sweeps.resolve,
    rule=config.build(judge.Rule, base.rule(), 'rule'),
  )
  known = {'CLAIMS': ('C9', 'C10'), 'BUDGET': recipe.BUDGET, 'choose': recipe.choose}
  return experiment.opened(
    storage.path(root), name, 'test', swept=swept, settings=known | settings
  )


def measured(point, rate=0.0, attention=0.0, name='sink', **fields):
  """A point of the sweep -> a finished result with these sink rates."""
  value = lambda x: {'value': x, 'layers': [x, x]}
  known = dict(
    experiment=name,
    scale='test',
    point=point.name,
    labels=point.labels,
    changes=point.changes,
    config=json.loads(json.dumps(point.config)),
    state='finished',
    steps=point.steps,
    tokens=experiment.tokens(point),
    parameters=1,
    loss=1.5,
    spikes=0.0,
    probes={
      'sink_rate_64': value(rate),
      'first_token_attention_documents_from_64': value(attention),
    },
    curves={},
    data='data',
    code='code',
    machine='1 x cpu',
    versions={},
    seconds=1.0,
    tokens_per_second=100.0,
    command='train.py',
  )
  return result.Result(**known | fields)


def names(points):
  return [(p.labels['condition'], p.labels['arm']) for p in points]


def test_the_search_tries_baselines_until_one_has_a_sink(tmp_path, monkeypatch):
  monkeypatch.setitem(recipe.SINK, 'test', (0.15, 0.05))
  e = opened(tmp_path)
  first, second = e.wanted()
  assert {p.labels['arm'] for p in (first, second)} == {'baseline'}
  # One of the two conditions is not enough.
  e.results.append(measured(first, rate=0.2, attention=0.04))
  assert e.wanted() == [second]
  e.results.append(measured(second, rate=0.16, attention=0.06))
  condition = second.labels['condition']
  assert names(e.wanted()) == [(condition, 'elementwise'), (condition, 'headwise')]


def test_an_unmasked_model_is_judged_by_the_first_token_of_its_row(tmp_path):
  e = opened(tmp_path)
  one = measured(e.swept.points[0], attention=0.3)
  assert recipe.first_token_attention(one) == 0.3
  one.config['model']['mask_documents'] = False
  assert math.isnan(recipe.first_token_attention(one))


@pytest.mark.slow
def test_every_gated_arm_has_the_parameters_of_its_baseline():
  for scale in ('gpu', 'test'):
    sizes = {}
    for point in recipe.get_grid(f'scale={scale}'):
      c = recipe.get_config(f'scale={scale}')
      c.update_from_flattened_dict(point.changes)
      sizes[tuple(point.labels.values())] = _parameters(c.model.to_dict())
    for (condition, arm, *_), size in sizes.items():
      baseline = sizes[condition, 'baseline']
      assert abs(size - baseline) <= 0.025 * baseline, (condition, arm)


def _parameters(knobs):
  from gated import model

  return model.count(model.abstract(config.build(model.Config, knobs, 'config.model')))


def test_a_point_beyond_the_budget_is_not_wanted(tmp_path):
  e = opened(tmp_path)
  each = experiment.tokens(e.swept.points[0])
  small = opened(tmp_path, BUDGET={'test': 2 * each - 1})
  assert len(e.wanted()) == 2
  assert small.wanted() == e.wanted()[:1]


def test_the_cheapest_open_claim_comes_first(tmp_path):
  cheap, dear = opened(tmp_path, 'cheap'), opened(tmp_path, 'dear')
  open_claims = {'cheap': 2, 'dear': 1}
  order = lambda *es: [
    s.experiment.name for s in campaign.ordered(es, lambda e: open_claims[e.name])
  ]
  assert order(dear, cheap) == ['cheap', 'cheap', 'dear', 'dear']
  open_claims['cheap'] = 0  # Decided: last.
  assert order(cheap, dear) == ['dear', 'dear', 'cheap', 'cheap']


@pytest.mark.slow
def test_a_finished_model_is_probed_even_if_its_point_is_no_longer_wanted(tmp_path):
  e = opened(tmp_path, choose=lambda points, results: [points[1].name])
  root = storage.path(tmp_path)
  swept = sweep.write(campaign.joined([e], root))
  shown = []
  work = campaign.Campaign(
    root,
    [e],
    swept,
    seconds=60,
    whole=False,
    open_claims=lambda e: 1,
    view=shown.append,
  )
  row = next(iter(swept.points))
  workdir = swept.workdir(row)
  (workdir / 'checkpoints').mkdir(parents=True)
  outcome.write(workdir, outcome.Outcome(0, row.steps))
  run = work.runner([machine.Slot('CPU', {})], tmp_path)
  work._update(run.rows)
  assert [r.point.name for r in run.rows] == [row.name, swept.points[1].name]
  (eval_, *words) = run._after(row)
  assert eval_ == 'eval.py' and '--probe' in words
  assert len(shown[0]) == len(swept.points)
  # Without its checkpoint it cannot be probed; its result is what training logged.
  (workdir / 'checkpoints').rmdir()
  (workdir / 'run.json').write_text(json.dumps(RUN))
  (workdir / 'metrics.jsonl').write_text(
    ''.join(json.dumps(r | {'time': 0.0}) + '\n' for r in _records(row.steps))
  )
  work._update(run.rows)
  assert [r.point.name for r in run.rows] == [swept.points[1].name]
  (one,) = result.read_all(root, 'sink', 'test')
  assert (one.point, one.loss) == (e.swept.points[0].name, 1.25)
  assert one.probes == {'rows': 0, 'sink_rate_64': {'value': 0.5}}
  assert one.seconds == 10 * 0.5 + 10 * 0.25
  assert one.curves['train'] == {'step': [0, 10, 20], 'loss': [3.0, 2.0, 1.5]}
  assert (
    one.tokens == experiment.tokens(row) and one.config['data']['mixture'] == 'stdlib'
  )
  # A figure and a table follow from the result alone.
  path = summary.write(root, 'sink', 'test')
  (line,) = csv.DictReader(path.read_text().splitlines())
  assert (line['condition'], line['arm']) == ('decay0.5-lr8e-3', 'baseline')
  assert (line['heldout_loss'], line['sink_64'], line['probed_rows']) == (
    '1.25',
    '0.5',
    '0',
  )
  assert len(storage.read(path.with_suffix('.svg'), 1 << 24)) > 10_000


def test_runs_without_probes_are_drawn_as_the_losses_of_their_arms():
  decays = {'0.004': '0.8', '0.008': '0.4'}
  labels = lambda arm, lr, seed: {
    'arm': arm,
    'lr': lr,
    'decay': decays[lr],
    'seed': f'{seed}',
  }
  results = [
    made.made(arm, labels=labels(arm, lr, k), loss=loss)
    for arm, lr, losses in (
      ('baseline', '0.004', (1.5, 1.7)),
      ('baseline', '0.008', (1.8,)),
      ('headwise', '0.004', (1.4,)),
      ('elementwise', '0.008', (1.3, 1.4)),
      ('elementwise', '0.004', (1.9,)),
    )
    for k, loss in enumerate(losses)
  ]
  figure = summary.figure(results)
  (ax,) = figure.axes
  rows = [label.get_text() for label in ax.get_yticklabels()]
  assert rows == ['elementwise', 'headwise', 'baseline']
  low, high, line = (own.get_xydata().tolist() for own in ax.get_lines())
  assert low == [[1.5, 2], [1.7, 2], [1.4, 1], [1.9, 0]]
  assert high == [[1.8, 2], [1.3, 0], [1.4, 0]]
  assert [x for x, _ in line] == pytest.approx([1.6, 1.6])
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ['lr 0.004, decay 0.8', 'lr 0.008, decay 0.4']


def test_rates_of_one_decay_are_drawn_as_a_line_for_each_arm_of_the_setting():
  def one(arm, lr, seed=0, loss=1.5, decay='0.8', **knobs):
    labels = {'arm': arm, 'lr': lr, 'decay': decay, 'seed': f'{seed}'}
    return made.made(arm, labels=labels, loss=loss, seed=seed, **knobs)

  own = [one('baseline', '0.008', k, loss) for k, loss in enumerate((1.6, 1.8))]
  own += [one('baseline', '0.016', loss=math.nan), one('elementwise', '0.016')]
  own += [one('baseline', '0.032', decay='0.4')]
  alike = [one('baseline', '0.004', loss=1.4), one('baseline', '0.008', loss=1.0)]
  others = [
    one('baseline', '0.004', loss=1.0, knobs={'steps': 7}),
    one('headwise', '0.004'),
  ]
  (ax,) = summary.figure(own, [*alike, *others]).axes
  mean, seeds, crosses, *gate = (line.get_xydata().tolist() for line in ax.get_lines())
  assert mean == [[0.004, 1.4], [0.008, pytest.approx(1.7)]]
  assert sorted(seeds) == [[0.004, 1.4], [0.008, 1.6], [0.008, 1.8]]
  assert crosses == [[0.016, 0.97]], 'a diverged run'
  assert gate == [[[0.016, 1.5]], [[0.016, 1.5]], []]


RUN = {
  'config': {},
  'data': {'sha256': 'data'},
  'sessions': [{'devices': 1, 'device_kind': 'cpu', 'versions': {}}],
}


def _records(steps):
  train = {'kind': 'train', 'tokens_per_second': 8.0}
  assert steps == 20
  return [
    {'kind': 'train', 'step': 0, 'loss': 3.0},
    train | {'step': 10, 'loss': 2.0, 'step_seconds': 0.5},
    train | {'step': 20, 'loss': 1.5, 'step_seconds': 0.25},
    {'kind': 'probes', 'step': 20, 'sink_rate_64': 0.5},
    {'kind': 'heldout', 'step': 20, 'loss': 1.25},
  ]


def test_a_folder_of_a_dataset_is_no_part_of_a_result():
  assert result._anywhere('/a/b/c@code=2,gs://x/d,stdlib') == 'c@code=2,d,stdlib'


def test_results_survive_a_round_trip_and_merge(tmp_path):
  e = opened(tmp_path / 'a')
  one, two = (measured(p, loss=math.nan, state='diverged') for p in e.wanted())
  a, b = storage.path(tmp_path / 'a'), storage.path(tmp_path / 'b')
  path = result.write(a, one)
  assert path.parts[-4:-1] == ('sink', 'results', 'test')
  assert dataclasses.astuple(result.read(path))[1:] != ()
  assert math.isnan(result.read(path).loss)
  same = dataclasses.replace(result.read(path), loss=0.0)
  assert same == dataclasses.replace(one, loss=0.0)
  result.write(b, two)
  copied, kept = result.merge(b, a)
  assert (len(copied), kept) == (1, [])
  assert {r.point for r in result.read_all(a, 'sink', 'test')} == {one.point, two.point}
  assert result.merge(b, a)[0] == []  # The second time there is nothing to copy.


def test_results_of_another_recipe_are_refused(tmp_path):
  e = opened(tmp_path / 'a')
  one = measured(e.wanted()[0])
  other = dataclasses.replace(one, config=json.loads(json.dumps(one.config)))
  other.config['optim']['b2'] = 0.5
  a, b = storage.path(tmp_path / 'a'), storage.path(tmp_path / 'b')
  result.write(a, other)
  with pytest.raises(ValueError, match=r'config.optim.b2 was 0.5 and is 0.95'):
    opened(tmp_path / 'a')
  result.write(b, one)
  with pytest.raises(ValueError, match=r'differ in their recipes: config.optim.b2'):
    result.merge(b, a)
  with pytest.raises(ValueError, match='holds no experiments/NAME/results'):
    result.merge(storage.path(tmp_path), a)


def test_a_knob_that_was_added_since_changes_nothing(tmp_path):
  e = opened(tmp_path)
  one = measured(e.wanted()[0])
  del one.config['optim']['b2']
  one.config['data']['mixture'] = '/another/place'
  result.write(storage.path(tmp_path), one)
  assert [r.point for r in opened(tmp_path).results] == [one.point]


def test_a_later_knob_that_is_missing_has_its_earlier_value():
  old, new = ({'model': {'numerics': n}} for n in ({}, {'matmul': 'compute'}))
  assert not result.changes(old, new)
  new['model']['numerics']['matmul'] = 'fp8'
  assert result.changes(old, new) == {'config.model.numerics.matmul': ('compute', 'fp8')}


def test_a_result_that_is_damaged_or_of_no_point_is_named(tmp_path):
  e = opened(tmp_path)
  path = result.write(storage.path(tmp_path), measured(e.wanted()[0]))
  path.write_text(path.read_text()[:-20])
  with pytest.raises(ValueError, match=f'{path} is damaged'):
    opened(tmp_path)
  path.unlink()
  point = e.wanted()[0]._replace(name='old')
  path = result.write(storage.path(tmp_path), measured(point))
  with pytest.raises(ValueError, match=r'old\.json is of no point of experiments/sink'):
    opened(tmp_path)


def test_a_campaign_refuses_what_this_machine_cannot_do(tmp_path, monkeypatch):
  e = opened(tmp_path)
  campaign.check([e])
  gpu = dataclasses.replace(e, scale='gpu')
  monkeypatch.setattr(machine, 'platform', lambda: 'cpu')
  with pytest.raises(ValueError, match='--scale=gpu needs a GPU'):
    campaign.check([gpu])
  monkeypatch.setattr(machine, 'platform', lambda: 'gpu')
  monkeypatch.setattr(machine, 'gpu_memory', lambda: 1 << 10)
  with pytest.raises(ValueError, match='use a larger one'):
    campaign.check([gpu])
  e.results.append(measured(e.wanted()[0], data='another'))
  with pytest.raises(ValueError, match=r'is not the data of experiments/sink/results'):
    campaign.check([e])


def test_a_folder_of_other_versions_is_refused(tmp_path):
  e = opened(tmp_path)
  swept = sweep.write(campaign.joined([e], storage.path(tmp_path)))
  campaign.check_versions(swept)
  versions = swept.made['versions'] | {'jax': '0.1'}
  old = dataclasses.replace(swept, made=swept.made | {'versions': versions})
  with pytest.raises(ValueError, match=r'other versions \(jax 0\.1 there, '):
    campaign.check_versions(old)


@pytest.mark.parametrize(
  'words, message',
  [
    (['--minutes=0', '--scale=test'], '--minutes=0 must be positive'),
    (['--minutes=1', '--scale=test', 'snk'], "'snk' is not an experiment; experiments/"),
    (['--minutes=1'], '--text=DIR is missing'),
    (
      ['--status', 'inside', '--only=headwse*'],
      "--only='headwse*' fits no point, such as",
    ),
  ],
)
def test_bad_arguments_name_the_flag(words, message, capsys):
  assert script.main(words) == script.REFUSED
  assert message in capsys.readouterr().err


def test_points_can_be_chosen_by_name():
  inside = script.opened('inside', 'test', '')
  (chosen,) = script.chosen_points([inside], ['element*'])
  names = lambda e: e.choose(e.swept.points, [])
  assert len(names(inside)) == 2
  assert names(chosen) == [n for n in names(inside) if n.startswith('elementwise')]


def test_points_are_stopped_in_time_and_killed_five_percent_later(tmp_path, monkeypatch):
  clock = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(campaign.time, 'monotonic', lambda: clock.now)
  root, e = storage.path(tmp_path), opened(tmp_path)
  work = campaign.Campaign(
    root,
    [e],
    sweep.write(campaign.joined([e], root)),
    seconds=1500,
    whole=False,
    open_claims=lambda e: 1,
    view=lambda rows: None,
  )
  run = work.runner([machine.Slot('CPU', {})], tmp_path)
  stops = []
  monkeypatch.setattr(run, 'leave', lambda: stops.append(clock.now))
  for clock.now in (1001.0, 2479.0, 2480.0, 2500.0, 2574.0, 2575.0, 2600.0):
    work._update(run.rows)
  assert stops == [2480.0, 2575.0]  # 20 seconds before the end, and 5% after it.


def test_only_points_that_fit_are_started_if_they_must_end(tmp_path, monkeypatch):
  monkeypatch.setattr(campaign.time, 'monotonic', lambda: 0.0)
  root, e = storage.path(tmp_path), opened(tmp_path)
  first, second = e.wanted()
  fast, slow = (
    measured(first, tokens_per_second=experiment.tokens(second) / n) for n in (100, 999)
  )
  swept = sweep.write(campaign.joined([e], root))
  options = dict(open_claims=lambda e: 1, view=lambda rows: None)
  for results, others in (([fast], [slow]), ([], [fast])):
    e.results[:] = results
    for seconds, count in ((100 + campaign.OVERHEAD + 5, 0), (300, 2)):
      work = campaign.Campaign(
        root, [e], swept, seconds=seconds, whole=True, others=others, **options
      )
      run = work.runner([machine.Slot('CPU', {})], tmp_path)
      work._update(run.rows)
      assert len(run.rows) == count, seconds


@pytest.mark.full
def test_a_campaign_survives_kills(tmp_path):
  """A campaign of one condition is killed in its first point, and begun again.

  The second one runs under nohup, and its terminal is closed.
  """
  checkout = tmp_path / 'checkout'
  for part in ('gated', 'configs', 'scripts', 'experiments', 'train.py', 'eval.py'):
    source = ROOT / part
    copy = shutil.copytree if source.is_dir() else shutil.copy
    checkout.mkdir(exist_ok=True)
    copy(source, checkout / part)
  shutil.rmtree(checkout / 'experiments/sink/results', ignore_errors=True)
  path = checkout / 'experiments/sink/recipe.py'
  less = path.read_text().replace("'test': tuple(CONDITIONS)[:2]", "'test': ('decay1',)")
  path.write_text(less.replace(", 'headwise')", ')'))
  command = [
    sys.executable,
    'scripts/campaign.py',
    '--scale=test',
    '--minutes=10',
    'sink',
  ]
  env = os.environ | {'PYTHONPATH': str(checkout), 'JAX_PLATFORMS': 'cpu'}
  # Eight devices on two threads can wait for each other for ever.
  env['XLA_FLAGS'] = process.xla_flags(1)
  piped = dict(cwd=checkout, env=env, stdout=subprocess.PIPE, text=True)
  results = lambda: result.read_all(storage.path(checkout), 'sink', 'test')
  killed = subprocess.Popen(command, **piped)
  deadline = time.monotonic() + 240
  while not list(checkout.glob('runs/campaign/*/points/*/metrics.jsonl')):
    assert killed.poll() is None and time.monotonic() < deadline
    time.sleep(0.5)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert not results()
  last = subprocess.Popen(['nohup', *command], **piped)
  while not results():
    assert last.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)
  last.send_signal(signal.SIGHUP)
  out, _ = last.communicate()
  assert last.returncode == 0, out
  # Any model meets the test scale's rule, so the gated arm follows the baseline.
  assert [r.labels['arm'] for r in results()] == ['baseline', 'elementwise']
  assert results()[1].probe('gate_mean') > 0
