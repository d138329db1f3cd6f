"""Matrix products of operands rounded to eight bits (arXiv 2209.05433).

Values and weights have the format E4M3, gradients E5M2, which has a larger range. Each
operand is divided by a power of two that brings its largest magnitude near the end of the
format's range ("current scaling"), so there is no state. Results have the dtype of the
operands.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gated.devices import mesh

VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
CAPABLE = 8.9  # The first compute capability of NVIDIA's GPUs with such products.


def check() -> None:
  """NotImplementedError for devices without such products. A CPU emulates them."""
  platform = mesh.platform()
  capable = platform == 'cpu'
  if platform == 'gpu' and jax.default_backend() != 'gpu':
    capable = True  # Compiled for another machine, whose GPUs are not known here.
  elif platform == 'gpu':
    # AMD's GPUs have a name there, such as gfx942, and other formats of eight bits.
    capability = str(getattr(jax.devices()[0], 'compute_capability', ''))
    capable = capability[:1].isdigit() and float(capability) >= CAPABLE
  if not capable:
    raise NotImplementedError(
      "config.model.numerics.matmul='fp8' needs an NVIDIA GPU of compute capability "
      f"{CAPABLE} or more (H100, L40S); allowed here is 'compute'"
    )


def rounded(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
  """x -> (q, scale), with q of a format of eight bits and x about q * scale.

  `scale` is a power of two, float32, for all of x. What is not finite stays so, and does
  not count in the scale.
  """
  size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
  _, exponent = jnp.frexp(jnp.max(size, initial=0).astype(jnp.float32))
  # The largest power of two of the format: 2**8 or 2**15.
  room = math.frexp(float(jnp.finfo(dtype).max))[1] - 1
  # A scale below 2**-126 would be rounded to zero.
  scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - room, -100))
  return (x.astype(jnp.float32) / scale).astype(dtype), scale


def tensordot(x: jax.Array, w: jax.Array, count: int) -> jax.Array:
  """`jnp.tensordot(x, w, count)` of rounded operands, forward and backward."""
  check()
  return _product(x, w, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, count):
  return _forward(x, w, count)[0]


def _forward(x, w, count):
  xs, ws = rounded(x, VALUES), rounded(w, VALUES)
  contract = range(x.ndim - count, x.ndim), range(count)
  y = _dot(xs, ws, contract, x.dtype)
  # The dtype of an empty array is that of the gradient of w.
  return y, (xs, ws, jnp.zeros(0, w.dtype))


def _backward(count, kept, dy):
  xs, ws, like = kept
  dys = rounded(dy, GRADIENTS)
  outs = ws[0].ndim - count
  rows = xs[0].ndim - count
  over_outs = range(dy.ndim - outs, dy.ndim), range(count, ws[0].ndim)
  # As in NVIDIA's Transformer Engine, gradients are summed in full float32.
  exactly = jax.lax.Precision.HIGHEST
  dx = _dot(dys, ws, over_outs, dy.dtype, exactly)
  dw = _dot(xs, dys, (range(rows), range(rows)), like.dtype, exactly)
  return dx, dw


_product.defvjp(_forward, _backward)


def _dot(a, b, contract, dtype, precision=None) -> jax.Array:
  """Two pairs of `rounded` -> the product over the dims `contract` of each."""
  (qa, scale_a), (qb, scale_b) = a, b
  dims = tuple(map(tuple, contract)), ((), ())
  y = jax.lax.dot_general(
    qa, qb, dims, precision=precision, preferred_element_type=jnp.dtype(dtype)
  )
  return y * (scale_a * scale_b).astype(y.dtype)
