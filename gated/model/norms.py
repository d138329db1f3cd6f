"""The norm before each branch, by name: RMSNorm, two successors of it, and Dynamic Tanh.

And V-scale, which shrinks the values of attention that are small already.

B batch  T tokens  D width  G KV heads  K head width
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


class ValueScale(nnx.Module):
  """V-scale (arXiv 2603.17771): v -> v r / (r + C), where r = |v|^2.

  C = D K std^2 exp(theta_G) is the expected |v|^2 at the start, with `std` that of the
  value projection's weights. theta_G starts at 0 and is trained if `kind` is 'learned'.
  Sinks have small values: they and their gradients almost vanish.
  """

  def __init__(self, kind: str, *, width: int, kv_heads: int, head_dim: int, std: float):
    self.expected = width * head_dim * std**2
    self.theta = Scale((kv_heads,), 0.0) if kind == 'learned' else None

  def __call__(self, v_BTGK: jax.Array) -> jax.Array:
    theta_G = 0.0 if self.theta is None else self.theta.scale[...].astype(jnp.float32)
    limit_G1 = jnp.expand_dims(self.expected * jnp.exp(theta_G), -1)
    x_BTGK = v_BTGK.astype(jnp.float32)
    r_BTG1 = jnp.square(x_BTGK).sum(-1, keepdims=True)
    limit_BTG1 = jnp.broadcast_to(limit_G1, r_BTG1.shape)
    return (x_BTGK * (r_BTG1 / (r_BTG1 + limit_BTG1))).astype(v_BTGK.dtype)


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
