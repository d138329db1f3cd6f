"""QK-clip against its rule, from scores written by hand; what it must not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import model
from gated.devices import mesh, trees
from gated.train import guard, optim, qk_clip, step

BATCH = small.batch(8, 16)


def recipe(kv_heads=2, **changes):
  knobs = dict(qk_norm=False, kv_heads=kv_heads, bias=True, window=6)
  knobs = {f'model__attn__{k}': v for k, v in knobs.items()}
  return small.whole(optim__name='muon', optim__qk_clip=9.0, **knobs, **changes)


@functools.cache
def trained(kv_heads, tau, accum=1, **sizes):
  """One step of a model -> (the model before, the model after, metrics), on the host."""
  cfg = recipe(kv_heads)
  tx = guard.guard(optim.make(cfg.optim, steps=5, multipliers={}), cfg.stability)
  opts = dict(tx=tx, schedule=optim.schedule(cfg.optim, 5), accum=accum)
  net = small.filled(model.abstract(cfg.model))
  zero = jnp.zeros((), jnp.int32)
  state = step.State(zero, zero, net, tx.init(net))
  run = jax.jit(functools.partial(step.train, **opts, loss=cfg.loss, tau=tau))
  if not sizes:
    new, metrics = run(state, BATCH)
    return net, new.model, metrics
  on = small.mesh_of(**sizes)
  state = jax.device_put(state, mesh.shardings(jax.eval_shape(lambda: state), on))
  with jax.set_mesh(on):
    new, metrics = run(state, mesh.place(BATCH, on, 8))
  return net, *jax.device_get((new.model, metrics))


@functools.cache
def largest(kv_heads):
  """The largest score of each head in each layer, (L, H), before the step."""
  net = small.filled(model.abstract(recipe(kv_heads).model))

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest)
    return trace.output, (trace.attn.query, trace.attn.key)

  run = lambda net: net.hidden(
    BATCH.tokens, BATCH.segments, BATCH.positions, through=through
  )
  q, k = map(np.asarray, jax.jit(run)(net)[1])
  score = np.einsum('lbthk,lbshk->lbhts', q, np.repeat(k, 4 // kv_heads, 3)) / 8**0.5
  distance = np.arange(16)[:, None] - np.arange(16)[None]
  seen = (BATCH.segments[:, :, None] == BATCH.segments[:, None]) & (distance >= 0)
  seen &= (distance < 6) & (BATCH.segments > 0)[:, :, None]
  return np.where(seen[None, :, None], score, -np.inf).max((1, 3, 4))


def limit(kv_heads):
  """A limit that half of the heads exceed."""
  return float(np.median(largest(kv_heads)))


@pytest.mark.slow
@pytest.mark.parametrize('kv_heads', [2, pytest.param(4, marks=pytest.mark.full)])
def test_weights_are_scaled_so_that_the_largest_logit_would_be_the_limit(kv_heads):
  _, plain, _ = trained(kv_heads, 0.0)
  top_LH, tau = largest(kv_heads), limit(kv_heads)
  _, clipped, metrics = trained(kv_heads, tau)
  factor = np.minimum(1, tau / top_LH)
  alone = kv_heads == 4
  expected = trees.flatten(plain)
  for part in ('query', 'key') if alone else ('query',):
    own = factor**0.5 if alone else factor
    for field, at in (('weight', own[:, None, :, None]), ('bias', own[..., None])):
      expected[f'blocks.attn.{part}.{field}'] *= at
  for name, value in trees.flatten(clipped).items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-7, err_msg=name)
  np.testing.assert_allclose(metrics['qk_logit'], top_LH.max(), rtol=1e-5)
  assert metrics['qk_clipped'] == 0.5


@pytest.mark.parametrize(
  'where',
  [
    pytest.param(dict(accum=2), marks=pytest.mark.full),
    pytest.param(dict(fsdp=2, tensor=2, context=2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_micro_batches_and_eight_devices_clip_alike(where):
  _, exact, metrics = trained(2, limit(2))
  _, ours, same = trained(2, limit(2), **where)
  np.testing.assert_allclose(same['qk_logit'], metrics['qk_logit'], rtol=1e-5)
  ours = trees.flatten(ours)
  for name, value in trees.flatten(exact).items():
    np.testing.assert_allclose(ours[name], value, rtol=0, atol=2e-4, err_msg=name)


def test_logits_that_are_not_finite_clip_nothing():
  net = small.filled(model.abstract(recipe().model))
  logits = jnp.array([[jnp.nan, jnp.inf, 1.0, -9.0]] * 2)
  after = trees.flatten(qk_clip.clip(net, logits, 9.0))
  for name, value in trees.flatten(net).items():
    np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(optim__qk_clip=-1.0), r'optim\.qk_clip=-1\.0'),
    (
      dict(optim__qk_clip=9.0, model__attn__qk_norm=True),
      r'optim\.qk_clip=9\.0 with .*attn\.qk_norm=True, but QK-norm cancels',
    ),
    (
      dict(
        optim__qk_clip=9.0,
        model__attn__qk_norm=False,
        model__attn__gate__position='key',
        model__attn__gate__form='add',
      ),
      r"optim\.qk_clip=9\.0 with .*attn\.gate\.form='add' on the key",
    ),
  ],
)
def test_a_clip_that_cannot_work_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.' + said):
    small.whole(**changes)
