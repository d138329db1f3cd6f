"""The points of the experiment on Table 4."""

import math
from types import SimpleNamespace

from experiments.inside import recipe

HIGH, LOW = (f'{lr:g}' for lr, _ in recipe.CELLS['gpu'])


def test_every_variant_has_three_seeds_in_two_cells():
  runs = {(*p.labels.values(),) for p in recipe.get_grid('scale=gpu')}
  for arm in recipe.ARMS:
    rates, decays, seeds = zip(*(run[1:] for run in runs if run[0] == arm))
    assert (len(set(rates)), len(set(decays)), len(set(seeds)), len(seeds)) == (
      2,
      2,
      3,
      6,
    )


def wanted(losses):
  """{'arm lr seed': loss} of the points that ended -> the others to run, in order."""
  points = [
    SimpleNamespace(name=f'{arm} {lr} {seed}', labels=p.labels)
    for p in recipe.get_grid('scale=gpu')
    for arm, lr, _, seed in [p.labels.values()]
  ]
  results = [
    SimpleNamespace(point=p.name, labels=p.labels, loss=loss, finished=loss < math.inf)
    for p in points
    if (loss := losses.get(p.name)) is not None
  ]
  return [name for name in recipe.choose(points, results) if name not in losses]


def test_more_seeds_run_in_the_best_cell_of_their_arm():
  cells = [f'{arm} {lr} 0' for arm in recipe.FIRST for lr in (HIGH, LOW)]
  headwise = [f'headwise {lr} 0' for lr in (HIGH, LOW)]
  assert wanted({})[:6] == cells + headwise
  one = {cells[0]: 1.6}
  assert wanted(one)[:5] == [*cells[1:], *headwise], (
    'no more seeds before all cells ended'
  )
  losses = dict(zip(cells, (1.6, 1.5, 1.7, 1.8)))
  seeds = [f'elementwise {LOW} {k}' for k in '12'] + [
    f'baseline {HIGH} {k}' for k in '12'
  ]
  assert wanted(losses)[:6] == [*seeds, *headwise]


def test_a_cell_in_which_a_seed_diverged_is_left():
  losses = {f'elementwise {HIGH} 0': 1.5, f'elementwise {LOW} 0': 1.6}
  losses[f'elementwise {HIGH} 1'] = math.inf
  assert [n for n in wanted(losses) if n.startswith('elementwise')] == [
    f'elementwise {LOW} {k}' for k in '12'
  ]
  losses[f'elementwise {LOW} 0'] = math.inf
  assert not [n for n in wanted(losses) if n.startswith('elementwise')]


def test_gated_models_have_at_most_two_percent_more_parameters():
  """The FFN of width 512 has 3 * 512 weights a channel; a gate has 512 a score."""
  extra = {'elementwise': 512, 'shared': 512, 'ns_sigmoid': 512, 'g2': 256, 'headwise': 8}
  for point in recipe.get_grid('scale=gpu'):
    ffn = point.changes.get('model.ffn', 1536)
    added = 18 * 512 * (extra.get(point.labels['arm'], 0) - 3 * (1536 - ffn))
    assert 0 <= added < 0.02 * 61e6
