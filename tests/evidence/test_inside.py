"""The points of the experiment on Table 4."""

from experiments.inside import recipe


def test_every_variant_has_three_seeds_and_a_second_cell():
  runs = {(*p.labels.values(),) for p in recipe.get_grid('scale=gpu')}
  for arm in recipe.ARMS:
    assert sorted(run[1:] for run in runs if run[0] == arm) == [
      ('0.005', '1', '0'),
      ('0.005', '1', '1'),
      ('0.005', '1', '2'),
      ('0.01', '0.5', '0'),
    ]


def test_gated_models_have_at_most_two_percent_more_parameters():
  """The FFN of width 512 has 3 * 512 weights a channel; a gate has 512 a score."""
  extra = {'elementwise': 512, 'shared': 512, 'ns_sigmoid': 512, 'g2': 256, 'headwise': 8}
  for point in recipe.get_grid('scale=gpu'):
    ffn = point.changes.get('model.ffn', 1536)
    added = 18 * 512 * (extra.get(point.labels['arm'], 0) - 3 * (1536 - ffn))
    assert 0 <= added < 0.02 * 61e6
