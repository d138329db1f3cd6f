"""The grouped matmul's backends: relative errors and times, in one table.

  python bench/grouped_matmul.py [--rows=262144 --groups=128 --width=2048 --hidden=768]

Peers in the same run: `torch.nn.functional.grouped_mm` with --torch, tokamax where it is
installed, JAX's own Mosaic GPU kernels with --mosaic (for Hopper), a dense batched
product of the same size (the cost of even loads), and `jax.lax.ragged_dot` with --ragged
(on a GPU it needs memory for every matrix on every row). Loads are uneven: shares drawn
from a Dirichlet distribution. Errors are relative to float32, at a 16th of the rows;
times are medians in milliseconds of forward, and of forward and backward.
"""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import timing

from gated import kernels


def inputs(N, E, A, B, dtype):
  keys = jax.random.split(jax.random.key(N), 3)
  shapes = (N, A), (E, A, B), (N, B)
  x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))
  rng = np.random.default_rng(N)
  size = rng.multinomial(N, rng.dirichlet(np.full(E, 4.0)))
  return x, w, jnp.asarray(size, jnp.int32), dy


def with_gradients(product):
  """A product -> a function that returns y and the gradients of x and w."""

  def run(x, w, size, dy):
    y, back = jax.vjp(lambda x, w: product(x, w, size), x, w)
    return y, *back(dy)

  return jax.jit(run)


# Rows, columns and terms of a block, and blocks in flight, for --mosaic.
BLOCKS = (128, 128, 64, 4), (128, 128, 64, 6), (64, 256, 64, 4), (128, 128, 128, 3)


def mosaic(rows, columns, terms, steps):
  """JAX's Mosaic GPU kernels, which no public JAX function calls -> a product."""
  package = 'jax.experimental.pallas.ops.gpu'
  dot = importlib.import_module(f'{package}.ragged_dot_mgpu').ragged_dot
  outer = importlib.import_module(f'{package}.transposed_ragged_dot_mgpu')
  block = dict(block_m=rows, block_n=columns, block_k=terms)
  how = block | dict(max_concurrent_steps=steps, grid_block_n=1)

  @jax.custom_vjp
  def product(x, w, size):
    return dot(x, w, group_sizes=size, **how)

  def back(kept, dy):
    x, w, size = kept
    dx = dot(dy, w, group_sizes=size, transpose_rhs=True, **how)
    return dx, outer.transposed_ragged_dot(x, dy, group_sizes=size, **how), None

  product.defvjp(lambda *args: (product(*args), args), back)
  return product


def functions(E, ragged, with_mosaic):
  """Name -> (x, w, sizes) -> y."""
  products = {
    f'ours {name}': functools.partial(kernels.grouped_matmul, backend=name)
    for name in kernels.GROUPED
  }
  batched = lambda x, w, size: (x.reshape(E, -1, x.shape[1]) @ w).reshape(len(x), -1)
  products['peer dense batched'] = batched
  if importlib.util.find_spec('tokamax'):
    product = importlib.import_module('tokamax').ragged_dot
    products['peer tokamax'] = functools.partial(product, implementation='mosaic')
  if with_mosaic:
    products |= {f'peer mosaic {"x".join(map(str, b))}': mosaic(*b) for b in BLOCKS}
  if ragged:
    products['peer jax.lax.ragged_dot'] = jax.lax.ragged_dot
  return products


def reference(x, w, size, dy):
  """y and the gradients of x and w in float32, one group at a time."""
  x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
  ends = np.cumsum(size)[:-1]
  groups = list(zip(np.split(x, ends), w, np.split(dy, ends)))
  y = np.concatenate([x @ w for x, w, _ in groups])
  dx = np.concatenate([dy @ w.T for _, w, dy in groups])
  return y, dx, np.stack([x.T @ dy for x, _, dy in groups])


def torch_times(N, E, A, B):
  """Milliseconds of PyTorch's product, forward, and forward and backward."""
  import torch

  draw = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  x, w, dy = draw(N, A, requires_grad=True), draw(E, A, B, requires_grad=True), draw(N, B)
  size = np.asarray(inputs(N, E, 8, 8, jnp.bfloat16)[2])
  ends = torch.tensor(np.cumsum(size), device='cuda', dtype=torch.int32)
  run = lambda: torch.nn.functional.grouped_mm(x, w, offs=ends)
  wait = lambda _: torch.cuda.synchronize()
  with torch.no_grad():
    forward = timing.milliseconds(run, wait=wait)
  return forward, timing.milliseconds(lambda: run().backward(dy), wait=wait)


def main():
  sizes = dict(rows=262_144, groups=128, width=2048, hidden=768)
  flags = dict(ragged=False, torch=False, mosaic=False)
  a = timing.options(__doc__, **sizes, dtype='bfloat16', **flags).parse_args()
  print(timing.title(vars(a)))
  N, E, A, B = a.rows, a.groups, a.width, a.hidden
  small, big = inputs(N // 16, E, A, B, a.dtype), inputs(N, E, A, B, a.dtype)
  expected = reference(*small)

  def line(name, forward, both, errors=()):
    rates = f'{2 * N * A * B / forward / 1e9:6.0f} {6 * N * A * B / both / 1e9:6.0f}'
    error = ' '.join(f'{e:.1e}' for e in errors)
    print(f'{name:25} {forward:9.2f} {both:9.2f} ms  {rates} TFLOP/s  y dx dw {error}',
          flush=True)  # fmt: skip

  for name, f in functions(E, a.ragged, a.mosaic).items():
    try:
      errors = []
      if 'dense' not in name:  # It ignores the sizes.
        errors = map(timing.relative_error, with_gradients(f)(*small), expected)
      forward = timing.milliseconds(jax.jit(f), *big[:3])
      line(name, forward, timing.milliseconds(with_gradients(f), *big), errors)
    except Exception as problem:
      print(f'{name:25} failed: {type(problem).__name__}: {str(problem)[:200]}')
  if a.torch:
    del big
    line('peer torch grouped_mm', *torch_times(N, E, A, B))


if __name__ == '__main__':
  main()
