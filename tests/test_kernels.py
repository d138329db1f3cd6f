"""Attention and the vocabulary loss against NumPy in float64, gradients included.

The contract test runs for each backend of kernels.ATTENTION.
"""

import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import kernels, mesh

B, T, H, G, K = 2, 24, 4, 2, 8
BACKENDS = [
  pytest.param('reference', jnp.float32),
  pytest.param('reference', jnp.bfloat16),
  pytest.param('cudnn', jnp.bfloat16, marks=pytest.mark.accelerator),
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


def test_every_backend_is_held_to_the_contract():
  assert {p.values[0] for p in BACKENDS} == set(kernels.ATTENTION)


def attend_by_hand(q, k, v, segments, dy):
  """Equation 2 and its gradient, one row and head at a time -> y, dq, dk, dv."""
  y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  length = q.shape[1]
  causal = np.tril(np.ones((length, length), bool))
  for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
    g = h // (q.shape[2] // k.shape[2])
    seen = causal & (segments[b][:, None] == segments[b][None])
    score = q[b, :, h] @ k[b, :, g].T / np.sqrt(q.shape[-1])
    weight = np.where(seen, np.exp(score - score.max(-1, keepdims=True)), 0)
    weight /= weight.sum(-1, keepdims=True)
    y[b, :, h] = weight @ v[b, :, g]
    dv[b, :, g] += weight.T @ dy[b, :, h]
    dweight = dy[b, :, h] @ v[b, :, g].T
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdims=True))
    dq[b, :, h] = dscore @ k[b, :, g] / np.sqrt(q.shape[-1])
    dk[b, :, g] += dscore.T @ q[b, :, h] / np.sqrt(q.shape[-1])
  return y, dq, dk, dv


@pytest.mark.parametrize(
  ('kv_heads', 'packed'), [(1, True), (2, False), (2, True), (4, True)]
)
@pytest.mark.parametrize(('backend', 'dtype'), BACKENDS)
def test_attention_and_its_gradients_are_the_definition(backend, dtype, kv_heads, packed):
  rows = len(SEGMENTS)
  rng = np.random.default_rng(0)
  shape = lambda heads: (rows, T, heads, K)
  draw = lambda heads: jnp.asarray(rng.normal(size=shape(heads)), dtype)
  q, k, v, dy = draw(H), draw(kv_heads), draw(kv_heads), draw(H)
  segments = jnp.asarray(SEGMENTS) if packed else None

  @small.jit
  def run(q, k, v, dy):
    attend = lambda *qkv: kernels.attend(*qkv, segments, backend=backend, max_segments=8)
    y, back = jax.vjp(attend, q, k, v)
    return y, *back(dy)

  ours = run(q, k, v, dy)
  seen = SEGMENTS if packed else np.ones_like(SEGMENTS)
  exact = attend_by_hand(
    *(np.asarray(a, np.float64) for a in (q, k, v)), seen, np.asarray(dy)
  )
  tolerance = 2e-5 if dtype == jnp.float32 else 0.03
  for name, a, b in zip(('y', 'dq', 'dk', 'dv'), ours, exact):
    # Padding is nobody's: what a backend puts there does not matter, if it is finite.
    real = np.asarray(seen > 0)
    assert a.dtype == dtype
    assert np.isfinite(np.asarray(a, np.float32)).all()
    np.testing.assert_allclose(
      np.asarray(a, np.float64)[real],
      b[real],
      atol=tolerance,
      rtol=tolerance,
      err_msg=name,
    )


def test_auto_does_not_take_the_reference_for_a_long_row():
  qkv = [jax.ShapeDtypeStruct((1, 4097, h, 8), jnp.float32) for h in (2, 1, 1)]
  attend = lambda backend: jax.eval_shape(
    lambda *a: kernels.attend(*a, None, backend=backend, max_segments=8), *qkv
  )
  with pytest.raises(NotImplementedError) as error:
    attend('auto')
  said = str(error.value)
  assert "config.model.attn.backend='reference'" in said and '4096' in said
  assert all(name in said for name in kernels.ATTENTION)
  assert attend('reference').shape == (1, 4097, 2, 8)


def test_auto_takes_the_reference_for_a_short_row_and_says_so_once(caplog):
  kernels._log_choice.cache_clear()
  q = jnp.ones((1, 4096, 1, 2))
  with caplog.at_level('INFO', logger='gated'):
    for _ in range(2):
      jax.eval_shape(
        lambda q: kernels.attend(q, q, q, None, backend='auto', max_segments=8), q
      )
  if jax.default_backend() == 'cpu':
    assert [r.message for r in caplog.records] == [
      'attention runs on the reference backend (cudnn needs a GPU)'
    ]


def test_a_named_backend_that_cannot_says_what_it_lacks():
  if jax.default_backend() == 'cpu':
    q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match='needs a GPU'):
      kernels.attend(q, q, q, None, backend='cudnn', max_segments=8)


def test_a_backend_that_does_not_exist_is_refused_by_its_knob():
  with pytest.raises(ValueError, match=r"config\.model\.attn\.backend='flash'.*'auto'"):
    small.attention_config(backend='flash')


def runs_by_hand(row):
  groups = [(key, len(list(group))) for key, group in itertools.groupby(row)]
  starts = np.cumsum([0, *(size for _, size in groups)])[:-1]
  return starts.tolist(), [size for _, size in groups]


@pytest.mark.parametrize('limit', [8, 9, 30])
def test_segment_runs_finds_each_run_up_to_exactly_the_limit(limit):
  starts, sizes = jax.jit(kernels.segment_runs, static_argnums=1)(SEGMENTS, limit)
  assert starts.shape == sizes.shape == (len(SEGMENTS), limit)
  for row, start, size in zip(SEGMENTS.tolist(), starts.tolist(), sizes.tolist()):
    expected, lengths = runs_by_hand(row)
    filler = [-1] * (limit - len(expected))
    assert start == expected + filler
    assert size == lengths + filler


def test_segment_runs_of_random_rows():
  rng = np.random.default_rng(0)
  rows = np.cumsum(rng.random((50, 24)) < 0.25, 1).astype(np.int32)
  rows[::3, 18:] = 0  # padding at the end; some rows begin with 0 too
  starts, sizes = jax.jit(kernels.segment_runs, static_argnums=1)(rows, 24)
  for row, start, size in zip(rows.tolist(), starts.tolist(), sizes.tolist()):
    expected, lengths = runs_by_hand(row)
    assert [s for s in start if s >= 0] == expected
    assert [s for s in size if s >= 0] == lengths
    assert sum(s for s in size if s >= 0) == 24


N_ROWS, LENGTH, WIDTH, VOCAB = 4, 12, 6, 16


def loss_problem(dtype=jnp.float32, rows=N_ROWS, length=LENGTH):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(rows, length, WIDTH)), dtype)
  w = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
  targets = rng.integers(0, VOCAB, (rows, length), np.int32)
  weights = rng.choice([0, 0.5, 1], (rows, length)).astype(np.float32)
  return x, w, targets, weights


def loss_by_hand(x, w, targets, weights, z):
  """total, nll, lse, dtotal/dx and dtotal/dw in float64."""
  x, w = np.asarray(x, np.float64), np.asarray(w.astype(x.dtype), np.float64)
  logits = x @ w.T
  top = logits.max(-1, keepdims=True)
  lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
  one = np.eye(len(w))[targets]
  nll = lse - (logits * one).sum(-1)
  softmax = np.exp(logits - lse[..., None])
  dlogit = weights[..., None] * (softmax * (1 + 2 * z * lse[..., None]) - one)
  total = (weights * (nll + z * lse**2)).sum()
  return total, nll, lse, dlogit @ w, np.einsum('btv,btd->vd', dlogit, x)


def loss_and_gradients(x, w, targets, weights, *, z, chunk, scale=1.0):
  def total(x, w, targets, weights):
    t, nll, lse = kernels.vocab_loss(x, w, targets, weights, z=z, chunk=chunk)
    return scale * t, (nll, lse)

  run = small.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (t, (nll, lse)), (dx, dw) = run(x, w, targets, weights)
  return t, nll, lse, dx, dw


def assert_loss(ours, exact, tolerance):
  for name, a, b in zip(('total', 'nll', 'lse', 'dx', 'dw'), ours, exact):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, atol=tolerance, rtol=tolerance, err_msg=name
    )


@pytest.mark.parametrize(
  ('chunk', 'z'), [(1, 0.0), (7, 0.01), (16, 0.01), (48, 0.01), (10_000, 0.01)]
)
def test_vocab_loss_is_the_log_softmax_whatever_the_chunk(chunk, z):
  problem = loss_problem()
  ours = loss_and_gradients(*problem, z=z, chunk=chunk)
  assert_loss(ours, loss_by_hand(*problem, z), 1e-5)


def test_vocab_loss_of_bfloat16_states_is_summed_in_float32():
  problem = loss_problem(jnp.bfloat16)
  ours = loss_and_gradients(*problem, z=0.01, chunk=16)
  assert [a.dtype for a in ours] == ['float32'] * 3 + ['bfloat16', 'float32']
  exact = loss_by_hand(*problem, 0.01)
  assert_loss(ours[:3], exact[:3], 1e-5)
  assert_loss(ours, exact, 0.03)


def test_vocab_loss_without_a_gradient_is_the_same():
  problem = loss_problem()
  total, nll, lse = kernels.vocab_loss(*problem, z=0.01, chunk=16)
  assert_loss((total, nll, lse), loss_by_hand(*problem, 0.01)[:3], 1e-5)


def test_vocab_loss_passes_on_what_its_total_is_multiplied_by():
  problem = loss_problem()
  *_, dx, dw = loss_and_gradients(*problem, z=0.01, chunk=16, scale=-2.0)
  *_, exact_dx, exact_dw = loss_by_hand(*problem, 0.01)
  np.testing.assert_allclose(dx, -2 * exact_dx, atol=1e-5)
  np.testing.assert_allclose(dw, -2 * exact_dw, atol=1e-5)


def test_vocab_loss_is_finite_for_huge_logits():
  x, w, targets, weights = loss_problem()
  ours = loss_and_gradients(100 * x, 100 * w, targets, weights, z=0.0, chunk=16)
  assert all(np.isfinite(a).all() for a in ours)


def peak_logits(chunk, rows=8, length=64):
  """The most elements that any array with a vocabulary dim has inside the loss."""
  x, w, targets, weights = loss_problem(rows=rows, length=length)
  total = lambda x, w: kernels.vocab_loss(x, w, targets, weights, z=0.0, chunk=chunk)[0]
  jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, w)
  sizes = [0]

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      shapes = [v.aval.shape for v in eqn.outvars]
      sizes.extend(int(np.prod(s)) for s in shapes if len(s) > 1 and s[-1] == VOCAB)
      for sub in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(sub)

  walk(jaxpr.jaxpr)
  return max(sizes)


def test_only_a_chunk_of_logits_exists_at_a_time():
  assert peak_logits(chunk=32) == 32 * VOCAB
  assert peak_logits(chunk=512) == 512 * VOCAB


MESHES = [dict(tensor=2, context=2, fsdp=2), dict(tensor=8), dict(data=4, context=2)]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_vocab_loss_on_a_mesh_is_the_same(sizes):
  on = mesh.make(**dict(data=1, fsdp=1, expert=1, tensor=1, context=1) | sizes)
  x, w, targets, weights = problem = loss_problem(rows=8)
  place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(on, mesh.spec(axes, on)))
  placed = (
    place(x, 'batch', 'tokens', None),
    place(w, 'vocab', None),
    place(targets, 'batch', 'tokens'),
    place(weights, 'batch', 'tokens'),
  )
  with jax.set_mesh(on):
    ours = loss_and_gradients(*placed, z=0.01, chunk=5, scale=2.0)
  total, nll, lse, dx, dw = loss_by_hand(*problem, 0.01)
  assert_loss(ours, (2 * total, nll, lse, 2 * dx, 2 * dw), 1e-5)
