"""Smaller moments: in bfloat16, rounded at random without bias, or factored.

The second moment of AdamW changes by (1 - b2) of itself in a step: with b2 = 0.95 by up
to 5%, and with 0.999 by 0.1%, less than the 0.4% between neighbours in bfloat16. Rounding
to the nearest would freeze it; rounding up with the probability of the remainder keeps
its mean (arXiv 2010.06192).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gated.devices import trees

DTYPES = ('float32', 'bfloat16')
FACTORED = 128  # Matrices whose smaller side is below it keep whole second moments.


class Stored(NamedTuple):
  """The state of an optimizer in bfloat16."""

  count: jax.Array  # updates so far, from which the next rounding draws its key
  inner: Any


def stored(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """An optimizer with a float32 state -> the same with its arrays in bfloat16.

  The rounding depends only on the number of the update, so a resumed run repeats it.
  """

  def init(params):
    state = tx.init(params)
    return Stored(jnp.zeros((), jnp.int32), jax.tree.map(_narrow, state))

  def update(updates, state, params=None):
    wide = jax.tree.map(_wide, state.inner)
    updates, inner = tx.update(updates, wide, params)
    key = jax.random.fold_in(jax.random.key(0), state.count)
    leaves, tree = jax.tree.flatten(inner)
    rounded = [
      rounded_at_random(leaf, jax.random.fold_in(key, i)) if _moment(leaf) else leaf
      for i, leaf in enumerate(leaves)
    ]
    return updates, Stored(state.count + 1, jax.tree.unflatten(tree, rounded))

  return optax.GradientTransformation(init, update)


def factored(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """AdamW's direction, with second moments from the means of rows and columns.

  As in Adafactor (arXiv 1804.04235, section 3), the gradient is first divided by the root
  of its second moment; the first moment averages the quotients. Both averages are
  bias-corrected, as in Adam. Rows and columns are the two largest axes of a parameter;
  each matrix of a stack has its own.
  """

  def decay(step, _):
    return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))

  second = optax.scale_by_factored_rms(
    decay_rate_fn=decay, min_dim_size_to_factor=FACTORED, epsilon=max(eps**2, 1e-30)
  )

  def init(params):
    # Their shapes differ from the parameter's, so they are stored by its name.
    return second.init(trees.flatten(params))

  def update(updates, state, params=None):
    flat, state = second.update(trees.flatten(updates), state, trees.flatten(params))
    return trees.unflatten(updates, flat), state

  return optax.chain(optax.GradientTransformation(init, update), optax.ema(b1))


def factored_size(shape: Sequence[int]) -> int:
  """The shape of a parameter -> the elements of its second moments, if factored."""
  *_, smaller, larger = 0, *sorted(shape)
  size = math.prod(shape)
  return size if smaller < FACTORED else size // larger + size // smaller


def rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 -> bfloat16: a neighbour of x, with x as its mean; x itself if not finite."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # bfloat16 has the upper 16 bits of a float32; a carry out of the lower rounds up.
  noise = jax.random.bits(key, x.shape, jnp.uint32) >> 16
  bits = jnp.where(jnp.isfinite(x), bits + noise, bits) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _moment(leaf: jax.Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0


def _narrow(leaf: jax.Array) -> jax.Array:
  return leaf.astype(jnp.bfloat16) if _moment(leaf) else leaf


def _wide(leaf: jax.Array) -> jax.Array:
  return leaf.astype(jnp.float32) if _moment(leaf) else leaf
