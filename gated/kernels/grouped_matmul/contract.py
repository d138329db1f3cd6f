"""The grouped matrix product: each row times the matrix of its own group.

N rows  E groups  A width in  B width out  M blocks  R rows of a block
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gated import config
from gated.devices import determinism, mesh
from gated.kernels import choice
from gated.kernels.grouped_matmul import gpu, tpu


def grouped_matmul(
  x_NA: jax.Array, w_EAB: jax.Array, size_E: jax.Array, *, backend: str
) -> jax.Array:
  """Rows sorted by group, a matrix and a number of rows per group -> y_NB.

  The sizes are integers; a group may be empty. The rows after the last group are
  unassigned: y and the gradient of x may hold garbage or NaN there, and x and the
  gradient of y are ignored there. Only 'ragged' multiplies every row by every matrix.
  Raises NotImplementedError if no backend supports the case.
  """
  knob = 'config.model.moe.backend'
  args = x_NA, w_EAB, size_E
  return choice.run('the grouped matmul', knob, backend, GROUPED, *args)


def _pallas(x_NA, w_EAB, size_E):
  """Our own kernels, for bfloat16 on GPUs."""
  if mesh.platform() != 'gpu':
    raise NotImplementedError('needs a GPU')
  if x_NA.dtype != jnp.bfloat16:
    raise NotImplementedError(f'computes in bfloat16, not {x_NA.dtype}')
  N, A, B = len(x_NA), *w_EAB.shape[1:]
  if A % 64 or B % 64:
    raise NotImplementedError(f'needs widths that are multiples of 64, not {A} and {B}')
  if N < 256:
    raise NotImplementedError(f'needs at least 256 rows, not {N}')
  return gpu.multiply(x_NA, w_EAB, size_E)


def _megablox(x_NA, w_EAB, size_E):
  """JAX's own kernels for TPUs."""
  if mesh.platform() != 'tpu':
    raise NotImplementedError('needs a TPU')
  for dim, n in zip(('rows', 'width in', 'width out'), (len(x_NA), *w_EAB.shape[1:])):
    if n % tpu.LANES:
      raise NotImplementedError(f'needs multiples of 128, not {dim} of {n}')
  return tpu.multiply(x_NA, w_EAB, size_E)


def _ragged(x_NA, w_EAB, size_E):
  """XLA's ragged_dot, for small sizes on TPUs.

  The gradient of w has no kernel: it multiplies every row by every matrix.
  """
  if mesh.platform() != 'tpu':
    raise NotImplementedError('multiplies every row by every matrix')
  return jax.lax.ragged_dot(x_NA, w_EAB, size_E)


def _blocked(x_NA, w_EAB, size_E):
  """Pads each group to whole blocks of rows, so that a block has one matrix.

  A CPU loops over the blocks that are not empty. Other platforms multiply batches of
  blocks, each with a copy of its matrix, which is slow.
  """
  rows, dtype = block_rows(len(x_NA), len(w_EAB)), x_NA.dtype
  if mesh.platform() == 'cpu':
    # CPUs have no products in bfloat16; float32 is as exact, and faster.
    x_NA, w_EAB = x_NA.astype(jnp.float32), w_EAB.astype(jnp.float32)
  return _by_blocks(x_NA, w_EAB, size_E, rows).astype(dtype)


def block_rows(n: int, groups: int) -> int:
  """Rows of a block: half the mean group, so that padding adds half on average."""
  return max(8, min(256, 1 << max(n // (2 * groups), 1).bit_length() - 1))


def _blocks(size_E: jax.Array, n: int, rows: int):
  """-> each block's group (E for an empty block) and its row numbers (n for padding)."""
  blocks = n // rows + len(size_E)
  count_E = -(-size_E // rows)
  end_E = jnp.cumsum(count_E)
  block_M = jnp.arange(blocks)
  group_M = jnp.searchsorted(end_E, block_M, side='right')
  safe_M = jnp.minimum(group_M, len(size_E) - 1)
  nth_M = block_M - (end_E - count_E)[safe_M]
  inside_MR = nth_M[:, None] * rows + jnp.arange(rows)[None]
  row_MR = (jnp.cumsum(size_E) - size_E)[safe_M][:, None] + inside_MR
  real_MR = (group_M < len(size_E))[:, None] & (inside_MR < size_E[safe_M][:, None])
  return group_M, jnp.where(real_MR, row_MR, n)


def _gathered(x_NA, row_MR):
  """Row numbers -> the rows x_MRA, with zeros for padding."""
  return x_NA.at[row_MR].get(mode='fill', fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_blocks(x_NA, w_EAB, size_E, rows):
  group_M, row_MR = _blocks(size_E, len(x_NA), rows)
  y_MRB = _products(_gathered(x_NA, row_MR), w_EAB, group_M)
  # Each row is in exactly one block.
  y_NB = jnp.zeros((len(x_NA), w_EAB.shape[2]), x_NA.dtype)
  flat = y_MRB.reshape(-1, w_EAB.shape[2])
  return y_NB.at[row_MR.reshape(-1)].set(flat, mode='drop')


def _by_blocks_forward(x_NA, w_EAB, size_E, rows):
  return _by_blocks(x_NA, w_EAB, size_E, rows), (x_NA, w_EAB, size_E)


def _by_blocks_backward(rows, saved, dy_NB):
  x_NA, w_EAB, size_E = saved
  dx_NA = _by_blocks(dy_NB, w_EAB.swapaxes(1, 2), size_E, rows)
  group_M, row_MR = _blocks(size_E, len(x_NA), rows)
  x_MRA, dy_MRB = _gathered(x_NA, row_MR), _gathered(dy_NB, row_MR)
  dw_EAB = _outer_products(x_MRA, dy_MRB, group_M, len(w_EAB))
  return dx_NA, dw_EAB.astype(w_EAB.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)

# Blocks multiplied at a time; not used on a CPU, where batches are no faster.
_BATCH = 128


def _products(x_MRA, w_EAB, group_M):
  """Blocks times their groups' matrices -> y_MRB."""
  M, R, _ = x_MRA.shape
  E, _, B = w_EAB.shape
  one = lambda at: at[0] @ w_EAB[jnp.minimum(at[1], E - 1)]
  if mesh.platform() != 'cpu':
    return jax.lax.map(one, (x_MRA, group_M), batch_size=_BATCH)
  put = lambda m, y: y.at[m].set(one((x_MRA[m], group_M[m])))
  return jax.lax.fori_loop(0, (group_M < E).sum(), put, jnp.zeros((M, R, B), x_MRA.dtype))


def _outer_products(x_MRA, dy_MRB, group_M, E):
  """Sums of x^T dy over the blocks of each group -> dw_EAB, in float32."""
  M, _, A = x_MRA.shape
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  start = jnp.zeros((E, A, dy_MRB.shape[2]), jnp.float32)
  if mesh.platform() == 'cpu' or determinism.applies(mesh.platform()):
    outer = lambda m: product('ra,rb->ab', x_MRA[m], dy_MRB[m])
    add = lambda m, dw_EAB: dw_EAB.at[group_M[m]].add(outer(m))
    return jax.lax.fori_loop(0, (group_M < E).sum(), add, start)
  fill = -M % _BATCH

  def pieces(a, value):
    a = jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1), constant_values=value)
    return a.reshape(-1, _BATCH, *a.shape[1:])

  def add_batch(dw_EAB, at):
    x, dy, group = at
    return dw_EAB.at[group].add(product('mra,mrb->mab', x, dy), mode='drop'), None

  batches = pieces(x_MRA, 0), pieces(dy_MRB, 0), pieces(group_M, E)
  return jax.lax.scan(add_batch, start, batches)[0]


# In the order in which 'auto' tries them.
GROUPED: dict[str, Callable] = {
  'pallas': _pallas,
  'megablox': _megablox,
  'ragged': _ragged,
  'blocked': _blocked,
}


def check_grouped(backend: str) -> None:
  """Raises ValueError, naming the knob, for a backend that does not exist."""
  config.one_of('config.model.moe.backend', backend, ('auto', *GROUPED))
