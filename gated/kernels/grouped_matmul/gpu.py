"""The grouped matmul on GPUs: two Pallas kernels, lowered through Triton.

One kernel multiplies rows by their groups' matrices, for the product and for the gradient
of x. The other sums x^T dy over each group's rows, for the gradient of w. A group may
start at any row: a block belongs to one group and masks the rows of other groups.

N rows  E groups  A width in  B width out  M blocks  R rows of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# Rows and columns of a block, terms added at a time; warps, and stages of the loop.
# Measured on one H200: bench/grouped_matmul.py.
TILE = dict(rows=128, columns=256, terms=64, warps=8, stages=4)
OUTER_TILE = dict(rows=128, columns=256, terms=32, warps=8, stages=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(x_NA, w_EAB, size_E, interpret: bool = False):
  """As `grouped_matmul`: widths are multiples of 64, and N is at least a block."""
  return _products(x_NA, w_EAB, size_E, transposed=False, interpret=interpret)


def _forward(x_NA, w_EAB, size_E, interpret):
  return multiply(x_NA, w_EAB, size_E, interpret), (x_NA, w_EAB, size_E)


def _backward(interpret, saved, dy_NB):
  x_NA, w_EAB, size_E = saved
  dx_NA = _products(dy_NB, w_EAB, size_E, transposed=True, interpret=interpret)
  return dx_NA, _outer_products(x_NA, dy_NB, size_E, w_EAB.dtype, interpret), None


multiply.defvjp(_forward, _backward)


def _tile(width: int, most: int) -> int:
  """The largest power of two up to `most` that divides a width."""
  return min(most, width & -width)


def _products(x_NA, w_EAB, size_E, *, transposed: bool, interpret: bool):
  """x times each group's matrix, or times its transpose -> y_NB."""
  (N, A), E = x_NA.shape, len(w_EAB)
  B = w_EAB.shape[1 if transposed else 2]
  R, T, C = TILE['rows'], _tile(A, TILE['terms']), _tile(B, TILE['columns'])
  blocks = N // R + E
  count_E = -(-size_E // R)
  after_E = jnp.cumsum(count_E)
  block_M = jnp.arange(blocks, dtype=jnp.int32)
  group_M = jnp.searchsorted(after_E, block_M, side='right').astype(jnp.int32)
  safe_M = jnp.minimum(group_M, E - 1)
  end_E = jnp.cumsum(size_E).astype(jnp.int32)
  first_M = (end_E - size_E)[safe_M] + (block_M - (after_E - count_E)[safe_M]) * R
  end_M = jnp.where(group_M < E, end_E[safe_M], 0)

  def kernel(group_ref, first_ref, end_ref, x_ref, w_ref, y_ref):
    m, column = pl.program_id(0), pl.program_id(1) * C
    group, first, end = group_ref[m], first_ref[m], end_ref[m]
    # The last blocks start earlier, so that no row beyond N is accessed.
    start = jnp.minimum(first, N - R)
    row_R = start + jnp.arange(R)
    mine_R1 = ((row_R >= first) & (row_R < end))[:, None]

    @pl.when(first < end)
    def _():
      def add(i, y_RC):
        terms = pl.ds(i * T, T)
        x_RT = plt.load(x_ref.at[pl.ds(start, R), terms], mask=mine_R1, other=0)
        if transposed:
          w_CT = plt.load(w_ref.at[group, pl.ds(column, C), terms])
          return y_RC + plt.dot(x_RT, w_CT, trans_b=True)
        w_TC = plt.load(w_ref.at[group, terms, pl.ds(column, C)])
        return y_RC + plt.dot(x_RT, w_TC)

      y_RC = jax.lax.fori_loop(0, A // T, add, jnp.zeros((R, C), jnp.float32))
      where = y_ref.at[pl.ds(start, R), pl.ds(column, C)]
      plt.store(where, y_RC.astype(y_ref.dtype), mask=mine_R1)

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((N, B), x_NA.dtype),
    grid=(blocks, B // C),
    compiler_params=_params(TILE),
    interpret=interpret,
    name='grouped_products',
  )(safe_M, first_M.astype(jnp.int32), end_M, x_NA, w_EAB)


def _outer_products(x_NA, dy_NB, size_E, dtype, interpret: bool):
  """Sums of x^T dy over each group's rows -> dw_EAB; zeros for an empty group."""
  (N, A), B, E = x_NA.shape, dy_NB.shape[1], len(size_E)
  T = OUTER_TILE['terms']
  R, C = _tile(A, OUTER_TILE['rows']), _tile(B, OUTER_TILE['columns'])
  end_E = jnp.cumsum(size_E).astype(jnp.int32)

  def kernel(end_ref, size_ref, x_ref, dy_ref, dw_ref):
    group, row, column = pl.program_id(2), pl.program_id(0) * R, pl.program_id(1) * C
    end, size = end_ref[group], size_ref[group]

    def add(i, dw_RC):
      first = end - size + i * T
      start = jnp.minimum(first, N - T)
      term_T = start + jnp.arange(T)
      mine_T1 = ((term_T >= first) & (term_T < end))[:, None]
      terms = pl.ds(start, T)
      x_TR = plt.load(x_ref.at[terms, pl.ds(row, R)], mask=mine_T1, other=0)
      dy_TC = plt.load(dy_ref.at[terms, pl.ds(column, C)], mask=mine_T1, other=0)
      return dw_RC + plt.dot(x_TR, dy_TC, trans_a=True)

    zeros = jnp.zeros((R, C), jnp.float32)
    dw_RC = jax.lax.fori_loop(0, pl.cdiv(size, T), add, zeros)
    plt.store(dw_ref.at[group, pl.ds(row, R), pl.ds(column, C)], dw_RC.astype(dtype))

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((E, A, B), dtype),
    grid=(A // R, B // C, E),
    compiler_params=_params(OUTER_TILE),
    interpret=interpret,
    name='grouped_outer_products',
  )(end_E, size_E.astype(jnp.int32), x_NA, dy_NB)


def _params(tile: dict):
  return plt.CompilerParams(num_warps=tile['warps'], num_stages=tile['stages'])
