"""The grouped matmul's backends: error against float32, and time, in one table.

  python bench/grouped_matmul.py [--rows=262144 --groups=128 --width=2048 --hidden=768]

Peers in the same run: `torch.nn.functional.grouped_mm` with --torch, tokamax where it is
installed, a dense batched product of the same size (what even loads would cost), and
`jax.lax.ragged_dot` with --ragged (on a GPU it wants memory for every matrix on every
row). Loads are uneven: shares drawn from a Dirichlet distribution. Errors are relative,
||out - ref|| / ||ref||, at a 16th of the rows; times are medians in milliseconds of
forward, and of forward and backward.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import milliseconds

from gated import kernels


def inputs(N, E, A, B, dtype):
  keys = jax.random.split(jax.random.key(N), 3)
  shapes = (N, A), (E, A, B), (N, B)
  x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))
  rng = np.random.default_rng(N)
  size = rng.multinomial(N, rng.dirichlet(np.full(E, 4.0)))
  return x, w, dy, jnp.asarray(size, jnp.int32)


def with_gradients(product):
  def run(x, w, dy, size):
    y, back = jax.vjp(lambda x, w: product(x, w, size), x, w)
    return y, *back(dy)

  return run


def functions(E, ragged):
  ours = lambda name: lambda x, w, size: kernels.grouped_matmul(x, w, size, backend=name)
  found = {f'ours {name}': ours(name) for name in kernels.GROUPED}
  batched = lambda x, w, size: (x.reshape(E, -1, x.shape[1]) @ w).reshape(len(x), -1)
  found['peer dense batched'] = batched
  try:
    import tokamax

    mosaic = dict(implementation='mosaic')
    found['peer tokamax'] = lambda x, w, n: tokamax.ragged_dot(x, w, n, **mosaic)
  except ImportError:
    pass
  if ragged:
    found['peer jax.lax.ragged_dot'] = jax.lax.ragged_dot
  return found


def reference(x, w, dy, size):
  """In float32, one group at a time."""
  x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
  ends = np.cumsum(size)
  parts = [slice(e - n, e) for e, n in zip(ends, size)]
  y = np.concatenate([x[p] @ w[e] for e, p in enumerate(parts)])
  dx = np.concatenate([dy[p] @ w[e].T for e, p in enumerate(parts)])
  return y, dx, np.stack([x[p].T @ dy[p] for p in parts])


def torch_line(N, E, A, B):
  import torch

  x = torch.randn(N, A, device='cuda', dtype=torch.bfloat16, requires_grad=True)
  w = torch.randn(E, A, B, device='cuda', dtype=torch.bfloat16, requires_grad=True)
  size = np.asarray(inputs(N, E, 8, 8, jnp.bfloat16)[3])
  ends = torch.tensor(np.cumsum(size), device='cuda', dtype=torch.int32)
  dy = torch.randn(N, B, device='cuda', dtype=torch.bfloat16)
  run = lambda: torch.nn.functional.grouped_mm(x, w, offs=ends)

  def timed(f):
    f()
    torch.cuda.synchronize()
    times = []
    for _ in range(10):
      start = time.perf_counter()
      f()
      torch.cuda.synchronize()
      times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)

  with torch.no_grad():
    forward = timed(run)
  return forward, timed(lambda: run().backward(dy))


def line(name, forward, both, N, A, B, errors=()):
  flops = 2 * N * A * B
  rates = f'{flops / forward / 1e9:6.0f} {3 * flops / both / 1e9:6.0f} TFLOP/s'
  told = ' '.join(f'{e:.1e}' for e in errors)
  print(f'{name:24} {forward:9.2f} {both:9.2f} ms  {rates}  y dx dw {told}', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  sizes = dict(rows=262_144, groups=128, width=2048, hidden=768)
  for name, value in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--ragged', action='store_true')
  parser.add_argument('--torch', action='store_true')
  a = parser.parse_args()
  N, E, A, B = a.rows, a.groups, a.width, a.hidden
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}')
  small, big = inputs(N // 16, E, A, B, a.dtype), inputs(N, E, A, B, a.dtype)
  exact = reference(*small)
  for name, f in functions(E, a.ragged).items():
    try:
      errors = []
      if 'dense' not in name:
        got = jax.jit(with_gradients(f))(*small)
        errors = [
          float(np.linalg.norm(np.asarray(g, np.float32) - e) / np.linalg.norm(e))
          for g, e in zip(got, exact)
        ]
      x, w, dy, size = big
      forward = milliseconds(f, x, w, size)
      both = milliseconds(with_gradients(f), x, w, dy, size)
      line(name, forward, both, N, A, B, errors)
    except Exception as problem:
      print(f'{name:24} failed: {type(problem).__name__}: {str(problem)[:200]}')
  if a.torch:
    del big, x, w, dy
    line('peer torch grouped_mm', *torch_line(N, E, A, B), N, A, B)


if __name__ == '__main__':
  main()
