"""The embedding table: the sharded lookup and its gradient.

V vocabulary  D width  B batch  T tokens  N tokens of an inner group
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gated.devices import collectives, determinism, mesh
from gated.model.layers import Numerics, normal_param


class Embed(nnx.Module):
  """A table of V vectors of width D: tokens (B, T) -> (B, T, D)."""

  def __init__(self, key: jax.Array, *, vocab: int, width: int, numerics: Numerics):
    self.compute = numerics.compute
    draw = functools.partial(normal_param, std=numerics.init_std, dtype=numerics.weights)
    self.table = draw(key, (vocab, width), ('vocab', 'embed'))

  def __call__(self, token_BT: jax.Array) -> jax.Array:
    return _look_up(self.table[...], token_BT, self.compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VD: jax.Array, token_BT: jax.Array, compute: str) -> jax.Array:
  read = _sharded(_read, ('VD', 'BT'), 'BTD', width=table_VD.shape[1])
  return read(table_VD.astype(compute), token_BT)


def _look_up_forward(table_VD, token_BT, compute):
  return _look_up(table_VD, token_BT, compute), (token_BT, table_VD)


def _look_up_backward(compute, saved, dx_BTD):
  token_BT, table_VD = saved
  count, width = table_VD.shape
  add = functools.partial(_sum_rows, count=count)
  d_VD = _sharded(add, ('BT', 'BTD'), 'VD', width=width)(token_BT, dx_BTD)
  return d_VD.astype(table_VD.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)

# The devices of an inner group split the table's columns; each takes at least this many.
# An accelerator's memory reads and adds rows of this width at a time.
COLUMNS = 128


def _sharded(run, ins: tuple[str, ...], out: str, *, width: int):
  """A function of one device's shards -> the same function of whole arrays.

  Arrays are named by their dims: 'VD' is a table, 'BT' tokens, 'BTD' their vectors.
  """
  current = mesh.current()
  if current is None:
    return functools.partial(run, groups=collectives.TableGroups())
  VD, BT = (
    mesh.spec(axes, current) for axes in (('vocab', 'embed'), ('batch', 'tokens'))
  )
  specs = {'VD': VD, 'BT': BT, 'BTD': P(*BT, None)}
  groups = collectives.table_groups(current, VD, BT)
  n = max(n for n in groups.width.sizes() if n == 1 or n * COLUMNS <= width)
  return jax.shard_map(
    functools.partial(run, groups=groups.with_inner(n)),
    mesh=current,
    in_specs=tuple(specs[name] for name in ins),
    out_specs=specs[out],
    check_vma=False,
  )


def _read(table_VD, token_BT, *, groups: collectives.TableGroups):
  """Reads this device's columns for its group -> all columns of its own tokens."""
  inner, outer, (B, T) = groups.inner, groups.outer, token_BT.shape
  table_VD = outer.all_gather(table_VD, 1)
  row_N = _rows(inner.all_gather(token_BT.reshape(-1), 0), len(table_VD), groups)
  x_ND = groups.vocab.sum(table_VD.at[row_N].get(mode='fill', fill_value=0))
  x_ND = inner.all_to_all(x_ND, split=0, join=1)
  # A device's columns are not contiguous in the table: one part for each outer index.
  return x_ND.reshape(B, T, inner.size, outer.size, -1).swapaxes(2, 3).reshape(B, T, -1)


def _sum_rows(token_BT, dx_BTD, *, count: int, groups: collectives.TableGroups):
  """Gradients of tokens -> that of a table of `count` rows: `_read` in reverse."""
  inner, outer, (B, T) = groups.inner, groups.outer, token_BT.shape
  dx_ND = dx_BTD.reshape(B * T, outer.size, inner.size, -1).swapaxes(1, 2)
  dx_ND = inner.all_to_all(dx_ND.reshape(B * T, -1), split=1, join=0)
  rows = count // groups.vocab.size
  row_N = _rows(inner.all_gather(token_BT.reshape(-1), 0), rows, groups)
  # A frequent token's gradient has thousands of terms, hence float32.
  dx_ND = dx_ND.astype(jnp.float32)
  d_VD = jnp.zeros((rows, dx_ND.shape[1]), jnp.float32)
  if determinism.applies(mesh.platform()):
    d_VD = determinism.add_rows(d_VD, row_N, dx_ND)
  else:
    d_VD = d_VD.at[row_N].add(dx_ND, mode='drop')
  return groups.replicas.sum(outer.reduce_scatter(d_VD, 1))


def _rows(token_N, rows: int, groups: collectives.TableGroups):
  """Tokens -> rows of this device's shard; `rows` for tokens of other shards."""
  if groups.vocab.size == 1:
    return token_N
  row_N = token_N - rows * groups.vocab.index()
  return jnp.where((row_N >= 0) & (row_N < rows), row_N, rows)
