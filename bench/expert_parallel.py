"""Experts split over devices: the gather, an all-to-all, weights gathered, in a table.

  python bench/expert_parallel.py [--expert=4 --tokens=8192 --experts=128 --top_k=8 ...]

A dropless layer's forward and backward pass on all devices: 8 simulated ones on a CPU
(small sizes are the default there), or the GPUs of this machine. FSDP takes what --expert
leaves. Peers in the same run: the all-to-all, with buffers for the worst load, since no
token may be dropped; and each device with the weights of all experts, as it was before.
Bytes are those that a device receives, read from the compiled program; times are medians
in milliseconds; errors are relative to the weights' way, ||out - ref|| / ||ref||.
"""

import argparse
import os

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from timing import milliseconds

from gated import kernels
from gated.devices import mesh
from gated.model.layers import swiglu
from gated.model.moe import dropless
from gated.pods import compiled

ROWS = P(('fsdp', 'expert'))
WIDE, NARROW = P('expert', 'fsdp'), P('expert', None, 'fsdp')


def grouped(x, act, up, down, size_E):
  multiply = lambda x, w: kernels.grouped_matmul(x, w, size_E, backend='auto')
  return multiply(swiglu(multiply(x, act), multiply(x, up)), down)


def whole_weights(x_BTD, weight_BTk, choice_BTk, *weights):
  """The old way."""
  gather = lambda w, axis: jax.lax.all_gather(
    jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True), 'expert', tiled=True
  )
  weights = [gather(w, axis) for w, axis in zip(weights, (1, 1, 2))]
  return dropless._alone(x_BTD, weight_BTk, choice_BTk, *weights, backend='auto')[0]


def all_to_all(x_BTD, weight_BTk, choice_BTk, *weights):
  """Each selection goes to its expert's device, into a place kept for it, and back."""
  (B, T, D), k, S = x_BTD.shape, choice_BTk.shape[-1], jax.lax.axis_size('expert')
  weights = [
    jax.lax.all_gather(w, 'fsdp', axis=i, tiled=True) for w, i in zip(weights, (1, 1, 2))
  ]
  e, choice_M = len(weights[0]), choice_BTk.reshape(-1)
  places = B * T * min(k, e)  # Of what one device sends another, at worst.
  order_M = jnp.argsort(choice_M, stable=True)
  back_M = jnp.argsort(order_M)
  sorted_M = choice_M[order_M]
  size_S = jnp.bincount(choice_M // e, length=S)
  nth_M = jnp.arange(len(choice_M)) - (jnp.cumsum(size_S) - size_S)[sorted_M // e]
  slot_M = sorted_M // e * places + nth_M
  swap = lambda a: jax.lax.all_to_all(a, 'expert', 0, 0, tiled=True)
  x_MD = dropless._spread(x_BTD.reshape(-1, D), order_M, back_M)
  sent = jnp.zeros((S * places, D), x_BTD.dtype).at[slot_M].set(x_MD, unique_indices=True)
  expert = swap(jnp.full(S * places, e).at[slot_M].set(sorted_M % e))
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order)
  size_e = jnp.bincount(expert, length=e).astype(jnp.int32)
  real = jnp.arange(S * places) < size_e.sum()
  rows = jnp.where(real[:, None], dropless._permuted(swap(sent), order, back), 0)
  rows = jnp.where(real[:, None], grouped(rows, *weights, size_e), 0)
  y_MD = swap(dropless._permuted(rows, back, order))[slot_M]
  y_MD = dropless._permuted(y_MD, back_M, order_M)
  return dropless.combined(y_MD.reshape(B, T, k, D), weight_BTk)


def gathered_tokens(x_BTD, weight_BTk, choice_BTk, *weights):
  routed = x_BTD, weight_BTk, choice_BTk
  return dropless.run(list(weights), *routed, backend='auto')


def sharded(local, on):
  specs = dict(in_specs=(ROWS, ROWS, ROWS, WIDE, WIDE, NARROW), out_specs=ROWS)
  return jax.shard_map(local, mesh=on, check_vma=False, **specs)


def step(run):
  """y, and the gradients of x, of the router's weights and of the experts."""

  def both(dy, x, weight, choice, *weights):
    y, back = jax.vjp(
      lambda x, weight, *w: run(x, weight, choice, *w), x, weight, *weights
    )
    return y, *back(dy)

  return jax.jit(both)


def inputs(on, a):
  rng, B = np.random.default_rng(0), on.size
  shape = (B, a.tokens)
  logit = rng.normal(size=(*shape, a.experts)).astype(np.float32)
  # Some experts are liked better than others.
  logit += a.uneven * rng.normal(size=a.experts)
  choice = np.argpartition(-logit, a.top_k)[..., : a.top_k].astype(np.int32)
  weight = rng.random((*shape, a.top_k), np.float32)

  def place(value, spec, dtype):
    return jax.device_put(jnp.asarray(value, dtype), NamedSharding(on, spec))

  draw = lambda spec, *shape: place(
    rng.standard_normal(shape, np.float32) / shape[-2] ** 0.5, spec, a.dtype
  )
  E, D, F = a.experts, a.width, a.hidden
  weights = draw(WIDE, E, D, F), draw(WIDE, E, D, F), draw(NARROW, E, F, D)
  routed = place(weight, ROWS, jnp.float32), place(choice, ROWS, jnp.int32)
  return draw(ROWS, *shape, D), draw(ROWS, *shape, D), *routed, *weights


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  small = jax.default_backend() == 'cpu'
  sizes = dict(tokens=256, experts=32, top_k=8, width=128, hidden=64)
  large = dict(tokens=8192, experts=128, top_k=8, width=2048, hidden=768)
  for name, value in (sizes if small else large).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  count = jax.device_count()
  parser.add_argument('--expert', type=int, default=min(4, count))
  parser.add_argument('--uneven', type=float, default=0.1, help='spread of the logits')
  parser.add_argument('--dtype', default='float32' if small else 'bfloat16')
  a = parser.parse_args()
  on = mesh.make(data=1, fsdp=-1, expert=a.expert, tensor=1, context=1)
  print(f'{count} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}')
  args, exact = inputs(on, a), None
  ways = {
    'peer weights of all experts': sharded(whole_weights, on),
    'ours gather of tokens': gathered_tokens,
    'peer all-to-all, padded': sharded(all_to_all, on),
  }
  with jax.set_mesh(on):
    for name, run in ways.items():
      program = step(run).lower(*args).compile()
      moved = compiled.read(program, dict(on.shape)).collectives
      along = lambda axis: sum(t.bytes for t in moved if axis in t.axis) / 1e6  # noqa: B023
      bytes_ = f'expert {along("expert"):8.1f}, fsdp {along("fsdp"):8.1f} MB'
      memory = program.memory_analysis().temp_size_in_bytes / 1e6
      out = [np.asarray(o, np.float32) for o in program(*args)]
      exact = exact or out
      error = max(np.linalg.norm(o - e) / np.linalg.norm(e) for o, e in zip(out, exact))
      took = milliseconds(step(run), *args)
      print(f'{name:28} {took:9.2f} ms  {bytes_}  temporaries {memory:8.1f} MB  '
            f'error {error:.1e}', flush=True)  # fmt: skip


if __name__ == '__main__':
  main()
