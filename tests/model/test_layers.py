"""The small parts, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated.devices import mesh, trees
from gated.model import embedding, layers

F32 = small.numerics(init_std=0.5)
BF16 = small.numerics(init_std=0.5, compute='bfloat16')
rng = np.random.default_rng(0)


def normal(*shape):
  return rng.normal(size=shape).astype(np.float32)


def silu(x):
  return x / (1 + np.exp(-x))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rmsnorm_takes_its_statistics_in_float32(dtype):
  # Values whose squares bfloat16 would add up to a few percent off.
  x = jnp.asarray(normal(2, 3, 512) + 10, dtype)
  norm = layers.RMSNorm(512, axes=('embed',), numerics=BF16)
  norm.scale[...] = jnp.asarray(normal(512))
  y = norm(x)
  assert y.dtype == dtype
  z = np.asarray(x, np.float64)
  exact = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
  np.testing.assert_allclose(
    np.asarray(y, np.float64),
    exact,
    rtol=1e-5 if dtype == jnp.float32 else 2**-8,
    atol=1e-7,
  )


def test_rmsnorm_adds_eps_to_the_mean_square():
  numerics = small.numerics(norm_eps=0.25)
  y = layers.RMSNorm(4, axes=('embed',), numerics=numerics)(jnp.full((1, 4), 0.5))
  np.testing.assert_allclose(y, 0.5 / np.sqrt(0.5), rtol=1e-6)


def test_the_norm_before_rope_computes_its_mean_apart_on_gpus(monkeypatch):
  make = lambda **how: layers.RMSNorm(8, axes=('head_dim',), numerics=F32, **how)
  plain, rotated = make(), make(rotated=True)
  texts = {}
  # Other shapes for each, since JAX keeps what it traced.
  for heads, platform in enumerate(('cpu', 'gpu'), 3):
    monkeypatch.setattr(mesh, 'platform', lambda platform=platform: platform)
    x, cotangent = (jnp.asarray(normal(2, 5, heads, 8)) for _ in range(2))
    for name, norm in (('plain', plain), ('rotated', rotated)):
      y, back = jax.vjp(norm, x)
      texts[platform, name] = str(jax.make_jaxpr(norm)(x))
      want, want_back = jax.vjp(plain, x)
      np.testing.assert_allclose(y, want, rtol=1e-6)
      np.testing.assert_allclose(back(cotangent)[0], want_back(cotangent)[0], rtol=1e-5)
  barrier = {key for key, text in texts.items() if 'optimization_barrier' in text}
  assert barrier == {('gpu', 'rotated')}


def test_fan_out_adds_each_new_gradient_on_the_left():
  def total(spread, x, weights):
    return sum(w * y for w, y in zip(weights, spread(x, len(weights))))

  def sums(spread):
    """The operands of the gradient's sums: 'total' for the one before."""
    own = jax.make_jaxpr(jax.grad(functools.partial(total, spread)))
    added, totals = [], set()
    for e in own(jnp.float32(2.0), weights).eqns:
      if e.primitive.name in ('add', 'add_any') and e.outvars[0].aval.shape == ():
        added.append(['total' if str(v) in totals else 'new' for v in e.invars])
        totals.add(str(e.outvars[0]))
    return added[-2:]

  weights = [jnp.float32(w) for w in (1e8, -1e8, 1.0)]
  plain = lambda x, count: (x,) * count
  assert sums(plain)[-1] == ['total', 'new']
  assert sums(layers.fan_out) == [['new', 'new'], ['new', 'total']]
  # From the last to the first, as in JAX: -1e8 + 1 is -1e8 in float32.
  for spread in plain, layers.fan_out:
    assert jax.grad(functools.partial(total, spread))(jnp.float32(2.0), weights) == 0


@pytest.mark.parametrize('bias', [False, True])
def test_dense_contracts_the_last_dims(bias):
  axes = ('heads', 'head_dim', 'embed')
  dense = layers.Dense(
    jax.random.key(0), (2, 3), (5,), axes=axes, std=1.0, bias=bias, numerics=F32
  )
  x, b = normal(4, 6, 2, 3), 0
  if bias:
    b = normal(5)
    assert dense.bias.axes == ('embed',)
    np.testing.assert_array_equal(dense.bias[...], 0)
    dense.bias[...] = jnp.asarray(b)
  exact = x.reshape(4, 6, 6) @ np.asarray(dense.weight[...]).reshape(6, 5) + b
  np.testing.assert_allclose(dense(x), exact, rtol=1e-4, atol=1e-5)


def test_weights_are_kept_in_one_dtype_and_multiplied_in_another():
  dense = layers.Dense(
    jax.random.key(0),
    (4,),
    (4,),
    axes=('embed', 'ffn'),
    std=1.0,
    bias=True,
    numerics=BF16,
  )
  assert dense.weight.dtype == dense.bias.dtype == jnp.float32
  assert dense(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_initial_weights_have_the_std_asked_for():
  w = layers.normal_param(
    jax.random.key(0), (300, 300), ('embed', 'ffn'), std=0.02, dtype='float32'
  )
  assert abs(float(w[...].std()) / 0.02 - 1) < 0.02
  assert abs(float(w[...].mean())) < 0.02 / 50


@pytest.mark.slow
def test_residual_maps_are_drawn_narrower_with_depth_only_when_asked():
  deep = small.transformer(small.model_config(numerics__residual_init='depth')).blocks
  plain = small.transformer(small.model_config()).blocks
  for scaled, whole in ((deep.ffn.down, plain.ffn.down), (deep.attn.out, plain.attn.out)):
    np.testing.assert_allclose(scaled.weight[...] * 2, whole.weight[...], rtol=1e-6)
  np.testing.assert_array_equal(deep.ffn.up.weight[...], plain.ffn.up.weight[...])


def test_swiglu_is_its_formula():
  ffn = layers.SwiGLU(jax.random.key(0), width=6, hidden=10, std_out=0.5, numerics=F32)
  x = normal(2, 3, 6)
  act, up, down = (
    np.asarray(m.weight[...], np.float64) for m in (ffn.act, ffn.up, ffn.down)
  )
  exact = (silu(x @ act) * (x @ up)) @ down
  np.testing.assert_allclose(ffn(x), exact, rtol=1e-4, atol=1e-5)


def test_rope_is_multiplication_of_complex_numbers():
  x, position = normal(2, 7, 3, 8), rng.integers(0, 5000, (2, 7))
  y = layers.rope(jnp.asarray(x), small.angles(position, 8, 10_000.0), 1.0)
  turns = position[..., None, None] * 10_000.0 ** -(2 * np.arange(4) / 8)
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * turns)
  # The angle itself is in float32: 5000 radians are known to 2^-11.
  np.testing.assert_allclose(y, np.concatenate([z.real, z.imag], -1), atol=2e-3)
  near = layers.rope(jnp.asarray(x), small.angles(position % 9, 8, 1e4), 1.0)
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
    1j * (position % 9)[..., None, None] * 1e4 ** -(2 * np.arange(4) / 8)
  )
  np.testing.assert_allclose(near, np.concatenate([z.real, z.imag], -1), atol=1e-5)


def test_rope_products_depend_on_the_distance_alone():
  q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16)
  at = lambda x, p: layers.rope(jnp.asarray(x), small.angles([[p]], 16, 500.0), 1.0)
  product = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
  assert abs(product(3, 1) - product(103, 101)) < 1e-4
  assert abs(product(3, 1) - product(3, 2)) > 1e-2
  np.testing.assert_array_equal(at(q, 0), q)


def test_rope_of_bfloat16_is_turned_in_float32():
  x, position = normal(1, 2, 1, 8), jnp.asarray([[300, 301]])
  angle = small.angles(position, 8, 1e4)
  low = layers.rope(jnp.asarray(x, jnp.bfloat16), angle, 1.0)
  high = layers.rope(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), angle, 1.0)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def test_embed_reads_its_table():
  embed = embedding.Embed(jax.random.key(0), vocab=11, width=4, numerics=F32)
  tokens = np.array([[3, 0, 10], [3, 3, 1]])
  np.testing.assert_array_equal(embed(tokens), np.asarray(embed.table[...])[tokens])


def test_the_gradient_of_a_frequent_token_is_summed_beyond_bfloat16():
  """A sum of thousands of terms in bfloat16 stops growing at 256 times a term."""
  embed = embedding.Embed(jax.random.key(0), vocab=4, width=8, numerics=BF16)
  tokens = jnp.zeros((8, 512), jnp.int32)
  loss = lambda embed: jnp.sum(embed(tokens).astype(jnp.float32))
  grad = jax.jit(jax.grad(loss))(embed)
  np.testing.assert_allclose(grad.table[...][0], 4096.0, rtol=1e-2)


def embed_on(sizes, *, vocab, width, numerics=F32, scale=None):
  """A table on a mesh -> (table, tokens, (table, tokens) -> (vectors, gradient)).

  Some tokens are there many times, some never, the first and the last at least once.
  """
  on = small.mesh_of(**sizes)
  place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(on, mesh.spec(axes, on)))
  tokens = np.random.default_rng(1).integers(0, vocab // 2, (8, 16), np.int32)
  tokens[:, :3], tokens[0, 3] = 5, vocab - 1
  table = jax.random.normal(jax.random.key(0), (vocab, width))
  weight = jnp.asarray(normal(8, 16, width)) if scale is None else scale

  def run(table, tokens):
    def total(table):
      embed = embedding.Embed(
        jax.random.key(0), vocab=vocab, width=width, numerics=numerics
      )
      embed.table[...] = table
      x = embed(tokens)
      return jnp.sum(weight * x), x

    return jax.grad(total, has_aux=True)(table)

  placed = place(table, 'vocab', 'embed'), place(tokens, 'batch', 'tokens')
  return on, placed, run


EMBEDS = [
  *((dict(fsdp=8), columns) for columns in (1, 4, 16)),
  *((dict(fsdp=2, tensor=2, context=2), columns) for columns in (8, 16)),
  (dict(fsdp=2, expert=4), 8),
  (dict(fsdp=4, data=2), 8),
  (dict(data=2, expert=2, tensor=2), 16),
  *(({axis: 8}, 16) for axis in ('data', 'expert', 'tensor', 'context')),
]


@pytest.mark.slow
@pytest.mark.parametrize(('sizes', 'columns'), EMBEDS, ids=str)
def test_embed_on_a_mesh_is_that_of_one_device(sizes, columns, monkeypatch):
  monkeypatch.setattr(embedding, 'COLUMNS', columns)
  on, (table, tokens), run = embed_on(sizes, vocab=24, width=16)
  with jax.set_mesh(on):
    grad, x = jax.jit(run)(table, tokens)
  exact_grad, exact_x = jax.jit(run)(*map(np.asarray, (table, tokens)))
  np.testing.assert_array_equal(x, exact_x)
  np.testing.assert_array_equal(x, np.asarray(table)[np.asarray(tokens)])
  np.testing.assert_allclose(grad, exact_grad, rtol=1e-5, atol=1e-5)
  assert np.abs(exact_grad[12:23]).max() == 0 < np.abs(exact_grad[23]).min()


@pytest.mark.parametrize('sizes', [dict(fsdp=8), dict(fsdp=2, expert=4)], ids=str)
def test_the_gradient_of_a_frequent_token_is_summed_so_on_a_mesh(sizes, monkeypatch):
  monkeypatch.setattr(embedding, 'COLUMNS', 4)
  embed = embedding.Embed(jax.random.key(0), vocab=4, width=16, numerics=BF16)
  total = lambda embed, tokens: jnp.sum(embed(tokens).astype(jnp.float32))
  on = small.mesh_of(**sizes)
  with jax.set_mesh(on):
    grad = jax.jit(jax.grad(total))(embed, jnp.zeros((8, 512), jnp.int32))
  np.testing.assert_array_equal(grad.table[...][0], 4096.0)


def test_no_device_holds_an_array_as_large_as_the_embedding():
  on, placed, run = embed_on(dict(fsdp=8), vocab=512, width=1024, scale=1.0)
  with jax.set_mesh(on):
    compiled = jax.jit(run).lower(*placed).compile()
    looked_up = jax.jit(lambda *a: run(*a)[1]).lower(*placed).compile()
  for each in (compiled, looked_up):
    assert small.largest_array(each) <= 512 * 1024 // 4


def test_the_gradient_of_a_bias_is_summed_beyond_bfloat16():
  dense = layers.Dense(
    jax.random.key(0),
    (4,),
    (4,),
    axes=('embed', 'ffn'),
    std=1.0,
    bias=True,
    numerics=BF16,
  )
  x = jnp.ones((8, 512, 4), jnp.bfloat16)
  grad = jax.jit(jax.grad(lambda d: jnp.sum(d(x).astype(jnp.float32))))(dense)
  np.testing.assert_allclose(grad.bias[...], 4096.0, rtol=1e-2)


def test_a_child_key_depends_on_the_name_and_the_parent():
  draw = lambda seed, name: jax.random.key_data(
    layers.child_key(jax.random.key(seed), name)
  ).tolist()
  assert draw(0, 'gate') == draw(0, 'gate')
  assert len({str(draw(s, n)) for s in (0, 1) for n in ('gate', 'query')}) == 4


MORE = [
  dict(attn__gate__position='sdpa'),
  dict(attn__gate__position='out', attn__bias=True, attn__out_bias=True),
  dict(tied=False, attn__qk_norm=False),
]


@pytest.mark.slow
@pytest.mark.parametrize('changes', MORE)
def test_adding_a_parameter_leaves_every_other_initial_value_as_it_was(changes):
  with_it = trees.flatten(small.transformer(small.model_config(**changes)))
  without = trees.flatten(small.transformer(small.model_config()))
  assert with_it.keys() != without.keys()
  for name in with_it.keys() & without.keys():
    np.testing.assert_array_equal(with_it[name], without[name], err_msg=name)


@pytest.mark.slow
def test_no_two_weights_start_alike():
  for changes in MORE:
    leaves = trees.flatten(small.transformer(small.model_config(**changes)))
    drawn = [
      float(layer.ravel()[0])
      for name, leaf in leaves.items()
      if not name.endswith(('scale', 'bias'))
      for layer in (leaf if name.startswith('blocks') else [leaf])
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (dict(numerics__weights='float16'), 'numerics.weights'),
    (dict(numerics__compute='fp32'), 'numerics.compute'),
    (dict(numerics__matmul='fp4'), 'numerics.matmul'),
    (dict(numerics__init_std=-0.1), 'numerics.init_std'),
    (dict(numerics__norm_eps=-1.0), 'numerics.norm_eps'),
    (dict(numerics__residual_init='deep'), 'numerics.residual_init'),
  ],
)
def test_bad_numerics_are_refused_by_name(change, said):
  with pytest.raises(ValueError, match=f'config.model.{said}='):
    small.model_config(**change)


def yarn(**changes):
  plain = dict(factor=4.0, original=32, beta_fast=4.0, beta_slow=1.0, truncate=True)
  plain |= dict(attention=0.0, mscale=0.0, mscale_all_dim=0.0)
  return layers.Yarn(**plain | changes)


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_ramps_between():
  dim, base = 16, 100.0
  plain = layers.rope_frequencies(dim, base, yarn(factor=1.0))
  np.testing.assert_allclose(plain, base ** -(2 * np.arange(8) / dim), rtol=1e-6)
  ratio = np.asarray(layers.rope_frequencies(dim, base, yarn()) / plain)
  # Pairs turn 32 f / 2 pi times over the old context.
  turns = 32 * np.asarray(plain) / (2 * np.pi)
  np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[turns < 0.5], 0.25, rtol=1e-6)
  assert (np.diff(ratio) <= 1e-6).all()
  assert ((ratio > 0.26) & (ratio < 0.99)).any()


def test_yarn_scales_queries_and_keys_by_its_rule_or_as_told():
  assert yarn(factor=1.0).scale == 1
  np.testing.assert_allclose(yarn().scale, 0.1 * np.log(4) + 1)
  assert yarn(attention=1.5).scale == yarn(factor=1.0, attention=1.5).scale == 1.5
  np.testing.assert_allclose(yarn(mscale=2.0).scale, 0.1 * np.log(4) + 1)
  ratio = (0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
  np.testing.assert_allclose(yarn(mscale=2.0, mscale_all_dim=0.5).scale, ratio)
  x = jnp.asarray(normal(1, 3, 1, 8))
  angle = small.angles([[0, 1, 2]], 8, 1e4)
  scaled, plain = (layers.rope(x, angle, s) for s in (1.5, 1.0))
  np.testing.assert_allclose(scaled, 1.5 * plain, rtol=1e-5)


def test_yarn_is_changed_by_a_factor_and_fields():
  changed = yarn().changed('8, truncate=false,original=64')
  assert changed == yarn(factor=8.0, truncate=False, original=64)
  for spec, message in (
    ('', "factor='', but a number"),
    ('4,True', "'True', but FIELD=VALUE"),
    ('0.5', r'yarn\.factor=0\.5'),
    ('4,mscale=x', "mscale='x', but a number"),
    ('4,alpha=1', r'yarn\.alpha is not a knob'),
    ('4,mscale=-99,mscale_all_dim=1', r'yarn\.mscale=-99\.0 and'),
  ):
    with pytest.raises(ValueError, match=message):
      yarn().changed(spec)


def test_the_gated_norm_is_its_formula():
  norm = layers.GatedNorm(jax.random.key(0), 6, 3, numerics=F32)
  assert (norm.down.weight.shape, norm.up.weight.shape) == ((6, 3), (3, 6))
  x = normal(2, 4, 6)
  y = x / np.sqrt((x**2).mean(-1, keepdims=True) + F32.norm_eps)
  down, up = (np.asarray(m.weight[...], np.float64) for m in (norm.down, norm.up))
  exact = y / (1 + np.exp(-silu(y @ down) @ up))
  np.testing.assert_allclose(norm(jnp.asarray(x)), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('compute', 'precision'), [('float32', 'highest'), ('bfloat16', None)]
)
def test_exact_asks_for_exact_products_of_a_float32_model_alone(compute, precision):
  numerics = small.model_config(numerics__compute=compute).numerics
  precisions = []
  run = layers.exact(
    numerics, lambda x: precisions.append(jax.config.jax_default_matmul_precision) or x
  )
  assert run(3) == 3
  assert precisions == [precision]
  assert jax.config.jax_default_matmul_precision is None
