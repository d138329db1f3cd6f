"""How large activations grow: the residual stream and what each branch adds to it.

B batch  T tokens  D width
"""

from typing import Any

import jax
import jax.numpy as jnp

# Where a layer is measured: fields of model.BlockTrace.
POINTS = ('attn_branch', 'middle', 'ffn_branch', 'output')
TOP = 3


def measure(trace: Any, live_BT: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """One layer's trace -> {point: numbers of each row}; padding does not count.

  top       (B, 3): the three largest |h| over tokens and channels, largest first
  token, channel   (B,): where the largest is
  median    (B,): of |h| over tokens and channels
  kurtosis  (B,): summed over tokens: mean(h^4) / mean(h^2)^2 over channels
  """
  return {point: _row(getattr(trace, point), live_BT) for point in POINTS}


def _row(h_BTD: jax.Array, live_BT: jax.Array) -> dict[str, jax.Array]:
  size_BTD = jnp.abs(h_BTD.astype(jnp.float32))
  B, _, D = size_BTD.shape
  shown = jnp.where(live_BT[..., None], size_BTD, -1)
  top_BTk, channel_BTk = jax.lax.top_k(shown, min(TOP, D))
  top_Bk, place_Bk = jax.lax.top_k(top_BTk.reshape(B, -1), TOP)
  token_B, rank_B = jnp.divmod(place_Bk[:, 0], top_BTk.shape[-1])
  channel_B = channel_BTk[jnp.arange(B), token_B, rank_B]
  square = jnp.square(size_BTD)
  kurtosis_BT = jnp.square(square).mean(-1) / jnp.square(square.mean(-1))
  return {
    'top': top_Bk,
    'token': token_B,
    'channel': channel_B,
    'median': _median(size_BTD, live_BT),
    'kurtosis': jnp.where(live_BT, kurtosis_BT, 0).sum(1),
  }


def _median(size_BTD: jax.Array, live_BT: jax.Array) -> jax.Array:
  """The exact median of non-negative numbers, without a sort: (B,), 0 without tokens.

  The bits of non-negative floats are ordered like the floats. From the highest bit on, a
  bit of the k-th smallest number is set if at most k numbers are smaller than with it.
  """
  bits_BTD = jax.lax.bitcast_convert_type(size_BTD, jnp.int32)
  count_B = live_BT.sum(1) * size_BTD.shape[-1]
  middle_B2 = jnp.stack([jnp.maximum(count_B - 1, 0) // 2, count_B // 2], -1)

  def step(i, value_B2):
    candidate_B2 = value_B2 | (1 << (30 - i))
    below = bits_BTD[..., None] < candidate_B2[:, None, None]
    below_B2 = jnp.sum(below & live_BT[..., None, None], (1, 2))
    return jnp.where(below_B2 <= middle_B2, candidate_B2, value_B2)

  value_B2 = jax.lax.fori_loop(0, 31, step, jnp.zeros_like(middle_B2, jnp.int32))
  median_B2 = jax.lax.bitcast_convert_type(value_B2, jnp.float32)
  return jnp.where(count_B > 0, median_B2.mean(-1), 0)
