"""The cost of a compiled program, read from its optimized HLO text.

  program = compiled.read(lowered.compile())
  program.flops, program.bytes, program.collectives, program.buffers, program.memory

Counts are per chip and run. XLA's `cost_analysis()` counts a loop's body once and skips
most kernels; here loops count by their trips, and kernels by a table.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated.pods.compiled import collectives, flops, hlo, loops, traffic
from gated.pods.compiled.places import Place, Places


@dataclass(frozen=True)
class Traffic:
  """One kind of collective over one network."""

  kind: str
  axis: str  # mesh axis of the groups; 'a+b' for two, '' if not known
  network: str  # 'links' inside a slice, 'network' between slices or hosts
  count: int  # per step
  bytes: float  # that a chip receives, per step
  largest: int  # bytes of the largest result


@dataclass(frozen=True)
class Buffer:
  """An array of the program; equal arrays of one source share an entry."""

  shape: hlo.Shape
  opcode: str
  source: str  # JAX's name of the operation
  place: Place  # the line of gated/ that made it
  count: int

  @property
  def bytes(self) -> int:
    return self.shape.bytes

  @property
  def size(self) -> int:
    return self.shape.size

  @property
  def dims(self) -> tuple[int, ...]:
    return self.shape.dims


@dataclass(frozen=True)
class Memory:
  """Bytes on one chip, as the compiler planned them."""

  arguments: int
  outputs: int  # without arguments updated in place
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Assumed:
  """Properties of the data, which the HLO text does not contain."""

  fill: float = 1.0  # share of the rows of grouped products that hold tokens
  idle: tuple[str, ...] = ()  # loops of these files without a trip count never run


@dataclass(frozen=True)
class Program:
  flops: float  # of matrix products
  bytes: float  # read from and written to main memory; an estimate
  collectives: tuple[Traffic, ...]
  buffers: tuple[Buffer, ...]  # arrays outside fusions, the largest first
  gathers: tuple[Buffer, ...]  # results of all-gathers, the largest first
  memory: Memory | None  # None for a program read from text
  kernels: Mapping[str, float]  # FLOPs by kernel, part of `flops`
  work: Mapping[str, float]  # `flops` by file of gated/, '' if not known
  uncounted: Mapping[str, int]  # unknown custom calls -> runs
  unknown_loops: tuple[str, ...]  # loops without a trip count, counted once
  idle_loops: tuple[str, ...]  # loops assumed never to run
  conditionals: int  # counted by their most costly branch

  @property
  def again(self) -> float:
    """FLOPs of attention's scores that backward kernels recompute.

    Fused kernels do five products, separate ones three for dq and four for dk and dv.
    """
    dq, dkv = (self.kernels.get(f'splash {name}', 0.0) for name in ('dq', 'dkv'))
    cudnn = self.kernels.get('cuDNN attention, backward', 0.0)
    return cudnn / 5 + (dq / 3 + dkv / 2 if dq else dkv / 5)


def read(
  executable: Any,
  axes: Mapping[str, int] | None = None,
  slices: Sequence[int] | None = None,
  assumed: Assumed = Assumed(),
) -> Program:
  """The result of `jax.stages.Lowered.compile()` -> its cost.

  `axes` maps the mesh's axes to their sizes; `slices` lists each device's slice or host,
  in the mesh's order.
  """
  stats = executable.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  text = executable.as_text()
  return read_text(text, axes=axes, slices=slices, memory=memory, assumed=assumed)


def read_text(
  text: str,
  *,
  axes: Mapping[str, int] | None = None,
  slices: Sequence[int] | None = None,
  memory: Memory | None = None,
  assumed: Assumed = Assumed(),
) -> Program:
  """Optimized HLO as text -> its cost."""
  program, places = hlo.parse(text), Places(text)
  cost = lambda c, op: flops.of(c, op, assumed.fill)
  idle = lambda c, op: places.of(c, op).file.startswith(assumed.idle)
  runs = loops.count(program, lambda c, op: cost(c, op) or 0.0, idle)
  # Arrays of idle loops take memory all the same.
  reach = loops.count(program, lambda c, op: 0.0) if runs.idle else runs
  total, moved, conditionals = 0.0, 0.0, 0
  kernels: dict[str, float] = defaultdict(float)
  uncounted: dict[str, int] = defaultdict(int)
  work: dict[str, float] = defaultdict(float)
  for name, computation in program.items():
    times, alone = runs.of(name), runs.alone[name]
    if not times:
      continue
    for op in computation.body.values():
      one_run = cost(computation, op)
      if op.opcode == 'custom-call' and one_run != 0:
        kernel = flops.kernel(op)
        if one_run is None:
          uncounted[kernel] += times
        else:
          kernels[kernel] += times * one_run
      if one_run:
        total += times * one_run
        work[places.of(computation, op).file] += times * one_run
      moved += alone * traffic.of(program, computation, op) if alone else 0
      conditionals += op.opcode == 'conditional'
  return Program(
    flops=total,
    bytes=moved,
    collectives=_collectives(
      program, runs, collectives.Layout(_devices(text), axes, slices)
    ),
    buffers=_buffers(places, _arrays(program, reach)),
    gathers=_buffers(places, _gathers(program, reach)),
    memory=memory,
    kernels=dict(kernels),
    work=dict(work),
    uncounted=dict(uncounted),
    unknown_loops=tuple(runs.unknown.values()),
    idle_loops=tuple(runs.idle.values()),
    conditionals=conditionals,
  )


def _devices(text: str) -> int:
  """The number of devices of a program."""
  header = text.partition('\n')[0]
  numbers = [
    int(n) for n in re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', header)
  ]
  return max([1, *numbers])


def _reached(program, runs):
  """-> (computation, instruction, runs) of all that run, inside fusions too."""
  for name, computation in program.items():
    times = runs.of(name)
    for op in computation.body.values() if times else ():
      yield computation, op, times


def _collectives(program, runs, layout: collectives.Layout) -> tuple[Traffic, ...]:
  totals: dict[tuple[str, str, str], list] = defaultdict(lambda: [0, 0.0, 0])

  def add(key, times, size, largest):
    entry = totals[key]
    entry[0] += times
    entry[1] += times * size
    entry[2] = max(entry[2], largest)

  for computation, op, times in _reached(program, runs):
    between = collectives.across(op)
    if between:
      whole = op.shapes[0].bytes
      size = collectives.SHARE.get(between, lambda s, g: s)(whole, layout.slices)
      add((between, layout.crossing, 'network'), times, size, whole)
    kind = collectives.kind(computation, op)
    if kind is None:
      continue
    groups = [g for g in layout.groups(op.words) if len(set(g)) > 1]
    if groups:
      size = collectives.received(computation, op, kind, max(map(len, groups)))
      key = kind, layout.axis(groups), layout.network(groups)
      add(key, times, size, max(s.bytes for s in op.shapes))
  entries = [Traffic(*key, *entry) for key, entry in totals.items()]
  return tuple(sorted(entries, key=lambda t: -t.bytes))


# These return an operand, or end an operation that another instruction started.
_VIEWS = traffic.VIEWS | {'dynamic-update-slice'}


def _arrays(program, runs):
  """-> (computation, instruction, shape): arguments, and results outside fusions."""
  for computation, op, _ in _reached(program, runs):
    views = op.opcode in _VIEWS or op.opcode.endswith(('-start', '-update'))
    views = views or op.target in ('ConcatBitcast', 'AsyncCollectiveStart')
    inner = op.opcode == 'parameter' and not computation.entry
    if views or inner or not runs.alone[computation.name]:
      continue
    in_place = _updated(program, op) if op.opcode == 'fusion' else set()
    for n, shape in enumerate(op.shapes):
      if n not in in_place:
        yield computation, op, shape


def _gathers(program, runs):
  """-> (computation, instruction, shape): results of all-gathers, fused ones too."""
  for computation, op, _ in _reached(program, runs):
    if collectives.kind(computation, op) == 'all-gather':
      # The result of a start holds the operands too, which are smaller.
      for shape in op.shapes:
        yield computation, op, shape


def _buffers(places: Places, arrays) -> tuple[Buffer, ...]:
  count: dict[tuple, int] = defaultdict(int)
  for computation, op, shape in arrays:
    source = op.source or op.name
    count[shape, op.opcode, source, places.of(computation, op)] += 1
  order = lambda buffer: (-buffer.bytes, str(buffer.shape), buffer.source)
  return tuple(sorted((Buffer(*key, n) for key, n in count.items()), key=order))


def _updated(program, op: hlo.Instruction) -> set[int]:
  """The results of a fusion that are its operands, passed on or updated in place."""
  callee = program[op.called['calls'][0]]
  root = callee.root
  parts = [root.name] if root.opcode != 'tuple' else root.operands
  in_place = set()
  for n, name in enumerate(parts):
    part = callee.body[name]
    while part.opcode == 'bitcast':
      part = callee.body[part.operands[0]]
    if part.opcode in ('dynamic-update-slice', 'parameter', 'get-tuple-element'):
      in_place.add(n)
  return in_place
