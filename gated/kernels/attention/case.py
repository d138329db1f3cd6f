"""Shared parts of the attention backends: the case, scores, soft cap, log-sum-exp.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Case(NamedTuple):
  """The options of a call, besides q, k, v and the segments."""

  max_segments: int  # per row
  lse: bool  # also return the log of the softmax's denominator
  normalizer: str = 'softmax'
  cap: float = 0.0  # c tanh(score / c); 0 for none
  mean_segments: float = 0  # of a row on average, if known; for the size of fused kernels
  gradient: bool = True  # of the lse; costs fused kernels a second call
  window: int = 0  # a query sees this many tokens, its own included; 0 for all
  rounding: str = 'backend'  # or a key of rounding.ROUNDINGS
  clip: tuple[float, float] = (0.0, 1.0)  # gamma and zeta of the clipped softmax
  offset_H: Any = None  # tau of the elastic softmax

  def require_softmax(self) -> None:
    """Raises NotImplementedError; for backends that support only the plain softmax."""
    if self.normalizer != 'softmax':
      raise NotImplementedError(f'has no {self.normalizer} attention')
    if self.rounding != 'backend':
      raise NotImplementedError(f'has no rounding={self.rounding!r}')


def scores(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  """q k / sqrt(K) in float32, (B, G, H/G, T, S): without cap and mask."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  score = jnp.einsum('btghk,bsgk->bghts', q, k_BSGK, preferred_element_type=jnp.float32)
  return score * K**-0.5


def sees(query: Any, key: Any, window: int) -> Any:
  """Positions of queries and keys -> whether a query sees a key, by position alone."""
  causal = query >= key
  return causal & (query - key < window) if window else causal


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap): close to x if x is small, always within cap; 0 for no cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def with_lse_gradient(run: Callable, q_BTHK, k_BSGK, lse_BTH) -> jax.Array:
  """A kernel `run(q, k, v) -> y` and its log-sum-exp -> lse_BTH with its gradient.

  Kernels themselves drop this gradient.

  With p the weights, d lse_i = scale * sum_j p_ij d(q_i k_j). Attention whose values are
  the keys gives m_i = sum_j p_ij k_j, and t_i = scale * q_i m_i has the same gradient
  for fixed p: dt/dq_i = scale * m_i, dt/dk_j = scale * sum_i p_ij q_i.
  """
  stop = jax.lax.stop_gradient
  m_BTHK = run(stop(q_BTHK), stop(k_BSGK), k_BSGK).astype(jnp.float32)
  t_BTH = q_BTHK.shape[-1] ** -0.5 * (q_BTHK.astype(jnp.float32) * m_BTHK).sum(-1)
  return stop(lse_BTH) + t_BTH - stop(t_BTH)
