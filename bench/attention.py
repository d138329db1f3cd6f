"""Attention backends of `gated.kernels`: error against float64, and time, in one table.

  python bench/attention.py [--batch=8 --length=4096 --heads=16 --kv_heads=8]

Beside ours stands the peer: `jax.nn.dot_product_attention` on cuDNN without packing, and
with packing as a mask of T x T. Errors are relative, ||out - ref|| / ||ref||, on a
smaller input; times are medians in milliseconds of forward, and forward and backward.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import milliseconds

from gated import kernels


def inputs(B, T, H, G, K, segments):
  keys = jax.random.split(jax.random.key(T), 4)
  shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
  arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]
  cuts = np.sort(np.random.default_rng(T).integers(1, T, (B, segments - 1)), 1)
  segment_BT = (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1) + 1
  return arrays, jnp.asarray(segment_BT, jnp.int32)


def masked(q, k, v, segment_BT):
  mask = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=True, implementation='cudnn'
  )


def functions(limit):
  ours = lambda name: (
    lambda q, k, v, s: kernels.attend(q, k, v, s, backend=name, max_segments=limit)
  )
  return {
    'peer cudnn, unpacked': lambda q, k, v, s: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation='cudnn'
    ),
    'peer cudnn, T x T mask': masked,
    'ours auto, unpacked': lambda q, k, v, s: ours('auto')(q, k, v, None),
    'ours auto, packed': ours('auto'),
  }


def both(f):
  """f and its gradients, weighted by the fourth array."""

  def run(q, k, v, w, s):
    loss = lambda q, k, v: jnp.sum(f(q, k, v, s).astype(jnp.float32) * w)
    return jax.grad(loss, (0, 1, 2))(q, k, v)

  return jax.jit(run)


def error(f, reference, arrays, segment_BT):
  q, k, v, w = arrays
  got = [f(q, k, v, segment_BT), *both(f)(q, k, v, w, segment_BT)]
  up = [a.astype(jnp.float32) for a in arrays]
  with jax.default_matmul_precision('highest'):
    want = [reference(*up[:3], segment_BT), *both(reference)(*up, segment_BT)]
  distance = lambda a, b: float(
    jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
  )
  return [distance(a, b) for a, b in zip(got, want)]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  for name, value in dict(batch=8, length=4096, heads=16, kv_heads=8, segments=8).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--limits', type=int, nargs='+', default=[16, 64])
  a = parser.parse_args()
  plain = lambda q, k, v, s: kernels.attend(
    q, k, v, s, backend='reference', max_segments=2
  )
  small, small_segments = inputs(2, 512, a.heads, a.kv_heads, 128, 5)
  big, segment_BT = inputs(a.batch, a.length, a.heads, a.kv_heads, 128, a.segments)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}')
  for limit in a.limits:
    for name, f in functions(limit).items():
      try:
        packed = 'unpacked' not in name
        reference = plain if packed else lambda q, k, v, s: plain(q, k, v, None)
        errors = error(f, reference, small, small_segments)
        forward = milliseconds(jax.jit(f), *big[:3], segment_BT)
        total = milliseconds(both(f), *big, segment_BT)
        told = ' '.join(f'{e:.1e}' for e in errors)
        times = f'{forward:7.2f} {total:7.2f} ms'
        print(f'{name:24} max_segments {limit:4}  {times}  y dq dk dv {told}')
      except Exception as problem:
        print(f'{name:24} max_segments {limit:4}  failed: {str(problem)[:300]}')


if __name__ == '__main__':
  main()
