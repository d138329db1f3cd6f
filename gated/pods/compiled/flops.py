"""Multiply-adds of a compiled program: matrix products, and the kernels that hold them.

2 FLOPs a multiply-add. Additions, exponentials and the like are not counted.
"""

import math
import re
from collections.abc import Callable

from gated.pods.compiled.hlo import Computation, Instruction, Shape

GROUPED = 'grouped products'

# Custom calls that place, check, transfer or draw, and multiply nothing.
FREE = re.compile(
  r'AllocateBuffer|PrepareAsync|ConcatBitcast|ZeroCrop|SliceId|Assume|AsyncCollective'
  r'|Sharding|SPMD|annotate|MoveTo|Barrier|Pin'
  r'|ProduceToken|TopK|[Ss]ort|threefry|rng|Rng|Resize|SliceToDynamic|PadToStatic'
  r'|X64|xla_ffi_python|callback|Token|LayoutConstraint|CreateBuffer|Alias|megascale'
)


def of(computation: Computation, op: Instruction, fill: float = 1.0) -> float | None:
  """FLOPs of one run of an instruction, what it calls left out; None if not known.

  `fill` is the share of the rows of grouped products that are somebody's.
  """
  found = _each(computation, op)
  rows = op.opcode == 'ragged-dot' or (found and kernel(op) == GROUPED)
  return found * fill if found and rows else found


def _each(computation: Computation, op: Instruction) -> float | None:
  if op.opcode in ('dot', 'ragged-dot'):
    return _PRODUCTS[op.opcode](computation, op)
  if op.opcode == 'convolution':
    return _convolution(computation, op)
  if op.opcode == 'custom-call':
    return _custom_call(computation, op)
  return 0.0


def kernel(op: Instruction) -> str:
  """A custom call -> what it is called in the table, or by whoever wrote it."""
  if op.opcode != 'custom-call':
    return ''
  found = _entry(op)
  if found:
    return found[0]
  names = [op.target, *reversed(op.source.split('/'))]
  plain = [n for n in names if n not in ('', 'pallas_call', *_GENERIC)]
  return plain[0] if plain else op.target


def _dot(computation: Computation, op: Instruction) -> float:
  left = computation.operand(op, 0).dims
  summed = math.prod(left[d] for d in op.dims('lhs_contracting_dims'))
  return 2.0 * op.shapes[0].size * summed


def _ragged_dot(computation: Computation, op: Instruction) -> float:
  """Rows are a group's or no group's: each meets one matrix."""
  left = computation.operand(op, 0).dims
  summed = math.prod(left[d] for d in op.dims('lhs_contracting_dims'))
  ragged = op.dims('lhs_ragged_dims')
  groups = 1
  if set(ragged) & set(op.dims('lhs_contracting_dims')):
    groups = op.shapes[0].dims[0]
  return 2.0 * op.shapes[0].size * summed / groups


_PRODUCTS = {'dot': _dot, 'ragged-dot': _ragged_dot}


def _convolution(computation: Computation, op: Instruction) -> float:
  """Products of places that exist: what padding and dilation add is not multiplied.

  TPUs write a matrix product as a convolution, its batch dims as dims of the window.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.words)
  assert labels, op.name
  left, right = computation.operand(op, 0).dims, computation.operand(op, 1).dims
  out = op.shapes[0].dims
  places = 1
  for n, window in enumerate(_window(op.words)):
    digit = str(n)
    places *= _meetings(
      left[labels[1].index(digit)],
      right[labels[2].index(digit)],
      out[labels[3].index(digit)],
      **window,
    )
  batch = out[labels[3].index('b')]
  features = out[labels[3].index('f')] * right[labels[2].index('i')]
  return 2.0 * batch * features * places


def _window(words: str) -> list[dict[str, int]]:
  """`window={size=2x3 stride=1x2 pad=0_0x1_1}` -> each dim's stride, pad, dilation."""
  found = re.search(r'window={([^}]*)}', words)
  if not found:
    return []
  fields = dict(part.split('=') for part in found[1].split())
  rank = len(fields['size'].split('x'))
  number = lambda name, n: int(fields[name].split('x')[n]) if name in fields else 1
  dims = []
  for n in range(rank):
    pad = fields['pad'].split('x')[n].split('_')[0] if 'pad' in fields else '0'
    dims.append(
      dict(
        stride=number('stride', n),
        low=int(pad),
        left_step=number('lhs_dilate', n),
        right_step=number('rhs_dilate', n),
      )
    )
  return dims


def _meetings(left, right, out, *, stride, low, left_step, right_step) -> int:
  """Pairs (place of the output, place of the window) that meet a place of the input."""
  if left_step == stride == right_step == 1 and low == 0 and left == out + right - 1:
    return out * right
  met = 0
  last = (left - 1) * left_step
  for k in range(right):
    # The output's places o with 0 <= o * stride + at <= last, at a multiple of left_step.
    at = k * right_step - low
    first, final = max(0, -(at // stride)), min(out - 1, (last - at) // stride)
    period = left_step // math.gcd(stride, left_step)
    for o in range(first, min(final, first + period - 1) + 1):
      if (o * stride + at) % left_step == 0:
        met += (final - o) // period + 1
        break
  return met


def _custom_call(computation: Computation, op: Instruction) -> float | None:
  found = _entry(op)
  if found:
    return found[1]([computation.body[name].shapes for name in op.operands], op)
  return 0.0 if FREE.search(op.target) else None


# What a kernel computes is told from its name; these say only who made it.
_GENERIC = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call', 'mosaic_gpu')


def _entry(op: Instruction):
  """A custom call -> (the kernel's name, its count), or None.

  The innermost name that the table knows decides, where the target is anybody's.
  """
  names = (op.target,)
  if op.target.startswith(_GENERIC):
    names = (op.name, *reversed(op.source.split('/')))
  for name in names:
    for pattern, entry in KERNELS.items():
      if re.search(pattern, name):
        return entry
  return None


def _splash(products: int, fused: int = 0) -> Callable:
  """q (..., H, T, K) and k (..., S, K): `products` of H T S K, the causal half.

  Blocks above the diagonal are skipped, so half is what is done, and what is needed. The
  kernel of dk and dv that makes dq too has a result for it with a dim more than q, and
  does `fused` products.
  """

  def count(operands: list[tuple[Shape, ...]], op: Instruction) -> float:
    q, k = [s[0] for s in operands if s and _is_float(s[0]) and len(s[0].dims) > 1][:2]
    parts = any(len(s.dims) > len(q.dims) for s in op.shapes)
    done = fused if fused and parts else products
    return 2.0 * done * q.size * k.dims[-2] / 2

  return count


def _grouped(operands: list[tuple[Shape, ...]], op: Instruction) -> float | None:
  """Rows (N, A) by the matrices (E, A, B) of their groups, or rows by rows: 2 N A B."""
  arrays = [s[0] for s in operands if s and _is_float(s[0]) and len(s[0].dims) > 1]
  made = [s for s in op.shapes if _is_float(s) and len(s.dims) == 3]
  rows = next((s for s in arrays if len(s.dims) == 2), None)
  stack = next((s for s in [*made, *arrays] if len(s.dims) == 3), None)
  if rows is None or stack is None:
    return None
  _, A, B = stack.dims
  return 2.0 * rows.size * B if made else 2.0 * rows.dims[0] * A * B


def _gemm(operands: list[tuple[Shape, ...]], op: Instruction) -> float | None:
  """cuBLAS: which dims are summed stands in its configuration."""
  found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.words)
  if not found:
    return None
  left = operands[0][0].dims
  summed = math.prod(left[int(n)] for n in re.findall(r'\d+', found[1]))
  return 2.0 * op.shapes[0].size * summed


def _cudnn(products: int) -> Callable:
  """q (B, T, H, K) and k (B, S, G, K), as JAX hands them over."""

  def count(operands: list[tuple[Shape, ...]], op: Instruction) -> float:
    half = 2 if 'CAUSAL' in op.words else 1
    return 2.0 * products * operands[0][0].size * operands[1][0].dims[1] / half

  return count


def _is_float(shape: Shape) -> bool:
  return shape.dtype.startswith(('bf', 'f'))


# A pattern of a custom call's target or name -> (its name here, its count). Backward
# passes make the scores again: 5 products, or 3 for dq and 4 for dk and dv.
KERNELS: dict[str, tuple[str, Callable]] = {
  r'splash_\w+_fwd': ('splash forward', _splash(2)),
  r'splash_\w+_dq': ('splash dq', _splash(3)),
  r'splash_\w+_dkv': ('splash dkv', _splash(4, fused=5)),
  r'\bt?gmm\b|grouped_(outer_)?products': (GROUPED, _grouped),
  r'__cublas': ('cuBLAS', _gemm),
  r'__cudnn\$fmha\w*Backward': ('cuDNN attention, backward', _cudnn(5)),
  r'__cudnn\$fmha': ('cuDNN attention', _cudnn(2)),
}
