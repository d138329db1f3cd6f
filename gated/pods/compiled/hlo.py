"""XLA's optimized HLO, read from its text: computations, instructions, shapes.

Only what counting needs is parsed when it is asked for; an instruction's other words are
kept as they stand.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

BITS = {'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 'c64': 64, 'c128': 128}

_SHAPE = re.compile(r'([a-z]\w*)\[([0-9,<=? ]*)\](?:\{([^{}]*)\})?')
_START = re.compile(r'^\s+(?:ROOT )?%?([^\s=%]+) = ')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{\s*$')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|true_computation'
  r'|false_computation|called_computations)=(\{[^{}]*\}|%?[\w.\-]+)'
)
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_SPACE = re.compile(r'S\((\d+)\)')


@dataclass(frozen=True)
class Shape:
  dtype: str
  dims: tuple[int, ...]
  space: int  # 0 is the chip's main memory; on a TPU 1 is its vector memory

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without what a layout pads."""
    return -(-self.size * bits(self.dtype) // 8)

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclass(frozen=True)
class Instruction:
  name: str
  shapes: tuple[Shape, ...]  # of the result; a tuple's elements, flat
  opcode: str
  args: str  # what stands between the opcode's parentheses
  words: str  # what follows them
  root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    return tuple(_OPERAND.findall(self.args))

  @functools.cached_property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Role (calls, to_apply, body, ...) -> the computations' names."""
    found = _CALLED.findall(self.words)
    names = lambda text: tuple(n.strip(' %') for n in text.strip('{}').split(','))
    return {role: names(text) for role, text in found}

  @property
  def source(self) -> str:
    """The name that JAX gave the operation."""
    found = _NAME.search(self.words)
    return found[1] if found else ''

  @property
  def target(self) -> str:
    """Of a custom call."""
    found = re.search(r'custom_call_target="([^"]*)"', self.words)
    return found[1] if found else ''

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  def dims(self, word: str) -> tuple[int, ...]:
    """`lhs_batch_dims={0,1}` -> (0, 1); () where it is not there."""
    found = re.search(rf'\b{word}={{([0-9,]*)}}', self.words)
    return tuple(int(n) for n in found[1].split(',') if n) if found else ()

  def number(self, word: str) -> int | None:
    found = re.search(rf'\b{word}=(-?\d+)', self.words)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Computation:
  name: str
  entry: bool
  body: dict[str, Instruction]  # callees and operands stand before those that use them

  @functools.cached_property
  def root(self) -> Instruction:
    return next(op for op in self.body.values() if op.root)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    used: dict[str, list[Instruction]] = {name: [] for name in self.body}
    for op in self.body.values():
      for name in dict.fromkeys(op.operands):
        used.setdefault(name, []).append(op)
    return used

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    found = [op for op in self.body.values() if op.opcode == 'parameter']
    return {int(op.args): op for op in found}

  def operand(self, op: Instruction, i: int) -> Shape:
    """The shape of operand i, which is not a tuple."""
    return self.body[op.operands[i]].shapes[0]


def parse(text: str) -> dict[str, Computation]:
  """A module's text -> its computations, callees before callers; the entry is last."""
  found = {}
  name, entry, body = '', False, None
  for line in _joined(text):
    if body is None:
      header = _HEADER.match(line)
      if header and not line.startswith('HloModule'):
        name, entry, body = header[2], bool(header[1]), {}
    elif line.startswith('}'):
      found[name] = Computation(name, entry, body)
      body = None
    else:
      op = instruction(line)
      body[op.name] = op
  if not any(c.entry for c in found.values()):
    raise ValueError('no ENTRY computation in the text of the compiled program')
  return found


def _joined(text: str) -> Iterator[str]:
  """Lines, of which those that continue an instruction are joined to it."""
  held = ''
  for line in text.splitlines():
    fresh = _START.match(line) or (line.startswith('}') and not line.startswith('}}'))
    if held and (fresh or not line.strip()):
      yield held
      held = ''
    if _START.match(line):
      held = line
    elif held:
      held += ' ' + line
    else:
      yield line
  if held:
    yield held


def instruction(line: str) -> Instruction:
  """`  ROOT %a.1 = f32[2,3]{1,0} add(%b, %c), metadata={...}` -> it."""
  start = _START.match(line)
  assert start, line[:200]
  rest = line[start.end() :]
  if rest.startswith('('):
    end = _closing(rest, 0) + 1
  else:
    end = rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  open_at = rest.index('(')
  close_at = _closing(rest, open_at)
  return Instruction(
    name=start[1],
    shapes=shapes(kind),
    opcode=rest[:open_at],
    args=rest[open_at + 1 : close_at],
    words=rest[close_at + 1 :],
    root=line.lstrip().startswith('ROOT '),
  )


def _closing(text: str, at: int) -> int:
  """Where the parenthesis that opens at `at` closes."""
  depth = 0
  for found in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, at):
    if found[0] in '()':
      depth += 1 if found[0] == '(' else -1
      if depth == 0:
        return found.start()
  raise ValueError(f'a parenthesis never closes: {text[:200]}')


@functools.lru_cache(maxsize=100_000)
def shapes(text: str) -> tuple[Shape, ...]:
  """'(f32[2]{0}, s32[])' -> its arrays, flat; tokens and the like have none."""
  found = []
  for dtype, dims, layout in _SHAPE.findall(text):
    space = _SPACE.search(layout or '')
    size = tuple(int(re.sub(r'\D', '', n)) for n in dims.split(',') if n.strip())
    found.append(Shape(dtype, size, int(space[1]) if space else 0))
  return tuple(s for s in found if s.dtype not in ('token', 'opaque'))


def bits(dtype: str) -> int:
  """'bf16' -> 16, 'f8e4m3fn' -> 8."""
  if dtype in BITS:
    return BITS[dtype]
  found = re.match(r'[a-z]+(\d+)', dtype)
  if not found:
    raise ValueError(f'unknown type {dtype!r} in the text of the compiled program')
  return int(found[1])
