"""The points of the experiments that tune each arm, and their order."""

import io
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.inside import recipe as inside
from experiments.positions import recipe as positions
from experiments.scores import recipe as scores
from experiments.sink import recipe as sink
from experiments.stability import recipe as stability
from gated.evidence import arms
from gated.sweep import folder

ROOT = Path(__file__).resolve().parents[2]

LOW, HIGH = INSIDE = ['0.004 1.8', '0.006 1.2']
POSITIONS = ['0.004 0.8', '0.008 0.4']
SCORES = ['0.008 1.2', '0.006 1.6']
STABILITY = ['0.008 0.8', '0.016 0.8']


@pytest.mark.parametrize(
  ('recipe', 'cells'),
  [(inside, INSIDE), (positions, POSITIONS), (scores, SCORES)],
  ids=['inside', 'positions', 'scores'],
)
def test_every_arm_has_three_seeds_in_every_cell(recipe, cells):
  runs = [' '.join(p.labels.values()) for p in recipe.get_grid('scale=gpu')]
  names = inside.FIRST if recipe is scores else recipe.ARMS
  expected = {f'{arm} {cell} {k}' for arm in names for cell in cells for k in '012'}
  assert len(runs) == len(expected) and {*runs} == expected


def wanted(recipe, losses):
  """{'arm lr decay seed': loss} of the points that ended -> the others to run."""
  points = [
    SimpleNamespace(name=' '.join(p.labels.values()), labels=p.labels)
    for p in recipe.get_grid('scale=gpu')
  ]
  results = [
    SimpleNamespace(point=p.name, labels=p.labels, loss=loss, finished=loss < math.inf)
    for p in points
    if (loss := losses.get(p.name)) is not None
  ]
  return [name for name in recipe.choose(points, results) if name not in losses]


def test_more_seeds_run_in_the_best_cell_of_their_arm():
  cells = [f'{arm} {cell} 0' for arm in inside.FIRST for cell in INSIDE]
  headwise = [f'headwise {cell} 0' for cell in INSIDE]
  assert wanted(inside, {})[:6] == cells + headwise
  one = {cells[0]: 1.6}
  assert wanted(inside, one)[:5] == cells[1:] + headwise, (
    'more seeds before all cells ended'
  )
  losses = dict(zip(cells, (1.6, 1.5, 1.7, 1.8)))
  seeds = [f'elementwise {HIGH} {k}' for k in '12'] + [
    f'baseline {LOW} {k}' for k in '12'
  ]
  assert wanted(inside, losses)[:6] == seeds + headwise


def test_a_cell_in_which_a_seed_diverged_is_left():
  losses = {f'elementwise {cell} 0': 1.5 + k / 10 for k, cell in enumerate(INSIDE)}
  losses[f'elementwise {LOW} 1'] = math.inf
  own = lambda: [n for n in wanted(inside, losses) if n.startswith('elementwise')]
  assert own() == [f'elementwise {HIGH} {k}' for k in '12']
  losses[f'elementwise {HIGH} 0'] = math.inf
  assert own() == []


def test_all_rates_have_three_seeds_at_one_weight_decay():
  by_rate = [
    f'{arm} {cell} {k}'
    for cell in STABILITY
    for arm in ('baseline', 'elementwise')
    for k in '012'
  ]
  # What the first two arms have in experiments/positions, the others need here.
  sandwich = [f'sandwich 0.004 0.8 {k}' for k in '012']
  sandwich += ['sandwich 0.008 0.4 0', *(f'sandwich 0.008 0.8 {k}' for k in '012')]
  sandwich += [f'sandwich 0.016 0.8 {k}' for k in '012']
  order = wanted(stability, {})
  assert order[:22] == by_rate + sandwich
  assert len(order) == 12 + 3 * 10


def test_stability_shares_the_setting_of_positions():
  def models(recipe):
    """Arm -> its setting, changes and sizes."""
    named = {}
    for point in recipe.get_grid('scale=gpu'):
      changed = recipe.get_config('scale=gpu')
      changed.update_from_flattened_dict(point.changes)
      named[point.labels['arm']] = arms.split(changed.to_dict())
    return named

  own, theirs = models(stability), models(positions)
  assert {arm for arm in own if own[arm] == theirs.get(arm)} == {
    'baseline',
    'elementwise',
  }
  assert {*stability.CLAIMS} == {*positions.SHARED}


def test_a_sink_gets_more_seeds_and_its_gate_another_cell():
  def result(condition, arm, rate=0.0, loss=1.6):
    labels = {'condition': condition, 'arm': arm}
    known = dict(name=f'{condition} {arm}', point=f'{condition} {arm}', labels=labels)
    config = {'model': {'mask_documents': True}}
    probe = {'sink_rate_64': rate, 'first_token_attention_documents_from_64': rate / 4}
    more = dict(finished=True, scale='gpu', config=config, probe=probe.get, loss=loss)
    return SimpleNamespace(**known, **more)

  points = [
    SimpleNamespace(name=' '.join(p.labels.values()), labels=p.labels)
    for p in sink.get_grid('scale=gpu')
  ]
  of = lambda *results: sink.choose(points, results)
  baselines = [f'{condition} baseline' for condition in sink.CONDITIONS]
  weak = result('decay0.5-lr8e-3', 'baseline', 0.16)
  assert of() == of(weak) == baselines
  strong = result('decay1', 'baseline', 0.4, loss=1.5)
  gated = [f'decay1 {arm}' for arm in ('baseline', 'elementwise', 'headwise')]
  cells = 'decay1', 'decay0.5-lr8e-3'
  more = [f'{cells[1]} baseline', *(f'decay1 baseline {k}' for k in '123')]
  assert of(weak, strong) == [*gated, *more, f'{cells[1]} elementwise']
  # The gate's best cell may be another one; it also gets seeds in the baseline's.
  both = [result(cell, 'elementwise', loss=x) for cell, x in zip(cells, (1.5, 1.4))]
  seeds = [f'{cell} elementwise {k}' for k in '12' for cell in sorted(cells)]
  assert sorted(n for n in of(weak, strong, *both) if n in seeds) == sorted(seeds)
  assert not {*seeds} & {*of(weak, strong, *both[:1])}
  unmasked = 'decay0.5-lr8e-3-unmasked'
  alone = of(weak, result(unmasked, 'baseline', 0.4))
  assert {name.split()[0] for name in alone} == {unmasked}


def test_a_campaigns_copy_of_the_sources_has_all_that_recipes_import(tmp_path):
  with tarfile.open(fileobj=io.BytesIO(folder.pack(ROOT)), mode='r:gz') as archive:
    archive.extractall(tmp_path, filter='data')
  names = [path.parent.name for path in ROOT.glob('experiments/*/recipe.py')]
  code = '; '.join(
    f'import experiments.{name}.recipe as r; r.get_grid()' for name in names
  )
  code += '; print(r.__file__)'
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  run = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
  done = subprocess.run([sys.executable, '-c', code], **run)
  assert done.stdout.startswith(str(tmp_path)), done.stderr


@pytest.mark.parametrize(
  'recipe', [inside, positions, scores, stability], ids=lambda r: r.__name__.split('.')[1]
)
def test_the_ledger_has_the_arms_of_the_experiment(recipe):
  own, settings = {}, []
  for point in recipe.get_grid('scale=gpu'):
    changed = recipe.get_config('scale=gpu')
    changed.update_from_flattened_dict(point.changes)
    knobs, (changes, sizes) = arms.split(changed.to_dict())
    settings.append(knobs)
    own[point.labels['arm']] = arms.Arm(
      changes=changes, sizes=sizes, parameters=1, cells={}
    )
  assert all(knobs == settings[0] for knobs in settings)
  setting = arms.Setting(knobs=settings[0], data='', arms=[*own.values()])
  assert setting.choose(arms.ARMS) == own


def test_gated_models_have_at_most_two_percent_more_parameters():
  """The FFN of width 512 has 3 * 512 weights a channel; a gate has 512 a score."""
  extra = {'elementwise': 512, 'shared': 512, 'ns_sigmoid': 512, 'g2': 256, 'headwise': 8}
  for point in (p for r in (inside, scores) for p in r.get_grid('scale=gpu')):
    ffn = point.changes.get('model.ffn', 1536)
    added = 18 * 512 * (extra.get(point.labels['arm'], 0) - 3 * (1536 - ffn))
    assert 0 <= added < 0.02 * 61e6


def test_positions_and_forms_have_as_many_parameters_as_the_baseline():
  """The FFN of width 384 has 3 * 384 weights a channel; a gate has 384 a score."""
  scores = {'g2': 192, 'g3': 192, 'headwise': 6}
  plain = 'baseline', 'sdpa_rmsnorm', 'sdpa_silu', 'sandwich', 'clip300', 'clip100'
  scores |= dict.fromkeys(plain, 0)
  more = {'kv_heads_x2', 'heads_x1.5'}  # In the paper as well.
  for point in (p for r in (positions, stability) for p in r.get_grid('scale=gpu')):
    arm = point.labels['arm']
    added = scores.get(arm, 384) - 3 * (1152 - point.changes.get('model.ffn', 1152))
    if arm not in more and 'switch' not in arm:
      assert added == (6 if arm == 'headwise' else 0), arm
