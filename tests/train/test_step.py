"""A step is the same however its batch is cut and wherever its arrays lie."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from gated import model
from gated.devices import mesh, trees
from gated.plan import Plan
from gated.train import guard, losses, optim, step

GATE = dict(model__attn__gate__position='sdpa')
KNOBS = dict(loss__z=1e-3, optim__lr=1e-3, optim__floor=1e-4, **GATE)
LENGTH = 16


def batches(count=5, rows=8):
  return [small.batch(rows, LENGTH, seed=seed) for seed in range(count)]


CFG = small.whole(**KNOBS)
TX = guard.guard(optim.make(CFG.optim, steps=CFG.steps, multipliers={}), CFG.stability)


@functools.cache
def runner(accum=1):
  """(state, batch) -> (state, metrics), on one device and with nothing donated."""
  schedule = optim.schedule(CFG.optim, CFG.steps)
  opts = dict(tx=TX, schedule=schedule, accum=accum, loss=CFG.loss)
  return jax.jit(functools.partial(step.train, **opts))


@pytest.fixture(scope='module')
def single():
  """The state before five steps on one device, the states and metrics after each."""
  net = small.model_of(attn__gate__position='sdpa')
  zero = lambda: jnp.zeros((), jnp.int32)
  first = state = step.State(zero(), zero(), net, jax.jit(TX.init)(net))
  after = []
  for batch in batches():
    state, metrics = runner()(state, batch)
    after.append((state, jax.device_get(metrics)))
  return first, after


def norm(leaves):
  return math.sqrt(sum((np.asarray(leaf, float) ** 2).sum() for leaf in leaves))


def test_step_and_data_step_count_updates_and_batches(single):
  first, after = single
  assert (int(first.step), int(first.data_step)) == (0, 0)
  assert [(int(s.step), int(s.data_step)) for s, _ in after] == [
    (n, n) for n in range(1, 6)
  ]


def test_metrics_match_their_names(single):
  first, after = single
  batch, (state, metrics) = batches()[0], after[0]
  assert set(metrics) == {
    'loss', 'z_loss', 'grad_norm', 'param_norm', 'update_norm', 'lr', 'tokens',
    'skipped', 'spikes', 'bad_in_row', 'verdict', 'loss_zscore', 'grad_norm_zscore',
  }  # fmt: skip
  assert all(np.shape(v) == () for v in metrics.values())
  run = jax.jit(lambda net, *batch: net(*batch))
  out = run(first.model, batch.tokens, batch.segments, batch.positions)
  out = np.asarray(out, float)
  lse = np.log(np.exp(out).sum(-1))
  nll = lse - np.take_along_axis(out, batch.targets[..., None], -1)[..., 0]
  weight = batch.weights / batch.weights.sum()
  np.testing.assert_allclose(metrics['loss'], (weight * nll).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics['z_loss'], 1e-3 * (weight * lse**2).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics['tokens'], batch.weights.sum())
  np.testing.assert_allclose([m['lr'] for _, m in after[:2]], [5e-4, 1e-3], rtol=1e-6)
  np.testing.assert_allclose(after[-1][1]['lr'], 1e-4, rtol=1e-4)

  old, new = trees.flatten(first.model), trees.flatten(state.model)
  np.testing.assert_allclose(metrics['param_norm'], norm(new.values()), rtol=1e-5)
  moved = norm(new[name] - old[name] for name in new)
  np.testing.assert_allclose(metrics['update_norm'], moved, rtol=1e-3)


def test_the_gradient_norm_is_reported_before_clipping(single):
  state, metrics = single[1][0]
  assert metrics['grad_norm'] > 1.1
  # Adam's first moment is the gradient that it was given, times 0.1.
  given = 10 * norm(jax.tree.leaves(state.opt.inner[1].mu))
  np.testing.assert_allclose(given, 1.0, rtol=1e-4)


@pytest.mark.slow
def test_accumulation_with_uneven_weights_is_one_batch(single):
  """Micro-batches of 2 rows, whose sums of weights differ by more than two times."""
  first, after = single
  batch = batches()[0]
  sums = batch.weights.reshape(2, 4, -1).sum((0, 2))
  assert sums.max() > 1.2 * sums.min()
  state, metrics = runner(accum=4)(first, batch)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, after[0][1][name], rtol=2e-5, err_msg=name)
  # Adam's first moment is the gradient itself, times 0.1.
  ours, exact = (trees.flatten(s.opt.inner[1].mu) for s in (state, after[0][0]))
  for name in exact:
    size = float(np.abs(exact[name]).max())
    np.testing.assert_allclose(ours[name], exact[name], atol=2e-5 * size, err_msg=name)


def test_a_batch_without_a_token_changes_nothing_but_by_decay(single):
  first, batch = single[0], batches()[0]
  empty = batch._replace(weights=np.zeros_like(batch.weights))
  state, metrics = runner()(first, empty)
  assert metrics['loss'] == metrics['z_loss'] == metrics['grad_norm'] == 0
  new, old = trees.flatten(state.model), trees.flatten(first.model)
  for name, leaf in new.items():
    shrunk = 1 if name.endswith('scale') else 1 - 5e-4 * CFG.optim.weight_decay
    np.testing.assert_allclose(leaf, shrunk * old[name], rtol=1e-6, err_msg=name)


def sharded(sizes, single, **knobs):
  """Five losses on eight devices, no transfer on the way that was not asked for."""
  axes = {f'mesh__{k}': v for k, v in sizes.items()}
  plan = Plan(small.whole(**KNOBS, **axes, **knobs))
  train = plan.train_step().compile()
  # By way of the host: what is donated must not be the memory of `single`.
  leaves = trees.flatten(jax.device_get(single[0]))
  place = lambda name, like: jax.device_put(leaves[name], like.sharding)
  shapes = trees.flatten(plan.state)
  state = trees.unflatten(plan.state, {n: place(n, like) for n, like in shapes.items()})
  placed = [mesh.place(batch, plan.mesh, 8) for batch in batches()]
  losses = []
  with jax.transfer_guard('disallow'):
    for batch in placed:
      before = state
      state, metrics = train(state, batch)
      losses.append(metrics['loss'])
    assert before.model.embed.table[...].is_deleted(), 'the state was not donated'
  for name, leaf in trees.flatten(state).items():
    assert leaf.sharding.is_equivalent_to(
      trees.flatten(plan.state)[name].sharding, leaf.ndim
    )
  return state, jax.device_get(losses)


def assert_same(ours, single):
  state, losses = ours
  np.testing.assert_allclose(losses, [m['loss'] for _, m in single[1]], rtol=0, atol=1e-5)
  exact = trees.flatten(single[1][-1][0].model)
  for name, leaf in trees.flatten(state.model).items():
    # Adam divides by the gradient's size: a small one may differ by some of a step.
    np.testing.assert_allclose(leaf, exact[name], atol=5e-4, err_msg=name)


def test_sharded_over_weights_heads_and_tokens_is_single(single):
  sizes = dict(fsdp=2, tensor=2, context=2)
  assert_same(sharded(sizes, single), single)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sizes', 'knobs'),
  [
    (dict(fsdp=8), {}),
    (dict(fsdp=2, tensor=2, data=2), dict(accum=2, model__remat='full')),
    *(
      pytest.param(sizes, knobs, marks=pytest.mark.full)
      for sizes, knobs in [
        (dict(data=2, fsdp=2, expert=2), {}),
        (dict(fsdp=2, context=4), dict(model__layers='unroll')),
      ]
    ),
  ],
  ids=str,
)
def test_sharded_in_other_ways_is_single(sizes, knobs, single):
  assert_same(sharded(dict(fsdp=1) | sizes, single, **knobs), single)


def test_evaluate_gives_each_rows_nats_and_weight(single):
  first, batch = single[0], batches()[0]
  nats, weight = jax.jit(functools.partial(losses.per_row, chunk=16))(first.model, batch)
  assert nats.shape == weight.shape == (8,)
  np.testing.assert_allclose(weight, batch.weights.sum(1))
  loss = single[1][0][1]['loss']
  np.testing.assert_allclose(nats.sum() / weight.sum(), loss, rtol=1e-5)


def test_the_first_state_follows_from_the_seed_alone():
  build = lambda key: {'w': jax.random.normal(key, (3,))}
  tx = optim.make(small.optim_config(), steps=5, multipliers={})
  first, again, other = (step.init(build, tx, seed) for seed in (0, 0, 1))
  assert trees.digest(first) == trees.digest(again) != trees.digest(other)
  assert int(first.step) == int(first.data_step) == 0


@pytest.mark.slow
def test_vectors_of_bfloat16_weights_learn_and_sums_are_float32():
  """In bfloat16, an update of 3e-4 would leave each norm scale at 1."""
  cfg = small.model_config(numerics__weights='bfloat16', attn__bias=True)
  build = functools.partial(model.Transformer, cfg)
  state = jax.jit(lambda: step.init(build, TX, 0))()
  grads = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.01, leaf.dtype), state.model)
  terms = {'loss': jnp.float32(1)}
  gradients = step.Gradients(grads, terms, None, jnp.float32(1))
  options = dict(tx=TX, schedule=optax.constant_schedule(3e-4))
  new, metrics = jax.jit(functools.partial(step.update, **options))(state, gradients)
  old = trees.flatten(state.model)
  vectors = {name for name in old if name.endswith(('.scale', '.bias'))}
  assert len(vectors) == 8
  for name, leaf in trees.flatten(new.model).items():
    assert leaf.dtype == ('float32' if name in vectors else 'bfloat16'), name
    assert name not in vectors or (leaf != old[name]).all(), name
  # A sum in bfloat16 has an error of about 1e-3.
  for name, tree in (('param_norm', new.model), ('grad_norm', grads)):
    np.testing.assert_allclose(metrics[name], norm(jax.tree.leaves(tree)), rtol=1e-5)
