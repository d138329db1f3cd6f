"""The size of activations: the residual stream and the output of each branch.

B batch  T tokens  D width
"""

from typing import Any

import jax
import jax.numpy as jnp

# The measured points of a layer: fields of model.BlockTrace.
POINTS = ('attn_branch', 'middle', 'ffn_branch', 'output')
TOP = 3


def measure(trace: Any, live_BT: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """One layer's trace -> {point: numbers of each row}; padding does not count.

  top       (B, 3): the three largest |h| over tokens and channels, largest first
  token, channel   (B,): the position of the largest |h|
  median    (B,): of |h| over tokens and channels
  kurtosis  (B,): summed over tokens: mean(h^4) / mean(h^2)^2 over channels
  """
  return {point: _row(getattr(trace, point), live_BT) for point in POINTS}


def _row(h_BTD: jax.Array, live_BT: jax.Array) -> dict[str, jax.Array]:
  size_BTD = jnp.abs(h_BTD)
  B, _, D = size_BTD.shape
  # The largest three lie in the three tokens with the largest maxima.
  largest_BT = jnp.where(live_BT, size_BTD.max(-1), -1)
  _, token_Bk = jax.lax.top_k(largest_BT, TOP)
  few_BkD = jnp.take_along_axis(size_BTD, token_Bk[..., None], 1)
  few_BkD = jnp.where(jnp.take_along_axis(live_BT, token_Bk, 1)[..., None], few_BkD, -1)
  top_Bk, place_Bk = jax.lax.top_k(few_BkD.reshape(B, -1), TOP)
  rank_B, channel_B = jnp.divmod(place_Bk[:, 0], D)
  token_B = jnp.take_along_axis(token_Bk, rank_B[:, None], 1)[:, 0]
  square = jnp.square(size_BTD.astype(jnp.float32))
  kurtosis_BT = jnp.square(square).mean(-1) / jnp.square(square.mean(-1))
  return {
    'top': top_Bk.astype(jnp.float32),
    'token': token_B,
    'channel': channel_B,
    'median': _median(size_BTD, live_BT),
    'kurtosis': jnp.where(live_BT, kurtosis_BT, 0).sum(1),
  }


def _median(size_BTD: jax.Array, live_BT: jax.Array) -> jax.Array:
  """The exact median of non-negative numbers, without a sort: (B,), 0 without tokens.

  The bits of non-negative floats are ordered like the floats. The result is built from
  its highest bit on: a bit is set if at most (count - 1) // 2 numbers are smaller than
  the result with this bit.
  """
  width = 8 * size_BTD.dtype.itemsize
  integer = jnp.dtype(f'int{width}')
  bits_BTD = jax.lax.bitcast_convert_type(size_BTD, integer)
  # Padding is never counted as smaller: it is set above any number.
  bits_BTD = jnp.where(live_BT[..., None], bits_BTD, jnp.iinfo(integer).max)
  count_B = live_BT.sum(1) * size_BTD.shape[-1]
  lower_B = jnp.maximum(count_B - 1, 0) // 2

  def step(i, value_B):
    candidate_B = value_B | (jnp.ones((), integer) << (width - 2 - i).astype(integer))
    smaller = bits_BTD < candidate_B[:, None, None]
    return jnp.where(jnp.sum(smaller, (1, 2)) <= lower_B, candidate_B, value_B)

  value_B = jnp.zeros(lower_B.shape, integer)
  value_B = jax.lax.fori_loop(0, width - 1, step, value_B)
  # For an even count the median is the mean of this number and the next larger one.
  larger = bits_BTD > value_B[:, None, None]
  next_B = jnp.where(larger, bits_BTD, jnp.iinfo(integer).max).min((1, 2))
  up_to_B = count_B - jnp.sum(larger & live_BT[..., None], (1, 2))
  upper_B = jnp.where(up_to_B > count_B // 2, value_B, next_B)
  to_float = lambda bits: jax.lax.bitcast_convert_type(bits, size_BTD.dtype)
  lower, upper = to_float(value_B), to_float(upper_B)
  middle_B = (lower.astype(jnp.float32) + upper.astype(jnp.float32)) / 2
  return jnp.where(count_B > 0, middle_B, 0)
