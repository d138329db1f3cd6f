"""Sinks that share the softmax's denominator with the keys.

B batch  T tokens  H heads  G KV heads  K head width  N sink tokens
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gated import kernels
from gated.model.layers import VECTORS, Numerics, child_key, normal_param


class Sinks(nnx.Module):
  """Extra terms in the softmax's denominator, added after the attention kernel.

  Logits e_n with values u_n join the softmax over the keys: e = 0 for off-by-one, e = s_h
  for a learned sink logit, both with u = 0, and e_n = q k_n / sqrt(K) for a sink token.

    y' = y * p + u * (1 - p),    p = exp(lse) / (exp(lse) + sum(exp(e)))
    u  = sum_n softmax(e)_n u_n

  The kernel only needs to return its log-sum-exp. q is the query before RoPE, so that a
  sink token has no position.
  """

  def __init__(
    self,
    key: jax.Array,
    *,
    tokens: int,
    values: str,
    normalizer: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cap: float,
    scale: float,
    numerics: Numerics,
  ):
    self.heads, self.normalizer, self.cap, self.scale = heads, normalizer, cap, scale
    shape, axes = (tokens, kv_heads, head_dim), (None, 'kv_heads', None)
    draw = lambda name: normal_param(
      child_key(key, name), shape, axes, std=numerics.init_std, dtype=numerics.weights
    )
    self.key = draw('key') if tokens else None
    with_values = tokens and values == 'learned'
    self.value = draw('value') if with_values else None
    zeros = jnp.zeros(heads, VECTORS)
    learned = normalizer == 'sink_logit'
    self.logit = nnx.Param(zeros, axes=('heads',)) if learned else None

  def __call__(self, y_BTHK, lse_BTH, q_BTHK) -> tuple[jax.Array, jax.Array]:
    """-> (y'_BTHK, ln(sum(exp(e))) as (B, T, H))."""
    logit_BTHN = jnp.concatenate([*self._tokens(q_BTHK), *self._constants(q_BTHK)], -1)
    extra_BTH = jax.nn.logsumexp(logit_BTHN, -1)
    u_BTHK = None
    if self.value is not None:
      v_NHK = self._by_head(self.value)
      share_BTHN = jnp.exp(logit_BTHN - extra_BTH[..., None])[..., : len(v_NHK)]
      u_BTHK = jnp.einsum('bthn,nhk->bthk', share_BTHN, v_NHK)
    return _merged(y_BTHK, lse_BTH, extra_BTH, u_BTHK), extra_BTH

  def _by_head(self, parameter) -> jax.Array:
    """(N, G, K) -> (N, H, K), in float32."""
    value = parameter[...].astype(jnp.float32)
    return jnp.repeat(value, self.heads // value.shape[1], 1)

  def _tokens(self, q_BTHK) -> list[jax.Array]:
    if self.key is None:
      return []
    q, k_NHK = q_BTHK.astype(jnp.float32), self._by_head(self.key)
    # YaRN scales the queries and keys of all other scores; q and k_n here are unscaled.
    scale = q.shape[-1] ** -0.5 * self.scale**2
    score_BTHN = scale * jnp.einsum('bthk,nhk->bthn', q, k_NHK)
    return [kernels.soft_cap(score_BTHN, self.cap)]

  def _constants(self, q_BTHK) -> list[jax.Array]:
    if self.normalizer == 'softmax':
      return []
    H, zero = self.heads, jnp.float32(0)
    s_H = jnp.full(H, zero) if self.logit is None else self.logit[...]
    s_BTH1 = s_H.astype(jnp.float32)[None, None, :, None]
    return [jnp.broadcast_to(s_BTH1, (*q_BTHK.shape[:-1], 1))]


@jax.checkpoint
def _merged(y_BTHK, lse_BTH, extra_BTH, u_BTHK) -> jax.Array:
  p_BTH1 = jax.nn.sigmoid(lse_BTH - extra_BTH)[..., None]
  merged = y_BTHK.astype(jnp.float32) * p_BTH1
  if u_BTHK is not None:
    merged = merged + u_BTHK * (1 - p_BTH1)
  return merged.astype(y_BTHK.dtype)
