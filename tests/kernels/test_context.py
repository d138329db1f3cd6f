"""Attention whose rows are split over devices, and attention that is linear in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import kernels, model
from gated.devices import mesh
from gated.kernels.attention import blockwise, context, splash

H, G, K = 4, 2, 8
BACKENDS = ['reference', 'blockwise', 'splash']
ALONE = dict(data=1, fsdp=1, expert=1, tensor=1, context=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  small.blocks(monkeypatch, 16)


def on(**sizes):
  sizes = ALONE | sizes
  return mesh.make(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])


def problem(length, rows=1):
  """q, k, v, segments, and how much each log-sum-exp weighs."""
  rng = np.random.default_rng(0)
  draw = lambda *dims: rng.normal(size=(rows, length, *dims)).astype(np.float32)
  segments = np.cumsum(rng.random((rows, length)) < 4 / length, 1).astype(np.int32)
  segments[0, -length // 9 :] = 0  # padding
  return draw(H, K), draw(G, K), draw(G, K), segments, draw(H)


def outcome(arrays, backend):
  """y, lse and the gradients of something that depends on both."""

  def total(q, k, v, segments, weight):
    opts = dict(backend=backend, max_segments=32)
    y, lse = kernels.attend_lse(q, k, v, segments, **opts)
    return jnp.sum(jnp.sin(y)) + jnp.sum(weight * lse), (y, lse)

  run = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  return jax.tree.leaves(jax.jit(run)(*arrays))


def placed(arrays, where):
  axes = ('batch', 'tokens', 'heads', None)
  put = lambda x: jax.device_put(
    x, jax.NamedSharding(where, mesh.spec(axes[: x.ndim], where))
  )
  return [put(x) for x in arrays]


# One device is in tests/kernels/test_attention_kernels.py.
MESHES = [
  dict(context=4),
  *(
    pytest.param(sizes, marks=pytest.mark.full)
    for sizes in [
      dict(context=8),
      dict(data=2, tensor=2, context=2),
      dict(fsdp=2, tensor=2),
    ]
  ),
]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_attention_on_a_mesh_is_attention_on_one_device(backend, sizes):
  ways = sizes.get('context', 1)
  length = (256 if backend == 'splash' else 48) * ways
  arrays = problem(length, rows=sizes.get('data', 1) * sizes.get('fsdp', 1))
  exact = outcome(arrays, 'reference')
  where = on(**sizes)
  with jax.set_mesh(where):
    ours = outcome(placed(arrays, where), backend)
  for a, b in zip(ours, exact):
    assert np.abs(b).max() > 1e-2
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.full
@pytest.mark.parametrize('backend', ['blockwise', 'splash'])
def test_rows_without_segments_are_split_too(backend):
  *qkv, _, weight = problem(512)
  where = on(context=2)
  exact = outcome((*qkv, None, weight), 'reference')
  with jax.set_mesh(where):
    q, k, v, w = placed((*qkv, weight), where)
    ours = outcome((q, k, v, None, w), backend)
  for a, b in zip(ours, exact):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_tokens_that_do_not_make_whole_halves_of_shards_are_refused():
  q, message = jnp.ones((1, 12, 2, 8)), r'8 equal parts of a row.*12 tokens'
  where = on(context=4)
  with jax.set_mesh(where), pytest.raises(NotImplementedError, match=message):
    kernels.attend(q, q, q, None, backend='blockwise', max_segments=8)


@pytest.mark.parametrize('ways', [2, 3, 4, 8])
def test_every_query_is_answered_once_and_all_devices_see_as_many_keys(ways):
  order = context.order(48 * ways, ways)
  assert sorted(order.ravel()) == list(range(48 * ways))
  assert len(set((order + 1).sum(1))) == 1


@pytest.mark.parametrize('ways', [1, 2, 4, 8])
def test_all_devices_have_as_many_blocks_and_none_above_the_diagonal(ways):
  length, block = 4096, 128
  count = length // block
  pairs = blockwise.plan(length, ways, blockwise.Sizes(block, block, 0.0))
  forward, _, backward = splash.plan(length, ways, block, block)
  for blocks in (
    pairs.live_N.sum(1),
    (forward.block_mask > 0).sum((1, 2, 3)),
    (backward.block_mask > 0).sum((1, 2, 3)),
  ):
    assert blocks.tolist() == [count * (count + 1) // 2 // ways] * ways


def test_blocks_that_do_not_fit_the_shards_are_even_within_one():
  for length in (96, 240, 1008):
    pairs = blockwise.plan(length, 2, blockwise.Sizes(10, 16, 0.0))
    live = pairs.live_N.sum(1)
    assert live.max() == pairs.live_N.shape[1]
    assert np.ptp(live) <= 1, (length, live)


def most_elements(run, *args):
  """Of all arrays in the compiled program of a function, those of the largest."""
  text = jax.jit(run).lower(*args).compile().as_text()
  shapes = re.findall(r'\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]', text)
  return max(np.prod([int(n) for n in shape.split(',')]) for shape in shapes)


@pytest.mark.full
@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
@pytest.mark.parametrize('ways', [1, 2])
def test_blockwise_attention_never_holds_all_scores(monkeypatch, ways, remat):
  monkeypatch.setattr(blockwise, 'MOST', 128)
  T = 1024
  q, k = (jax.ShapeDtypeStruct((1, T, h, K), jnp.float32) for h in (2, 1))
  segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def gradients(q, k, v, segments, backend):
    opts = dict(backend=backend, max_segments=8)
    attend = lambda *qkv: kernels.attend(*qkv, segments, **opts)
    if remat != 'none':
      attend = jax.checkpoint(attend, policy=model.REMAT[remat])
    return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), argnums=(0, 1, 2))(q, k, v)

  largest = lambda name: most_elements(
    functools.partial(gradients, backend=name), q, k, k, segments
  )
  with jax.set_mesh(on(context=ways)):
    assert largest('reference') >= T * T / ways
    assert largest('blockwise') < T * T / 8
