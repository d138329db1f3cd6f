"""The remedies beside gates, in whole models against a plain one, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import model
from gated.devices import mesh, trees
from gated.model import attention, differential, norms, stacks
from gated.train import step

MODELS = {
  'dyt, differential, a window but in the last layer': dict(
    norm='dyt',
    norm_alpha=(0.8, 0.4),
    attn__differential=True,
    attn__window=5,
    attn__global_layers='last:1',
  ),
  'pre_affine, elastic, V-scale': dict(
    norm='pre_affine',
    attn__normalizer='elastic',
    attn__elastic_tau=-0.4,
    attn__value_scale='learned',
  ),
  'clipped, a window, a fixed V-scale': dict(
    attn__value_scale='fixed',
    attn__normalizer='clipped',
    attn__clip_gamma=-0.05,
    attn__clip_zeta=1.1,
    attn__window=4,
  ),
  'sink logits, a window, repaired rounding': dict(
    attn__normalizer='sink_logit', attn__window=3, attn__rounding='repaired'
  ),
  'elastic in the last layer': dict(
    attn__normalizer='elastic', attn__normalizer_layers='last:1', attn__elastic_tau=-0.4
  ),
  'sink logits in the first layer, a window in the last': dict(
    attn__normalizer='sink_logit',
    attn__normalizer_layers='first:1',
    attn__window=3,
    attn__global_layers='first:1',
  ),
}
LENGTH = 16


def recipe(name):
  return small.whole(**{f'model__{knob}': v for knob, v in MODELS[name].items()})


@functools.cache
def net_of(name):
  """A model whose parameters are far from their initial values."""
  return small.filled(model.abstract(recipe(name).model))


BATCH = small.batch(8, LENGTH)


def normed(part, x, eps=1e-6):
  if isinstance(part, norms.DynamicTanh):
    return part.scale[...] * jnp.tanh(part.alpha.scale[...] * x) + part.bias[...]
  if isinstance(part, norms.PreAffine):
    x, part = part.before.scale[...] * x, part.rms
  return part.scale[...] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)


def turned(x_BTHK, position_BT):
  """RoPE by complex numbers."""
  half = x_BTHK.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = position_BT[..., None, None] * frequency
  z = (x_BTHK[..., :half] + 1j * x_BTHK[..., half:]) * jnp.exp(1j * angle)
  return jnp.concatenate([z.real, z.imag], -1)


def weights_by_hand(cfg, normalizer, score_BHTS, mask_B1TS, attn):
  """Scores -> weights, each remedy as its paper writes it."""
  e = jnp.where(mask_B1TS, jnp.exp(score_BHTS), 0)
  of_head = lambda x: x[None, :, None, None]
  if normalizer == 'sink_logit':
    return e / (e.sum(-1, keepdims=True) + of_head(jnp.exp(attn.sinks.logit[...])))
  w = e / e.sum(-1, keepdims=True)
  if normalizer == 'clipped':
    w = jnp.clip((cfg.clip_zeta - cfg.clip_gamma) * w + cfg.clip_gamma, 0, 1)
  if normalizer == 'elastic':
    count = mask_B1TS.sum(-1, keepdims=True)
    w = jnp.maximum(w + of_head(attn.elastic.scale[...]) / count, 0)
  return jnp.where(mask_B1TS, w, 0)


def differenced(attn, w_BHTS, v_BSGK, layer):
  """Two heads of each pair of KV heads in turn -> y_BTHK."""
  G, R = v_BSGK.shape[2], w_BHTS.shape[1] // v_BSGK.shape[2]
  q1, k1, q2, k2 = (getattr(attn.differential, n)[...] for n in differential.VECTORS)
  start = 0.8 - 0.6 * np.exp(-0.3 * layer)
  lam = jnp.exp((q1 * k1).sum()) - jnp.exp((q2 * k2).sum()) + start
  heads = [None] * (G * R)
  for j in range(G // 2):
    value = jnp.concatenate([v_BSGK[:, :, 2 * j], v_BSGK[:, :, 2 * j + 1]], -1)
    for r in range(R):
      first, second = 2 * j * R + r, (2 * j + 1) * R + r
      y = (w_BHTS[:, first] - lam * w_BHTS[:, second]) @ value
      y = (1 - start) * normed(attn.differential.norm, y)
      heads[first], heads[second] = jnp.split(y, 2, -1)
  return jnp.stack(heads, 2)


def blocks_of(net):
  """The layers; those without the normalizer have none of its parameters."""
  blocks, depth, own = stacks.copied(net.blocks), net.cfg.depth, net.cfg.normalizer_layers
  parts = {name: getattr(blocks.attn, name) for name in ('sinks', 'elastic')}
  blocks.attn.sinks = blocks.attn.elastic = None
  layers = model.unstack(blocks, depth)
  for i, layer in enumerate(own):
    for name, part in parts.items():
      setattr(layers[layer].attn, name, jax.tree.map(lambda leaf, i=i: leaf[i], part))
  return layers


def by_hand(net, batch):
  """The mean loss of a batch, written as plainly as it can be."""
  cfg, position = net.cfg, batch.positions
  x = net.embed.table[...][batch.tokens]
  if cfg.norm == 'dyt':
    x = x * net.embed_scale.scale[...]
  at = jnp.arange(LENGTH)
  same = batch.segments[:, :, None] == batch.segments[:, None]
  for layer, block in enumerate(blocks_of(net)):
    attn, own, y = block.attn, cfg.attn, normed(block.attn_norm, x)
    q, k, v = (
      jnp.einsum('btd,dhk->bthk', y, part.weight[...])
      for part in (attn.query, attn.key, attn.value)
    )
    if own.value_scale != 'none':
      theta = attn.value_scale.theta.scale[...] if own.value_scale == 'learned' else 0.0
      limit = cfg.width * own.head_dim * cfg.numerics.init_std**2 * jnp.exp(theta)
      r = (v**2).sum(-1)
      v = v * (r / (r + limit))[..., None]
    q, k = normed(attn.query_norm, q), normed(attn.key_norm, k)
    q, k = turned(q, position), turned(k, position)
    shared = own.heads // own.kv_heads
    score = jnp.einsum('bthk,bshk->bhts', q, jnp.repeat(k, shared, 2)) / 8**0.5
    local = own.window and (layer in cfg.windowed)
    near = at[:, None] - at[None] < (own.window if local else LENGTH)
    mask = (same & (at[:, None] >= at[None]) & near)[:, None]
    normalizer = own.normalizer if layer in cfg.normalizer_layers else 'softmax'
    w = weights_by_hand(own, normalizer, score, mask, attn)
    if own.differential:
      y = differenced(attn, w, v, layer)
    else:
      y = jnp.einsum('bhts,bshk->bthk', w, jnp.repeat(v, shared, 2))
    x = x + jnp.einsum('bthk,hkd->btd', y, attn.out.weight[...])
    y, ffn = normed(block.ffn_norm, x), block.ffn
    inner = jax.nn.silu(y @ ffn.act.weight[...]) * (y @ ffn.up.weight[...])
    x = x + inner @ ffn.down.weight[...]
  logit = normed(net.norm, x) @ net.embed.table[...].T
  nll = jax.nn.logsumexp(logit, -1) - jnp.take_along_axis(
    logit, batch.targets[..., None], -1
  ).squeeze(-1)
  return (batch.weights * nll).sum() / batch.weights.sum()


@functools.cache
def expected(name):
  with jax.numpy_rank_promotion('allow'):
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(net_of(name), BATCH)
  return loss, trees.flatten(grads)


def agrees(name, got):
  loss, exact = expected(name)
  np.testing.assert_allclose(got.losses['loss'], loss, rtol=1e-5)
  grads = trees.flatten(got.grads)
  assert grads.keys() == exact.keys()
  for key, value in exact.items():
    assert np.abs(value).max() > 0, key
    atol = 3e-5 * max(1, np.abs(value).max())
    np.testing.assert_allclose(grads[key], value, rtol=0, atol=atol, err_msg=key)


def gradients(name):
  return jax.jit(functools.partial(step.gradients, accum=1, loss=recipe(name).loss))


def test_patterns_choose_the_layers_with_the_normalizer_and_the_window():
  last, first = (net_of(name).cfg for name in [*MODELS][-2:])
  assert last.normalizer_layers == (1,) and first.normalizer_layers == (0,)
  assert first.windowed == (1,) and last.windowed == ()
  assert net_of('clipped, a window, a fixed V-scale').cfg.normalizer_layers == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_remedy_and_its_gradients_are_its_formula(name):
  agrees(name, gradients(name)(net_of(name), BATCH))


FEW = list(MODELS)[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', [*FEW, *(pytest.param(n, marks=pytest.mark.full) for n in [*MODELS][1:])]
)
def test_eight_devices_compute_a_remedy_as_one_does(name):
  on = small.mesh_of(fsdp=2, tensor=2, context=2)
  if 'differential' in name:  # Whose pairs of KV heads stay together.
    on = small.mesh_of(fsdp=4, context=2)
  net = net_of(name)
  net = jax.device_put(net, mesh.shardings(jax.eval_shape(lambda: net), on))
  with jax.set_mesh(on):
    got = gradients(name)(net, mesh.place(BATCH, on, 8))
    agrees(name, jax.device_get(got))


def sizes(**changes):
  return model.parts(small.model_config(**changes))


D, H, G, K, L = 16, 4, 2, 8, 2


@pytest.mark.parametrize(
  ('changes', 'added'),
  [
    (dict(norm='pre_affine'), (2 * L + 1) * D),
    # alpha and beta of each norm, and the scale of the embeddings.
    (dict(norm='dyt'), (2 * L + 1) * (1 + D) + 1),
    (dict(attn__differential=True), L * (4 * K + 2 * K)),
    (dict(attn__normalizer='elastic'), L * H),
    (dict(attn__normalizer='clipped'), 0),
    (dict(attn__value_scale='learned'), L * G),
    (dict(attn__value_scale='fixed'), 0),
    (dict(attn__normalizer='elastic', attn__normalizer_layers='first:1'), H),
    (dict(attn__normalizer='sink_logit', attn__normalizer_layers='last:1'), H),
    (dict(attn__window=3, attn__global_layers='first:1'), 0),
    (dict(attn__rounding='repaired'), 0),
  ],
  ids=str,
)
def test_a_remedy_has_exactly_the_parameters_of_its_formula(changes, added):
  assert sizes(**changes)['total'] - sizes()['total'] == added


@pytest.mark.slow
def test_initial_values_are_the_papers():
  cfg = small.model_config(
    norm='dyt',
    norm_alpha=(0.8, 0.2),
    attn__normalizer='elastic',
    attn__value_scale='learned',
    depth=1,
  )
  net = model.Transformer(cfg, jax.random.key(0))
  assert float(net.embed_scale.scale[...]) == D**0.5
  for norm, alpha in ((net.blocks.attn_norm, 0.8), (net.blocks.ffn_norm, 0.2)):
    np.testing.assert_allclose(norm.alpha.scale[...], alpha)
    assert (norm.scale[...] == 1).all() and (norm.bias[...] == 0).all()
  assert (net.blocks.attn.elastic.scale[...] == -1).all()
  assert (net.blocks.attn.value_scale.theta.scale[...] == 0).all()
  before = norms.PreAffine(D, numerics=cfg.numerics).before
  assert (before.scale[...] == 1).all()


@pytest.mark.slow
def test_v_scale_halves_values_of_the_expected_size_and_removes_small_ones():
  """At the start of a standard model |v|^2 is C on average, whatever its width."""
  for width in (64, 512):
    x_BTD = jax.random.normal(jax.random.key(1), (4, 64, width))
    cfg = small.attention_config(value_scale='learned', qk_norm=False)
    numerics = small.model_config(numerics__init_std=0.02).numerics
    options = dict(width=width, std_out=0.02, numerics=numerics)
    attn = attention.Attention(cfg, jax.random.key(0), **options)
    v_BTGK = attn.value(x_BTD)
    square = (v_BTGK.astype(jnp.float32) ** 2).sum(-1)
    np.testing.assert_allclose(square.mean(), attn.value_scale.expected, rtol=0.1)
  scale = attn.value_scale
  direction_K = jnp.zeros(cfg.head_dim).at[0].set(1.0)
  shrunk = lambda size: scale(size * direction_K[None, None, None].repeat(2, 2))[..., 0]
  root = scale.expected**0.5
  np.testing.assert_allclose(shrunk(root), root / 2, rtol=1e-6)
  np.testing.assert_allclose(shrunk(100 * root), 100 * root, rtol=2e-4)
  np.testing.assert_allclose(shrunk(root / 100), root * 1e-6, rtol=2e-4)
  # The published Jacobian: r / (r + C) across, (r^2 + 3 C r) / (r + C)^2 along v.
  r, C = (2 * root) ** 2, scale.expected
  at = lambda v_K: scale(v_K[None, None, None].repeat(2, 2))[0, 0, 0]
  jacobian = jax.jacobian(at)(2 * root * direction_K)
  along, across = (r**2 + 3 * C * r) / (r + C) ** 2, r / (r + C)
  exact = np.diag([along, *[across] * (cfg.head_dim - 1)])
  np.testing.assert_allclose(jacobian, exact, rtol=1e-5, atol=1e-6)


def test_starts_of_lambda_grow_with_the_layer_as_in_the_paper():
  np.testing.assert_allclose(differential.start(0), 0.2)
  np.testing.assert_allclose(differential.start(11), 0.8 - 0.6 * np.exp(-3.3))


def test_flops_count_the_keys_in_a_window_and_the_width_of_differential_values():
  """Of each token and layer: 4 H K for a key, and 6 H K if values are twice as wide."""
  flops = lambda **changes: model.attention_flops(small.model_config(**changes), 10)
  assert flops() == L * 4 * H * K * 5.5
  # 1, 2, 3, 3, 3, ... keys.
  window = (1 + 2 + 8 * 3) / 10
  assert flops(attn__window=3) == L * 4 * H * K * window
  mixed = dict(attn__window=3, attn__global_layers='first:1')
  assert flops(**mixed) == 4 * H * K * (window + 5.5)
  assert flops(attn__window=99) == flops()
  assert flops(attn__differential=True) == L * 6 * H * K * 5.5
  # Two documents of 4 and 6 tokens in a row.
  position_BT = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
  packed = lambda **changes: model.attention_flops(
    small.model_config(**changes), 10, position_BT
  )
  assert packed() == pytest.approx(L * 4 * H * K * (10 + 21) / 10)
  assert packed(attn__window=3) == pytest.approx(L * 4 * H * K * (3 * 2 + 3 * 6) / 10)
  assert packed(mask_documents=False) == flops()
  total = model.flops_per_token
  cfg, plain = small.model_config(attn__window=3), small.model_config()
  saved = 3 * L * 4 * H * K * (5.5 - window)
  np.testing.assert_allclose(total(plain, 10) - total(cfg, 10), saved)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(window=-1), r'attn\.window=-1'),
    (dict(global_layers='all'), r"attn\.global_layers='all' with .*attn\.window=0"),
    (dict(rounding='up'), r"attn\.rounding='up'"),
    (dict(value_scale='on'), r"attn\.value_scale='on', but allowed are 'none', 'fixed'"),
    (
      dict(normalizer_layers='all'),
      r"attn\.normalizer_layers='all' with .*attn\.normalizer='softmax'",
    ),
    (
      dict(normalizer='off_by_one', normalizer_layers='all', sink_tokens=1),
      r"attn\.normalizer_layers='all' with .*attn\.sink_tokens=1",
    ),
    (
      dict(rounding='flash', backend='blockwise'),
      r"attn\.rounding='flash' with .*attn\.backend='blockwise'",
    ),
    (
      dict(rounding='flash', normalizer='sigmoid'),
      r"attn\.rounding='flash' with .*attn\.normalizer='sigmoid'",
    ),
    (dict(clip_gamma=0.1), r'attn\.clip_gamma=0\.1'),
    (dict(clip_zeta=0.9), r'attn\.clip_zeta=0\.9'),
    (
      dict(normalizer='clipped', clip_gamma=0.0),
      r"attn\.normalizer='clipped' with .*clip_gamma=0.0 .*, but this is the softmax",
    ),
    (dict(elastic_tau=1e9), r'attn\.elastic_tau=1000000000\.0'),
    (dict(differential=True, kv_heads=1), r'attn\.kv_heads=1 must be a multiple of'),
    (
      dict(differential=True, normalizer='off_by_one'),
      r"attn\.differential=True with .*attn\.normalizer='off_by_one'",
    ),
    (dict(differential=True, sink_tokens=2), r'differential=True with .*sink_tokens=2'),
    (dict(differential=True, output='silu'), r"differential=True with .*output='silu'"),
    (
      dict(normalizer='elastic', sink_tokens=1),
      r"attn\.sink_tokens=1 with .*normalizer='elastic'",
    ),
  ],
)
def test_a_remedy_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\..*' + said):
    small.attention_config(**changes)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(attn__window=4, attn__global_layers='all'), r'are all layers'),
    (dict(attn__window=4, attn__global_layers='last:3'), r'global_layers'),
    (
      dict(attn__normalizer='softpick', attn__normalizer_layers='3'),
      r"normalizer_layers='3', but the model has the layers 0 to 1",
    ),
    (dict(attn__window=4, attn__global_layers='even'), r"global_layers='even'"),
    (dict(norm_alpha=(1.0,)), r'norm_alpha=\(1\.0,\)'),
    (dict(norm_alpha=(1.0, 0.0)), r'norm_alpha'),
    (dict(norm='layer'), r"norm='layer', but allowed are 'rms'"),
  ],
)
def test_a_model_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\..*' + said):
    small.model_config(**changes)
