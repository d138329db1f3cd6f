"""Experts on several devices: a gather of tokens, an all-to-all, a gather of weights.

  python bench/expert_parallel.py [--expert=4 --tokens=8192 --experts=128 --top_k=8 ...]

A dropless layer's forward and backward pass on all devices: 8 simulated ones on a CPU
(small sizes are the default there), or the GPUs of this machine. The fsdp axis has the
devices that remain. Peers in the same run: the all-to-all, with buffers for the worst
load, since no token may be dropped; and the weights of all experts on each device. Bytes
are those that a device receives, read from the compiled program; times are medians in
milliseconds; errors are relative to the gather of weights.
"""

import functools
import os

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def whole_experts(weights):
  """One device's weights -> the whole weights of its experts."""
  gather = functools.partial(jax.lax.all_gather, axis_name='fsdp', tiled=True)
  return [gather(w, axis=axis) for w, axis in zip(weights, (1, 1, 2))]


def all_weights(x_BTD, weight_BTk, choice_BTk, *weights):
  """Each device gathers the weights of all experts."""
  gather = functools.partial(jax.lax.all_gather, axis_name='expert', tiled=True)
  weights = map(gather, whole_experts(weights))
  return dropless._alone(x_BTD, weight_BTk, choice_BTk, *weights, backend='auto')[0]


def all_to_all(x_BTD, weight_BTk, choice_BTk, *weights):
  """Sends each selection to its expert's device, into a reserved row, and back."""
  (B, T, D), k, S = x_BTD.shape, choice_BTk.shape[-1], jax.lax.axis_size('expert')
  weights = whole_experts(weights)
  e, choice_M = len(weights[0]), choice_BTk.reshape(-1)
  places = B * T * min(k, e)  # The most rows that one device sends to another.
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
  return dropless.run(weights, x_BTD, weight_BTk, choice_BTk, backend='auto')


def step(run):
  """y, and the gradients of x, of the router's weights and of the experts."""

  def run_both(dy, x, weight, choice, *weights):
    forward = lambda x, weight, *weights: run(x, weight, choice, *weights)
    y, back = jax.vjp(forward, x, weight, *weights)
    return y, *back(dy)

  return jax.jit(run_both)


def inputs(on, a):
  rng, B = np.random.default_rng(0), on.size
  shape = (B, a.tokens)
  logit = rng.normal(size=(*shape, a.experts)).astype(np.float32)
  # Some experts are more popular than others.
  logit += a.uneven * rng.normal(size=a.experts)
  choice = np.argpartition(-logit, a.top_k)[..., : a.top_k].astype(np.int32)
  weight = rng.random((*shape, a.top_k), np.float32)

  place = lambda value, spec: jax.device_put(value, NamedSharding(on, spec))

  def draw(spec, *shape):
    value = rng.standard_normal(shape, np.float32) / shape[-2] ** 0.5
    return place(jnp.asarray(value, a.dtype), spec)

  E, D, F = a.experts, a.width, a.hidden
  weights = draw(WIDE, E, D, F), draw(WIDE, E, D, F), draw(NARROW, E, F, D)
  dy, x = draw(ROWS, *shape, D), draw(ROWS, *shape, D)
  return dy, x, place(weight, ROWS), place(choice, ROWS), *weights


def main():
  small = jax.default_backend() == 'cpu'
  sizes = dict(tokens=256, experts=32, top_k=8, width=128, hidden=64, dtype='float32')
  large = dict(tokens=8192, experts=128, top_k=8, width=2048, hidden=768)
  sizes |= {} if small else large | dict(dtype='bfloat16')
  sizes |= dict(expert=min(4, jax.device_count()), uneven=0.1)
  a = timing.options(__doc__, **sizes).parse_args()
  on = mesh.make(data=1, fsdp=-1, expert=a.expert, tensor=1, context=1)
  print(timing.title(vars(a)))
  args, expected = inputs(on, a), None
  specs = dict(in_specs=(ROWS, ROWS, ROWS, WIDE, WIDE, NARROW), out_specs=ROWS)
  shard = functools.partial(jax.shard_map, mesh=on, check_vma=False, **specs)
  methods = {
    'peer weights of all experts': shard(all_weights),
    'ours gather of tokens': gathered_tokens,
    'peer all-to-all, padded': shard(all_to_all),
  }
  with jax.set_mesh(on):
    for name, run in methods.items():
      program = step(run).lower(*args).compile()
      transfers = compiled.read(program.as_text(), dict(on.shape)).collectives
      expert, fsdp = (
        sum(t.bytes for t in transfers if axis in t.axis) / 1e6
        for axis in ('expert', 'fsdp')
      )
      memory = program.memory_analysis().temp_size_in_bytes / 1e6
      actual = jax.device_get(program(*args))
      expected = expected or actual
      error = max(map(timing.relative_error, actual, expected))
      print(f'{name:28} {timing.milliseconds(step(run), *args):9.2f} ms  '
            f'expert {expert:8.1f}, fsdp {fsdp:8.1f} MB  temporaries {memory:8.1f} MB  '
            f'error {error:.1e}', flush=True)  # fmt: skip


if __name__ == '__main__':
  main()
