"""StreamingLLM: a window and the first tokens, at inference (arXiv 2309.17453).

A query sees the last `window` tokens, its own included, and the first `kept` tokens of
its row, which is one document. Positions are those in the cache of these tokens. In a
full cache a query is at kept + window - 1 and the kept tokens are at 0 to kept - 1, so
that their distance stops growing; distances within the window do not change. With
kept = 0 this is attention with a window.

B batch  T tokens  S kept tokens  H heads  G KV heads  K head width
"""

from typing import Any

import jax
import jax.numpy as jnp

from gated import kernels


def keep(net: Any, kept: int) -> Any:
  """A model with a window in all layers -> a copy that also sees the first tokens."""
  net = jax.tree.map(lambda leaf: leaf, net)  # New modules, the same weights.
  net.blocks.attn.kept = kept
  return net


def capped(angle_BTk: jax.Array, *, window: int, kept: int) -> jax.Array:
  """RoPE angles of a row's queries -> those of their positions in the cache."""
  place_T = jnp.minimum(jnp.arange(angle_BTk.shape[1]), window + kept - 1)
  return angle_BTk[:, place_T]


def joined(
  windowed: tuple[jax.Array, jax.Array],
  capped_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  *,
  window: int,
  kept: int,
  cap: float,
) -> tuple[jax.Array, jax.Array]:
  """Adds the kept keys that have left the window to attention -> (y_BTHK, lse_BTH).

  `windowed` is that pair for the window alone; `capped_BTHK` are the queries at their
  positions in the cache, `cap` is the soft cap of scores, 0 for none.
  """
  y_BTHK, lse_BTH = windowed
  B, T, H, _ = y_BTHK.shape
  k_BSGK, v_BSGK = k_BTGK[:, :kept], v_BTGK[:, :kept]
  score_BGhTS = kernels.soft_cap(kernels.scores(capped_BTHK, k_BSGK), cap)
  left_TS = jnp.arange(T)[:, None] - jnp.arange(k_BSGK.shape[1])[None] >= window
  score_BGhTS = jnp.where(left_TS[None, None, None], score_BGhTS, -jnp.inf)
  score_BTHS = score_BGhTS.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
  total_BTH = jnp.logaddexp(lse_BTH, jax.nn.logsumexp(score_BTHS, -1))
  weight_BTHS = jnp.exp(score_BTHS - total_BTH[..., None])
  value_BSHK = jnp.repeat(v_BSGK, H // v_BSGK.shape[2], 2).astype(jnp.float32)
  extra_BTHK = jnp.einsum('bths,bshk->bthk', weight_BTHS, value_BSHK)
  y = jnp.exp(lse_BTH - total_BTH)[..., None] * y_BTHK.astype(jnp.float32) + extra_BTHK
  return y.astype(y_BTHK.dtype), total_BTH
