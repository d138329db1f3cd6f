"""The points of the experiment on Table 4."""

from experiments.inside import recipe


def test_every_variant_has_three_seeds_and_a_second_cell():
  runs = {(*p.labels.values(),) for p in recipe.get_grid('scale=gpu')}
  for arm in recipe.ARMS:
    assert sorted(run[1:] for run in runs if run[0] == arm) == [
      ('0.004', '1.5', '0'),
      ('0.004', '1.5', '1'),
      ('0.004', '1.5', '2'),
      ('0.008', '1', '0'),
    ]


def test_gated_models_have_at_most_two_percent_more_parameters():
  """The FFN of width 384 has 3 * 384 weights a channel; a gate has 384 a score."""
  extra = {'elementwise': 384, 'shared': 384, 'ns_sigmoid': 384, 'g2': 192, 'headwise': 6}
  for point in recipe.get_grid('scale=gpu'):
    ffn = point.changes.get('model.ffn', 1152)
    added = 12 * 384 * (extra.get(point.labels['arm'], 0) - 3 * (1152 - ffn))
    assert 0 <= added < 0.02 * 24e6
