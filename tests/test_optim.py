"""Schedules pass through the points they promise; AdamW is its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import optim

STEPS, WARMUP, PEAK, FLOOR = 50, 10, 1e-2, 1e-3


def knobs(**changes):
  return small.optim_config(
    **dict(lr=PEAK, warmup=WARMUP, decay=20, floor=FLOOR, clip=0.0) | changes
  )


def rates(steps=STEPS, **changes):
  """The learning rate of each update of a run."""
  schedule = optim.schedule(knobs(**changes), steps)
  return np.asarray(small.jit(jax.vmap(schedule))(jnp.arange(steps)))


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'linear', 'constant'])
def test_a_schedule_warms_up_linearly_and_ends_at_its_floor(schedule):
  lr = rates(schedule=schedule)
  np.testing.assert_allclose(lr[:WARMUP], PEAK * np.arange(1, 11) / 10, rtol=1e-5)
  np.testing.assert_allclose(lr[-1], PEAK if schedule == 'constant' else FLOOR, rtol=1e-5)
  assert lr.max() == pytest.approx(PEAK, rel=1e-6)
  # Nowhere a jump: no step is larger than the warm-up's or the steepest decay's.
  assert np.abs(np.diff(lr)).max() < 1.1 * PEAK / WARMUP
  assert (np.diff(lr[WARMUP:]) <= 1e-9).all()


def test_schedules_take_their_own_way_down():
  after = np.arange(1, STEPS - WARMUP + 1) / (STEPS - WARMUP)
  down = rates(schedule='cosine')[WARMUP:]
  cosine = FLOOR + (PEAK - FLOOR) * (1 + np.cos(np.pi * after)) / 2
  np.testing.assert_allclose(down, cosine, rtol=1e-4)
  linear = PEAK + (FLOOR - PEAK) * after
  np.testing.assert_allclose(rates(schedule='linear')[WARMUP:], linear, rtol=1e-4)
  wsd = rates(schedule='wsd')
  np.testing.assert_allclose(wsd[WARMUP:30], PEAK, rtol=1e-6)
  np.testing.assert_allclose(
    wsd[30:], PEAK + (FLOOR - PEAK) * np.arange(1, 21) / 20, rtol=1e-4
  )


def test_a_floor_of_zero_is_reached():
  for schedule in ('cosine', 'linear', 'wsd'):
    assert abs(rates(schedule=schedule, floor=0.0)[-1]) < 1e-9


def test_without_a_warmup_the_first_update_is_near_the_peak():
  lr = rates(warmup=0, schedule='linear')
  assert 0.97 * PEAK < lr[0] <= PEAK
  assert rates(warmup=0, schedule='constant')[0] == pytest.approx(PEAK)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant'])
def test_a_run_may_end_within_its_warmup(schedule):
  np.testing.assert_allclose(
    rates(steps=4, schedule=schedule), PEAK * np.arange(1, 5) / 10, rtol=1e-5
  )


def test_a_decay_longer_than_what_follows_the_warmup_is_refused():
  with pytest.raises(
    ValueError, match=r'config\.optim\.decay=20, .* within config\.steps=20'
  ):
    optim.schedule(knobs(schedule='wsd'), 20)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(schedule='step'), "schedule='step'.*'cosine', 'wsd', 'linear', 'constant'"),
    (dict(decay_by='time'), "decay_by='time'"),
    (dict(lr=0.0), 'lr=0.0'),
    (dict(floor=0.1), 'floor=0.1 is above config.optim.lr=0.01'),
    (dict(warmup=-1), 'warmup=-1'),
    (dict(weight_decay=-0.1), 'weight_decay=-0.1'),
    (dict(clip=-1.0), 'clip=-1.0'),
    (dict(b1=1.0), 'b1=1.0'),
    (dict(b2=-0.1), 'b2=-0.1'),
    (dict(eps=-1.0), 'eps=-1.0'),
  ],
)
def test_a_bad_knob_is_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=r'config\.optim\.' + said):
    knobs(**changes)


# Leaves by the names that a model's have; no gradient where only decay is to act.
rng = np.random.default_rng(0)
PARAMS = {
  'embed': {'table': rng.normal(size=(5, 3))},
  'attn': {
    'query': {'weight': rng.normal(size=(3, 3)), 'bias': rng.normal(size=3)},
    'norm': {'scale': rng.normal(size=3)},
    'gate': {'weight': rng.normal(size=(3, 2))},
  },
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
GRADS = jax.tree.map(lambda x: jnp.sin(7 * x), PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def updates(grads, steps=1, multipliers={}, **changes):  # noqa: B006
  tx = optim.make(knobs(**changes), steps=STEPS, multipliers=multipliers)

  @small.jit
  def run(grads):
    state, out = tx.init(PARAMS), []
    for _ in range(steps):
      update, state = tx.update(grads, state, PARAMS)
      out.append(update)
    return out

  return run(grads)


def test_an_update_is_adamw_as_written():
  b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.1
  seen = updates(GRADS, 3, weight_decay=decay, schedule='constant')
  g, p = (np.asarray(t['attn']['query']['weight'], float) for t in (GRADS, PARAMS))
  m = v = 0
  for t, update in enumerate(seen, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    expected = -PEAK * t / WARMUP * (adam + decay * p)
    np.testing.assert_allclose(update['attn']['query']['weight'], expected, rtol=1e-4)


def test_weight_decay_spares_norms_and_biases():
  update = updates(ZEROS, weight_decay=0.1)[0]
  lr = PEAK / WARMUP
  spared = [update['attn']['query']['bias'], update['attn']['norm']['scale']]
  assert all(float(np.abs(u).max()) == 0 for u in spared)
  for path in (
    ('embed', 'table'),
    ('attn', 'query', 'weight'),
    ('attn', 'gate', 'weight'),
  ):
    u, p = update, PARAMS
    for key in path:
      u, p = u[key], p[key]
    np.testing.assert_allclose(u, -lr * 0.1 * p, rtol=1e-5)


def test_decay_by_schedule_does_not_depend_on_the_peak():
  """arXiv 2309.14322's independent decay: it has the schedule's shape, not its height."""
  decayed = lambda **kw: np.stack(
    [u['embed']['table'] for u in updates(ZEROS, 3, weight_decay=0.1, **kw)]
  )
  once, twice = (decayed(decay_by='schedule', lr=lr) for lr in (PEAK, 2 * PEAK))
  np.testing.assert_allclose(once, twice, rtol=1e-5)
  np.testing.assert_allclose(
    once[1], -0.1 * 2 / WARMUP * PARAMS['embed']['table'], rtol=1e-5
  )
  once, twice = (decayed(decay_by='lr', lr=lr) for lr in (PEAK, 2 * PEAK))
  np.testing.assert_allclose(2 * once, twice, rtol=1e-5)


def test_clipping_scales_the_whole_gradient_to_the_norm_asked_for():
  norm = float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(GRADS))))
  # With a large eps Adam is linear in the gradient, so that its scale is seen.
  first = lambda scale, clip: updates(
    jax.tree.map(lambda g: scale * g, GRADS), clip=clip, eps=1e4, weight_decay=0.0
  )[0]['embed']['table']
  np.testing.assert_allclose(first(1.0, 0.0), first(1.0, 2 * norm), rtol=1e-6)
  np.testing.assert_allclose(first(1.0, norm / 2), first(0.5, 0.0), rtol=1e-3)
  np.testing.assert_allclose(first(9.0, norm / 2), first(0.5, 0.0), rtol=1e-3)


def test_multipliers_scale_the_updates_of_what_they_name():
  plain, scaled = updates(GRADS)[0], updates(GRADS, multipliers={'gate': 0.25})[0]
  gate, query = (
    lambda u: u['attn']['gate']['weight'],
    lambda u: u['attn']['query']['bias'],
  )
  np.testing.assert_allclose(gate(scaled), 0.25 * gate(plain), rtol=1e-6)
  np.testing.assert_array_equal(query(scaled), query(plain))
  # A whole part of the name, not a piece of one.
  assert optim.multiplier('blocks.attn.gated.weight', {'gate': 3.0}) == 1.0
  assert optim.multiplier('attn.gate.weight', {'gate': 3.0, 'attn': 2.0}) == 6.0
