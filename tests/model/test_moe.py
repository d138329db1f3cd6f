"""Experts against a dense reference that runs every expert on every token."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from gated import model
from gated.devices import mesh, trees
from gated.model import moe
from gated.plan import Plan
from gated.train import guard, optim, step

D, F, E, K = 12, 10, 6, 2
B, T = 4, 16
NUMERICS = small.numerics()
MOE = dict(model__moe__experts=8, model__moe__top_k=2)


def moe_config(**changes):
  return small._part(moe.Config, 'model__moe', dict(experts=E, top_k=K) | changes)


def built(**changes):
  cfg = moe_config(**changes)
  opts = dict(width=D, hidden=F, std_out=0.3, numerics=NUMERICS)
  return small.filled(jax.eval_shape(lambda: moe.MoE(cfg, jax.random.key(0), **opts)))


# What is added to the router's logits, so that some loads are far from even.
LOADS = {
  'as it comes': np.zeros(E),
  'skewed': 2.0 * np.arange(E),
  'empty experts': np.array([0, -99, 0, -99, 0, -99]),
  'a single pair': np.array([-99, 99, -99, 99, -99, -99]),
}


def problem(load):
  """A layer with a router leaning as `load` says, by a channel of x that is always 1."""
  net = built()
  rng = np.random.default_rng(1)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  x[..., 0] = 1
  net.router.weight[...] = net.router.weight[...].at[0].add(jnp.asarray(LOADS[load]))
  return net, jnp.asarray(x), jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


def dense(net, x, norm_topk=True):
  """Every expert on every token, weighted by zero where it was not chosen."""
  prob = jax.nn.softmax(x @ net.router.weight[...], -1)
  chosen = prob >= jnp.sort(prob, -1)[..., -K][..., None]
  weight = jnp.where(chosen, prob, 0)
  if norm_topk:
    weight = weight / weight.sum(-1, keepdims=True)
  act = jnp.einsum('btd,edf->btef', x, net.experts.act[...])
  up = jnp.einsum('btd,edf->btef', x, net.experts.up[...])
  y = jnp.einsum('btef,efd->bted', jax.nn.silu(act) * up, net.experts.down[...])
  return jnp.einsum('bted,bte->btd', y, weight)


LIVE = jnp.ones((B, T), bool)


def with_gradients(run, net, x, dy):
  total = lambda net, x: jnp.sum(dy * run(net, x))
  with jax.default_matmul_precision('highest'):
    value = jax.jit(run)(net, x)
    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(net, x)
  return {'y': value, 'x': grads[1]} | trees.flatten(grads[0])


@pytest.mark.slow
@pytest.mark.parametrize('load', LOADS)
@pytest.mark.parametrize(
  'dispatch', ['dropless', pytest.param('capacity', marks=pytest.mark.slow)]
)
def test_output_and_gradients_are_the_dense_reference(load, dispatch):
  """The issue of a capacity of all of a row is that nothing is dropped."""
  net, x, dy = problem(load)
  if dispatch == 'capacity':
    object.__setattr__(net, 'cfg', moe_config(dispatch='capacity', capacity=float(E)))
  ours = with_gradients(lambda net, x: net(x, LIVE)[0], net, x, dy)
  exact = with_gradients(dense, net, x, dy)
  for name in exact:
    size = max(1.0, float(jnp.abs(exact[name]).max()))
    np.testing.assert_allclose(ours[name], exact[name], atol=1e-5 * size, err_msg=name)
  counts = np.asarray(jax.jit(lambda net, x: net(x, LIVE)[1].load_E)(net, x))
  assert counts.sum() == B * T * K
  wanted = {
    'as it comes': (counts > 0).all(),
    'skewed': counts.max() > 10 * counts.min(),
    'empty experts': (counts[1::2] == 0).all(),
    'a single pair': counts.tolist() == [0, B * T, 0, B * T, 0, 0],
  }
  assert wanted[load]


@pytest.mark.slow
def test_weights_that_are_not_normalised_are_the_probabilities():
  net, x, dy = problem('skewed')
  object.__setattr__(net, 'cfg', moe_config(norm_topk=False))
  ours = with_gradients(lambda net, x: net(x, LIVE)[0], net, x, dy)
  exact = with_gradients(functools.partial(dense, norm_topk=False), net, x, dy)
  for name in exact:
    size = max(1.0, float(jnp.abs(exact[name]).max()))
    np.testing.assert_allclose(ours[name], exact[name], atol=1e-5 * size, err_msg=name)


@pytest.mark.full
def test_shared_experts_are_added_for_every_token():
  net, x, _ = problem('skewed')
  more = built(shared=2)
  more.router.weight[...] = net.router.weight[...]
  assert more.shared.up.weight.shape == (D, 2 * F)
  extra = more(x, LIVE)[0] - net(x, LIVE)[0]
  np.testing.assert_allclose(extra, more.shared(x), atol=1e-5)


def capacity_by_hand(choice, live, capacity):
  """Which choices (T, k) of one row find a place: first choices of all tokens first."""
  taken, fits = np.zeros(E, int), np.zeros(choice.shape, bool)
  for k in range(choice.shape[1]):
    for t in range(choice.shape[0]):
      if live[t]:
        fits[t, k] = taken[choice[t, k]] < capacity
        taken[choice[t, k]] += 1
  return fits


@pytest.mark.full
def test_what_a_capacity_drops_is_left_out_and_counted():
  net, x, _ = problem('skewed')
  factor = 0.9
  limit = math.ceil(factor * K * T / E)
  object.__setattr__(
    net, 'cfg', moe_config(dispatch='capacity', capacity=factor, norm_topk=False)
  )
  live = np.ones((B, T), bool)
  live[:, -3:] = False
  y, report = net(x, jnp.asarray(live))
  logit = x @ net.router.weight[...]
  weight, choice, _ = (np.asarray(a) for a in moe.route(logit, net.cfg))
  one = dense(net, x, norm_topk=False)
  assert report.dropped > 0
  dropped = 0
  for b in range(B):
    fits = capacity_by_hand(choice[b], live[b], limit)
    dropped += (~fits[live[b]]).sum()
    for t in np.flatnonzero(live[b]):
      kept = [(weight[b, t, k], choice[b, t, k]) for k in range(K) if fits[t, k]]
      x_D = np.asarray(x[b, t], np.float64)
      act, up, down = (
        np.asarray(w[...], np.float64)
        for w in (net.experts.act, net.experts.up, net.experts.down)
      )
      silu = lambda z: z / (1 + np.exp(-z))
      exact = sum(w * (silu(x_D @ act[e]) * (x_D @ up[e])) @ down[e] for w, e in kept)
      np.testing.assert_allclose(y[b, t], exact, atol=1e-4)
  assert int(report.dropped) == dropped
  assert np.abs(y - one)[live].max() > 1e-2


@pytest.mark.full
def test_padding_is_neither_counted_nor_balanced():
  net, x, _ = problem('as it comes')
  live = np.ones((B, T), bool)
  live[:, T // 2 :] = False
  _, report = net(x, jnp.asarray(live))
  _, half = net(x[:, : T // 2], LIVE[:, : T // 2])
  for a, b in zip(report, half):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_losses_are_their_formulae():
  rng = np.random.default_rng(0)
  load = rng.integers(0, 9, (3, E)).astype(np.float32)
  prob = rng.random((3, E)).astype(np.float32)
  zero = np.zeros(3, np.float32)
  report = moe.Report(load, prob, zero + 5, zero)
  balance, z = moe.losses(report, load, jnp.float32(7))
  exact = sum(E * (f / f.sum() * p / 7).sum() for f, p in zip(load, prob))
  np.testing.assert_allclose(balance, exact, rtol=1e-6)
  np.testing.assert_allclose(z, 15 / 7, rtol=1e-6)
  even = jnp.full((1, E), 4.0)
  report = moe.Report(even, even / 4 * 7 / E, zero[:1], zero[:1])
  np.testing.assert_allclose(moe.losses(report, even, jnp.float32(7))[0], 1, rtol=1e-6)


def test_statistics_are_their_definitions():
  load = jnp.asarray([[4.0, 4, 4, 4], [16, 0, 0, 0]])
  zero = jnp.zeros(2)
  found = moe.statistics(moe.Report(load, load, zero, jnp.asarray([0.0, 8])))
  assert float(found['load_max']) == 4
  np.testing.assert_allclose(found['load_entropy'], math.log(4) / 2, rtol=1e-6)
  assert float(found['dropped']) == 0.25


SPLITS = [
  dict(fsdp=2, expert=4),
  dict(expert=8),
  dict(data=2, expert=2, tensor=2),
  dict(fsdp=2, tensor=2, context=2),
  dict(expert=2, context=2, tensor=2),
]
# What is added to the router's logits of eight experts. By one alone, or by the two of
# one device, all selections are one device's, which are more than one pass takes.
LEANINGS = {
  'as it comes': np.zeros(8),
  'one and another': 99.0 * (np.arange(8) == 6),
  'a single pair': 99.0 * (np.arange(8) < 2),
}


def split_problem(leaning):
  """(weights, x, weight, choice) of eight experts, and a gradient of y."""
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  logit = rng.normal(size=(8, 8, 8)) + LEANINGS[leaning]
  choice = jnp.asarray(np.argsort(-logit)[..., :K], jnp.int32)
  weight = jnp.asarray(rng.random((8, 8, K)), jnp.float32)
  weights = [0.3 * draw(8, 16, 12), 0.3 * draw(8, 16, 12), 0.3 * draw(8, 12, 16)]
  return weights, draw(8, 8, 16), weight, choice, draw(8, 8, 16)


def split_over(on, weights, x, weight, choice, dy):
  """The same, as a mesh splits it."""
  place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(on, mesh.spec(axes, on)))
  rows = lambda a: place(a, 'batch', 'tokens', None)
  wide, narrow = ('experts', 'embed', 'ffn'), ('experts', 'ffn', 'embed')
  split = [place(w, *axes) for w, axes in zip(weights, (wide, wide, narrow))]
  return split, rows(x), rows(weight), rows(choice), rows(dy)


def dropless_with_gradients(weights, x, weight, choice, dy):
  """-> y and the gradients of the weights, of x and of the router's weights."""
  run = lambda weights, x, weight: moe.dropless.run(
    weights, x, weight, choice, backend='auto'
  )
  with jax.default_matmul_precision('highest'):
    y, back = jax.vjp(run, weights, x, weight)
    return y, *back(dy)


@pytest.mark.slow
@pytest.mark.parametrize('leaning', LEANINGS)
@pytest.mark.parametrize(
  'sizes',
  [SPLITS[0], *(pytest.param(s, marks=pytest.mark.full) for s in SPLITS[1:])],
  ids=str,
)
def test_experts_of_several_devices_are_those_of_one(sizes, leaning):
  problem = split_problem(leaning)
  on = mesh.make(**dict.fromkeys(mesh.AXES, 1) | sizes)
  exact = jax.jit(dropless_with_gradients)(*problem)
  with jax.set_mesh(on):
    ours = jax.jit(dropless_with_gradients)(*split_over(on, *problem))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize('sizes', SPLITS, ids=str)
def test_a_load_that_is_one_devices_takes_several_passes(sizes):
  """The test above would not tell otherwise."""
  devices = sizes.get('expert', 1)
  tokens = 64 * sizes.get('tensor', 1) // 8
  here = 8 // devices
  choice = np.asarray(split_problem('a single pair')[3])
  assert sorted(set(choice.ravel())) == [0, 1]
  load = devices * tokens * min(K, here)
  assert devices == 1 or load > moe.dropless.pass_rows(tokens * K, worst=load)


def test_a_pass_is_for_somewhat_more_than_the_mean_and_for_no_more_than_all():
  rows = lambda mean, worst: moe.dropless.pass_rows(mean, worst=worst)
  assert rows(131_072, 1 << 20) == 196_608
  assert rows(5001, 1 << 20) % moe.dropless.TILE == 0
  assert 7502 <= rows(5001, 1 << 20) < 7502 + moe.dropless.TILE
  assert rows(100, 128) == 128 and rows(16, 1000) == 24


def gathered(program):
  """A compiled program -> how many numbers the result of each all-gather has."""
  calls = re.findall(r'= (\(?[^=]*?) all-gather(?:-start)?\(', program)
  shapes = [shape for call in calls for shape in re.findall(r'\w+\[([\d,]*)\]', call)]
  return [math.prod(int(n) for n in shape.split(',') if n) for shape in shapes]


@pytest.mark.parametrize('dispatch', ['dropless', 'capacity'])
def test_no_device_gathers_the_weights_of_all_experts(dispatch):
  weights, x, weight, choice, dy = split_problem('as it comes')
  on = mesh.make(data=1, fsdp=2, expert=4, tensor=1, context=1)

  def capacity(weights, x, weight, choice, dy):
    run = lambda *args: moe.capacity.run(
      *args, choice, live_BT=jnp.ones((8, 8), bool), factor=1.0
    )[0]
    y, back = jax.vjp(run, weights, x, weight)
    return y, *back(dy)

  run = dropless_with_gradients if dispatch == 'dropless' else capacity
  args = split_over(on, weights, x, weight, choice, dy)
  with jax.set_mesh(on):
    program = jax.jit(run).lower(*args).compile().as_text()
  sizes = gathered(program)
  of_all = weights[0].size
  # A device's own experts are whole, which FSDP had split.
  assert of_all // 4 in sizes
  # The tokens of a layer are fewer than its weights here.
  assert x.size < of_all
  assert max(sizes) < of_all


KNOBS = MOE | dict(loss__balance=0.5, loss__router_z=0.1, optim__lr=1e-3)


@functools.cache
def first_step(accum=1, over='global', dispatch='dropless', **sizes):
  """The metrics of one step from a filled model, and the model after it, by plain SGD."""
  axes = dict(data=1, fsdp=1, expert=1, tensor=1, context=1) | sizes
  knobs = KNOBS | dict(model__moe__dispatch=dispatch, model__moe__capacity=0.8)
  cfg = small.whole(accum=accum, loss__balance_over=over, **knobs)
  on = mesh.make(**axes, devices=jax.devices()[: math.prod(axes.values())])
  # The change of a parameter is its gradient; Adam's first would be little but its sign.
  tx = guard.guard(optax.sgd(1.0), cfg.stability)
  schedule = optim.schedule(cfg.optim, cfg.steps)
  run = functools.partial(
    step.train, tx=tx, schedule=schedule, accum=accum, loss=cfg.loss
  )
  net = small.filled(model.abstract(cfg.model))
  zero = jnp.zeros((), jnp.int32)
  state = step.State(zero, zero, net, tx.init(net))
  shardings = mesh.shardings(jax.eval_shape(lambda: state), on)
  state = jax.device_put(state, shardings)
  batch = mesh.place(small.batch(8, 16), on, 8)
  with jax.set_mesh(on):
    state, metrics = jax.jit(run)(state, batch)
  return jax.device_get(metrics), trees.flatten(jax.device_get(state.model))


# Meshes without micro-batches are in tests/devices/test_placement.py.
@pytest.mark.full
@pytest.mark.parametrize(
  ('accum', 'sizes'),
  [
    (8, {}),
    (4, dict(data=2)),
    (2, dict(fsdp=2, expert=2)),
    (2, dict(data=2, expert=2, tensor=2)),
  ],
  ids=str,
)
def test_the_global_balance_is_one_number_however_a_batch_is_split(accum, sizes):
  """So are the other metrics, and the parameters after a step: so is its gradient."""
  exact, exact_model = first_step()
  metrics, after = first_step(accum, **sizes)
  for name, value in exact.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  # The counts are integers.
  assert metrics['load_max'] == exact['load_max'] > 1
  for name, value in exact_model.items():
    np.testing.assert_allclose(after[name], value, atol=2e-5, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize('sizes', [SPLITS[0], *SPLITS[2:4]], ids=str)
def test_a_capacity_drops_the_same_on_any_mesh(sizes):
  exact, exact_model = first_step(dispatch='capacity')
  rows = math.prod(size for axis, size in sizes.items() if axis in mesh.RULES['batch'])
  metrics, after = first_step(8 // rows // 2 or 1, dispatch='capacity', **sizes)
  assert metrics['dropped'] == exact['dropped'] > 0
  for name, value in exact.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  for name, value in exact_model.items():
    np.testing.assert_allclose(after[name], value, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.full
def test_a_buffer_and_micro_batches_ask_for_another_balance():
  losses = {
    over: float(first_step(4, over)[0]['balance_loss'])
    for over in ('global', 'buffer', 'micro')
  }
  assert losses['micro'] > losses['buffer'] > losses['global']
  # With one micro-batch there is no difference.
  for over in ('buffer', 'micro'):
    alone = float(first_step(1, over)[0]['balance_loss'])
    np.testing.assert_allclose(alone, losses['global'], rtol=1e-6)


@pytest.mark.slow
def test_router_losses_reach_the_routers_gradient():
  cfg = small.whole(**KNOBS | dict(loss__balance=0.0, loss__router_z=0.0))
  assert cfg.loss.balance == 0
  net = small.filled(model.abstract(cfg.model))
  batch = small.batch(8, 16)

  @jax.jit
  def gradient(net, balance):
    def run(net):
      x, report = net.hidden(batch.tokens, batch.segments, batch.positions)
      terms = moe.losses(report, report.load_E, jnp.float32(8 * 16))
      return balance * (terms[0] + terms[1]) + 0 * x.sum()

    return jax.grad(run)(net).blocks.ffn.router.weight[...]

  assert float(jnp.abs(gradient(net, 1.0)).max()) > 1e-3
  np.testing.assert_array_equal(gradient(net, 0.0), 0)


def test_a_layer_has_the_experts_parameters_and_no_others():
  cfg = small.model_config(moe__experts=8, moe__top_k=2, moe__shared=1)
  shapes = {k: v.shape for k, v in trees.flatten(model.abstract(cfg)).items()}
  ffn = {k: v for k, v in shapes.items() if '.ffn.' in k}
  assert ffn == {
    'blocks.ffn.router.weight': (2, 16, 8),
    'blocks.ffn.experts.act': (2, 8, 16, 24),
    'blocks.ffn.experts.up': (2, 8, 16, 24),
    'blocks.ffn.experts.down': (2, 8, 24, 16),
    'blocks.ffn.shared.act.weight': (2, 16, 24),
    'blocks.ffn.shared.up.weight': (2, 16, 24),
    'blocks.ffn.shared.down.weight': (2, 24, 16),
  }
  parts = model.parts(cfg)
  assert parts['experts'] == 2 * 3 * 8 * 16 * 24
  assert parts['total'] - parts['active'] == 2 * 3 * 6 * 16 * 24
  dense = small.model_config()
  two = model.flops_per_token(small.model_config(moe__experts=8, moe__top_k=2), 8)
  one = model.flops_per_token(dense, 8)
  # One FFN more, and the router.
  assert two - one == 6 * 2 * (3 * 16 * 24 + 16 * 8)


@pytest.mark.slow
def test_the_router_computes_in_float32_whatever_the_model_does():
  cfg = small.model_config(
    moe__experts=8,
    moe__top_k=2,
    numerics__compute='bfloat16',
    numerics__weights='bfloat16',
  )
  assert trees.flatten(model.abstract(cfg))['blocks.ffn.router.weight'].dtype == 'float32'
  assert trees.flatten(model.abstract(cfg))['blocks.ffn.experts.up'].dtype == 'bfloat16'
  net = small.filled(model.abstract(cfg))
  _, report = jax.jit(lambda net, t: net.hidden(t))(net, small.batch(2, 16).tokens)
  assert all(leaf.dtype == jnp.float32 for leaf in report)


@pytest.mark.full
@pytest.mark.usefixtures('no_transfers')
def test_a_step_with_experts_makes_no_transfer():
  with jax.transfer_guard('allow'):
    plan = Plan(small.whole(accum=2, batch=16, **KNOBS))
    run, state = plan.train_step().compile(), plan.init()
    batch = mesh.place(small.batch(16, 16), plan.mesh, 16)
  state, metrics = run(state, batch)
  jax.block_until_ready(metrics)
  with jax.transfer_guard('allow'):
    assert int(state.step) == 1
    assert np.isfinite(float(metrics['loss'])) and float(metrics['balance_loss']) > 0


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(top_k=7), r'moe\.top_k=7, but there are config\.model\.moe\.experts=6'),
    (dict(top_k=0), r'moe\.top_k=0'),
    (dict(experts=-1), r'moe\.experts=-1'),
    (dict(shared=-1), r'moe\.shared=-1'),
    (dict(experts=0, shared=1), r'moe\.shared=1, but config\.model\.moe\.experts=0'),
    (dict(dispatch='drop'), r"moe\.dispatch='drop', but allowed are 'dropless'"),
    (dict(capacity=0.0), r'moe\.capacity=0\.0'),
    (
      dict(dispatch='capacity', backend='blocked'),
      r"moe\.backend='blocked', but .*dispatch='capacity'.*allowed is 'auto'",
    ),
    (dict(backend='cuda'), r"moe\.backend='cuda', but allowed are 'auto', 'pallas'"),
  ],
)
def test_a_mixture_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\.' + said):
    moe_config(**changes)


def test_experts_that_the_mesh_does_not_divide_are_refused():
  with pytest.raises(
    ValueError, match=r'moe\.experts=6 must be a multiple of .*expert=4'
  ):
    Plan(
      small.whole(
        model__moe__experts=6, model__moe__top_k=2, mesh__expert=4, mesh__fsdp=2, batch=8
      )
    )
