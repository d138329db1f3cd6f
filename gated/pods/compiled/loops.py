"""How often each computation of a program runs in a step.

A loop's trip count is the compiler's annotation; without one, its counter is simulated.
"""

import operator
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from gated.pods.compiled.hlo import Computation, Instruction

# The simulation of a loop's counter stops after this many rounds.
MOST = 1_000_000

_KNOWN = r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)'
_ARITHMETIC = {
  'add': operator.add,
  'subtract': operator.sub,
  'multiply': operator.mul,
  'maximum': max,
  'minimum': min,
}
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'optimization-barrier')


@dataclass
class Runs:
  """How often each computation runs alone, and how often inside a fusion."""

  alone: dict[str, int] = field(default_factory=lambda: defaultdict(int))
  fused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
  trips: dict[str, int] = field(default_factory=dict)  # by loop
  unknown: dict[str, str] = field(default_factory=dict)  # loop -> its source
  idle: dict[str, str] = field(default_factory=dict)  # loop -> its source

  def of(self, name: str) -> int:
    """How often a computation runs in all."""
    return self.alone[name] + self.fused[name]


def count(
  program: dict[str, Computation],
  cost: Callable[[Computation, Instruction], float],
  idle: Callable[[Computation, Instruction], bool] = lambda computation, op: False,
) -> Runs:
  """Counts runs per run of the entry; of a conditional, only the most costly branch.

  `cost(computation, op)` is the cost of one instruction without its callees. The body of
  a loop without a trip count is counted once and listed in `unknown`; if
  `idle(computation, op)` is true, it is not counted and listed in `idle`.
  """
  runs = Runs()
  whole: dict[str, float] = {}
  for name, computation in program.items():
    whole[name] = sum(cost(computation, op) for op in computation.body.values())
    for op in computation.body.values():
      if op.opcode == 'while':
        _count_trips(program, computation, op, idle, runs)
      whole[name] += sum(n * whole[c] for c, n in _callees(op, whole, runs.trips))
  runs.alone[next(c.name for c in program.values() if c.entry)] = 1
  for name in reversed(program):
    for op in program[name].body.values() if runs.of(name) else ():
      for callee, n in _callees(op, whole, runs.trips):
        into_fusion = op.opcode == 'fusion'
        runs.fused[callee] += n * (runs.of(name) if into_fusion else runs.fused[name])
        runs.alone[callee] += 0 if into_fusion else n * runs.alone[name]
  # Drop unknown loops that never run.
  reached = {op for c in program.values() if runs.of(c.name) for op in c.body}
  runs.unknown = {k: v for k, v in runs.unknown.items() if k in reached}
  return runs


def _count_trips(program, computation: Computation, loop: Instruction, idle, runs: Runs):
  trips = trip_count(program, computation, loop)
  if trips is None:
    never = idle(computation, loop)
    (runs.idle if never else runs.unknown)[loop.name] = loop.source or loop.name
    trips = 0 if never else 1
  runs.trips[loop.name] = trips


def _callees(op: Instruction, whole: dict[str, float], trips: dict[str, int]):
  """-> (computation, runs) for each one that an instruction calls."""
  called = op.called
  if op.opcode == 'while':
    n = trips[op.name]
    return [(called['body'][0], n), (called['condition'][0], n + 1)]
  if op.opcode == 'conditional':
    roles = ('branch_computations', 'true_computation', 'false_computation')
    branches = [name for role in roles if role in called for name in called[role]]
    return [(max(branches, key=whole.__getitem__), 1)]
  if op.opcode in ('fusion', 'async-start'):
    return [(name, 1) for name in called['calls']]
  if op.opcode == 'call':
    return [(name, 1) for name in called['to_apply']]
  # Reductions, sorts and collectives apply scalar functions; kernels count as a whole.
  return []


def trip_count(program, computation: Computation, loop: Instruction) -> int | None:
  """How often a loop's body runs; None if not known."""
  known = loop.find(_KNOWN)
  if known:
    return int(known)
  condition = program[loop.called['condition'][0]]
  body = program[loop.called['body'][0]]
  unknown = lambda n, index: None
  # Simulate only the values that the condition depends on.
  state: dict[int, int | None] = {}
  reads: set[int] = set()

  def record(n: int, index: int | None) -> None:
    if index is not None:
      reads.add(index)

  _value(program, condition, condition.root.name, record)
  while reads - state.keys():
    for i in sorted(reads - state.keys()):
      state[i] = _value(program, computation, loop.operands[0], unknown, i)
      _value(program, body, body.root.name, record, i)
  for trips in range(MOST):
    carried = lambda n, index, state=state: None if n else state.get(index)
    proceed = _value(program, condition, condition.root.name, carried)
    if proceed is None:
      return None
    if not proceed:
      return trips
    state = {i: _value(program, body, body.root.name, carried, i) for i in state}
  return None


def _value(program, computation: Computation, name: str, parameter, index=None):
  """An instruction's integer, or the one at `index` of its tuple; None if not known.

  `parameter(n, index)` reads the computation's n-th parameter likewise.
  """
  op = computation.body[name]
  inner = lambda name, index=None: _value(program, computation, name, parameter, index)
  if op.opcode == 'parameter':
    return parameter(int(op.args), index)
  if index is None and [s.dims for s in op.shapes] != [()]:
    return None
  if op.opcode in _SAME:
    return inner(op.operands[0], index)
  if op.opcode in ('fusion', 'call'):
    callee = program[op.called['calls' if op.opcode == 'fusion' else 'to_apply'][0]]
    argument = lambda n, index: inner(op.operands[n], index)
    return _value(program, callee, callee.root.name, argument, index)
  if index is not None:
    return inner(op.operands[index]) if op.opcode == 'tuple' else None
  if op.opcode == 'constant':
    text = {'true': '1', 'false': '0'}.get(op.args.strip(), op.args.strip())
    return int(text) if re.fullmatch(r'-?\d+', text) else None
  if op.opcode == 'get-tuple-element':
    return inner(op.operands[0], int(op.find(r'\bindex=(\d+)')))
  if op.opcode not in _ARITHMETIC and op.opcode != 'compare':
    return None
  a, b = (inner(operand) for operand in op.operands)
  if a is None or b is None:
    return None
  if op.opcode == 'compare':
    # The directions LT, LE, GT, GE, EQ and NE are the names of Python's functions.
    return int(getattr(operator, op.find(r'direction=(\w+)').lower())(a, b))
  return _ARITHMETIC[op.opcode](a, b)
