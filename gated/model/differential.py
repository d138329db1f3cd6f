"""Differential attention (arXiv 2410.05258): the difference of two attention maps.

    y = (1 - start) RMSNorm((A1 - lambda A2) [V1, V2])
    lambda = exp(q1 k1) - exp(q2 k2) + start,    start = 0.8 - 0.6 exp(-0.3 layer)

A differential head is two heads of the plain layer, one for each map, and its values are
those of two KV heads side by side; so the projections have the shapes of the plain layer.
KV heads 2j and 2j + 1 hold the keys of the first and the second map, and the halves V1
and V2 of the values; their query heads are the maps of R differential heads. q1, k1, q2
and k2 are learned vectors (K,), and layers count from 0.

B batch  T tokens  S keys' tokens  H heads  G KV heads  R = H/G  K head width  L layers
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gated.model.layers import Numerics, RMSNorm, child_key, normal_param

VECTORS = ('query_1', 'key_1', 'query_2', 'key_2')
STD = 0.1  # of the vectors' initial values


def start(layer: int) -> float:
  """The initial lambda of a layer, up to the vectors' random values; counts from 0."""
  return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Differential(nnx.Module):
  """The normalized difference of the two maps of each pair of KV heads."""

  def __init__(self, key: jax.Array, *, head_dim: int, numerics: Numerics):
    draw = functools.partial(normal_param, std=STD, dtype=jnp.float32)
    for name in VECTORS:
      setattr(self, name, draw(child_key(key, name), (head_dim,), (None,)))
    self.norm = RMSNorm(2 * head_dim, axes=(None,), numerics=numerics)
    self.start: nnx.Variable | None = nnx.data(None)  # of this layer; None: layer 0's

  def __call__(
    self, attend: Callable, v_BSGK: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Values -> (y_BTHK, lse_BTH or None), as `attend` returns for one set of values."""
    B, S, G, K = v_BSGK.shape
    pairs = v_BSGK.reshape(B, S, G // 2, 2, K)
    both = [jnp.repeat(pairs[:, :, :, i : i + 1], 2, 3) for i in (0, 1)]
    (y0, lse), (y1, _) = (attend(v.reshape(B, S, G, K)) for v in both)
    T, H = y0.shape[1:3]
    y = jnp.stack([y0, y1], -2).astype(jnp.float32)
    y = y.reshape(B, T, G // 2, 2, H // G, 2 * K)
    first = self._start()
    z = y[:, :, :, 0] - (self._lambda() + first) * y[:, :, :, 1]
    z = (1 - first) * self.norm(z)
    z = jnp.moveaxis(z.reshape(B, T, G // 2, H // G, 2, K), 4, 3)
    return z.reshape(B, T, H, K).astype(v_BSGK.dtype), lse

  def _start(self) -> jax.Array:
    return jnp.float32(start(0)) if self.start is None else self.start[...]

  def _lambda(self) -> jax.Array:
    q1, k1, q2, k2 = (getattr(self, name)[...].astype(jnp.float32) for name in VECTORS)
    return jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2))
