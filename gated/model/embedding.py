"""The embedding table, and how the devices that share it read it and add its gradient.

V vocabulary  D width  B batch  T tokens  N tokens of a device and its neighbours
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gated.devices import determinism, mesh, teams
from gated.model.layers import Numerics, normal_param


class Embed(nnx.Module):
  """A table of V vectors of width D, read by token (B, T) -> (B, T, D)."""

  def __init__(self, key: jax.Array, *, vocab: int, width: int, numerics: Numerics):
    self.compute = numerics.compute
    draw = functools.partial(normal_param, std=numerics.init_std, dtype=numerics.weights)
    self.table = draw(key, (vocab, width), ('vocab', 'embed'))

  def __call__(self, token_BT: jax.Array) -> jax.Array:
    return _look_up(self.table[...], token_BT, self.compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VD: jax.Array, token_BT: jax.Array, compute: str) -> jax.Array:
  run = _on_devices(_read, ('VD', 'BT'), 'BTD', width=table_VD.shape[1])
  return run(table_VD.astype(compute), token_BT)


def _look_up_forward(table_VD, token_BT, compute):
  return _look_up(table_VD, token_BT, compute), (token_BT, table_VD)


def _look_up_backward(compute, kept, dx_BTD):
  token_BT, table_VD = kept
  count, width = table_VD.shape
  add = functools.partial(_add_up, count=count)
  d_VD = _on_devices(add, ('BT', 'BTD'), 'VD', width=width)(token_BT, dx_BTD)
  return d_VD.astype(table_VD.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)

# Neighbours share a table by its columns, of which each takes at least so many: the rows
# that an accelerator's memory reads and adds at a time are no narrower.
COLUMNS = 128


def _on_devices(run, ins: tuple[str, ...], out: str, *, width: int):
  """A function of a device's own parts -> the function of the whole arrays.

  They are named by their dims: 'VD' is a table, 'BT' tokens, 'BTD' their vectors.
  """
  on = jax.sharding.get_abstract_mesh()
  if on.empty or on.size == 1:
    return functools.partial(run, devices=teams.Sharing())
  VD, BT = mesh.spec(('vocab', 'embed'), on), mesh.spec(('batch', 'tokens'), on)
  specs = {'VD': VD, 'BT': BT, 'BTD': P(*BT, None)}
  devices = teams.sharing(on, VD, BT)
  n = max(n for n in devices.width.sizes() if n == 1 or n * COLUMNS <= width)
  return jax.shard_map(
    functools.partial(run, devices=devices.by(n)),
    mesh=on,
    in_specs=tuple(specs[name] for name in ins),
    out_specs=specs[out],
    check_vma=False,
  )


def _read(table_VD, token_BT, *, devices: teams.Sharing):
  """Reads one's own columns for all neighbours' tokens; then each gets all of its own."""
  near, far, (B, T) = devices.near, devices.far, token_BT.shape
  table_VD = far.gather(table_VD, 1)
  row_N = _rows(near.gather(token_BT.reshape(-1), 0), len(table_VD), devices)
  x_ND = devices.vocab.sum(table_VD.at[row_N].get(mode='fill', fill_value=0))
  x_ND = near.exchange(x_ND, split=0, join=1)
  # A neighbour's columns lie apart in the table: one part in each of the teams.
  return x_ND.reshape(B, T, near.size, far.size, -1).swapaxes(2, 3).reshape(B, T, -1)


def _add_up(token_BT, dx_BTD, *, count: int, devices: teams.Sharing):
  """The gradient in a table of `count` rows: the way of `_read`, backwards."""
  near, far, (B, T) = devices.near, devices.far, token_BT.shape
  dx_ND = dx_BTD.reshape(B * T, far.size, near.size, -1).swapaxes(1, 2)
  dx_ND = near.exchange(dx_ND.reshape(B * T, -1), split=1, join=0)
  rows = count // devices.vocab.size
  row_N = _rows(near.gather(token_BT.reshape(-1), 0), rows, devices)
  # In float32, for a frequent token's gradient has thousands of terms.
  dx_ND = dx_ND.astype(jnp.float32)
  d_VD = jnp.zeros((rows, dx_ND.shape[1]), jnp.float32)
  if determinism.applies(mesh.platform()):
    d_VD = determinism.add_rows(d_VD, row_N, dx_ND)
  else:
    d_VD = d_VD.at[row_N].add(dx_ND, mode='drop')
  return devices.rest.sum(far.scatter(d_VD, 1))


def _rows(token_N, rows: int, devices: teams.Sharing):
  """Tokens -> their rows in one's own part of the vocabulary; `rows` for others'."""
  if devices.vocab.size == 1:
    return token_N
  row_N = token_N - rows * devices.vocab.place()
  return jnp.where((row_N >= 0) & (row_N < rows), row_N, rows)
