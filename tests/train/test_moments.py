"""Moments in bfloat16 keep their means, and depend on the update's number alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_optim import GRADS, PARAMS, knobs

from gated.devices import mesh
from gated.plan import Plan
from gated.pods.estimate import memory
from gated.pods.estimate.layout import Layout
from gated.train import moments, optim


@pytest.mark.slow
def test_rounding_takes_a_neighbour_and_keeps_the_mean():
  x = jnp.full(40_000, 1 + 0.3 * 2**-7, jnp.float32)
  rounded = np.asarray(moments.rounded_at_random(x, jax.random.key(0)), np.float32)
  assert set(rounded) == {1.0, 1 + 2**-7}
  # Three standard deviations of the share that is rounded up.
  assert abs((rounded == 1 + 2**-7).mean() - 0.3) < 3 * (0.21 / 40_000) ** 0.5
  exact = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
  same = moments.rounded_at_random(exact, jax.random.key(1))
  np.testing.assert_array_equal(same.astype(jnp.float32), exact)


@pytest.mark.slow
def test_a_slow_second_moment_still_moves():
  """By 0.1% a step, which rounding to the nearest would lose."""
  tx = moments.stored(optim.OPTIMIZERS['adamw'](knobs(b2=0.999)))
  params, grads = jnp.zeros(4096), jnp.full(4096, 2.0)

  def body(state, _):
    return tx.update(grads, state, params)[1], None

  run = jax.jit(lambda state: jax.lax.scan(body, state, length=300)[0])
  state = run(tx.init(params))
  assert state.inner.nu.dtype == state.inner.mu.dtype == jnp.bfloat16
  mean = float(state.inner.nu.astype(jnp.float32).mean())
  assert abs(mean / (4 * (1 - 0.999**300)) - 1) < 0.01
  # Resumed at step 150, it has the same bits.
  half = jax.jit(lambda state: jax.lax.scan(body, state, length=150)[0])
  again = half(half(tx.init(params)))
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_updates_are_those_of_float32_moments_up_to_rounding():
  def updates(dtype):
    tx = optim.make(knobs(moments=dtype), steps=50, multipliers={})
    state, out = tx.init(PARAMS), None
    for _ in range(3):
      out, state = tx.update(GRADS, state, PARAMS)
    return out

  wide, narrow = updates('float32'), updates('bfloat16')
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-6)
  jax.tree.map(close, narrow, wide)


@pytest.mark.slow
def test_factored_moments_are_a_product_of_means():
  """By hand, for a stack of matrices and a vector."""
  shape, b1, b2 = (3, 128, 256), 0.8, 0.9
  grads = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  tx = moments.factored(b1, b2, 1e-8)
  params = {'w': jnp.zeros(shape), 'b': jnp.zeros(128)}
  state, v, first, b = tx.init(params), 0.0, 0.0, 0.0
  for t, g in enumerate(grads, start=1):
    updates, state = tx.update({'w': g, 'b': g[0, :, 0]}, state, params)
    v, b = v * b2 + (1 - b2) * g**2, b * b2 + (1 - b2) * g[0, :, 0] ** 2
    rows, columns = v.mean(2, keepdims=True), v.mean(1, keepdims=True)
    second = rows * columns / rows.mean(1, keepdims=True) / (1 - b2**t)
    quotient = g / np.sqrt(second), g[0, :, 0] / np.sqrt(b / (1 - b2**t))
    first = jax.tree.map(
      lambda a, q: b1 * a + (1 - b1) * q, first or (0.0, 0.0), quotient
    )
    for actual, expected in zip((updates['w'], updates['b']), first):
      np.testing.assert_allclose(actual, expected / (1 - b1**t), rtol=2e-4, atol=1e-6)
  assert moments.factored_size(shape) == 3 * (128 + 256)
  second = jax.tree.leaves(state[0])
  assert sum(leaf.size for leaf in second if leaf.size > 1) == 3 * (128 + 256) + 128


@pytest.mark.full
def test_factored_moments_are_the_same_on_eight_devices():
  def losses(count):
    sizes = dict(model__width=128, model__ffn=256, mesh__fsdp=count)
    plan = Plan(small.whole(optim__factored=True, **sizes), jax.devices()[:count])
    step, state, losses = plan.train_step().compile(), plan.init(), []
    batch = mesh.place(small.batch(8, 16), plan.mesh, 8)
    for _ in range(4):
      state, values = step(state, batch)
      losses.append(float(values['loss']))
    return losses

  single = losses(1)
  np.testing.assert_allclose(losses(8), single, atol=1e-5)
  assert single[-1] < single[0] - 0.01


@pytest.mark.parametrize('changes', [{}, dict(optim__factored=True, model__width=128)])
def test_preflight_counts_the_bytes_that_the_state_has(changes):
  cfg = small.whole(optim__moments='bfloat16', **changes)
  plan = Plan(cfg, jax.devices()[:1])
  large = [leaf for leaf in jax.tree.leaves(plan.state.opt.inner) if leaf.size > 4]
  held = memory.held(Layout(cfg, dict(plan.mesh.shape)), gpu=False)
  assert {leaf.dtype for leaf in large} == {jnp.dtype(jnp.bfloat16)}
  assert sum(leaf.size * 2 for leaf in large) == held['optimizer']
