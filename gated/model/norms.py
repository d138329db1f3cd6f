"""The norm before each branch, by name: RMSNorm, two successors of it, and Dynamic Tanh.

D width
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gated.model.layers import GatedNorm, Numerics, RMSNorm, as_last


class Scale(nnx.Module):
  """x -> scale * x, for a learned scalar or one value for each channel."""

  def __init__(self, shape: tuple[int, ...], start: float):
    axes = (None,) * len(shape)
    self.scale = nnx.Param(jnp.full(shape, start, jnp.float32), axes=axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = as_last(self.scale[...].astype(jnp.float32), x)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class PreAffine(nnx.Module):
  """x -> RMSNorm(lambda * x) with a learned lambda_D, initially 1 (arXiv 2601.22966)."""

  def __init__(self, dim: int, *, numerics: Numerics):
    self.before = Scale((dim,), 1.0)
    self.rms = RMSNorm(dim, axes=(None,), numerics=numerics)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.rms(self.before(x))


class DynamicTanh(nnx.Module):
  """x -> gamma * tanh(alpha x) + beta, alpha a learned scalar (arXiv 2503.10622).

  No statistic of x is needed. The authors' code for Llama has no beta.
  """

  def __init__(self, dim: int, alpha: float):
    self.alpha = Scale((), alpha)
    self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axes=(None,))
    self.bias = nnx.Param(jnp.zeros(dim, jnp.float32), axes=(None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    return _dynamic_tanh(x, self.alpha.scale[...], self.scale[...], self.bias[...])


@jax.checkpoint
def _dynamic_tanh(x, alpha, scale, bias):
  alpha, scale, bias = (as_last(p.astype(jnp.float32), x) for p in (alpha, scale, bias))
  return (scale * jnp.tanh(alpha * x.astype(jnp.float32)) + bias).astype(x.dtype)


# Norms before a branch and of the last layer's output, by name: (config.model, key,
# initial alpha) -> module.
NORMS = {
  'rms': lambda m, key, alpha: RMSNorm(m.width, axes=(None,), numerics=m.numerics),
  'gated': lambda m, key, alpha: GatedNorm(
    key, m.width, m.norm_rank, numerics=m.numerics
  ),
  'pre_affine': lambda m, key, alpha: PreAffine(m.width, numerics=m.numerics),
  'dyt': lambda m, key, alpha: DynamicTanh(m.width, alpha),
}
# Norms that do not change the scale of their input much: the authors multiply embeddings
# by a learned scalar, initially sqrt(D), without which their models do not converge.
EMBEDDINGS_SCALED = ('dyt',)
