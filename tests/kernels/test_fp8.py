"""Products in FP8 are those of the rounded operands, forward and backward."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import small
from flax import nnx

from gated import model
from gated.devices import mesh, trees
from gated.kernels import fp8
from gated.model import layers

# Dims of x and w, and how many are summed: as in query, output projection and FFN.
SHAPES = {
  'query': ((2, 8, 32), (32, 4, 16), 1),
  'out': ((2, 8, 4, 16), (4, 16, 32), 2),
  'ffn': ((2, 8, 32), (32, 48), 1),
}
DTYPES = {'float32': 2e-6, 'bfloat16': 1e-2}


def as_rounded(x, dtype):
  """x -> the nearest values of the format, by NumPy; the scale is a power of two."""
  x = np.asarray(x, np.float32)
  room = np.floor(np.log2(float(ml_dtypes.finfo(dtype).max)))
  scale = 2.0 ** (np.floor(np.log2(np.abs(x).max())) + 1 - room)
  return (x / scale).astype(dtype).astype(np.float64) * scale


def operands(shapes, dtype):
  rng = np.random.default_rng(0)
  x, w, _ = shapes
  y = (*x[: len(x) - shapes[2]], *w[shapes[2] :])
  # Scales far from one, and far from each other.
  draw = lambda shape, std: jnp.asarray(std * rng.standard_normal(shape), dtype)
  return draw(x, 30.0), draw(w, 0.02), draw(y, 1e-6)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', SHAPES)
def test_a_product_and_its_gradients_are_those_of_the_rounded_operands(name, dtype):
  x, w, dy = operands(SHAPES[name], dtype)
  count = SHAPES[name][2]
  y, vjp = jax.vjp(jax.jit(lambda x, w: fp8.tensordot(x, w, count)), x, w)
  dx, dw = vjp(dy)
  e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
  xr, wr, dyr = as_rounded(x, e4m3), as_rounded(w, e4m3), as_rounded(dy, e5m2)
  outs, rows = w.ndim - count, x.ndim - count
  last = lambda a, n: list(range(a.ndim - n, a.ndim))
  expected = (
    np.tensordot(xr, wr, count),
    np.tensordot(dyr, wr, (last(dyr, outs), last(wr, outs))),
    np.tensordot(xr, dyr, (list(range(rows)), list(range(rows)))),
  )
  for got, want in zip((y, dx, dw), expected, strict=True):
    assert got.dtype == x.dtype and got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error < DTYPES[dtype]


def test_rounding_costs_as_much_as_three_bits_of_a_mantissa_would():
  x, w, _ = operands(SHAPES['ffn'], 'float32')
  y = np.tensordot(np.asarray(x), np.asarray(w), 1)
  error = np.linalg.norm(fp8.tensordot(x, w, 1) - y) / np.linalg.norm(y)
  assert 0.02 < error < 0.05  # Two operands, each with about 2**-4 / sqrt(3).


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_the_product(bad):
  x, w, dy = operands(SHAPES['ffn'], 'float32')
  y = fp8.tensordot(x.at[0, 0, 0].set(bad), w, 1)
  assert not jnp.isfinite(y[0, 0]).any() and jnp.isfinite(y[1]).all()
  _, vjp = jax.vjp(lambda x: fp8.tensordot(x, w, 1), x)
  (dx,) = vjp(dy.at[0, 0, 0].set(bad))
  assert not jnp.isfinite(dx[0, 0]).any()


@pytest.mark.parametrize('dtype', [fp8.VALUES, fp8.GRADIENTS])
def test_zeros_and_extreme_values_keep_a_scale(dtype):
  for value in (0.0, 1e-25, 1e30, float(jnp.finfo(dtype).max)):
    q, scale = fp8.rounded(jnp.asarray([value, -value / 3]), dtype)
    assert np.isfinite(scale) and scale > 0
    assert abs(float(q[0]) * float(scale) - value) <= 2**-3 * value


def test_a_product_of_sharded_operands_has_the_scale_of_the_whole():
  x, w, _ = operands(((8, 8, 32), (32, 4, 16), 1), 'float32')
  # The largest value is in one shard only.
  x = x.at[7, 7, 7].set(500.0)
  on = small.mesh_of(data=4, tensor=2)
  axes = jax.sharding.PartitionSpec
  place = lambda value, *names: jax.device_put(
    value, jax.sharding.NamedSharding(on, axes(*names))
  )
  product = jax.jit(fp8.tensordot, static_argnums=2)
  sharded = product(place(x, 'data'), place(w, None, 'tensor'), 1)
  np.testing.assert_allclose(sharded, product(x, w, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('platform', 'here', 'capability', 'allowed'),
  [
    ('tpu', 'tpu', '', False),
    ('gpu', 'gpu', '8.0', False),
    ('gpu', 'gpu', '9.0', True),
    ('gpu', 'gpu', 'gfx942', False),
    ('gpu', 'cpu', '', True),  # compiled for another machine
    ('tpu', 'cpu', '', False),
  ],
)
def test_known_devices_without_such_products_are_refused(
  platform, here, capability, allowed, monkeypatch
):
  monkeypatch.setattr(mesh, 'platform', lambda: platform)
  monkeypatch.setattr(jax, 'default_backend', lambda: here)
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  if allowed:
    return fp8.check()
  with pytest.raises(NotImplementedError, match=r"matmul='fp8' needs .*'compute'"):
    fp8.check()


def test_dense_products_are_rounded_and_routers_are_not():
  sparse = dict(moe__experts=4, moe__top_k=2, moe__shared=1, norm='gated')
  net = model.abstract(small.model_config(numerics__matmul='fp8', **sparse))
  kinds = {
    '.'.join(map(str, path)): node.matmul
    for path, node in nnx.iter_modules(net)
    if isinstance(node, layers.Dense)
  }
  plain = {name for name, kind in kinds.items() if kind == 'compute'}
  assert plain and all('router' in name or 'norm' in name for name in plain)
  rounded = ' '.join(kinds.keys() - plain)
  assert all(name in rounded for name in ('query', 'key', 'value', 'out', 'shared.down'))


@functools.cache
def gradient(**knobs):
  """-> loss and gradients of a small model with a gate."""
  net, batch = small.model_of(attn__gate__position='sdpa', **knobs), small.batch(8, 16)

  def loss(net):
    logits = net(batch.tokens, batch.segments, batch.positions)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return (nats * batch.weights).sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(net)
  return float(value), {k: np.asarray(v) for k, v in trees.flatten(grads).items()}


@pytest.mark.parametrize('knobs', [{}, dict(layers='unroll', remat='full')], ids=str)
def test_the_gradients_of_a_model_in_fp8_point_where_others_do(knobs):
  plain_loss, plain = gradient()
  loss, grads = gradient(numerics__matmul='fp8', **knobs)
  assert 0 < abs(loss / plain_loss - 1) < 0.02
  for name, leaf in grads.items():
    cosine = (
      (leaf * plain[name]).sum() / np.linalg.norm(leaf) / np.linalg.norm(plain[name])
    )
    assert 0.9 < cosine < 0.9999, name
