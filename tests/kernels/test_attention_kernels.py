"""Attention and grouped matmul against NumPy in float64, gradients included.

The contract test runs for each backend of kernels.ATTENTION.
"""

import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import kernels
from gated.kernels import choice
from gated.kernels.attention import blockwise, contract
from gated.kernels.grouped_matmul import contract as grouped_contract
from gated.kernels.grouped_matmul import gpu as grouped_gpu
from gated.kernels.grouped_matmul import tpu as grouped_tpu

B, T, H, G, K = 2, 24, 4, 2, 8
BACKENDS = [
  pytest.param('reference', jnp.float32),
  pytest.param('reference', jnp.bfloat16),
  pytest.param('cudnn', jnp.bfloat16, marks=pytest.mark.accelerator),
  pytest.param('splash', jnp.float32),
  pytest.param('splash', jnp.bfloat16, marks=pytest.mark.full),
  pytest.param('blockwise', jnp.float32),
  pytest.param('blockwise', jnp.bfloat16),
]
# Two documents and padding; one document; as many as fit; a row that ends in a short one.
SEGMENTS = np.array(
  [
    [1] * 10 + [2] * 9 + [0] * 5,
    [1] * 24,
    [1, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8],
    [1] * 23 + [2],
  ],
  np.int32,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  small.blocks(monkeypatch, 7)


def segments_for(backend):
  """SEGMENTS, stretched to the length that a backend has blocks for."""
  return np.repeat(SEGMENTS, 11, 1)[:, :256] if backend == 'splash' else SEGMENTS


def test_every_backend_is_held_to_the_contract():
  assert {p.values[0] for p in BACKENDS} == set(kernels.ATTENTION)


def attend_by_hand(q, k, v, segments, dy):
  """Equation 2 and its gradient, one row and head at a time -> y, dq, dk, dv."""
  y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  length = q.shape[1]
  causal = np.tril(np.ones((length, length), bool))
  for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
    g = h // (q.shape[2] // k.shape[2])
    visible = causal & (segments[b][:, None] == segments[b][None])
    score = q[b, :, h] @ k[b, :, g].T / np.sqrt(q.shape[-1])
    weight = np.where(visible, np.exp(score - score.max(-1, keepdims=True)), 0)
    weight /= weight.sum(-1, keepdims=True)
    y[b, :, h] = weight @ v[b, :, g]
    dv[b, :, g] += weight.T @ dy[b, :, h]
    dweight = dy[b, :, h] @ v[b, :, g].T
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdims=True))
    dq[b, :, h] = dscore @ k[b, :, g] / np.sqrt(q.shape[-1])
    dk[b, :, g] += dscore.T @ q[b, :, h] / np.sqrt(q.shape[-1])
  return y, dq, dk, dv


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kv_heads', 'packed'), [(1, True), (2, False), (2, True), (4, True)]
)
@pytest.mark.parametrize(('backend', 'dtype'), BACKENDS)
def test_attention_and_its_gradients_are_the_definition(backend, dtype, kv_heads, packed):
  rng = np.random.default_rng(0)
  packing = segments_for(backend)
  draw = lambda heads: jnp.asarray(rng.normal(size=(*packing.shape, heads, K)), dtype)
  q, k, v, dy = draw(H), draw(kv_heads), draw(kv_heads), draw(H)
  segments = jnp.asarray(packing) if packed else None

  @jax.jit
  def run(q, k, v, dy):
    attend = lambda *qkv: kernels.attend(*qkv, segments, backend=backend, max_segments=8)
    y, back = jax.vjp(attend, q, k, v)
    return y, *back(dy)

  ours = run(q, k, v, dy)
  visible = packing if packed else np.ones_like(packing)
  exact = attend_by_hand(
    *(np.asarray(a, np.float64) for a in (q, k, v)), visible, np.asarray(dy)
  )
  tolerance = 2e-5 if dtype == jnp.float32 else 0.03
  for name, a, b in zip(('y', 'dq', 'dk', 'dv'), ours, exact):
    # Padding is nobody's: what a backend puts there does not matter, if it is finite.
    real = np.asarray(visible > 0)
    assert a.dtype == dtype
    assert np.isfinite(np.asarray(a, np.float32)).all()
    np.testing.assert_allclose(
      np.asarray(a, np.float64)[real],
      b[real],
      atol=tolerance,
      rtol=tolerance,
      err_msg=name,
    )


def shapes_of(backend, length, **opts):
  q, k = (jax.ShapeDtypeStruct((1, length, h, 8), jnp.float32) for h in (2, 1))
  attend = functools.partial(kernels.attend, backend=backend, max_segments=8, **opts)
  return jax.eval_shape(lambda q, k: attend(q, k, k, None), q, k)


@pytest.fixture
def only_here(monkeypatch, caplog):
  """The backends as they are, none of them interpreted, and their messages."""
  if jax.default_backend() != 'cpu':
    pytest.skip('says what a machine without an accelerator says')
  monkeypatch.setitem(kernels.ATTENTION, 'splash', contract._splash)
  monkeypatch.setattr(blockwise, 'MOST', 512)
  choice.log.cache_clear()
  caplog.set_level('INFO', logger='gated')
  return caplog


def test_auto_takes_blocks_for_a_long_row_and_never_the_reference(only_here):
  assert shapes_of('auto', 4097).shape == (1, 4097, 2, 8)
  (record,) = only_here.records
  assert record.message.startswith('attention runs on the blockwise backend (cudnn ')
  assert "config.model.attn.backend='reference'" in record.message
  assert '4096' in record.message
  assert shapes_of('reference', 4097).shape == (1, 4097, 2, 8)


def test_a_long_row_does_not_use_the_reference(only_here):
  with pytest.raises(NotImplementedError) as error:
    shapes_of('auto', 4097, normalizer='sigmoid')
  message = str(error.value)
  assert "config.model.attn.backend='reference'" in message and '4096' in message
  assert all(name in message for name in kernels.ATTENTION)


def test_auto_takes_the_reference_for_a_short_row_and_says_so_once(only_here):
  for _ in range(2):
    shapes_of('auto', 4096)
  assert [r.message for r in only_here.records] == [
    'attention runs on the reference backend (cudnn needs a GPU; splash needs a TPU)'
  ]


@pytest.mark.parametrize(('backend', 'needs'), [('cudnn', 'GPU'), ('splash', 'TPU')])
def test_a_named_backend_reports_the_unsupported_case(only_here, backend, needs):
  q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match=f'{backend} needs a {needs}'):
    kernels.attend(q, q, q, None, backend=backend, max_segments=8)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'opts', 'message'),
  [
    ((1, 192, 2, 8), jnp.float32, {}, 'multiples of 128 tokens, not 192'),
    ((1, 128, 2, 8), jnp.float16, {}, 'computes in bfloat16 or float32, not float16'),
    ((1, 128, 2, 2048), jnp.float32, {}, 'no blocks for a head width of 2048'),
    ((1, 128, 2, 8), jnp.float32, dict(normalizer='softpick'), 'no softpick attention'),
  ],
)
def test_splash_names_the_unsupported_case(shape, dtype, opts, message):
  q = jnp.ones(shape, dtype)
  with pytest.raises(NotImplementedError, match=f'splash .*{message}'):
    kernels.attend(q, q, q, None, backend='splash', max_segments=8, **opts)


@pytest.mark.slow
@pytest.mark.parametrize('lse', [False, True])
@pytest.mark.parametrize('backend', ['splash', 'blockwise'])
def test_a_soft_cap_and_its_gradients_are_the_references(backend, lse):
  packing = segments_for(backend)
  rng = np.random.default_rng(0)
  draw = lambda h: jnp.asarray(2 * rng.normal(size=(*packing.shape, h, K)), jnp.float32)
  qkv = draw(H), draw(G), draw(G)

  def total(q, k, v, backend):
    opts = dict(backend=backend, max_segments=8, cap=1.5)
    if not lse:
      y = kernels.attend(q, k, v, packing, **opts)
      return jnp.sum(jnp.sin(y)), y
    y, lse_BTH = kernels.attend_lse(q, k, v, packing, **opts)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(lse_BTH)), (y, lse_BTH)

  gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
  run = jax.jit(gradient, static_argnums=3)  # -> the gradients and the outputs
  if backend == 'splash' and lse:
    with pytest.raises(NotImplementedError, match='no log-sum-exp of capped scores'):
      run(*qkv, backend)
    return
  for a, b in zip(*(jax.tree.leaves(run(*qkv, name)) for name in (backend, 'reference'))):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_a_backend_that_does_not_exist_is_refused_by_its_knob():
  with pytest.raises(ValueError, match=r"config\.model\.attn\.backend='flash'.*'auto'"):
    small.attention_config(backend='flash')


TAU = np.array([-1.0, -0.3, 0.0, 0.4], np.float32)


def variant(score, visible, normalizer, tau=0.0):
  """Scores (T, S) of a head and which count -> weights, as their papers write them."""
  if normalizer == 'sigmoid':
    weight = 1 / (1 + np.exp(-(score - np.log(visible.sum(-1, keepdims=True)))))
    return np.where(visible, weight, 0)
  if normalizer in ('clipped', 'elastic'):
    weight = variant(score, visible, 'softmax')
    if normalizer == 'clipped':
      weight = np.clip((1.2 - -0.05) * weight - 0.05, 0, 1)
    else:
      weight = np.maximum(weight + tau / visible.sum(-1, keepdims=True), 0)
    return np.where(visible, weight, 0)
  if normalizer == 'softpick':
    e = np.where(visible, np.exp(score) - 1, 0)
    return np.maximum(e, 0) / (np.abs(e).sum(-1, keepdims=True) + 1e-8)
  weight = np.where(visible, np.exp(score), 0)
  return weight / weight.sum(-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize('cap', [0.0, 1.5])
@pytest.mark.parametrize('normalizer', kernels.NORMALIZERS)
def test_normalizers_match_their_formulas(normalizer, cap):
  q, k, v = draw_qkv(scale=1.5)
  causal = np.tril(np.ones((T, T), bool))
  ours = jax.jit(
    lambda *qkv: kernels.attend(
      *qkv,
      jnp.asarray(SEGMENTS),
      backend='reference',
      max_segments=8,
      normalizer=normalizer,
      cap=cap,
      clip=(-0.05, 1.2),
      offset_H=jnp.asarray(TAU),
    )
  )(q, k, v)
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  for b, h in itertools.product(range(len(SEGMENTS)), range(H)):
    visible = causal & (SEGMENTS[b][:, None] == SEGMENTS[b][None])
    score = q[b, :, h] @ k[b, :, h // (H // G)].T / np.sqrt(K)
    score = cap * np.tanh(score / cap) if cap else score
    exact = variant(score, visible, normalizer, TAU[h]) @ v[b, :, h // (H // G)]
    np.testing.assert_allclose(ours[b, :, h], exact, atol=1e-5)


def draw_qkv(scale=1.0):
  rng = np.random.default_rng(0)
  shape = lambda heads: (len(SEGMENTS), T, heads, K)
  return [jnp.asarray(scale * rng.normal(size=shape(h)), jnp.float32) for h in (H, G, G)]


@pytest.mark.slow
@pytest.mark.parametrize('normalizer', kernels.NORMALIZERS)
def test_huge_scores_neither_overflow_nor_lose_their_gradient(normalizer):
  def total(q, k, v):
    opts = dict(backend='reference', max_segments=8, normalizer=normalizer)
    opts |= dict(clip=(-0.05, 1.0), offset_H=jnp.asarray(TAU))
    return jnp.sum(jnp.square(kernels.attend(q, k, v, jnp.asarray(SEGMENTS), **opts)))

  for sign in (1, -1):
    q, k, v = draw_qkv(scale=30.0)
    k = sign * jnp.abs(k)
    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(jnp.abs(q), k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_the_log_sum_exp_of_a_kernel_that_drops_its_gradient_gets_it_back():
  """Against autodiff of the definition, with y's own gradient beside it."""
  segments = jnp.asarray(SEGMENTS)
  opts = dict(backend='reference', max_segments=8)
  rng = np.random.default_rng(1)
  weight = jnp.asarray(rng.normal(size=(len(SEGMENTS), T, H)), jnp.float32)

  def exact(q, k, v):
    y, lse = kernels.attend_lse(q, k, v, segments, **opts)
    return jnp.sum(weight * lse) + jnp.sum(jnp.sin(y))

  def mended(q, k, v):
    run = lambda q, k, v: kernels.attend(q, k, v, segments, **opts)
    _, lse = kernels.attend_lse(q, k, v, segments, **opts)
    lse = kernels.with_lse_gradient(run, q, k, jax.lax.stop_gradient(lse))
    return jnp.sum(weight * lse) + jnp.sum(jnp.sin(run(q, k, v)))

  qkv = draw_qkv()
  (a, da), (b, db) = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*qkv) for f in (exact, mended)
  )
  np.testing.assert_allclose(a, b, rtol=1e-5)
  for x, y in zip(da, db):
    np.testing.assert_allclose(x, y, atol=1e-4)
  # And it is not nothing: without it the gradient is another.
  cut = jax.jit(
    jax.grad(
      lambda q, k, v: (
        jnp.sum(
          weight * jax.lax.stop_gradient(kernels.attend_lse(q, k, v, segments, **opts)[1])
        )
        + jnp.sum(jnp.sin(kernels.attend(q, k, v, segments, **opts)))
      )
    )
  )(*qkv)
  assert np.abs(cut - da[0]).max() > 0.1


@pytest.mark.accelerator
def test_cudnns_log_sum_exp_and_its_gradients_are_the_references():
  q, k, v = (a.astype(jnp.bfloat16) for a in draw_qkv())
  rng = np.random.default_rng(1)
  weight = jnp.asarray(rng.normal(size=(len(SEGMENTS), T, H)), jnp.float32)
  real = jnp.asarray(SEGMENTS > 0)[..., None]
  for segments in (None, jnp.asarray(SEGMENTS)):

    def total(q, k, v, backend):
      y, lse = kernels.attend_lse(q, k, v, segments, backend=backend, max_segments=8)  # noqa: B023
      y = jnp.where(real[..., None], y.astype(jnp.float32), 0)
      return jnp.sum(weight * jnp.where(real, lse, 0)) + jnp.sum(jnp.sin(y))

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)), static_argnums=3)
    (a, da), (b, db) = run(q, k, v, 'cudnn'), run(q, k, v, 'reference')
    np.testing.assert_allclose(a, b, rtol=0.02, atol=0.5)
    for x, y in zip(da, db):
      x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
      np.testing.assert_allclose(x, y, atol=0.06 * np.abs(y).max())


def test_unsupported_cases_run_on_the_reference_and_are_logged(only_here):
  q = jnp.ones((1, 8, 2, 8))
  for opts, message in (
    (dict(normalizer='softpick'), 'has no softpick attention'),
    (dict(cap=2.0), 'has no soft cap'),
  ):
    choice.log.cache_clear()
    kernels.attend(q, q, q, None, backend='auto', max_segments=8, **opts)
    assert f'reference backend (cudnn {message};' in only_here.records[-1].message
    with pytest.raises(NotImplementedError, match=message):
      kernels.attend(q, q, q, None, backend='cudnn', max_segments=8, **opts)


# Rows by group: uneven, empty ones, one group alone, fewer rows than groups, even, none.
SIZES = [
  [0, 100, 0, 30, 70],
  [1, 0, 2, 0, 0, 0, 1],
  [0, 0],
  *(
    pytest.param(sizes, marks=pytest.mark.full)
    for sizes in ([64, 0, 0], [0, 0, 33], [7] * 9)
  ),
]
GROUPED = [
  pytest.param('blocked', jnp.float32),
  pytest.param('blocked', jnp.bfloat16),
  pytest.param('pallas', jnp.bfloat16, marks=pytest.mark.accelerator),
  pytest.param('ragged', jnp.float32, marks=pytest.mark.accelerator),
  pytest.param('megablox', jnp.bfloat16, marks=pytest.mark.accelerator),
  pytest.param('pallas, interpreted', jnp.float32),
  pytest.param('megablox, interpreted', jnp.float32),
]
INTERPRETED = {
  'pallas, interpreted': grouped_gpu.multiply,
  'megablox, interpreted': grouped_tpu.multiply,
}


def test_every_grouped_backend_is_held_to_the_contract():
  assert {p.values[0] for p in GROUPED} == {*kernels.GROUPED, *INTERPRETED}


@pytest.mark.slow
@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize(('backend', 'dtype'), GROUPED)
def test_the_grouped_product_and_its_gradients_are_the_definition(backend, dtype, sizes):
  """Rows beyond the groups, which hold no numbers, leave no trace in any other."""
  if backend in ('ragged', 'megablox') and jax.default_backend() != 'tpu':
    pytest.skip('needs a TPU')
  rng = np.random.default_rng(0)
  # Kernels have blocks to fill.
  wide = 1 if backend == 'blocked' else 16
  sizes = sizes if backend == 'blocked' else [4 * n for n in sizes]
  n = sum(sizes)
  rows = n + 5 if backend == 'blocked' else 256 + -(-n // 128) * 128
  spare = jnp.arange(rows)[:, None] >= n
  draw = lambda w: jnp.asarray(rng.normal(size=(rows, w * wide)), dtype)
  x, dy = (jnp.where(spare, jnp.nan, draw(w)) for w in (8, 16))
  w = jnp.asarray(rng.normal(size=(len(sizes), 8 * wide, 16 * wide)), dtype)

  @jax.jit
  def run(x, w, size, dy):
    named = lambda x, w: kernels.grouped_matmul(x, w, size, backend=backend)
    ours = INTERPRETED.get(backend)
    product = named if ours is None else lambda x, w: ours(x, w, size, True)
    y, back = jax.vjp(product, x, w)
    return y, *back(dy)

  y, dx, dw = run(x, w, jnp.asarray(sizes, jnp.int32), dy)
  assert [a.dtype for a in (y, dx, dw)] == [dtype] * 3
  x, w, dy = (np.asarray(a, np.float64) for a in (x[:n], w, dy[:n]))
  group = np.repeat(np.arange(len(sizes)), sizes)
  exact = np.einsum('na,nab->nb', x, w[group]), np.einsum('nb,nab->na', dy, w[group])
  exact += (np.stack([x[group == e].T @ dy[group == e] for e in range(len(sizes))]),)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.02
  for name, a, b in zip(('y', 'dx', 'dw'), (y[:n], dx[:n], dw), exact):
    limit = tolerance * max([1, *np.abs(b).ravel()])
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=limit, err_msg=name)


@pytest.mark.parametrize('n', [128, 384, 768, 896, 2048, 5120])
def test_blocks_on_a_tpu_divide_the_sizes(n):
  for block, most in zip(grouped_tpu._blocks(n, n, n), grouped_tpu.BLOCK):
    assert n % block == block % 128 == 0 < block <= most


def test_blocks_cost_half_as_much_again_at_most_on_average():
  """No expert is paid for by every token: padding is bounded by half a block a group."""
  for n, groups in ((262_144, 128), (8192, 128), (4096, 16)):
    rows = grouped_contract.block_rows(n, groups)
    assert groups * rows / 2 <= n / 4 or rows == 8
