"""How often each computation of a program runs in a step.

A loop's body runs as often as its trip count says: the compiler's own word where it
stands in the text, else found by running the loop's counter.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gated.pods.compiled.hlo import Computation, Instruction

# Beyond so many rounds of its counter a loop counts as one without an end.
MOST = 1_000_000

_KNOWN = re.compile(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_COMPARE = {
  'LT': int.__lt__,
  'LE': int.__le__,
  'GT': int.__gt__,
  'GE': int.__ge__,
  'EQ': int.__eq__,
  'NE': int.__ne__,
}
_ARITHMETIC = {
  'add': int.__add__,
  'subtract': int.__sub__,
  'multiply': int.__mul__,
  'maximum': max,
  'minimum': min,
}
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'optimization-barrier')


@dataclass
class Runs:
  """Computation -> how often it runs by itself, and how often inside of a fusion."""

  alone: dict[str, int] = field(default_factory=lambda: defaultdict(int))
  fused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
  trips: dict[str, int] = field(default_factory=dict)  # of each loop, by its name
  unknown: dict[str, str] = field(default_factory=dict)  # loop -> what it is
  idle: dict[str, str] = field(default_factory=dict)  # likewise
  rare: Callable[[Computation, Instruction], bool] = lambda computation, op: False

  def of(self, name: str) -> int:
    return self.alone[name] + self.fused[name]


def count(
  program: dict[str, Computation],
  cost: Callable[[Computation, Instruction], float],
  idle: Callable[[Computation, Instruction], bool] = lambda computation, op: False,
) -> Runs:
  """Counts runs, the entry's being one; of a conditional, the branch that costs most.

  `cost(computation, op)` is what one instruction costs by itself. A loop whose count is
  not to be found is entered under `unknown`, its body counted once; or under `idle`, and
  not at all, if `idle(computation, op)` says that it hardly ever runs.
  """
  runs = Runs(rare=idle)
  whole: dict[str, float] = {}
  for name, computation in program.items():
    whole[name] = sum(cost(computation, op) for op in computation.body.values())
    for op in computation.body.values():
      callees = _callees(program, computation, op, whole, runs)
      whole[name] += sum(n * whole[callee] for callee, n in callees)
  entry = next(c.name for c in program.values() if c.entry)
  runs.alone[entry] = 1
  for name in reversed(program):
    computation = program[name]
    if not runs.of(name):
      continue
    for op in computation.body.values():
      for callee, n in _callees(program, computation, op, whole, runs):
        into_fusion = op.opcode == 'fusion'
        runs.fused[callee] += n * (runs.of(name) if into_fusion else runs.fused[name])
        runs.alone[callee] += 0 if into_fusion else n * runs.alone[name]
  # A loop that never runs need not be known.
  reached = {
    op.name for c in program.values() if runs.of(c.name) for op in c.body.values()
  }
  runs.unknown = {k: v for k, v in runs.unknown.items() if k in reached}
  return runs


def _callees(program, computation, op: Instruction, whole, runs: Runs):
  """-> the computations that an instruction runs, each with how often."""
  called = op.called
  if op.opcode == 'while':
    if op.name not in runs.trips:
      trips = trip_count(program, computation, op)
      rare = trips is None and runs.rare(computation, op)
      if trips is None:
        (runs.idle if rare else runs.unknown)[op.name] = op.source or op.name
        trips = 0 if rare else 1
      runs.trips[op.name] = trips
    n = runs.trips[op.name]
    return [(called['body'][0], n), (called['condition'][0], n + 1)]
  if op.opcode == 'conditional':
    roles = ('branch_computations', 'true_computation', 'false_computation')
    branches = [name for role in roles for name in called.get(role, ())]
    return [(max(branches, key=lambda b: whole.get(b, 0)), 1)]
  if op.opcode in ('fusion', 'async-start'):
    return [(name, 1) for name in called.get('calls', ())]
  if op.opcode == 'call':
    return [(name, 1) for name in called.get('to_apply', ())]
  # What reductions, sorts and collectives apply are scalar; kernels are counted whole.
  return []


def trip_count(program, computation: Computation, loop: Instruction) -> int | None:
  """How often a loop's body runs; None where that is not to be found."""
  known = _KNOWN.search(loop.words)
  if known:
    return int(known[1])
  condition = program[loop.called['condition'][0]]
  body = program[loop.called['body'][0]]
  start = _Tuple(program, computation, loop.operands[0], {})
  # The counters: what the condition reads, and what those are made from.
  state: dict[int, int | None] = {}
  touched: set[int] = set()
  _value(program, condition, condition.root.name, {0: _Recorder(touched)})
  while touched - state.keys():
    for i in sorted(touched - state.keys()):
      state[i] = start[i]
      _Tuple(program, body, body.root.name, {0: _Recorder(touched)})[i]
  for trips in range(MOST):
    go_on = _value(program, condition, condition.root.name, {0: state})
    if go_on is None:
      return None
    if not go_on:
      return trips
    after = _Tuple(program, body, body.root.name, {0: state})
    state = {i: after[i] for i in state}
  return None


class _Recorder:
  """A loop's state of which only is noted what is read."""

  def __init__(self, touched: set[int]):
    self._touched = touched

  def get(self, i: int):
    self._touched.add(i)
    return None


class _Tuple:
  """A tuple's scalars, computed when read; `values` are the computation's parameters."""

  def __init__(self, program, computation: Computation, name: str, values: Any):
    self._at = program, computation, name, values

  def get(self, i: int):
    return self[i]

  def __getitem__(self, i: int):
    program, computation, name, values = self._at
    op = computation.body.get(name)
    while op is not None and op.opcode in _SAME:
      op = computation.body.get(op.operands[0])
    if op is None:
      return None
    if op.opcode == 'tuple':
      return _value(program, computation, op.operands[i], values)
    if op.opcode == 'parameter' and int(op.args) in values:
      return values[int(op.args)].get(i)
    if op.opcode == 'fusion':
      callee = program[op.called['calls'][0]]
      inner = _Arguments(program, computation, op, values)
      return _Tuple(program, callee, callee.root.name, inner)[i]
    return None


class _Arguments:
  """What a fusion or a call is given, computed when read."""

  def __init__(self, program, computation, op: Instruction, values):
    self._at = program, computation, op.operands, values

  def __contains__(self, n: int) -> bool:
    return n < len(self._at[2])

  def __getitem__(self, n: int):
    return self.get(n)

  def get(self, n: int):
    program, computation, operands, values = self._at
    return _value(program, computation, operands[n], values)


def _value(program, computation, name: str, values: Any):
  """The integer that a scalar instruction computes, or None."""
  op = computation.body.get(name)
  scalar = op is not None and [s.dims for s in op.shapes] == [()]
  if not scalar and not (op and op.opcode == 'parameter'):
    return None
  inner = lambda operand: _value(program, computation, operand, values)
  if op.opcode == 'constant':
    text = op.args.strip()
    return (
      int(text) if re.fullmatch(r'-?\d+', text) else {'true': 1, 'false': 0}.get(text)
    )
  if op.opcode == 'parameter':
    found = values.get(int(op.args))
    return found if isinstance(found, int) else None
  if op.opcode in _SAME:
    return inner(op.operands[0])
  if op.opcode == 'get-tuple-element':
    index = op.number('index')
    return _Tuple(program, computation, op.operands[0], values)[index]
  if op.opcode in ('fusion', 'call'):
    callee = program[(op.called.get('calls') or op.called['to_apply'])[0]]
    arguments = _Arguments(program, computation, op, values)
    return _value(program, callee, callee.root.name, arguments)
  if op.opcode in _ARITHMETIC or op.opcode == 'compare':
    a, b = (inner(operand) for operand in op.operands)
    if a is None or b is None:
      return None
    if op.opcode == 'compare':
      direction = re.search(r'direction=(\w+)', op.words)
      return int(_COMPARE[direction[1]](a, b)) if direction else None
    return _ARITHMETIC[op.opcode](a, b)
  return None
