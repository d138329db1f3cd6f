"""The gate adds what it must, acts as its formula says, and sees its own token alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import model
from gated.devices import trees
from gated.model import attention, gate
from gated.train import optim

D, H, G, K = 16, 4, 2, 8
ALLOWED = {
  'granularity': ('headwise', 'elementwise'),
  'heads': ('specific', 'shared'),
  'mean': ('before', 'after'),
  'form': ('multiply', 'add'),
  'activation': ('sigmoid', 'silu', 'identity', 'ns_sigmoid', '2sigmoid'),
  'source': ('input', 'parameter'),
}
GATED = [position for position, at in gate.POSITIONS.items() if at]
NUMERICS = small.numerics()


def combinations(*fields):
  """Every choice of values for these fields, as keyword arguments."""
  return [dict(zip(fields, c)) for c in itertools.product(*(ALLOWED[f] for f in fields))]


def build(cfg, key, numerics=NUMERICS):
  sizes = dict(width=D, heads=H, kv_heads=G, head_dim=K)
  return gate.Gate(cfg, key, **sizes, numerics=numerics)


def g1(**fields):
  return small.gate_config(**dict(position='sdpa') | fields)


def made(numerics=NUMERICS, **fields):
  """A gate of one layer with a weight of its own, by default G1."""
  shapes = jax.eval_shape(lambda: build(g1(**fields), jax.random.key(0), numerics))
  return small.filled(shapes)


def refused(position, granularity, heads='specific', **_):
  return position == 'out' and (granularity == 'headwise' or heads == 'shared')


def added(position, granularity, source):
  """Section 1.6 of the notes on the paper, for one layer."""
  heads = {'query': H, 'sdpa': H, 'key': G, 'value': G}.get(position)
  if position == 'out':
    scores = D
  else:
    scores = heads * (K if granularity == 'elementwise' else 1)
  return scores * (D if source == 'input' else 1)


@pytest.mark.slow
@pytest.mark.parametrize('position', GATED)
def test_every_allowed_combination_builds_and_keeps_the_shape_it_gates(position):
  shape = (2, 3, D) if position == 'out' else (2, 3, added(position, 'headwise', ''), K)
  y = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, 3, D), jnp.float32)
  built = 0
  for fields in combinations(*ALLOWED):
    if refused(position, **fields):
      with pytest.raises(ValueError, match='output projection has no heads'):
        small.gate_config(position=position, **fields)
      continue
    cfg = small.gate_config(position=position, **fields)
    out = jax.eval_shape(lambda y, x, cfg=cfg: build(cfg, jax.random.key(0))(y, x), y, x)
    assert (out.shape, out.dtype) == (y.shape, y.dtype), cfg
    built += 1
  assert built == (40 if position == 'out' else 160)


@pytest.mark.slow
@pytest.mark.parametrize('position', GATED)
def test_every_gate_adds_exactly_its_own_parameters(position):
  baseline = model.count(model.abstract(small.model_config()))
  for fields in combinations('granularity', 'heads', 'source'):
    if refused(position, **fields):
      continue
    changes = {f'attn__gate__{k}': v for k, v in fields.items()}
    cfg = small.model_config(
      attn__gate__position=position, attn__gate__place='after', **changes
    )
    more = model.count(model.abstract(cfg)) - baseline
    expected = added(position, fields['granularity'], fields['source'])
    assert more == cfg.depth * expected, fields


@pytest.mark.parametrize(
  ('position', 'granularity', 'source', 'count'),
  [
    ('sdpa', 'elementwise', 'input', 201_326_592),
    ('query', 'elementwise', 'input', 201_326_592),
    ('value', 'elementwise', 'input', 25_165_824),
    ('key', 'elementwise', 'input', 25_165_824),
    ('out', 'elementwise', 'input', 100_663_296),
    ('sdpa', 'headwise', 'input', 1_572_864),
    ('value', 'headwise', 'input', 196_608),
    ('sdpa', 'elementwise', 'parameter', 98_304),
  ],
)
def test_the_papers_gates_cost_what_table_1_charges(position, granularity, source, count):
  """24 layers, width 2048, 32 query and 4 KV heads of 128."""
  sizes = dict(width=2048, depth=24, attn__heads=32, attn__kv_heads=4, attn__head_dim=128)
  axes = dict(position=position, granularity=granularity, source=source)
  gated = small.model_config(**sizes, **{f'attn__gate__{k}': v for k, v in axes.items()})
  baseline = model.count(model.abstract(small.model_config(**sizes)))
  assert model.count(model.abstract(gated)) - baseline == count


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    (
      dict(position='output'),
      "position='output'.*'none', 'query', 'key', 'value', 'sdpa'",
    ),
    (dict(granularity='channel'), "granularity='channel'.*'headwise', 'elementwise'"),
    (dict(heads='both'), "heads='both'"),
    (dict(mean='during'), "mean='during'"),
    (dict(form='divide'), "form='divide'"),
    (dict(activation='relu'), "activation='relu'.*'2sigmoid'"),
    (dict(source='output'), "source='output'"),
    (dict(init='ones'), "init='ones'"),
    (dict(place='between'), "place='between'"),
    (dict(std=-1.0), 'std=-1.0'),
    (dict(lr=-1.0), 'lr=-1.0'),
    (dict(weight_decay=-0.5), 'weight_decay=-0.5'),
    (dict(score='bfloat16'), "score='bfloat16'.*'float32', 'compute'"),
    (dict(opens=(3,)), r'opens=\(3,\), but two steps'),
    (dict(opens=(5, 3)), r'opens=\(5, 3\), but two steps'),
    (dict(inputs='first'), "inputs='first'.*'all', 'first:N' and 'rank:R'"),
    (dict(inputs='rank:0'), "inputs='rank:0'"),
    (
      dict(inputs='rank:2', source='parameter'),
      "inputs='rank:2' with source='parameter'",
    ),
    (
      dict(position='out', granularity='headwise'),
      "granularity='headwise'.*output projection has no heads",
    ),
    (
      dict(position='out', heads='shared'),
      "heads='shared'.*output projection has no heads",
    ),
  ],
)
def test_a_gate_that_cannot_be_is_refused_with_its_reason(fields, said):
  with pytest.raises(ValueError, match=r'config\.model\.attn\.gate\.' + said):
    small.gate_config(**fields)


@pytest.mark.parametrize(
  'position', [p for p, at in gate.POSITIONS.items() if at and at.normed]
)
@pytest.mark.parametrize('heads', ['specific', 'shared'])
def test_a_headwise_gate_that_qk_norm_would_cancel_is_refused(position, heads):
  changes = dict(
    gate__position=position, gate__granularity='headwise', gate__heads=heads, qk_norm=True
  )
  with pytest.raises(
    ValueError, match=rf"granularity='headwise'.* the {position}: QK-norm"
  ):
    small.attention_config(**changes)
  small.attention_config(**changes | {'qk_norm': False})
  small.attention_config(**changes, gate__place='after')
  small.attention_config(**changes, gate__form='add')
  small.attention_config(**changes | {'gate__granularity': 'elementwise'})


def by_hand(fields, w, x, y):
  """Equations 5 and 9 and section 3.2 in NumPy, one head and channel after another."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  act = {
    'sigmoid': sigmoid,
    'silu': lambda z: z * sigmoid(z),
    'identity': lambda z: z,
    'ns_sigmoid': lambda z: 0.5 + 0.5 * sigmoid(z),
    '2sigmoid': lambda z: 2 * sigmoid(z),
    'hard_sigmoid': lambda z: np.clip(z / 6 + 0.5, 0, 1),
    'tanh': np.tanh,
    'softplus': lambda z: np.log(1 + np.exp(z)),
    'exp': np.exp,
  }[fields['activation']]
  B, T = x.shape[:2]
  out = np.zeros_like(y)
  for b, t, h, k in itertools.product(*map(range, y.shape)):
    channel = (k,) if fields['granularity'] == 'elementwise' else ()

    def logit(head, b=b, t=t, channel=channel):
      if fields['source'] == 'parameter':
        return w[(head, *channel)]
      return sum(x[b, t, d] * w[(d, head, *channel)] for d in range(D))

    if fields['heads'] == 'specific':
      score = act(logit(h))
    elif fields['mean'] == 'before':
      score = act(np.mean([logit(i) for i in range(H)]))
    else:
      score = np.mean([act(logit(i)) for i in range(H)])
    gated = (
      y[b, t, h, k] * score if fields['form'] == 'multiply' else y[b, t, h, k] + score
    )
    out[b, t, h, k] = gated
  assert out.shape[:2] == (B, T)
  return out


@pytest.mark.parametrize('activation', gate.ACTIVATIONS)
def test_every_gate_is_its_formula(activation):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(1, 2, D)), rng.normal(size=(1, 2, H, 2))
  known = activation in ALLOWED['activation']
  others = ('heads', 'mean', 'form', 'source') if known else ()
  for fields in combinations('granularity', *others):
    fields = {k: v[0] for k, v in ALLOWED.items()} | fields | dict(activation=activation)
    cfg = small.gate_config(position='sdpa', **fields)
    opts = dict(width=D, heads=H, kv_heads=G, head_dim=2, numerics=NUMERICS)
    shapes = jax.eval_shape(
      lambda cfg=cfg, opts=opts: gate.Gate(cfg, jax.random.key(0), **opts)
    )
    g = small.filled(shapes)
    ours = g(jnp.asarray(y, jnp.float32), jnp.asarray(x, jnp.float32))
    exact = by_hand(fields, np.asarray(g.weight[...], np.float64), x, y)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5, err_msg=str(fields))


@pytest.mark.parametrize('source', ['input', 'parameter'])
def test_the_gate_on_the_output_projection_scores_every_channel_of_the_width(source):
  g = made(position='out', source=source)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 2, 3, D)).astype(np.float32)
  w = np.asarray(g.weight[...])
  logit = x @ w if source == 'input' else w
  np.testing.assert_allclose(g(y, x), y / (1 + np.exp(-logit)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('heads', ['specific', 'shared'])
def test_a_headwise_gate_is_an_elementwise_one_with_equal_channels(heads):
  one, every = made(granularity='headwise', heads=heads), made(heads=heads)
  every.weight[...] = jnp.repeat(one.weight[...][..., None], K, -1)
  x, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.float32), None
  y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, H, K)), jnp.float32)
  np.testing.assert_allclose(one(y, x), every(y, x), rtol=1e-5)


def test_scores_are_float32_while_the_rest_computes_in_bfloat16():
  low = small.numerics(compute='bfloat16')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.bfloat16)
  y = jax.ShapeDtypeStruct((2, 3, H, K), jnp.bfloat16)
  for fields in combinations('granularity', 'heads', 'activation', 'source'):
    g = jax.eval_shape(lambda f=fields: build(g1(**f), jax.random.key(0), low))
    score, gated = jax.eval_shape(lambda g, y, x: (g.score(x), g(y, x)), g, y, x)
    assert (score.dtype, gated.dtype) == (jnp.float32, jnp.bfloat16), fields
  # The logit is rounded to bfloat16, but its activation is not, and keeps 24 bits.
  g = made(low)
  w = np.asarray(g.weight[...].astype(jnp.bfloat16), np.float64)
  exact = np.einsum('btd,dhk->bthk', np.asarray(x, np.float64), w)
  rounded = np.asarray(g.logit(x), np.float64)
  np.testing.assert_allclose(rounded, exact, rtol=2**-7, atol=1e-2)
  np.testing.assert_allclose(g.score(x), 1 / (1 + np.exp(-rounded)), rtol=1e-6)


def test_the_score_of_a_token_depends_on_that_token_alone():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, D)), jnp.float32)
  g = made()
  # dscore[t, h, k] / dx[u, d]
  slope = jax.jacrev(lambda x: g.score(x[None])[0])(x)
  size = np.abs(slope).sum((1, 2, 4))
  assert (np.diag(size) > 0).all()
  np.testing.assert_array_equal(size - np.diag(np.diag(size)), 0)


def test_a_gate_that_is_a_parameter_does_not_depend_on_the_input():
  g = made(source='parameter')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)
  assert g.score(x).shape == (1, 1, H, K)
  y = jnp.ones((2, 5, H, K))
  np.testing.assert_array_equal(g(y, x), g(y, -3 * x))


def test_zero_init_makes_zeros_and_normal_init_the_std_asked_for():
  key = jax.random.key(0)
  for fields, std in ((dict(init='zero'), 0), (dict(init='normal', std=0.25), 0.25)):
    cfg = small.gate_config(position='sdpa', **fields)
    wide = gate.Gate(
      cfg, key, width=256, heads=H, kv_heads=G, head_dim=K, numerics=NUMERICS
    )
    assert abs(float(wide.weight[...].std()) - std) <= 0.03 * std


TOKENS = np.random.default_rng(0).integers(0, 40, (1, 9), np.int32)


def forward(**fields):
  """Gate fields -> the logits of a model, and each layer's gate scores."""
  changes = {f'attn__gate__{k}': v for k, v in fields.items()}
  filled = small.model_of(**changes)
  cfg = filled.cfg

  @jax.jit
  def run(net, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    angles = small.angles(positions, cfg.attn.head_dim, cfg.attn.rope_base)
    x, scores = net.embed(tokens), []
    for block in model.unstack(net.blocks, cfg.depth):
      if block.attn.gate is not None:
        scores.append(block.attn.gate.score(block.attn_norm(x)))
      x, _ = block(x, angles, None, None)
    return net(tokens), scores

  return lambda tokens: run(filled, tokens)


def test_changing_a_token_changes_its_own_gate_and_nothing_earlier():
  run, at = forward(position='sdpa'), 4
  changed = TOKENS.copy()
  changed[0, at] = (changed[0, at] + 1) % 40
  (logits, scores), (others, moved) = run(TOKENS), run(changed)
  np.testing.assert_array_equal(logits[:, :at], others[:, :at])
  assert len(scores) == 2
  for a, b in zip(scores, moved):
    np.testing.assert_array_equal(a[:, :at], b[:, :at])
    assert np.abs(a[:, at] - b[:, at]).min() > 0
  # In the first layer nothing has been mixed yet: later gates stay as they were.
  np.testing.assert_array_equal(scores[0][:, at + 1 :], moved[0][:, at + 1 :])
  assert np.abs(scores[1][:, at + 1 :] - moved[1][:, at + 1 :]).max() > 0


T = 5
X = np.random.default_rng(0).normal(size=(T, D))


def own(token):
  """The direction in which this token alone has a part, 1 long: w @ own moves only it."""
  others = np.linalg.qr(np.delete(X, token, 0).T)[0]
  rest = X[token] - others @ (others.T @ X[token])
  return jnp.asarray(rest / (rest @ rest), jnp.float32)


def followers(position, token, shut):
  """Which tokens' outputs change with the value of `token`, the gate of `shut` closed."""
  cfg = small.attention_config(gate__position=position)
  opts = dict(width=D, std_out=0.3, numerics=NUMERICS)
  layer = small.filled(
    jax.eval_shape(lambda: attention.Attention(cfg, jax.random.key(0), **opts))
  )
  logits = jnp.full(layer.gate.weight.shape[1:], -200.0)
  layer.gate.weight[...] = jnp.tensordot(own(shut), logits, 0)
  angles = small.angles(jnp.arange(T)[None], K, 10_000.0)
  x = jnp.asarray(X, jnp.float32)[None]
  before = layer(x, angles, None)
  layer.value.weight[...] += jnp.tensordot(own(token), jnp.ones((G, K)), 0)
  return (np.abs(layer(x, angles, None) - before)[0].max(-1) > 1e-3).tolist()


@pytest.mark.slow
def test_the_value_gate_is_of_the_key_token_and_the_sdpa_gate_of_the_query_token():
  # G2: nobody sees the value of the token whose gate is shut, and all see another's.
  assert followers('value', 2, shut=2) == [False] * 5
  assert followers('value', 1, shut=2) == [False, True, True, True, True]
  # G1: the shut token puts out nothing; every later token sees its value all the same.
  assert followers('sdpa', 2, shut=2) == [False, False, False, True, True]
  assert followers('sdpa', 1, shut=2) == [False, True, False, True, True]


NEUTRAL = [
  ('query', 'elementwise', 'before'),
  ('query', 'headwise', 'after'),
  ('key', 'elementwise', 'after'),
  ('value', 'headwise', 'before'),
  ('sdpa', 'elementwise', 'before'),
  ('out', 'elementwise', 'before'),
]


@pytest.fixture(scope='module')
def ungated_logits():
  return small.model_of(layers='unroll')(TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(('position', 'granularity', 'place'), NEUTRAL)
def test_a_gate_that_starts_at_one_is_bit_identical_to_no_gate(
  position, granularity, place, ungated_logits
):
  """Operation by operation: compiled together, XLA may round them in another order."""
  fields = dict(position=position, granularity=granularity, place=place)
  changes = dict(activation='2sigmoid', init='zero') | fields
  net = small.model_of(
    layers='unroll', **{f'attn__gate__{k}': v for k, v in changes.items()}
  )
  weight = net.blocks.attn.gate.weight
  weight[...] = jnp.zeros_like(weight[...])
  np.testing.assert_array_equal(net(TOKENS), ungated_logits)
  weight[...] = jnp.full_like(weight[...], 1e-2)
  assert np.abs(net(TOKENS) - ungated_logits).max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('form', gate.FORMS)
def test_a_gate_that_has_not_opened_is_bit_identical_to_no_gate(form, ungated_logits):
  fields = dict(position='sdpa', opens=(3, 5), bias=True, form=form)
  changes = {f'attn__gate__{k}': v for k, v in fields.items()}
  net = small.model_of(layers='unroll', **changes)
  np.testing.assert_array_equal(net.at_step(3)(TOKENS), ungated_logits)
  assert np.abs(net.at_step(4)(TOKENS) - ungated_logits).max() > 1e-3


def test_a_gate_that_is_off_leaves_the_ungated_tree():
  names = {
    'embed.table',
    *(f'blocks.{norm}.scale' for norm in ('attn_norm', 'ffn_norm')),
    *(f'blocks.attn.{p}.weight' for p in ('query', 'key', 'value', 'out')),
    *(f'blocks.attn.{p}_norm.scale' for p in ('query', 'key')),
    *(f'blocks.ffn.{p}.weight' for p in ('act', 'up', 'down')),
    'norm.scale',
  }
  # Whatever the other fields say.
  off = small.model_config(attn__gate__granularity='headwise', attn__gate__lr=3.0)
  assert set(trees.flatten(model.abstract(off))) == names
  on = small.model_config(attn__gate__position='sdpa')
  assert set(trees.flatten(model.abstract(on))) == names | {'blocks.attn.gate.weight'}


def test_the_gates_learning_rate_multiplies_its_own_update_alone():
  net = small.model_of(attn__gate__position='sdpa')
  grads = small.filled(net, seed=1)

  def updates(multipliers):
    tx = optim.make(small.optim_config(), steps=5, multipliers=multipliers)
    update = jax.jit(lambda grads, net: tx.update(grads, tx.init(net), net)[0])
    return trees.flatten(update(grads, net))

  plain, scaled = updates({}), updates({'gate': 3.0})
  for name, update in plain.items():
    factor = 3.0 if name == 'blocks.attn.gate.weight' else 1.0
    np.testing.assert_allclose(scaled[name], factor * update, rtol=1e-6, err_msg=name)
    assert np.abs(update).max() > 0
