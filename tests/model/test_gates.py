"""Several gates on a layer, patterns over layers and the axes of a gate, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import config, model
from gated.devices import mesh, trees
from gated.model import gate, layers
from gated.train import guard, optim, step

DEPTH, STEP = 4, 13
# Every new axis in one model: (a, b) = (10, 20) opens the first gate by 0.3 at STEP.
GATES = dict(
  depth=DEPTH,
  attn__gate__position='sdpa',
  attn__gate__layers='every:2',
  attn__gate__inputs='first:6',
  attn__gate__bias=True,
  attn__gate__activation='softplus',
  attn__gate__opens=(10, 20),
  attn__gates='value granularity=headwise inputs=rank:3 activation=tanh layers=last:1;'
  'key place=after inputs=all activation=exp opens=0,0 bias=False layers=0,2-3;'
  'out form=add activation=hard_sigmoid opens=0,20 layers=first:1',
)
LAYERS = {'gate': [1, 3], 'gate_value': [3], 'gate_key': [0, 2, 3], 'gate_out': [0]}
OPEN = {'gate': 0.3, 'gate_value': 0.3, 'gate_key': 1.0, 'gate_out': 0.65}
CFG = small.model_config(**GATES)
BATCH = small.batch(8, 16)


def rms(x, scale):
  return scale * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def gated(name, layer, leaves, y, x):
  """The formula of each gate of GATES, for y (B, T, H, K) or (B, T, D)."""
  if layer not in LAYERS[name]:
    return y
  row = LAYERS[name].index(layer)
  of = lambda leaf: leaves[f'blocks.attn.{name}.{leaf}'][row]
  share = OPEN[name]
  if name == 'gate':
    logit = jnp.einsum('btd,dhk->bthk', x[..., :6], of('weight')) + of('bias')
    return y * (1 + share * (jnp.log1p(jnp.exp(logit)) - 1))
  if name == 'gate_value':
    logit = x @ of('reduce') @ of('weight') + of('bias')
    return y * (1 + share * (jnp.tanh(logit) - 1))[..., None]
  if name == 'gate_key':
    return y * jnp.exp(jnp.einsum('btd,dhk->bthk', x, of('weight')))
  logit = x[..., :6] @ of('weight') + of('bias')
  return y + share * jnp.clip(logit / 6 + 0.5, 0, 1)


def plain(leaves, batch):
  """The whole model in plain jax.numpy -> logits."""
  w = lambda name, i: leaves[f'blocks.{name}'][i]
  angle = small.angles(batch.positions, 8, 10_000.0)
  same = batch.segments[:, :, None] == batch.segments[:, None, :]
  seen = same & jnp.tril(jnp.ones((16, 16), bool))
  h = leaves['embed.table'][batch.tokens]
  for i in range(DEPTH):
    gates = {name: functools.partial(gated, name, i, leaves) for name in LAYERS}
    x = rms(h, w('attn_norm.scale', i))
    q, k, v = (
      jnp.einsum('btd,dhk->bthk', x, w(f'attn.{n}.weight', i))
      for n in ('query', 'key', 'value')
    )
    q, k = rms(q, w('attn.query_norm.scale', i)), rms(k, w('attn.key_norm.scale', i))
    k, v = gates['gate_key'](k, x), gates['gate_value'](v, x)
    q, k = (layers.rope(y, angle, 1.0) for y in (q, k))
    k, v = (jnp.repeat(y, 2, 2) for y in (k, v))
    score = jnp.einsum('bthk,bshk->bhts', q, k) / np.sqrt(8)
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf))
    y = gates['gate'](jnp.einsum('bhts,bshk->bthk', weight, v), x)
    y = jnp.einsum('bthk,hkd->btd', y, w('attn.out.weight', i))
    h = h + gates['gate_out'](y, x)
    x = rms(h, w('ffn_norm.scale', i))
    act, up = (x @ w(f'ffn.{n}.weight', i) for n in ('act', 'up'))
    h = h + (jax.nn.silu(act) * up) @ w('ffn.down.weight', i)
  return rms(h, leaves['norm.scale']) @ leaves['embed.table'].T


def loss(logits, batch):
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
  return (batch.weights * nll[..., 0]).sum()


@functools.cache
def expected():
  """The loss of the plain model, and its gradient by name."""
  leaves = trees.flatten(small.filled(model.abstract(CFG)))
  with jax.numpy_rank_promotion('allow'):
    return jax.jit(jax.value_and_grad(lambda x: loss(plain(x, BATCH), BATCH)))(leaves)


def whole(net, batch):
  logits = net.at_step(jnp.int32(STEP))(batch.tokens, batch.segments, batch.positions)
  return loss(logits, batch)


def agrees(value, grads):
  exact, slopes = expected()
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  for name, slope in trees.flatten(grads).items():
    close = dict(rtol=1e-3, atol=5e-4 * np.abs(slopes[name]).max())
    np.testing.assert_allclose(slope, slopes[name], **close, err_msg=name)
    assert np.abs(slope).max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize('run', ['scan', pytest.param('unroll', marks=pytest.mark.full)])
def test_gates_by_pattern_are_their_formulas_gradients_included(run):
  net = small.filled(model.abstract(small.model_config(**GATES, layers=run)))
  agrees(*jax.jit(jax.value_and_grad(whole))(net, BATCH))


@pytest.mark.slow
def test_eight_devices_compute_the_gates_of_one():
  on = small.mesh_of(data=2, fsdp=2, tensor=2)
  net = small.filled(model.abstract(CFG))
  with jax.set_mesh(on):
    net = jax.device_put(net, mesh.shardings(net, on))
    agrees(*jax.jit(jax.value_and_grad(whole))(net, mesh.place(BATCH, on, 8)))


def test_layers_without_a_gate_have_no_parameters_of_it():
  sizes = {name: 0 for name in LAYERS}
  for name, leaf in trees.flatten(model.abstract(CFG)).items():
    for own in sizes:
      sizes[own] += leaf.size if f'.{own}.' in name else 0
  assert sizes == {
    'gate': 2 * (6 * 4 * 8 + 4 * 8),
    'gate_value': 16 * 3 + 3 * 2 + 2,
    'gate_key': 3 * 16 * 2 * 8,
    'gate_out': 6 * 16 + 16,
  }
  parts = model.parts(CFG)
  assert parts['gates'] == sizes and parts['gate'] == sum(sizes.values())
  ungated = model.parts(small.model_config(depth=DEPTH))
  assert parts['total'] - ungated['total'] == parts['gate']
  assert parts['attention'] == ungated['attention']
  # Biases are no matrices.
  matrices = parts['gate'] - 2 * 4 * 8 - 2 - 16
  flops = model.flops_per_token(CFG, 16), model.flops_per_token(ungated_config(), 16)
  assert flops[0] - flops[1] == 6 * matrices


def ungated_config():
  return small.model_config(depth=DEPTH)


def test_a_further_gate_has_the_fields_of_the_first_that_it_does_not_name():
  attn = small.attention_config(
    gate__position='sdpa', gate__std=0.25, gates=' value  granularity=headwise; ;out '
  )
  first, value, out = attn.named.values()
  assert [*attn.named] == ['gate', 'gate_value', 'gate_out']
  assert first == attn.gate and (value.granularity, value.std) == ('headwise', 0.25)
  assert (out.position, out.granularity) == ('out', 'elementwise')
  alone = small.attention_config(gates='value opens=3,7 bias=True lr=2')
  own = alone.named['gate_value']
  assert (own.opens, own.bias, own.lr) == ((3, 7), True, 2.0) and not alone.gate.at


@pytest.mark.parametrize(
  ('pattern', 'expected'),
  [
    ('all', (0, 1, 2, 3, 4, 5)),
    ('every:1', (0, 1, 2, 3, 4, 5)),
    ('every:4', (3,)),
    ('first:2', (0, 1)),
    ('last:2', (4, 5)),
    ('5,0-2', (0, 1, 2, 5)),
  ],
)
def test_a_pattern_names_its_layers(pattern, expected):
  assert config.layers('knob', pattern, 6) == expected


G = 'config.model.attn.gate'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(gate__layers='every:3'), rf"{G}.layers='every:3': the number=3, but 2 is the "),
    (dict(gate__layers='0,2'), rf"{G}.layers='0,2', but the model has the layers 0 to 1"),
    (dict(gate__layers='odd'), rf"{G}.layers='odd', but layers are expected: 'all', "),
    (dict(gate__inputs='first:17'), rf"{G}.inputs='first:17', but X has only .*width=16"),
    (dict(gates='value inputs=rank:99'), rf"{G}s\[0\].inputs='rank:99', but X has only"),
    (dict(gates='value layers=last:9'), rf"{G}s\[0\].layers='last:9': the number=9"),
    (dict(gates='out;sdpa'), rf"{G}s='out;sdpa' .* two gates have position='sdpa'"),
    (dict(gates='value;value'), r"two gates have position='value', but only one"),
    (dict(gates='value std=-1'), rf'{G}s\[0\].std=-1.0, but it must be at least 0'),
    (dict(gates='out;none'), rf"{G}s\[1\].position='none', but allowed are 'query'"),
    (dict(gates='g2'), rf"{G}s\[0\].position='g2' of the paper is 'value' here"),
    (dict(gates='value wide=3'), rf"{G}s\[0\]='value wide=3': 'wide' is not a field"),
    (dict(gates='value std=x'), rf"{G}s\[0\].std='x', but a float is expected"),
    (dict(gates='value lr=1 lr=2'), r"'lr' is repeated"),
    (dict(gates='query granularity=headwise'), r'QK-norm cancels the score'),
  ],
)
def test_gates_that_do_not_fit_are_refused_by_name(changes, message):
  knobs = {f'attn__{knob}': value for knob, value in changes.items()}
  with pytest.raises(ValueError, match=message):
    small.model_config(attn__gate__position='sdpa', **knobs)


def test_a_gate_must_be_open_before_the_run_ends():
  knobs = dict(model__attn__gate__position='sdpa', steps=20)
  with pytest.raises(ValueError, match=rf'{G}.opens=\(5, 21\), but .* config.steps=20'):
    small.whole(model__attn__gate__opens=(5, 21), **knobs)
  with pytest.raises(ValueError, match=rf'{G}s\[0\].opens=\(0, 30\)'):
    small.whole(model__attn__gates='value opens=0,30', **knobs)
  small.whole(model__attn__gate__opens=(5, 20), **knobs)


@pytest.mark.parametrize(
  ('done', 'share'), [(0, 0), (10, 0), (11, 0.1), (15, 0.5), (20, 1), (10**6, 1)]
)
def test_a_gate_opens_linearly_between_its_steps(done, share):
  net = small.filled(model.abstract(CFG))
  own = net.at_step(jnp.int32(done)).blocks.attn.gate.open
  np.testing.assert_allclose(own[...], np.full(2, share), rtol=1e-6)
  assert net.blocks.attn.gate.open is None
  assert net.at_step(done).blocks.attn.gate.open is None or done < 20


def test_a_jump_opens_at_its_step():
  net = small.model_of(attn__gate__position='sdpa', attn__gate__opens=(7, 7))
  shares = [net.at_step(i).blocks.attn.gate.open for i in (6, 7)]
  assert (shares[0][...] == 0).all() and shares[1] is None


@pytest.mark.slow
def test_a_run_resumes_exactly_across_an_opening():
  """Two steps closed, one half open, two open; the state is read back as it is saved."""
  knobs = dict(attn__gate__position='sdpa', attn__gate__opens=(1, 3))
  whole = {f'model__{knob}': value for knob, value in knobs.items()}
  cfg = small.whole(optim__gates_first=1, **whole)
  tx = guard.guard(optim.make(cfg.optim, steps=5, multipliers={}), cfg.stability)
  schedule = optim.schedule(cfg.optim, 5)
  opts = dict(tx=tx, schedule=schedule, accum=1, loss=cfg.loss)
  run = jax.jit(functools.partial(step.train, **opts))
  net, batches = small.model_of(**knobs), [small.batch(8, 16, seed=i) for i in range(5)]
  zero = jnp.zeros((), jnp.int32)
  states = [step.State(zero, zero, net, jax.jit(tx.init)(net))]
  metrics = []
  for batch in batches:
    state, values = run(states[-1], batch)
    states.append(state)
    metrics.append(float(values['loss']))
  # The loss of each step is that of the gate's share at the step.
  plain = jax.jit(lambda net, batch: step.losses.per_row(net, batch, chunk=16))
  ungated = trees.unflatten(
    small.model_of(), {k: v for k, v in trees.flatten(net).items() if '.gate.' not in k}
  )
  for loss, net, batch in (
    (metrics[0], ungated, batches[0]),
    (metrics[4], states[4].model, batches[4]),
  ):
    nats, weight = plain(net, batch)
    np.testing.assert_allclose(loss, nats.sum() / weight.sum(), rtol=1e-5)
  gate_of = lambda i: np.asarray(states[i].model.blocks.attn.gate.weight[...])
  assert [float(state.current.blocks.attn.gate.open[0]) for state in states[:4]] == [
    *(0, 0, 0.5, 1)
  ]
  table = [np.asarray(state.model.embed.table[...]) for state in states[:3]]
  assert (table[0] == table[1]).all() and (table[1] != table[2]).any()
  # A closed gate moves by its weight decay alone.
  assert (
    np.abs(gate_of(2) / gate_of(0) - 1).max()
    < 1e-3
    < np.abs(gate_of(4) / gate_of(0) - 1).max()
  )
  saved = {k: np.asarray(v) for k, v in trees.flatten(states[2]).items()}
  state = trees.unflatten(states[0], {k: jnp.asarray(v) for k, v in saved.items()})
  for batch in batches[2:]:
    state, _ = run(state, batch)
  again, first = trees.flatten(state), trees.flatten(states[5])
  for name, leaf in again.items():
    np.testing.assert_array_equal(leaf, first[name], name)


def made(**fields):
  cfg = small.gate_config(**dict(position='sdpa') | fields)
  sizes = dict(width=512, heads=4, kv_heads=2, head_dim=8)
  return gate.Gate(cfg, jax.random.key(0), **sizes, numerics=NUMERICS)


NUMERICS = small.numerics(compute='bfloat16', init_std=0.02)


def test_scores_in_the_compute_dtype_are_rounded_to_it():
  x = jax.random.normal(jax.random.key(1), (2, 3, 512), jnp.bfloat16)
  y = jax.random.normal(jax.random.key(2), (2, 3, 4, 8), jnp.bfloat16)
  low, high = made(score='compute'), made()
  score = low.score(x)
  assert (score.dtype, high.score(x).dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(score, jax.nn.sigmoid(low.logit(x)))
  np.testing.assert_array_equal(low(y, x), y * score)
  assert np.abs(np.float32(low(y, x)) - np.float32(high(y, x))).max() > 0


def test_a_bias_and_a_rank_start_as_configured():
  own = made(bias=True, bias_init=-4.0, inputs='rank:64', init='zero')
  assert (own.bias[...] == -4).all() and own.bias[...].dtype == jnp.float32
  assert (own.weight[...] == 0).all()
  x = jax.random.normal(jax.random.key(1), (8, 512))
  assert float((x @ own.reduce[...]).std()) == pytest.approx(1, abs=0.1)
  score = own.score(x[None].astype(jnp.bfloat16))
  np.testing.assert_allclose(score, 1 / (1 + np.exp(4)), rtol=1e-5)


NET = dict(attn__gate__position='sdpa', attn__gate__bias=True, attn__gates='value')


def updates(count=1, own_decays=None, **knobs):
  net = small.model_of(**NET)
  tx = optim.make(
    small.optim_config(warmup=0, schedule='constant', **knobs),
    steps=9,
    multipliers={},
    own_decays=own_decays,
  )
  grads, state = small.filled(net, seed=1), tx.init(net)
  run = jax.jit(tx.update)
  for _ in range(count):
    update, state = run(grads, state, net)
  return trees.flatten(update), trees.flatten(net)


@pytest.mark.slow
def test_a_gate_has_a_weight_decay_of_its_own():
  (plain, net), (own, _) = updates(), updates(own_decays={'gate': 0.5, 'gate_value': 0})
  rate = {'blocks.attn.gate.weight': 0.5 - 0.1, 'blocks.attn.gate_value.weight': 0 - 0.1}
  for name, update in plain.items():
    less = -1e-3 * rate.get(name, 0) * np.asarray(net[name])
    np.testing.assert_allclose(own[name] - update, less, atol=1e-8, err_msg=name)


def test_only_the_gates_learn_in_the_first_steps():
  (early, _), (late, _) = (updates(n, gates_first=2) for n in (2, 3))
  for name in early:
    moves = '.gate' in name
    assert (np.abs(early[name]).max() > 0) == moves, name
    assert np.abs(late[name]).max() > 0
