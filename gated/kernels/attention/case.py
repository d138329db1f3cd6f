"""Shared parts of the attention backends: the case, scores, soft cap, log-sum-exp.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Case(NamedTuple):
  """The options of a call, besides q, k, v and the segments."""

  max_segments: int
  normalizer: str
  cap: float  # on scores, 0 for none
  lse: bool  # also return the log of the softmax's denominator
  gradient: bool = True  # of that log; costs fused kernels a second attention


def scores(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  """q k / sqrt(K) in float32, (B, G, H/G, T, S): without cap and mask."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  score = jnp.einsum('btghk,bsgk->bghts', q, k_BSGK, preferred_element_type=jnp.float32)
  return score * K**-0.5


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap): close to x if x is small, always within cap; 0 for no cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def with_lse_gradient(run: Callable, q_BTHK, k_BSGK, lse_BTH) -> jax.Array:
  """Restores the gradient of a kernel's log-sum-exp, which kernels drop.

  With p the weights, d lse_i = scale * sum_j p_ij d(q_i k_j). Attention whose values are
  the keys gives m_i = sum_j p_ij k_j, and t_i = scale * q_i m_i has the same gradient
  for fixed p: dt/dq_i = scale * m_i, dt/dk_j = scale * sum_i p_ij q_i.
  """
  stop = jax.lax.stop_gradient
  m_BTHK = run(stop(q_BTHK), stop(k_BSGK), k_BSGK).astype(jnp.float32)
  t_BTH = q_BTHK.shape[-1] ** -0.5 * (q_BTHK.astype(jnp.float32) * m_BTHK).sum(-1)
  return stop(lse_BTH) + t_BTH - stop(t_BTH)
