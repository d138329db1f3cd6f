"""XLA's optimized HLO, read from its text: computations, instructions, shapes.

An instruction's operands and attributes are parsed when they are first read.
"""

import functools
import math
import re
from dataclasses import dataclass

_SHAPE = re.compile(r'([a-z]\w*)\[([0-9,<=? ]*)\](?:\{([^{}]*)\})?')
_START = re.compile(r'^\s+(?:ROOT )?%?([^\s=%]+) = ')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{\s*$')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|true_computation'
  r'|false_computation|called_computations)=(\{[^{}]*\}|%?[\w.\-]+)'
)


@dataclass(frozen=True)
class Shape:
  """The type of an array."""

  dtype: str
  dims: tuple[int, ...]
  space: int  # 0 is the chip's main memory; on a TPU 1 is its vector memory

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of a layout."""
    return -(-self.size * bits(self.dtype) // 8)

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  shapes: tuple[Shape, ...]  # of the result; a tuple's elements, flat
  opcode: str
  args: str  # the text between the opcode's parentheses
  words: str  # the attributes after them
  root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    return tuple(_OPERAND.findall(self.args))

  @functools.cached_property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Role (calls, to_apply, body, ...) -> the computations' names."""
    names = lambda text: tuple(n.strip(' %') for n in text.strip('{}').split(','))
    return {role: names(text) for role, text in _CALLED.findall(self.words)}

  def find(self, pattern: str) -> str:
    """The first group of a pattern in the attributes; '' without a match."""
    match = re.search(pattern, self.words)
    return match[1] if match else ''

  @property
  def source(self) -> str:
    """JAX's name of the operation."""
    return self.find(r'op_name="((?:[^"\\]|\\.)*)"')

  @property
  def target(self) -> str:
    """The target of a custom call."""
    return self.find(r'custom_call_target="([^"]*)"')

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  def dims(self, word: str) -> tuple[int, ...]:
    """`lhs_batch_dims={0,1}` -> (0, 1); () if absent."""
    return tuple(map(int, re.findall(r'\d+', self.find(rf'\b{word}={{([0-9,]*)}}'))))


@dataclass(frozen=True)
class Computation:
  """A named list of instructions, such as a fusion or a loop's body."""

  name: str
  entry: bool
  body: dict[str, Instruction]  # operands before their users

  @functools.cached_property
  def root(self) -> Instruction:
    return next(op for op in self.body.values() if op.root)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name of an instruction -> the instructions that read its result."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.body}
    for op in self.body.values():
      for name in dict.fromkeys(op.operands):
        users[name].append(op)
    return users

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """The parameters by number."""
    return {int(op.args): op for op in self.body.values() if op.opcode == 'parameter'}

  def operand(self, op: Instruction, i: int) -> Shape:
    """The shape of operand i, an array."""
    return self.body[op.operands[i]].shapes[0]


def parse(text: str) -> dict[str, Computation]:
  """A module's text -> its computations, callees before callers; the entry is last."""
  computations = {}
  header, lines = None, []
  for line in text.splitlines():
    if header is None:
      header = None if line.startswith('HloModule') else _HEADER.match(line)
    elif line.startswith('}') and not line.startswith('}}'):
      body = {op.name: op for op in map(instruction, lines)}
      computations[header[2]] = Computation(header[2], bool(header[1]), body)
      header, lines = None, []
    elif _START.match(line):
      lines.append(line)
    else:
      # An instruction may continue on the next lines.
      lines[-1] += ' ' + line
  if not any(c.entry for c in computations.values()):
    raise ValueError('no ENTRY computation in the text of the compiled program')
  return computations


def instruction(line: str) -> Instruction:
  """Parses a line such as `  ROOT %a.1 = f32[2,3]{1,0} add(%b, %c), metadata={...}`."""
  start = _START.match(line)
  assert start, line[:200]
  rest = line[start.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  open_at = rest.index('(')
  close_at = _closing(rest, open_at)
  return Instruction(
    name=start[1],
    shapes=shapes(result),
    opcode=rest[:open_at],
    args=rest[open_at + 1 : close_at],
    words=rest[close_at + 1 :],
    root=line.lstrip().startswith('ROOT '),
  )


def _closing(text: str, opening: int) -> int:
  """The index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, opening):
    depth += {'(': 1, ')': -1}.get(match[0], 0)
    if depth == 0:
      return match.start()
  raise ValueError(f'a parenthesis never closes: {text[:200]}')


@functools.lru_cache(maxsize=100_000)
def shapes(text: str) -> tuple[Shape, ...]:
  """'(f32[2]{0}, s32[])' -> its arrays, flat; tokens are left out."""
  arrays = []
  for dtype, dims, layout in _SHAPE.findall(text):
    if dtype in ('token', 'opaque'):
      continue
    space = re.search(r'S\((\d+)\)', layout)
    size = tuple(int(re.sub(r'\D', '', n)) for n in dims.split(',') if n.strip())
    arrays.append(Shape(dtype, size, int(space[1]) if space else 0))
  return tuple(arrays)


def bits(dtype: str) -> int:
  """'bf16' -> 16, 'f8e4m3fn' -> 8."""
  number = re.match(r'[a-z]+(\d+)', dtype)
  if dtype != 'pred' and not number:
    raise ValueError(f'unknown type {dtype!r} in the text of the compiled program')
  return int(number[1]) if number else 8
