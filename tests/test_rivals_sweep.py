"""configs/rivals.py: every point is a recipe, one change from its baseline."""

import pytest

from configs import rivals
from gated import config, model, plan

ARGUMENTS = [
  f'{question}scale={scale},optimizer={optimizer}'
  for question in ('', 'rounding,')
  for scale in rivals.RATES
  for optimizer in ('adamw', 'muon')
]


def built(arg):
  """-> the config of each point of one seed and rate, by its labels."""
  found = {}
  for point in rivals.get_grid(f'{arg},seeds=1'):
    c = rivals.get_config(arg)
    c.update_from_flattened_dict(point.changes)
    labels = [v for k, v in point.labels.items() if k not in ('lr', 'seed')]
    found[' '.join(labels)] = config.build(plan.Config, c.to_dict(), 'config')
  return found


@pytest.mark.parametrize('arg', ARGUMENTS)
def test_every_point_is_a_recipe_that_its_checks_accept(arg):
  points = built(arg)
  assert len(points) == (6 if arg.startswith('rounding') else 23)
  assert len({config.digest(repr(point)) for point in points.values()}) == len(points)


@pytest.mark.slow
@pytest.mark.parametrize('scale', ['proxy', 'test'])
def test_remedies_have_about_the_parameters_of_the_baseline(scale):
  """The FFN makes up for a gate; no remedy adds more than 3%."""
  points = built(f'scale={scale}')
  count = {name: model.parts(cfg.model)['total'] for name, cfg in points.items()}
  for name, own in count.items():
    assert abs(own / count['baseline'] - 1) < 0.03, name
  assert abs(count['elementwise'] / count['baseline'] - 1) < 2e-3


def test_the_windows_are_a_quarter_of_a_row_in_every_second_layer():
  cfg = built('scale=test')['window_sink_logit']
  assert cfg.model.attn.window * 4 == cfg.data.length
  assert cfg.model.windowed == (0,) and cfg.model.depth == 2
  assert cfg.model.attn.normalizer == 'sink_logit'


def test_rounding_is_asked_without_qk_norm_in_both_precisions():
  points = built('rounding,scale=proxy')
  assert not any(cfg.model.attn.qk_norm for cfg in points.values())
  compute = {name: cfg.model.numerics.compute for name, cfg in points.items()}
  assert compute['baseline float32'] == 'float32'
  assert compute['elementwise repaired'] == compute['baseline flash'] == 'bfloat16'
