"""Bytes that a program reads and writes in a chip's main memory: an estimate.

Every instruction outside fusions reads its operands and writes its result once. A slice
reads only its result, and an update in place costs only the update. Values in a TPU's
vector memory cost nothing. A kernel counts as if it read each operand once.
"""

from gated.pods.compiled.hlo import Computation, Instruction, Shape

# Opcodes that compute nothing and return existing arrays.
VIEWS = {
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'optimization-barrier',
  'add-dependency',
}
# Opcodes that move no bytes, or end an operation that was counted at its start.
SILENT = VIEWS | {
  'parameter',
  'after-all',
  'partition-id',
  'replica-id',
  'async-start',
  'async-update',
  'async-done',
  'domain',
}
SLICES = ('dynamic-slice', 'slice', 'gather')


def of(program: dict[str, Computation], computation: Computation, op: Instruction) -> int:
  """Bytes of one run of an instruction outside fusions."""
  if op.opcode in SILENT or op.opcode.endswith('-done') or op.target == 'AllocateBuffer':
    return 0
  if op.opcode == 'copy-start':
    return _main(op.shapes[:2])
  if op.opcode == 'slice-start':
    return 2 * op.shapes[1].bytes
  if op.opcode == 'fusion':
    return _fusion(program, computation, op)
  if op.opcode in SLICES:
    return 2 * _main(op.shapes)
  sizes = [_main(computation.body[name].shapes) for name in op.operands]
  if op.opcode == 'dynamic-update-slice':
    return 2 * sizes[1]
  if op.opcode.endswith('-start'):
    return 3 * sum(sizes)
  return sum(sizes) + _main(op.shapes)


def _main(shapes: tuple[Shape, ...]) -> int:
  """Bytes of the arrays in main memory."""
  return sum(shape.bytes for shape in shapes if shape.space in (0, 5))


def _fusion(program, computation: Computation, op: Instruction) -> int:
  callee = program[op.called['calls'][0]]
  total = 0
  for n, name in enumerate(op.operands):
    part = _read(program, callee, callee.parameters[n])
    total += min(part, _main(computation.body[name].shapes))
  return total + sum(_written(callee, *result) for result in results(callee, op))


def _read(program, callee: Computation, op: Instruction) -> int:
  """Bytes that a fusion reads of its parameter, or of a view of it."""
  total = 0
  for user in callee.users[op.name]:
    first = user.operands[0] == op.name
    if user.opcode == 'bitcast':
      total += _read(program, callee, user)
    elif first and user.opcode in SLICES:
      total += user.bytes
    elif user.opcode == 'fusion':
      inner = program[user.called['calls'][0]]
      for n, name in enumerate(user.operands):
        if name == op.name:
          total += _read(program, inner, inner.parameters[n])
    elif not (
      (first and user.opcode == 'dynamic-update-slice')
      or user.opcode in ('tuple', 'get-tuple-element')
      or 'AsyncColl' in user.target
    ):
      return op.bytes
  return min(total, op.bytes)


def results(callee: Computation, op: Instruction):
  """-> (instruction, shapes) for each element of a fusion's result; skips bitcasts."""
  root, start = callee.root, 0
  for name in root.operands if root.opcode == 'tuple' else [root.name]:
    part = callee.body[name]
    shapes = op.shapes[start : start + len(part.shapes)]
    start += len(shapes)
    while part.opcode == 'bitcast':
      part = callee.body[part.operands[0]]
    yield part, shapes


def _written(callee: Computation, part: Instruction, shapes: tuple[Shape, ...]) -> int:
  """Bytes written for an element of a fusion's result.

  0 for an operand that the fusion returns; the bytes of the update for an operand that
  is updated in place.
  """
  if part.opcode in ('parameter', 'get-tuple-element'):
    return 0
  if 'AsyncCollective' in part.target:
    # The second result of a start is the collective's.
    return _main(shapes[1:2]) if part.target.endswith('Start') else 0
  if part.opcode == 'dynamic-update-slice':
    return min(callee.body[part.operands[1]].bytes, _main(shapes))
  return _main(shapes)
