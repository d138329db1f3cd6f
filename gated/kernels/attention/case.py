"""What attention backends share: the case asked of them, scores, the cap, a log-sum-exp.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Case(NamedTuple):
  """What is asked of a backend beside q, k, v and the segments."""

  max_segments: int
  normalizer: str
  cap: float  # on scores, 0 for none
  lse: bool  # the log of the softmax's denominator is wanted too


def scores(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  """q k / sqrt(K) in float32, (B, G, H/G, T, S): before a cap, and with no mask."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  score = jnp.einsum('btghk,bsgk->bghts', q, k_BSGK, preferred_element_type=jnp.float32)
  return score * K**-0.5


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap): x where it is small, never beyond cap; 0 caps nothing."""
  return cap * jnp.tanh(x / cap) if cap else x


def with_lse_gradient(run: Callable, q_BTHK, k_BSGK, lse_BTH) -> jax.Array:
  """A kernel's log-sum-exp, whose gradient kernels drop -> the same with its gradient.

  With p the weights, d lse_i = scale * sum_j p_ij d(q_i k_j). Attention whose values are
  the keys gives m_i = sum_j p_ij k_j, and t_i = scale * q_i m_i has that very gradient
  when p is held fixed: dt/dq_i = scale * m_i, dt/dk_j = scale * sum_i p_ij q_i.
  """
  stop = jax.lax.stop_gradient
  m_BTHK = run(stop(q_BTHK), stop(k_BSGK), k_BSGK).astype(jnp.float32)
  t_BTH = q_BTHK.shape[-1] ** -0.5 * (q_BTHK.astype(jnp.float32) * m_BTHK).sum(-1)
  return stop(lse_BTH) + t_BTH - stop(t_BTH)
