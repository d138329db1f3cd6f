"""FLOPs of a compiled program's matrix products, and of kernels with matrix products.

A multiply-add is 2 FLOPs. Additions, exponentials and the like are not counted.
"""

import math
import re
from collections.abc import Callable

from gated.pods.compiled.hlo import Computation, Instruction, Shape

GROUPED = 'grouped products'

# Custom calls without matrix products: placement, checks, transfers, random numbers.
FREE = re.compile(
  r'AllocateBuffer|PrepareAsync|ConcatBitcast|ZeroCrop|SliceId|Assume|AsyncCollective'
  r'|Sharding|SPMD|annotate|MoveTo|Barrier|Pin'
  r'|ProduceToken|TopK|[Ss]ort|threefry|rng|Rng|Resize|SliceToDynamic|PadToStatic'
  r'|X64|xla_ffi_python|callback|Token|LayoutConstraint|CreateBuffer|Alias|megascale'
)


def of(computation: Computation, op: Instruction, fill: float = 1.0) -> float | None:
  """FLOPs of one run of an instruction without its callees; None if not known.

  `fill` is the share of the rows of grouped products that hold tokens.
  """
  if op.opcode == 'dot':
    return _product(computation, op)
  if op.opcode == 'ragged-dot':
    return _product(computation, op) * fill
  if op.opcode == 'convolution':
    return _convolution(computation, op)
  if op.opcode == 'custom-call':
    return _custom_call(computation, op, fill)
  return 0.0


def kernel(op: Instruction) -> str:
  """A custom call -> its name in KERNELS, or else in its source."""
  entry = _entry(op)
  if entry:
    return entry[0]
  names = [op.target, *reversed(op.source.split('/'))]
  return next((n for n in names if n not in ('', 'pallas_call', *_GENERIC)), op.target)


def _product(computation: Computation, op: Instruction) -> float:
  """A dot, or a ragged dot: it multiplies each row by the matrix of the row's group."""
  left = computation.operand(op, 0).dims
  summed_dims = op.dims('lhs_contracting_dims')
  summed = math.prod(left[d] for d in summed_dims)
  ragged_sum = set(op.dims('lhs_ragged_dims')) & set(summed_dims)
  groups = op.shapes[0].dims[0] if ragged_sum else 1
  return 2.0 * op.shapes[0].size * summed / groups


def _convolution(computation: Computation, op: Instruction) -> float:
  """Products of real input elements, without the zeros of padding and dilation.

  TPUs write a matrix product as a convolution, with batch dims as window dims.
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
  match = re.search(r'window={([^}]*)}', words)
  if not match:
    return []
  fields = dict(part.split('=') for part in match[1].split())
  rank = len(fields['size'].split('x'))
  column = lambda name: fields[name].split('x') if name in fields else ['1'] * rank
  pads = fields['pad'].split('x') if 'pad' in fields else ['0_0'] * rank
  columns = zip(column('stride'), pads, column('lhs_dilate'), column('rhs_dilate'))
  return [
    dict(stride=int(s), low=int(pad.split('_')[0]), left_step=int(l), right_step=int(r))
    for s, pad, l, r in columns
  ]


def _meetings(left, right, out, *, stride, low, left_step, right_step) -> int:
  """Pairs (output position, window position) that read an input element."""
  if left_step == stride == right_step == 1 and low == 0 and left == out + right - 1:
    return out * right
  pairs = 0
  last = (left - 1) * left_step
  for k in range(right):
    # Output positions o with 0 <= o * stride + at <= last, a multiple of left_step.
    at = k * right_step - low
    first, final = max(0, -(at // stride)), min(out - 1, (last - at) // stride)
    period = left_step // math.gcd(stride, left_step)
    for o in range(first, min(final, first + period - 1) + 1):
      if (o * stride + at) % left_step == 0:
        pairs += (final - o) // period + 1
        break
  return pairs


def _custom_call(computation: Computation, op: Instruction, fill: float) -> float | None:
  entry = _entry(op)
  if not entry:
    return 0.0 if FREE.search(op.target) else None
  name, count = entry
  flops = count([computation.body[name].shapes for name in op.operands], op)
  return flops * fill if flops and name == GROUPED else flops


# Targets that name a kernel's compiler; the kernel's own name is in its source.
_GENERIC = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call', 'mosaic_gpu')


def _entry(op: Instruction):
  """A custom call -> its entry in KERNELS, or None.

  With a generic target, the entry is that of the innermost name of its source in KERNELS.
  """
  names = (op.target,)
  if op.target.startswith(_GENERIC):
    names = (op.name, *reversed(op.source.split('/')))
  for name in names:
    for pattern, entry in KERNELS.items():
      if re.search(pattern, name):
        return entry
  return None


def _matrices(operands: list[tuple[Shape, ...]]) -> list[Shape]:
  """The operands that are floating-point arrays of two or more dims."""
  firsts = [shapes[0] for shapes in operands if shapes]
  return [s for s in firsts if _is_float(s) and len(s.dims) > 1]


def _splash(products: int, fused: int = 0) -> Callable:
  """q (..., H, T, K) and k (..., S, K): the causal half of `products` of H T S K.

  The kernel skips blocks above the diagonal. The kernel of dk and dv may compute dq too,
  in a result with one dim more than q; it then does `fused` products.
  """

  def count(operands: list[tuple[Shape, ...]], op: Instruction) -> float:
    q, k = _matrices(operands)[:2]
    parts = any(len(s.dims) > len(q.dims) for s in op.shapes)
    done = fused if fused and parts else products
    return 2.0 * done * q.size * k.dims[-2] / 2

  return count


def _grouped(operands: list[tuple[Shape, ...]], op: Instruction) -> float | None:
  """Rows (N, A) by the matrices (E, A, B) of their groups, or rows by rows: 2 N A B."""
  arrays = _matrices(operands)
  made = [s for s in op.shapes if _is_float(s) and len(s.dims) == 3]
  rows = [s for s in arrays if len(s.dims) == 2]
  stacks = [s for s in [*made, *arrays] if len(s.dims) == 3]
  if not rows or not stacks:
    return None
  _, A, B = stacks[0].dims
  return 2.0 * rows[0].size * B if made else 2.0 * rows[0].dims[0] * A * B


def _gemm(operands: list[tuple[Shape, ...]], op: Instruction) -> float | None:
  """cuBLAS; its configuration holds the contracting dims."""
  contracting = op.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
  if not contracting:
    return None
  left = operands[0][0].dims
  summed = math.prod(left[int(n)] for n in re.findall(r'\d+', contracting))
  return 2.0 * op.shapes[0].size * summed


def _cudnn(products: int) -> Callable:
  """q (B, T, H, K) and k (B, S, G, K), JAX's layout."""

  def count(operands: list[tuple[Shape, ...]], op: Instruction) -> float:
    half = 2 if 'CAUSAL' in op.words else 1
    return 2.0 * products * operands[0][0].size * operands[1][0].dims[1] / half

  return count


def _is_float(shape: Shape) -> bool:
  return shape.dtype.startswith(('bf', 'f'))


# A pattern of a custom call's target or name -> (its name here, its FLOPs). Backward
# passes recompute the scores: 5 products, or 3 for dq and 4 for dk and dv.
KERNELS: dict[str, tuple[str, Callable]] = {
  r'splash_\w+_fwd': ('splash forward', _splash(2)),
  r'splash_\w+_dq': ('splash dq', _splash(3)),
  r'splash_\w+_dkv': ('splash dkv', _splash(4, fused=5)),
  r'\bt?gmm\b|grouped_(outer_)?products': (GROUPED, _grouped),
  r'__cublas': ('cuBLAS', _gemm),
  r'__cudnn\$fmha\w*Backward': ('cuDNN attention, backward', _cudnn(5)),
  r'__cudnn\$fmha': ('cuDNN attention', _cudnn(2)),
}
