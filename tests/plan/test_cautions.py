"""The warnings at the start of a run."""

import jax.numpy as jnp
import pytest
import small

from gated.plan import cautions
from gated.train import optim

BF16 = 'model__numerics__weights'


@pytest.mark.parametrize(
  ('knobs', 'rate'),
  [
    (dict(steps=20, optim__warmup=50), 0.4),
    (dict(steps=20, optim__warmup=20), 1.0),
    (dict(steps=20, optim__warmup=50, optim__schedule='constant'), 0.4),
  ],
)
def test_a_warm_up_that_does_not_end_is_named_with_the_last_rate(knobs, rate):
  cfg = small.whole(**knobs)
  [line] = cautions.of(cfg)
  warmup = knobs['optim__warmup']
  assert f'config.optim.warmup={warmup} does not end before config.steps=20' in line
  last = float(optim.schedule(cfg.optim, cfg.steps)(cfg.steps - 1))
  assert last == pytest.approx(rate * cfg.optim.lr)
  assert f'ends at {last:.3g} and does not reach' in line
  assert ('its peak' in line) == (rate < 1)


@pytest.mark.parametrize(
  'knobs',
  [
    {},
    dict(steps=20, optim__warmup=19),
    dict(steps=20, optim__warmup=20, optim__schedule='constant'),
    {BF16: 'bfloat16', 'optim__lr': 1e-2, 'optim__floor': 5e-3},
    {'optim__lr': 1e-9, 'optim__floor': 0.0},
  ],
)
def test_a_usual_recipe_has_no_warning(knobs):
  assert not list(cautions.of(small.whole(**knobs)))


@pytest.mark.parametrize(
  ('lr', 'floor', 'schedule', 'knob'),
  [
    (3e-5, 3e-6, 'cosine', 'lr=3e-05'),
    (3e-4, 3e-6, 'cosine', 'floor=3e-06'),
    (3e-5, 0.0, 'constant', 'lr=3e-05'),
  ],
)
def test_updates_that_bfloat16_rounds_away_are_named(lr, floor, schedule, knob):
  knobs = dict(optim__lr=lr, optim__floor=floor, optim__schedule=schedule)
  cfg = small.whole(**{BF16: 'bfloat16', 'model__numerics__init_std': 0.02, **knobs})
  [line] = cautions.of(cfg)
  assert f'config.optim.{knob} is about the size' in line
  assert 'the smallest step of a weight of 0.02 (init_std) is 0.00012,' in line
  weight = jnp.asarray(0.02, jnp.bfloat16)
  moved = lambda step: float(weight + jnp.asarray(step, jnp.bfloat16)) != float(weight)
  assert moved(1.2e-4) and not moved(5e-5)
