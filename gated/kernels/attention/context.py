"""Attention on a mesh, with rows, heads and a row's queries sharded over devices.

Each device gathers the keys and values of its whole rows, in order. Queries are first
rebalanced: under the causal mask, c contiguous shards would give the last device 2 - 1/c
times the mean work. Each shard is split in two. Of these 2c halves, half h needs work in
proportion to 2h + 1, so halves j and 2c-1-j together need the same work for every j.
Device j computes both; arrays outside of the kernel stay contiguous.

The keys are gathered, not passed around a ring. In bfloat16 a layer gathers 4 T G K bytes
per row: 128 MiB for 8 KV heads of 128 at T = 32,768. Only one layer's keys are held at a
time, and as many bytes of gradients. The forward pass takes 2 T^2 H K / c FLOPs on each
device. The transfer takes a share 2 (c-1) (G/H) F / (T W) of their time, with F in FLOP/s
and W in bytes/s. At T = 32,768, G/H = 1/2, F = 230e12 and W = 200e9 (half of a v5p's
peak, one axis of its torus) the share is 4% for c = 2 and 25% for c = 8, and half of that
for the backward pass. A ring could hide most of this time and save the memory, but needs
merges of partial softmaxes and a second rotation for the gradients. It would pay from
about a million tokens (4 GiB a row), or at fewer tokens if c G / H is large.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width  c ways
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated.devices import mesh


def ways() -> int:
  """c, the number of devices that the mesh splits a row's tokens over."""
  current = mesh.current()
  return 1 if current is None else current.shape['context']


def stretch(length: int) -> int:
  """The number of contiguous queries on a device, for a row of `length` tokens.

  Raises NotImplementedError if the row does not split evenly.
  """
  parts = 2 * ways() if ways() > 1 else 1
  if length % parts:
    raise NotImplementedError(
      f'gives each device two of {parts} equal parts of a row, not of {length} tokens'
    )
  return length // parts


def order(length: int, ways: int) -> np.ndarray:
  """The positions of each device's queries: (ways, length / ways)."""
  if ways == 1:
    return np.arange(length, dtype=np.int32)[None]
  half_hT = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
  held = np.empty((ways, 2), int)
  for parity in (0, 1):
    for origin, target in _moves(ways, parity):
      held[target, parity] = 2 * origin + parity
  return half_hT[held].reshape(ways, -1)


def attend(run: Callable, q_BTHK, k_BSGK, v_BSGK, segment_BT, *, split: Any, lse: bool):
  """Calls run(q, k, v, segments of q, of k, split) on each device -> y, or (y, lse).

  On a device, q holds its queries at the positions from `order`, k and v hold the whole
  rows. `split` is a tree of arrays with a leading dim of `ways()`; each device gets its
  own slice, without that dim.
  """
  current = mesh.current()
  if current is None:
    own = jax.tree.map(lambda a: a[0], split)
    return run(q_BTHK, k_BSGK, v_BSGK, segment_BT, segment_BT, own)
  count = ways()

  def local(q, k, v, segment, split):
    own = jax.tree.map(lambda a: a[0], split)
    key_segment = segment
    if count > 1:
      q = _balanced(q, count)
      k, v = _gathered(k), _gathered(v)
      if segment is not None:
        segment, key_segment = _balanced(segment, count), _gathered(segment)
    out = run(q, k, v, segment, key_segment, own)
    return out if count == 1 else jax.tree.map(lambda x: _restored(x, count), out)

  spec = lambda *axes: mesh.spec(axes, current)
  q, k = (spec('batch', 'tokens', h, None) for h in ('heads', 'kv_heads'))
  outs = (q, spec('batch', 'tokens', 'heads')) if lse else q
  ins = q, k, k, spec('batch', 'tokens'), spec('tokens')
  # Kernels' outputs carry no varying-axes types, hence no check_vma.
  sharded = jax.shard_map(
    local, mesh=current, in_specs=ins, out_specs=outs, check_vma=False
  )
  return sharded(q_BTHK, k_BSGK, v_BSGK, segment_BT, split)


def _moves(ways: int, parity: int) -> list[tuple[int, int]]:
  """(source, target) of each shard's first (parity 0) or second half."""
  return [(h // 2, min(h, 2 * ways - 1 - h)) for h in range(parity, 2 * ways, 2)]


def _balanced(x_BT: jax.Array, ways: int) -> jax.Array:
  """A contiguous shard -> this device's halves by `order`."""
  halves = jnp.split(x_BT, 2, axis=1)
  moved = [jax.lax.ppermute(x, 'context', _moves(ways, p)) for p, x in enumerate(halves)]
  return jnp.concatenate(moved, 1)


def _restored(x_BT: jax.Array, ways: int) -> jax.Array:
  halves = jnp.split(x_BT, 2, axis=1)
  back = lambda parity: [(b, a) for a, b in _moves(ways, parity)]
  moved = [jax.lax.ppermute(x, 'context', back(p)) for p, x in enumerate(halves)]
  return jnp.concatenate(moved, 1)


def _gathered(x_BS: jax.Array) -> jax.Array:
  return jax.lax.all_gather(x_BS, 'context', axis=1, tiled=True)
