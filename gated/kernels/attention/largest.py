"""The largest score of each head, over the pairs of a query and a key that it sees.

B batch  T tokens  H heads  G KV heads  K head width  q queries of a block  N blocks
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gated.devices import mesh
from gated.kernels.attention.case import scores, sees

# Pairs of a query and a key, per row and head, whose scores a device holds at a time:
# 2 MiB.
PAIRS = 1 << 19


def largest_scores(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  segment_BT: jax.Array | None,
  live_BT: jax.Array,
  *,
  window: int = 0,
  size: Callable[[jax.Array], jax.Array] = lambda score: score,
) -> jax.Array:
  """The largest size(q k / sqrt(K)) of each head (H,), without the queries of padding.

  It is NaN if any of these scores is: a sum finds the NaN, because a maximum may ignore
  it, on one device or between devices.
  """
  length = q_BTHK.shape[1]
  count = _blocks(length, mesh.ways('tokens'))
  k_BTGK = mesh.constrain(k_BTGK, 'batch', None, 'kv_heads', None)
  seen_BT = segment_BT
  if segment_BT is not None:
    seen_BT = mesh.constrain(segment_BT, 'batch', None)
  key_T = jnp.arange(length)

  def cut(x_BT):
    # Block i has queries i, i + count, ...: equally many of each device.
    x = x_BT.reshape(len(x_BT), -1, count, *x_BT.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  def largest(block):
    q_BqHK, position_q, segment_Bq, live_Bq = block
    mask = sees(position_q[:, None], key_T[None], window)[None] & live_Bq[:, :, None]
    if seen_BT is not None:
      mask = mask & (segment_Bq[:, :, None] == seen_BT[:, None])
    score, mask = size(scores(q_BqHK, k_BTGK)), mask[:, None, None]
    # Both are (G, H/G).
    return (
      jnp.where(mask, score, -jnp.inf).max((0, 3, 4)),
      jnp.where(mask, score, 0).sum((0, 3, 4)),
    )

  positions = cut(key_T[None])[:, 0]
  of_q = segment_BT if segment_BT is None else cut(segment_BT)
  blocks = cut(q_BTHK), positions, of_q, cut(live_BT)
  largest_NGR, sum_NGR = jax.lax.map(largest, blocks)
  bad = jnp.isnan(sum_NGR.sum(0))
  return jnp.where(bad, jnp.nan, largest_NGR.max(0)).reshape(-1)


def _blocks(length: int, ways: int) -> int:
  """The number of blocks of each device's queries: the fewest whose scores fit."""
  own = length // ways
  fits = (n for n in range(1, own) if own % n == 0 and own // n * length <= PAIRS)
  return next(fits, own)
