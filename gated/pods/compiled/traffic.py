"""Bytes that a program reads and writes in a chip's main memory: an estimate.

Every instruction that is not inside of a fusion reads its operands and writes its result
once. What is only sliced is read as far as the slices go, and what is updated in place
costs its update. Values in a TPU's vector memory cost nothing. Kernels that read an
operand several times are counted as if they read it once.
"""

from gated.pods.compiled.hlo import Computation, Instruction, Shape

# They compute nothing and hand on what is there.
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
# Nor do these, or they end what was counted as it started.
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
  """Bytes of one run of an instruction, which is in no fusion."""
  if op.opcode in SILENT or op.opcode.endswith('-done'):
    return 0
  if op.target == 'AllocateBuffer':
    return 0
  if op.opcode == 'copy-start':
    return sum(_main(shape) for shape in op.shapes[:2])
  if op.opcode == 'slice-start':
    return 2 * op.shapes[1].bytes
  if op.opcode == 'fusion':
    return _fusion(program, computation, op)
  if op.opcode in SLICES:
    return sum(map(_main, op.shapes)) * 2
  if op.opcode == 'dynamic-update-slice':
    return 2 * _size(computation, op.operands[1])
  written = 0 if op.opcode.endswith('-start') else sum(map(_main, op.shapes))
  read = sum(_size(computation, name) for name in op.operands)
  return read + (2 * read if op.opcode.endswith('-start') else written)


def _main(shape: Shape) -> int:
  return shape.bytes if shape.space in (0, 5) else 0


def _size(computation: Computation, name: str) -> int:
  op = computation.body.get(name)
  return sum(map(_main, op.shapes)) if op else 0


def _fusion(program, computation: Computation, op: Instruction) -> int:
  callee = program[op.called['calls'][0]]
  total = 0
  for n, name in enumerate(op.operands):
    if n in callee.parameters:
      part = _read(program, callee, callee.parameters[n])
      total += min(part, _size(computation, name))
  return total + _written(callee, callee.root, op.shapes)


def _read(program, callee: Computation, op: Instruction) -> int:
  """How much of a fusion's parameter, or of a view of it, the fusion reads."""
  total = 0
  for user in callee.users[op.name]:
    if user.opcode == 'bitcast':
      total += _read(program, callee, user)
    elif user.opcode in SLICES and user.operands[0] == op.name:
      total += user.bytes
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == op.name:
      total += 0
    elif user.opcode == 'fusion':
      inner = program[user.called['calls'][0]]
      for n, name in enumerate(user.operands):
        if name == op.name and n in inner.parameters:
          total += _read(program, inner, inner.parameters[n])
    elif user.opcode in ('tuple', 'get-tuple-element') or 'AsyncColl' in user.target:
      total += 0
    else:
      return op.bytes
  return min(total, op.bytes)


def _written(callee: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> int:
  """What a fusion writes; what it only hands on, or updates in place, it does not."""
  while root.opcode == 'bitcast':
    root = callee.body[root.operands[0]]
  if root.opcode == 'tuple':
    total, at = 0, 0
    for name in root.operands:
      part = callee.body[name]
      total += _written(callee, part, shapes[at : at + len(part.shapes)])
      at += len(part.shapes)
    return total
  if root.opcode in ('parameter', 'get-tuple-element'):
    return 0
  if 'AsyncCollective' in root.target:
    # The result of a collective, in the second place of what starts it.
    return _main(shapes[1]) if root.target.endswith('Start') else 0
  if root.opcode == 'dynamic-update-slice':
    update = callee.body[root.operands[1]]
    return min(update.bytes, sum(map(_main, shapes)))
  return sum(map(_main, shapes))
