"""The grouped matmul on TPUs: JAX's own Pallas kernels, megablox, in blocks that fit.

The products visit only blocks with rows of a group: rows beyond the groups cost nothing,
are never summed, and hold uninitialized memory in y.

N rows  E groups  A width in  B width out
"""

from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

# Maximum rows, terms and columns of a block. Two blocks each of x, w and y and a float32
# sum must fit into 16 MiB of a core's memory.
BLOCK = (512, 1024, 1024)
LANES = 128


def multiply(x_NA, w_EAB, size_E, interpret: bool = False):
  """As `grouped_matmul`: N and the widths are multiples of 128."""
  return gmm(x_NA, w_EAB, size_E, x_NA.dtype, _blocks, interpret=interpret)


def _blocks(rows: int, terms: int, columns: int) -> tuple[int, int, int]:
  """The largest multiples of 128 up to BLOCK that divide each size."""
  return _block(rows, BLOCK[0]), _block(terms, BLOCK[1]), _block(columns, BLOCK[2])


def _block(n: int, most: int) -> int:
  return max((b for b in range(LANES, most + 1, LANES) if n % b == 0), default=0)
