"""Schedules pass through the points they promise; AdamW is its formula, Muon optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

from gated import model
from gated.devices import mesh, trees
from gated.plan import Plan
from gated.pods import compiled
from gated.run import checkpoint
from gated.train import guard, optim

STEPS, WARMUP, PEAK, FLOOR = 50, 10, 1e-2, 1e-3


def knobs(**changes):
  return small.optim_config(
    **dict(lr=PEAK, warmup=WARMUP, decay=20, floor=FLOOR, clip=0.0) | changes
  )


def rates(steps=STEPS, **changes):
  """The learning rate of each update of a run."""
  schedule = optim.schedule(knobs(**changes), steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


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
  ('changes', 'message'),
  [
    (dict(name='sgd'), "name='sgd'.*'adamw', 'muon'"),
    (dict(muon__steps=0), 'muon.steps=0'),
    (dict(muon__rms=0.0), 'muon.rms=0.0'),
    (dict(muon__momentum=1.0), 'muon.momentum=1.0'),
    (dict(schedule='step'), "schedule='step'.*'cosine', 'wsd', 'linear', 'constant'"),
    (dict(decay_by='time'), "decay_by='time'"),
    (dict(lr=0.0), 'lr=0.0'),
    (dict(floor=0.1), 'floor=0.1 is above config.optim.lr=0.01'),
    (dict(warmup=-1), 'warmup=-1'),
    (dict(warmup=1 << 40), 'warmup=1099511627776, but'),
    (dict(weight_decay=-0.1), 'weight_decay=-0.1'),
    (dict(clip=-1.0), 'clip=-1.0'),
    (dict(b1=1.0), 'b1=1.0'),
    (dict(b2=-0.1), 'b2=-0.1'),
    (dict(eps=-1.0), 'eps=-1.0'),
  ],
)
def test_a_bad_knob_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=r'config\.optim\.' + message):
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

  @jax.jit
  def run(grads):
    state, out = tx.init(PARAMS), []
    for _ in range(steps):
      update, state = tx.update(grads, state, PARAMS)
      out.append(update)
    return out

  return run(grads)


def test_an_update_is_adamw_as_written():
  b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.1
  steps = updates(GRADS, 3, weight_decay=decay, schedule='constant')
  g, p = (np.asarray(t['attn']['query']['weight'], float) for t in (GRADS, PARAMS))
  m = v = 0
  for t, update in enumerate(steps, 1):
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


@pytest.mark.slow
@pytest.mark.parametrize(
  ('changes', 'promised'),
  [
    (dict(clip=1.0), True),
    (dict(clip=1.0, eps=1e-30), True),
    (dict(clip=0.0), False),
    (dict(clip=1.0, eps=0.0), False),
    (dict(clip=1.0, b2=1 - 1e-9), False),  # 1 in float32
    (dict(clip=1.0, lr=1e29), False),
    (dict(clip=1.0, name='muon'), False),
    (dict(clip=1.0, factored=True), False),
  ],
)
def test_updates_are_finite_where_that_is_promised(changes, promised):
  """Gradients of all sizes, from zeros and denormals to a norm near the largest."""
  cfg = knobs(**changes)
  assert optim.finite_updates(cfg) == promised
  if not promised:
    return
  tx = optim.make(cfg, steps=STEPS, multipliers={})
  rng, params = np.random.default_rng(0), {'w': jnp.full((512,), 1e3)}
  state = tx.init(params)
  for most in (-20, 18.2, -44, 0, 18.2, -44):
    sizes = 10 ** rng.uniform(-45, most, 512) if most > -44 else np.zeros(512)
    grads = {'w': jnp.asarray(sizes * rng.choice([-1, 1], 512), jnp.float32)}
    assert jnp.isfinite(optax.tree.norm(grads))
    updates, state = tx.update(grads, state, params)
    assert jnp.isfinite(updates['w']).all()


def test_multipliers_scale_the_updates_of_named_parameters():
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


# Parameters of two layers by the names and axes that a model's have: attention's maps,
# experts, and some that are none of Muon's.
AXES = {
  'query.weight': ('embed', 'heads', 'head_dim'),
  'out.weight': ('heads', 'head_dim', 'embed'),
  'gate.weight': ('embed', 'heads', 'head_dim'),
  'experts.down': ('experts', 'ffn', 'embed'),
  'router.weight': ('embed', None),
  'query.bias': ('heads', 'head_dim'),
  'norm.scale': (None,),
}
SIZES = {'embed': 6, 'heads': 2, 'head_dim': 4, 'experts': 2, 'ffn': 5, None: 3}
LAYERS = 2


def layered(seed):
  rng, tree = np.random.default_rng(seed), {}
  for name, axes in AXES.items():
    shape = (LAYERS, *(SIZES[axis] for axis in axes))
    module, leaf = name.split('.')
    value = nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes)
    tree.setdefault(module, {})[leaf] = value
  return tree


def layered_updates(steps=2, multipliers={}, **changes):  # noqa: B006
  """The updates of some steps of constant gradients, {name: array} each."""
  tx = optim.make(knobs(**changes), steps=STEPS, multipliers=multipliers)

  @jax.jit
  def run(params, grads):
    state, out = tx.init(params), []
    for step in range(steps):
      scaled = jax.tree.map(lambda g, step=step: jnp.cos(step * g) * g, grads)
      update, state = tx.update(scaled, state, params)
      out.append(update)
    return out

  return [trees.flatten(update) for update in run(layered(0), layered(1))]


@pytest.fixture(scope='module')
def by_muon():
  return layered_updates(name='muon')


@pytest.mark.slow
def test_muon_updates_every_layer_and_expert_as_optax_does_a_matrix(by_muon):
  cfg = knobs(name='muon')
  theirs = optax.contrib.muon(
    optim.schedule(cfg, STEPS),
    ns_steps=cfg.muon.steps,
    beta=cfg.muon.momentum,
    nesterov=cfg.muon.nesterov,
    weight_decay=cfg.weight_decay,
    consistent_rms=cfg.muon.rms,
  )

  @jax.jit
  def each(params, grads):
    state, out = theirs.init(params), []
    for step in range(2):
      scaled = jax.tree.map(lambda g, step=step: jnp.cos(step * g) * g, grads)
      update, state = theirs.update(scaled, state, params)
      out.append(update)
    return out

  def matrices(tree):
    flat = trees.flatten(tree)
    return {
      'query.weight': flat['query.weight'].reshape(LAYERS, 6, 8),
      'out.weight': flat['out.weight'].reshape(LAYERS, 8, 6),
      'gate.weight': flat['gate.weight'].reshape(LAYERS, 6, 8),
      'experts.down': flat['experts.down'].reshape(2 * LAYERS, 5, 6),
    }

  apart = lambda tree: {name: list(stack) for name, stack in matrices(tree).items()}
  for ours, plain in zip(by_muon, each(apart(layered(0)), apart(layered(1)))):
    for name, layers in plain.items():
      stack = np.stack(layers).reshape(ours[name].shape)
      np.testing.assert_allclose(ours[name], stack, rtol=1e-4, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_muons_updates_are_as_large_as_asked_for_before_decay_and_multipliers(by_muon):
  changed = layered_updates(name='muon', weight_decay=0.0, multipliers={'gate': 0.25})[0]
  params, lr = trees.flatten(layered(0)), PEAK / WARMUP
  shares = dict.fromkeys(('query.weight', 'out.weight', 'experts.down'), 1.0)
  for name, share in (shares | {'gate.weight': 0.25}).items():
    rms = float(jnp.sqrt(jnp.mean(changed[name] ** 2))) / (share * lr)
    assert 0.2 * 0.6 < rms < 0.2 * 1.25, name
    expected = share * (by_muon[0][name] + lr * 0.1 * params[name])
    np.testing.assert_allclose(changed[name], expected, rtol=1e-3, atol=1e-8)


def test_adamw_updates_all_but_matrices(by_muon):
  adamw = layered_updates(name='adamw')
  for name in ('router.weight', 'query.bias', 'norm.scale'):
    for ours, theirs in zip(by_muon, adamw):
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
  ('changes', 'taken', 'left'),
  [
    (
      dict(attn__gate__position='sdpa', norm='gated', tied=False),
      'attn.query attn.key attn.value attn.out attn.gate ffn.act ffn.up ffn.down',
      'attn_norm.down attn_norm.up embed head attn.query_norm',
    ),
    (
      dict(
        attn__gate__position='sdpa',
        attn__gate__granularity='headwise',
        attn__sink_tokens=2,
        moe__experts=4,
        moe__top_k=2,
        moe__shared=1,
      ),
      'ffn.experts.act ffn.experts.down ffn.shared.up ffn.shared.down',
      'ffn.router attn.gate attn.sinks',
    ),
    (
      dict(
        attn__gate__position='out',
        attn__switch__where='value',
        attn__switch__experts=2,
        attn__bias=True,
      ),
      'attn.gate attn.value.project.weight',
      'attn.value.router attn.query.bias attn.value.project.bias',
    ),
    (
      dict(attn__gate__position='value', attn__gate__source='parameter'),
      'attn.value',
      'attn.gate',
    ),
  ],
)
def test_muon_takes_the_matrices_of_the_layers(changes, taken, left):
  net = model.abstract(small.model_config(**changes))
  is_parameter = lambda x: isinstance(x, nnx.Variable)
  each = jax.tree_util.tree_leaves_with_path(net, is_leaf=is_parameter)
  matrices = {trees.name(path): optim.matrix(p) is not None for path, p in each}
  for group, expected in ((taken, True), (left, False)):
    for part in group.split():
      values = {name: m for name, m in matrices.items() if f'.{part}.' in f'.{name}.'}
      assert values and set(values.values()) == {expected}, (part, values)


def run_of(count, devices=1, **changes):
  """-> a plan, its compiled step, its state after so many steps, and their losses."""
  changes |= dict(optim__name='muon', optim__lr=0.05, optim__schedule='constant')
  changes |= dict(model__attn__gate__position='sdpa')
  plan = Plan(small.whole(**changes), jax.devices()[:devices])
  step = plan.train_step().compile()
  state, losses = plan.init(), []
  for i in range(count):
    state, metrics = step(state, placed(plan, i % 2))
    losses.append(float(metrics['loss']))
  return plan, step, state, losses


def placed(plan, seed, weight=1.0):
  host = small.batch(8, plan.cfg.data.length, seed=seed)
  host = host._replace(weights=host.weights * np.float32(weight))
  return mesh.place(jax.tree.map(np.asarray, host), plan.mesh, 8)


@pytest.mark.slow
@pytest.mark.full
def test_muon_learns_alike_on_one_device_and_on_eight_and_is_saved_to_the_last_bit(
  tmp_path,
):
  *_, losses = run_of(12)
  assert losses[-1] < losses[0] - 0.5
  plan, step, state, split = run_of(6, devices=8, mesh__fsdp=4, mesh__tensor=2, accum=2)
  np.testing.assert_allclose(split, losses[:6], atol=1e-5)
  where = {name: leaf.sharding for name, leaf in trees.flatten(state).items()}
  moments = [name for name in where if '.mu.' in name]
  assert sum('.muon.' in name for name in moments) == 8
  for name in moments:
    assert where[name] == where['model.' + name.split('.mu.')[1]], name
  # Matrices are moved to where they are whole, not sent in each of the iteration's steps:
  # that would be 28 bytes a parameter.
  moved = compiled.read(step.as_text(), dict(plan.mesh.shape)).collectives
  assert sum(t.bytes for t in moved if t.kind == 'all-gather') < 10 * plan.parameters

  about = dict(config={}, data={}, heldout_loss=None)
  with checkpoint.Checkpoints(tmp_path / 'saves', keep=1, keep_every=0) as saved:
    saved.save(6, state, about)
  digest, inner = trees.digest(state), trees.digest((state.model, state.opt.inner))
  with checkpoint.Reader(tmp_path / 'saves') as saved:
    state = saved.restore(6, plan.state)
  assert trees.digest(state) == digest
  # A step that is not finite leaves the momenta as they were.
  state, metrics = step(state, placed(plan, 0, weight=np.nan))
  assert guard.VERDICTS[int(metrics['verdict'])] == 'not finite'
  assert trees.digest((state.model, state.opt.inner)) == inner
