"""Experts with a capacity: an expert takes a limited number of tokens per row.

Shapes do not depend on the router, so XLA's partitioner can move the tokens.

B batch  T tokens  D width  F ffn of an expert  E experts  k experts of a token
C capacity  j choices of a row  S slots of a row
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated.devices import mesh
from gated.model.layers import swiglu
from gated.model.moe.dropless import combined


def run(
  weights: list[jax.Array], x_BTD, weight_BTk, choice_BTk, *, live_BT, factor: float
) -> tuple[jax.Array, jax.Array]:
  """Tokens, and the router's weights and choices -> (y_BTD, number of dropped choices).

  An expert takes up to C tokens of each row; C is `factor` times the mean, k T / E. It
  takes tokens that rank it first, then those that rank it second, and so on.
  """
  (B, T, D), k, E = x_BTD.shape, choice_BTk.shape[-1], len(weights[0])
  C = min(T, math.ceil(factor * k * T / E))
  # The first choices of all tokens, then the second ones.
  choice_Bj = choice_BTk.swapaxes(1, 2).reshape(B, k * T)
  live_Bj = jnp.tile(live_BT, (1, k))
  taken_BjE = jax.nn.one_hot(choice_Bj, E, dtype=jnp.int32) * live_Bj[..., None]
  place_Bj = (jnp.cumsum(taken_BjE, 1) * taken_BjE).sum(-1) - 1
  fits_Bj = live_Bj & (place_Bj < C)
  slot_Bj = jnp.where(fits_Bj, choice_Bj * C + place_Bj, E * C)
  token_j = jnp.tile(jnp.arange(T), k)
  source = lambda slot_j: jnp.full(E * C, T).at[slot_j].set(token_j, mode='drop')
  x_BSD = _read(x_BTD, jax.vmap(source)(slot_Bj))
  x_BECD = _by_expert(_by_row(x_BSD.reshape(B, E, C, D)))
  act, up, down = weights
  hidden = swiglu(
    jnp.einsum('becd,edf->becf', x_BECD, act), jnp.einsum('becd,edf->becf', x_BECD, up)
  )
  y_BECD = _by_row(_by_expert(jnp.einsum('becf,efd->becd', hidden, down)))
  y_BjD = _read(y_BECD.reshape(B, E * C, D), slot_Bj)
  y_BTkD = y_BjD.reshape(B, k, T, D).swapaxes(1, 2)
  dropped = (live_Bj & ~fits_Bj).sum().astype(jnp.float32)
  return combined(y_BTkD, weight_BTk), dropped


@jax.vmap
def _read(x_TD, at_S):
  """Reads tokens by their index in the row, on the row's device; zeros beyond the row."""
  return x_TD.at[at_S].get(mode='fill', fill_value=0)


def _by_row(x_BECD: jax.Array) -> jax.Array:
  return mesh.constrain(x_BECD, 'batch', None, None, None)


def _by_expert(x_BECD: jax.Array) -> jax.Array:
  """Shards experts by their axes, and rows by the remaining axes: an all-to-all."""
  current = mesh.current()
  if current is None:
    return x_BECD
  left = [m for m in mesh.RULES['batch'] if m not in mesh.RULES['experts']]
  rows = tuple(m for m in left if current.shape[m] > 1) or None
  experts = mesh.spec(('experts',), current)[0]
  return jax.lax.with_sharding_constraint(x_BECD, P(rows, experts, None, None))
