"""Flash attention's rounding in low precision, and a repair of its bias (2510.04212).

    P = exp(S - m),    O = P V / rowsum(P)

A fused kernel rounds P and the sums P V to the compute dtype before the division. A row
of scores with several equal maxima has several P of exactly 1. Their products are values
of V, with few bits, whose sums round with a bias if the values have the same sign. The
repair shifts m in such rows, so that all P are below 1. Softmax does not depend on m.

The gradient is that of a fused kernel: it computes P again in float32 from the
log-sum-exp, and dS = P (dP - sum(O dO)) reads the rounded O, which has the bias.

B batch  T queries  S keys  G KV heads  R query heads of a KV head  K head width
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

BETA = 7.0  # The paper's value, in [2, 8].
# Largest shift of m. From about 87 on, all P of a row would underflow and sum to 0. The
# paper sets no limit; scores above 10 reach it.
LARGEST_SHIFT = 60.0


def _repaired(top, count):
  """The paper's m for rows with several equal maxima r: beta r if r > 0, 0 if r < 0."""
  shift = jnp.where(top > 0, jnp.minimum((BETA - 1) * top, LARGEST_SHIFT), -top)
  return top + jnp.where(count > 1, jnp.minimum(shift, LARGEST_SHIFT), 0)


# (the largest score of each row, the number of its equals) -> m.
ROUNDINGS = {'flash': lambda top, count: top, 'repaired': _repaired}

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(score, v_BSGK, mask, rounding: str) -> tuple[jax.Array, jax.Array]:
  """Scores (B, G, R, T, S), values, their mask -> (y (B, G, R, T, K), lse (B, G, R, T)).

  `rounding` is a key of ROUNDINGS.
  """
  return _forward(score, v_BSGK, mask, rounding)[0]


def _forward(score, v_BSGK, mask, rounding: str):
  seen = jnp.where(mask, score, -jnp.inf)
  top = seen.max(-1, keepdims=True)
  m = ROUNDINGS[rounding](top, (seen == top).sum(-1, keepdims=True))
  p = jnp.exp(seen - m)
  total = p.sum(-1)
  sums = _product('bgrts,bsgk->bgrtk', p.astype(v_BSGK.dtype), v_BSGK)
  y = sums.astype(v_BSGK.dtype).astype(jnp.float32) / total[..., None]
  out = y.astype(v_BSGK.dtype), m[..., 0] + jnp.log(total)
  return out, (score, v_BSGK, mask, *out)


def _backward(rounding: str, kept: Any, cotangents: Any):
  score, v_BSGK, mask, y, lse = kept
  dy, dlse = cotangents
  p = jnp.where(mask, jnp.exp(score - lse[..., None]), 0)
  inner = _product('bgrtk,bgrtk->bgrt', y, dy) - dlse
  dp = _product('bgrtk,bsgk->bgrts', dy, v_BSGK)
  dv = _product('bgrts,bgrtk->bsgk', p.astype(dy.dtype), dy)
  return p * (dp - inner[..., None]), dv.astype(v_BSGK.dtype), None


attend.defvjp(_forward, _backward)
