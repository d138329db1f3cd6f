"""Experts with a capacity: so many tokens of each row, and those beyond are dropped.

The shapes stand still whatever the router does, and XLA's partitioner moves the tokens.

B batch  T tokens  D width  F ffn of an expert  E experts  k experts of a token
C capacity  j choices of a row  S slots of a row
"""

import math

import jax
import jax.numpy as jnp

from gated.layers import swiglu
from gated.moe.dropless import combined


def run(
  weights: list[jax.Array], x_BTD, weight_BTk, choice_BTk, *, live_BT, factor: float
) -> tuple[jax.Array, jax.Array]:
  """An expert takes up to C tokens of each row, those that chose it first at first.

  -> (y_BTD, how many choices found no place). C is `factor` times the mean, k T / E.
  """
  (B, T, D), k, E = x_BTD.shape, choice_BTk.shape[-1], len(weights[0])
  C = min(T, math.ceil(factor * k * T / E))
  # Choices in the order in which they are served: the first ones of all tokens, then on.
  choice_Bj = choice_BTk.swapaxes(1, 2).reshape(B, k * T)
  live_Bj = jnp.tile(live_BT, (1, k))
  taken_BjE = jax.nn.one_hot(choice_Bj, E, dtype=jnp.int32) * live_Bj[..., None]
  place_Bj = (jnp.cumsum(taken_BjE, 1) * taken_BjE).sum(-1) - 1
  fits_Bj = live_Bj & (place_Bj < C)
  slot_Bj = jnp.where(fits_Bj, choice_Bj * C + place_Bj, E * C)
  token_Bj = jnp.tile(jnp.arange(T)[None], (B, k))
  row_B1 = jnp.arange(B)[:, None]
  empty = jnp.full((B, E * C), T)
  source_BS = empty.at[row_B1, slot_Bj].set(token_Bj, mode='drop')
  x_BSD = x_BTD.at[row_B1, source_BS].get(mode='fill', fill_value=0)
  x_BECD = x_BSD.reshape(B, E, C, D)
  act, up, down = weights
  hidden = swiglu(
    jnp.einsum('becd,edf->becf', x_BECD, act), jnp.einsum('becd,edf->becf', x_BECD, up)
  )
  y_BSD = jnp.einsum('becf,efd->becd', hidden, down).reshape(B, E * C, D)
  y_BjD = y_BSD.at[row_B1, slot_Bj].get(mode='fill', fill_value=0)
  y_BTkD = y_BjD.reshape(B, k, T, D).swapaxes(1, 2)
  dropped = (live_Bj & ~fits_Bj).sum().astype(jnp.float32)
  return combined(y_BTkD, weight_BTk), dropped
