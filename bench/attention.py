"""Attention backends of `gated.kernels`: relative errors and times, in one table.

  python bench/attention.py [--batch=8 --length=4096 --heads=16 --kv_heads=8]

The peer is `jax.nn.dot_product_attention` on cuDNN, without packing and with packing as a
mask of T x T. Errors are relative to the reference backend in float32, on a smaller
input; times are medians in milliseconds of forward, and of forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import timing

from gated import kernels


def inputs(B, T, H, G, K, segments):
  keys = jax.random.split(jax.random.key(T), 4)
  shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
  arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]
  cuts = np.sort(np.random.default_rng(T).integers(1, T, (B, segments - 1)), 1)
  segment_BT = (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1) + 1
  return *arrays, jnp.asarray(segment_BT, jnp.int32)


def functions(limit):
  """Name -> (q, k, v, segments) -> y, with at most `limit` segments."""
  peer = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
  )
  same = lambda s: s[:, None, :, None] == s[:, None, None, :]
  ours = functools.partial(kernels.attend, backend='auto', max_segments=limit)
  return {
    'peer cudnn, unpacked': lambda q, k, v, s: peer(q, k, v),
    'peer cudnn, T x T mask': lambda q, k, v, s: peer(q, k, v, mask=same(s)),
    'ours auto, unpacked': lambda q, k, v, s: ours(q, k, v, None),
    'ours auto, packed': ours,
  }


def gradients(f):
  """f -> its gradients, with the fourth array as the weights of y."""

  def run(q, k, v, w, s):
    loss = lambda q, k, v: jnp.sum(f(q, k, v, s).astype(jnp.float32) * w)
    return jax.grad(loss, (0, 1, 2))(q, k, v)

  return jax.jit(run)


def errors(f, packed, q, k, v, w, s):
  """The relative errors of y and of the three gradients."""
  plain = functools.partial(kernels.attend, backend='reference', max_segments=2)
  reference = plain if packed else lambda q, k, v, s: plain(q, k, v, None)
  actual = f(q, k, v, s), *gradients(f)(q, k, v, w, s)
  q, k, v, w = (array.astype(jnp.float32) for array in (q, k, v, w))
  with jax.default_matmul_precision('highest'):
    expected = reference(q, k, v, s), *gradients(reference)(q, k, v, w, s)
  return map(timing.relative_error, actual, expected)


def main():
  sizes = dict(batch=8, length=4096, heads=16, kv_heads=8, segments=8)
  parser = timing.options(__doc__, **sizes)
  parser.add_argument('--limits', type=int, nargs='+', default=[16, 64])
  a = parser.parse_args()
  print(timing.title(vars(a)))
  small = inputs(2, 512, a.heads, a.kv_heads, 128, 5)
  q, k, v, w, s = inputs(a.batch, a.length, a.heads, a.kv_heads, 128, a.segments)
  for limit in a.limits:
    for name, f in functions(limit).items():
      label = f'{name:24} max_segments {limit:4} '
      try:
        error = ' '.join(f'{e:.1e}' for e in errors(f, 'unpacked' not in name, *small))
        forward = timing.milliseconds(jax.jit(f), q, k, v, s)
        total = timing.milliseconds(gradients(f), q, k, v, w, s)
        print(f'{label} {forward:7.2f} {total:7.2f} ms  y dq dk dv {error}')
      except Exception as problem:
        print(f'{label} failed: {str(problem)[:300]}')


if __name__ == '__main__':
  main()
