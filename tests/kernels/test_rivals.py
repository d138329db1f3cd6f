"""Windows and rounding in attention, against NumPy, gradients included."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small

from gated import kernels
from gated.devices import mesh
from gated.kernels.attention import blockwise, rounding, splash

H, G, K = 4, 2, 8
BACKENDS = [
  'reference',
  'blockwise',
  'splash',
  pytest.param('cudnn', marks=pytest.mark.accelerator),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  small.blocks(monkeypatch, 37)


def problem(length=256, dtype=jnp.float32):
  """q, k, v and dy of two rows: one of several documents and padding, one of one."""
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(2, length, heads, K)), dtype)
  ends = np.array([40, 41, 180, 230])
  segments = np.searchsorted(ends, np.arange(length), side='right') + 1
  segments[230:] = 0
  segments = np.stack([segments, np.ones(length)]).astype(np.int32)
  return (draw(H), draw(G), draw(G), draw(H)), segments


def by_hand(q, k, v, dy, segments, window):
  """-> y, lse, dq, dk, dv for the loss sum(y dy) + sum(lse), in float64."""
  q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
  k, v = (np.repeat(x, H // G, 2) for x in (k, v))
  at = np.arange(q.shape[1])
  distance = at[:, None] - at[None]
  visible = (distance >= 0) & (distance < window)
  visible = visible[None] & (segments[:, :, None] == segments[:, None])
  score = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(K)
  score = np.where(visible[:, None], score, -np.inf)
  lse = np.log(np.exp(score).sum(-1))
  p = np.exp(score - lse[..., None])
  y = np.einsum('bhts,bshk->bthk', p, v)
  dp = np.einsum('bthk,bshk->bhts', dy, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True) + 1) / np.sqrt(K)
  shared = lambda x: x.reshape(*x.shape[:2], G, H // G, K).sum(3)
  dq = np.einsum('bhts,bshk->bthk', ds, k)
  dk = np.einsum('bhts,bthk->bshk', ds, q)
  dv = np.einsum('bhts,bthk->bshk', p, dy)
  return y, lse.swapaxes(1, 2), dq, shared(dk), shared(dv)


def outcome(arrays, segments, **opts):
  def total(q, k, v, dy, segments):
    y, lse = kernels.attend_lse(q, k, v, segments, max_segments=8, **opts)
    live = (segments > 0)[..., None]
    loss = jnp.sum(y * dy) + jnp.sum(jnp.where(live, lse, 0))
    return loss, (y, lse)

  run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
  (_, out), grads = run(*arrays, segments)
  return *out, *grads


@pytest.mark.slow
@pytest.mark.parametrize(
  'window', [130, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 5, 999))]
)
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_window_hides_the_keys_that_are_too_far(backend, window):
  if backend == 'cudnn':
    arrays, segments = problem(dtype=jnp.bfloat16)
  else:
    arrays, segments = problem()
  arrays = (
    *arrays[:3],
    arrays[3] * (segments > 0)[..., None, None].astype(arrays[3].dtype),
  )
  exact = by_hand(*arrays, segments, window)
  live = segments > 0
  # The gradient of the log-sum-exp counts for live queries only.
  padded = by_hand(*arrays[:3], 0 * arrays[3], np.where(live, -1, segments), window)
  ours = outcome(arrays, segments, backend=backend, window=window)
  tolerance = 0.06 if backend == 'cudnn' else 3e-5
  for name, a, b, c in zip(('y', 'lse', 'dq', 'dk', 'dv'), ours, exact, padded):
    b = b - c * (~live)[..., None, None] if name in ('dq', 'dk') else b
    np.testing.assert_allclose(
      np.asarray(a, np.float64)[live],
      b[live],
      atol=tolerance,
      rtol=tolerance,
      err_msg=name,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  'backend',
  [
    'blockwise',
    *(pytest.param(b, marks=pytest.mark.full) for b in ('splash', 'reference')),
  ],
)
def test_a_window_on_eight_devices_is_the_window_on_one(backend):
  """The rows' tokens are split four ways, and the heads two ways."""
  arrays, segments = problem(1024)
  exact = outcome(arrays, segments, backend='reference', window=200)
  on = small.mesh_of(context=4, tensor=2)
  axes = 'batch', 'tokens', 'heads', None
  put = lambda x: jax.device_put(x, jax.NamedSharding(on, mesh.spec(axes[: x.ndim], on)))
  with jax.set_mesh(on):
    ours = outcome([*map(put, arrays)], put(segments), backend=backend, window=200)
  for a, b in zip(ours, exact):
    np.testing.assert_allclose(a, b, atol=3e-5)


def test_blocks_outside_the_window_are_not_visited():
  """4096 tokens in blocks of 128: each block of queries needs two more blocks of keys."""
  count = 32
  pairs = blockwise.plan(4096, 1, blockwise.Sizes(128, 128, 0.0, 256))
  forward, _, backward = splash.plan(4096, 1, 128, 128, 256)
  needed = count + (count - 1) + (count - 2)
  assert pairs.live_N.sum() == needed
  assert (forward.block_mask > 0).sum() == (backward.block_mask > 0).sum() == needed


@pytest.mark.slow
def test_a_window_in_a_cache_is_the_window_of_whole_rows():
  (q, k, v, _), _ = problem(48)
  whole = kernels.attend(q, k, v, None, backend='reference', max_segments=2, window=7)
  start = jnp.full(2, 40)
  y, _ = kernels.attend_cache(q[:, 40:], k, v, start, window=7)
  np.testing.assert_allclose(y, whole[:, 40:], atol=1e-5)


def bf16(x):
  return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize('kind', kernels.ROUNDINGS)
def test_flash_rounding_and_its_repair_are_the_papers_formulas(kind):
  """One row of scores with two equal maxima, one with a single maximum."""
  score = np.array([[3.0, 1.0, 3.0, -2.0], [-1.0, -1.0, -4.0, -1.5], [2.0, 0.5, 0, 0]])
  v = bf16(np.random.default_rng(0).normal(size=(4, 5)) - 2)
  m = score.max(1)
  if kind == 'repaired':
    m = np.array([rounding.BETA * 3.0, 0.0, 2.0])
  p = bf16(np.exp(score - m[:, None]))
  y = bf16(bf16(p @ v) / np.exp(score - m[:, None]).sum(1, keepdims=True))
  assert (p.max(1) < 1).tolist() == [kind == 'repaired', kind == 'repaired', False]
  like = jnp.asarray(score, jnp.float32)[None, None, None]
  ours, lse = rounding.attend(
    like,
    jnp.asarray(v, jnp.bfloat16)[None, :, None],
    jnp.ones((1, 1, 1, 3, 4), bool),
    kind,
  )
  np.testing.assert_array_equal(np.asarray(ours, np.float32)[0, 0, 0], y)
  np.testing.assert_allclose(
    lse[0, 0, 0], np.log(np.exp(score).sum(1)), rtol=1e-5, atol=1e-5
  )


def test_the_papers_sum_is_rounded_away_from_the_exact_one():
  """Section 3.3: -2.40625 - 0.00087 - 2.296875 becomes -4.71875, not -4.703990..."""
  v = np.array([-2.40625, -0.00087, -2.296875])[:, None]
  score = jnp.asarray([0.0, 0.0, 0.0])[None, None, None, None]
  args = jnp.asarray(v, jnp.bfloat16)[None, :, None], jnp.ones(score.shape, bool)
  y, _ = rounding.attend(score, *args, 'flash')
  assert float(y[0, 0, 0, 0, 0]) == bf16(-4.71875 / 3)


@pytest.mark.parametrize('kind', kernels.ROUNDINGS)
def test_in_float32_rounding_changes_nothing_and_gradients_are_the_softmaxs(kind):
  (q, k, v, dy), segments = problem(24)
  k = k.at[:, 3].set(k[:, 2])  # equal maxima
  segments = np.ones_like(segments)
  exact = by_hand(q, k, v, dy, segments, 24)
  ours = outcome((q, k, v, dy), segments, backend='reference', rounding=kind)
  for a, b in zip(ours, exact):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_huge_repeated_maximum_does_not_underflow():
  score = jnp.asarray([[80.0, 80.0, 0.0]])[None, None, None]
  v = jnp.ones((1, 3, 1, 2), jnp.bfloat16)
  y, lse = rounding.attend(score, v, jnp.ones(score.shape, bool), 'repaired')
  np.testing.assert_allclose(np.asarray(y, np.float32), 1, rtol=0.01)
  np.testing.assert_allclose(lse, 80 + np.log(2), rtol=1e-5)


@pytest.mark.parametrize('backend', ['blockwise', 'splash', 'cudnn'])
@pytest.mark.parametrize(
  'opts', [dict(rounding='repaired'), dict(normalizer='clipped')], ids=str
)
def test_other_backends_say_what_they_lack(backend, opts):
  q = jnp.ones((1, 128, 1, 8))
  said = 'rounding' if 'rounding' in opts else 'clipped attention'
  with pytest.raises(NotImplementedError, match=f'{backend} has no {said}'):
    kernels.attend(q, q, q, None, backend=backend, max_segments=8, **opts)
