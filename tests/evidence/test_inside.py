"""The experiment on Table 4: its points, and those that another experiment has run."""

import ml_collections

from experiments.inside import recipe
from experiments.sink import recipe as sink


def resolved(module, point) -> ml_collections.ConfigDict:
  c = module.get_config('scale=gpu')
  c.update_from_flattened_dict(point.changes)
  c.name = ''
  return c


def test_runs_of_the_search_for_a_sink_count_here():
  """They are the same recipes, so the ledger puts them into the same setting."""
  cells = {'decay1': 0, 'decay0.5-lr8e-3': 1}
  others = {
    (p.labels['arm'], cells[p.labels['condition']]): resolved(sink, p)
    for p in sink.get_grid('scale=gpu')
    if p.labels['condition'] in cells
  }
  for arm, cell, seed in recipe.DONE['gpu']:
    own = resolved(recipe, recipe.point(arm, cell, seed, 'gpu'))
    assert own.to_dict() == others[arm, cell].to_dict()


def test_every_variant_has_three_seeds_and_a_second_cell():
  runs = {(*p.labels.values(),) for p in recipe.get_grid('scale=gpu')}
  done = {
    (arm, *(f'{x:g}' for x in recipe.CELLS['gpu'][cell]), str(seed))
    for arm, cell, seed in recipe.DONE['gpu']
  }
  assert not runs & done
  for arm in recipe.ARMS:
    assert sorted(run[1:] for run in runs | done if run[0] == arm) == [
      ('0.004', '1', '0'),
      ('0.004', '1', '1'),
      ('0.004', '1', '2'),
      ('0.008', '0.5', '0'),
    ]


def test_gated_models_have_at_most_two_percent_more_parameters():
  """The FFN of width 512 has 3 * 512 weights a channel; a gate has 512 a score."""
  extra = {'elementwise': 512, 'shared': 512, 'ns_sigmoid': 512, 'g2': 256, 'headwise': 8}
  for point in recipe.get_grid('scale=gpu'):
    ffn = point.changes.get('model.ffn', 1536)
    added = 18 * 512 * (extra.get(point.labels['arm'], 0) - 3 * (1536 - ffn))
    assert 0 <= added < 0.02 * 61e6
