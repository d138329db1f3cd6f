"""Building blocks: linear maps, norms, SwiGLU and RoPE.

Every parameter stores the logical axis of each of its dims (`axes`), from which
`devices/mesh.py` derives its sharding. Its random key is derived from the parent's key
and its own name. Adding a parameter (a gate, say) therefore does not change the initial
values of the others.

Elementwise functions are wrapped in `jax.checkpoint`: the backward pass recomputes them
from their inputs. Each stored float32 intermediate would take twice the bytes of a
bfloat16 input, and on an accelerator moving bytes costs more than the arithmetic.
"""

import ast
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config, kernels
from gated.devices import mesh

Axes = Sequence[str | None]
DTYPES = ('float32', 'bfloat16')
PRODUCTS = {'compute': jnp.tensordot, 'fp8': kernels.fp8_tensordot}
# The dtype of norm scales, biases and sink logits. An update is often below 2**-9, the
# smallest change of a scale of 1 in bfloat16.
VECTORS = 'float32'
# Upper limit of a knob that counts heads, channels, sink tokens or experts.
LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Numerics:
  """Precision and initialisation, shared by all parameters of a model."""

  weights: str  # dtype of the matrices; vectors, such as norm scales, are float32
  compute: str  # dtype of activations and matrix products
  init_std: float  # standard deviation of the initial weights
  residual_init: str  # plain; depth: maps into the residual stream get std / sqrt(2 L)
  norm_eps: float  # added to the mean square in RMSNorm
  # compute: products of that dtype; fp8: those of attention's projections, dense FFNs
  # and shared experts round their operands to eight bits (`kernels/fp8.py`)
  matmul: str

  def __post_init__(self):
    config.one_of('config.model.numerics.weights', self.weights, DTYPES)
    config.one_of('config.model.numerics.compute', self.compute, DTYPES)
    config.one_of(
      'config.model.numerics.residual_init', self.residual_init, ('plain', 'depth')
    )
    config.one_of('config.model.numerics.matmul', self.matmul, tuple(PRODUCTS))
    config.at_least('config.model.numerics.init_std', self.init_std, 0.0)
    config.at_least('config.model.numerics.norm_eps', self.norm_eps, 0.0)

  def plain(self) -> 'Numerics':
    """The same with all products in the compute dtype."""
    return dataclasses.replace(self, matmul='compute')

  def residual_std(self, depth: int) -> float:
    """The init std of the two maps per layer that write to the residual stream."""
    return self.init_std / (math.sqrt(2 * depth) if self.residual_init == 'depth' else 1)


def exact(numerics: Numerics, run: Callable) -> Callable:
  """A function -> the same, with exact float32 products if the model computes in float32.

  By default accelerators round the inputs of float32 products to fewer bits.
  """
  if numerics.compute != 'float32':
    return run

  @functools.wraps(run)
  def precise(*args, **options):
    with jax.default_matmul_precision('highest'):
      return run(*args, **options)

  return precise


def child_key(key: jax.Array, name: str) -> jax.Array:
  """A module's random key, and the name of its child or parameter -> the child's key."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def normal_param(key: jax.Array, shape: Sequence[int], axes: Axes, *, std: float, dtype):
  """A parameter drawn from N(0, std^2) in float32, then cast to `dtype`."""
  value = std * jax.random.normal(key, shape, jnp.float32)
  return nnx.Param(value.astype(dtype), axes=tuple(axes))


def as_last(x: jax.Array, like: jax.Array) -> jax.Array:
  """Adds leading dims of 1 to x up to the rank of `like`: rank promotion raises here."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


class Dense(nnx.Module):
  """A linear map between tuples of dims, such as (..., D) -> (..., H, K)."""

  def __init__(
    self,
    key: jax.Array,
    dims_in: tuple[int, ...],
    dims_out: tuple[int, ...],
    *,
    axes: Axes,
    std: float,
    bias: bool,
    numerics: Numerics,
  ):
    self.dims_in, self.compute = len(dims_in), numerics.compute
    self.matmul = numerics.matmul
    shape = (*dims_in, *dims_out)
    self.weight = normal_param(key, shape, axes, std=std, dtype=numerics.weights)
    zeros = jnp.zeros(dims_out, VECTORS)
    self.bias = nnx.Param(zeros, axes=tuple(axes)[len(dims_in) :]) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    weight = self.weight[...].astype(self.compute)
    y = PRODUCTS[self.matmul](x, weight, self.dims_in)
    if self.bias is not None:
      y = y + as_last(self.bias[...].astype(self.compute), y)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x: jax.Array, count: int) -> tuple[jax.Array, ...]:
  """x, `count` times, for the products that read it.

  The backward pass adds the copies' gradients from the last to the first and writes each
  sum as `new + total`. XLA for GPUs computes `product + c` in one kernel if the product
  is on the left. JAX writes `total + new`, which leaves one sum as a kernel of its own.
  Forward-mode differentiation is not supported.
  """
  return (x,) * count


def _fan_in(count, _, gradients):
  return (functools.reduce(lambda total, new: new + total, reversed(gradients)),)


fan_out.defvjp(lambda x, count: ((x,) * count, None), _fan_in)


class RMSNorm(nnx.Module):
  """x -> scale * x / sqrt(mean(x^2) + eps), in float32 (arXiv 1910.07467)."""

  def __init__(
    self,
    dims: int | tuple[int, ...],
    *,
    axes: Axes,
    numerics: Numerics,
    rotated: bool = False,
  ):
    """The mean runs over the last dim only; the scale has all of `dims`.

    `rotated`: RoPE follows this norm (see `_rms_norm`).
    """
    self.eps = numerics.norm_eps
    self.rotated = rotated
    self.scale = nnx.Param(jnp.ones(dims, VECTORS), axes=tuple(axes))

  def __call__(self, x: jax.Array) -> jax.Array:
    return _rms_norm(x, self.scale[...], self.eps, self.rotated)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _rms_norm(x, scale, eps, rotated):
  z = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(z), -1, keepdims=True) + eps)
  if rotated and mesh.platform() == 'gpu':
    # Without the barrier XLA computes the mean and the product in one kernel and writes
    # float32, which RoPE reads back. With it, RoPE joins the product's kernel.
    inverse = jax.lax.optimization_barrier(inverse)
  z *= inverse
  return (z * as_last(scale.astype(jnp.float32), x)).astype(x.dtype)


class GatedNorm(nnx.Module):
  """x -> sigmoid(silu(y A) U) * y with y = RMSNorm(x) (arXiv 2601.22966).

  A is (D, rank) and U is (rank, D). As in an attention gate, scores start near one half.
  """

  def __init__(self, key: jax.Array, dim: int, rank: int, *, numerics: Numerics):
    dense = functools.partial(Dense, bias=False, numerics=numerics.plain())
    down, up = child_key(key, 'down'), child_key(key, 'up')
    self.rms = RMSNorm(dim, axes=(None,), numerics=numerics)
    std = numerics.init_std
    self.down = dense(down, (dim,), (rank,), axes=('embed', None), std=std)
    self.up = dense(up, (rank,), (dim,), axes=(None, 'embed'), std=std)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.rms(x)
    return _gated(y, self.up(jax.nn.silu(self.down(y))))


@jax.checkpoint
def _gated(y: jax.Array, logit: jax.Array) -> jax.Array:
  return (y * jax.nn.sigmoid(logit.astype(jnp.float32))).astype(y.dtype)


class SwiGLU(nnx.Module):
  """x -> (silu(x A) * x U) O (arXiv 2002.05202), hidden size F."""

  def __init__(
    self, key: jax.Array, *, width: int, hidden: int, std_out: float, numerics: Numerics
  ):
    dense = functools.partial(Dense, bias=False, numerics=numerics)
    wide = functools.partial(dense, axes=('embed', 'ffn'), std=numerics.init_std)
    narrow = functools.partial(dense, axes=('ffn', 'embed'), std=std_out)
    self.act = wide(child_key(key, 'act'), (width,), (hidden,))
    self.up = wide(child_key(key, 'up'), (width,), (hidden,))
    self.down = narrow(child_key(key, 'down'), (hidden,), (width,))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.down(swiglu(self.act(x_BTD), self.up(x_BTD)))


@jax.checkpoint
def swiglu(act: jax.Array, up: jax.Array) -> jax.Array:
  """silu(act) * up, elementwise."""
  return jax.nn.silu(act) * up


@dataclass(frozen=True, kw_only=True)
class Yarn:
  """Extends RoPE beyond the training context without training (arXiv 2309.00071)."""

  factor: float  # new context / old context; 1 turns YaRN off
  original: int  # tokens of the old context
  beta_fast: float  # pairs with more turns over `original` keep their frequency
  beta_slow: float  # pairs with fewer turns have it divided by `factor`
  truncate: bool  # round the ends of the ramp between them outwards to whole pairs
  attention: float  # multiplies queries and keys, at any factor; 0 for the rule below
  # The rule is r(mscale) / r(mscale_all_dim) with r(m) = 0.1 m ln(factor) + 1; r(1) if
  # one of them is 0.
  mscale: float
  mscale_all_dim: float

  def __post_init__(self):
    name = 'config.model.attn.yarn'
    config.at_least(f'{name}.factor', self.factor, 1.0)
    config.at_least(f'{name}.original', self.original, 1)
    config.at_least(f'{name}.attention', self.attention, 0.0)
    if not self.beta_fast > self.beta_slow > 0:
      slow, fast = self.beta_slow, self.beta_fast
      raise ValueError(
        f'{name}.beta_slow={slow} must be positive and below {name}.beta_fast={fast}'
      )
    if not 0 < self.scale < math.inf:
      raise ValueError(
        f'{name}.mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} with '
        f'factor={self.factor} scale queries and keys by {self.scale}, but a positive '
        'number is expected'
      )

  @property
  def scale(self) -> float:
    """The factor of queries and keys (section 3.4; the ratio is that of transformers)."""
    if self.attention:
      return self.attention
    rule = lambda m: 0.1 * m * math.log(self.factor) + 1.0
    if not (self.mscale and self.mscale_all_dim):
      return rule(1.0)
    below = rule(self.mscale_all_dim)
    return rule(self.mscale) / below if below else math.inf

  def changed(self, spec: str) -> 'Yarn':
    """'8' or '8,truncate=False,mscale=1' -> a copy with this factor and these fields.

    ValueError names a wrong part.
    """
    factor, *others = spec.split(',')
    values = {'factor': factor}
    for part in others:
      field, equals, value = part.partition('=')
      if not equals:
        raise ValueError(f'{part!r}, but FIELD=VALUE is expected after the factor')
      values[field.strip()] = value
    plain = dataclasses.asdict(self)
    for field, value in values.items():
      try:
        plain[field] = ast.literal_eval(value.strip().capitalize())
      except (ValueError, SyntaxError) as error:
        raise ValueError(f'{field}={value!r}, but a number is expected') from error
    return config.build(Yarn, plain, 'config.model.attn.yarn')


def rope_frequencies(dim: int, base: float, yarn: Yarn) -> jax.Array:
  """Radians per token of each pair of dims, (K/2,): base^(-2i / K), adjusted by YaRN.

  YaRN divides the frequency of slow pairs by its factor and keeps that of fast pairs. A
  linear ramp connects the pairs that turn beta_fast and beta_slow times (section 3.2).
  """
  frequency = base ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if yarn.factor == 1.0:
    return frequency
  pair = lambda turns: (
    dim * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(base))
  )
  low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = (jnp.arange(dim // 2) - low) / max(high - low, 1e-3)
  stretched = jnp.clip(ramp, 0, 1)
  return frequency * (1 - stretched) + frequency / yarn.factor * stretched


def rope_angles(position_BT: jax.Array, frequency_k: jax.Array) -> jax.Array:
  """Positions -> radians (B, T, K/2) (arXiv 2104.09864)."""
  return position_BT[..., None].astype(jnp.float32) * frequency_k[None, None, :]


@functools.partial(jax.checkpoint, static_argnums=2)
def rope(x_BTHK: jax.Array, angle_BTk: jax.Array, scale: float) -> jax.Array:
  """Rotates the pairs (i, i + K/2) of each head by their angles, in float32."""
  cos, sin = jnp.cos(angle_BTk)[:, :, None, :], jnp.sin(angle_BTk)[:, :, None, :]
  if scale != 1.0:
    cos, sin = scale * cos, scale * sin
  a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)
