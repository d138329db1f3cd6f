"""What a compiled program costs, read from XLA's own text of it.

  program = compiled.read(lowered.compile())
  program.flops, program.bytes, program.collectives, program.buffers, program.memory

All is per chip and run. XLA's `cost_analysis()` counts a loop's body once and most
kernels not at all; here a body counts as often as it runs, and kernels by a table.
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
  axis: str  # of the mesh, along which the groups lie; 'a+b' for two, '' if not known
  network: str  # 'links' of a slice, or 'network' between slices or hosts
  count: int  # per step
  bytes: float  # that a chip receives, per step
  largest: int  # bytes of the largest result


@dataclass(frozen=True)
class Buffer:
  """An array of the program; equal ones of one source are one entry."""

  shape: hlo.Shape
  opcode: str
  source: str  # the name that JAX gave the operation
  place: Place  # the line of gated/ that it comes from
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
  """Bytes of a chip, as the compiler planned them."""

  arguments: int
  outputs: int  # those that are not arguments updated in place
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Assumed:
  """What a program's text does not tell, for it depends on the data."""

  fill: float = 1.0  # the share of the rows of grouped products that are somebody's
  idle: tuple[str, ...] = ()  # files of gated/ whose loops without a count hardly turn


@dataclass(frozen=True)
class Program:
  flops: float  # of matrix products, by chip and run
  bytes: float  # of main memory, read and written; an estimate
  collectives: tuple[Traffic, ...]
  buffers: tuple[Buffer, ...]  # arrays outside of fusions, the largest first
  gathers: tuple[Buffer, ...]  # results of all-gathers, likewise
  memory: Memory | None  # None where only a text was read
  kernels: Mapping[str, float]  # FLOPs by kernel, part of `flops`
  work: Mapping[str, float]  # `flops` by file of gated/, '' where that is not known
  uncounted: Mapping[str, int]  # custom calls that may compute -> how often they run
  unknown_loops: tuple[str, ...]  # whose trip count is not in the text: counted once
  idle_loops: tuple[str, ...]  # taken never to turn
  conditionals: int  # of each the branch that costs most is counted
  loops: tuple[tuple[str, int], ...]  # each with its trips

  @property
  def exact(self) -> bool:
    """Nothing was left out or assumed to run once."""
    return not self.uncounted and not self.unknown_loops

  @property
  def again(self) -> float:
    """FLOPs of attention's scores, which backward kernels make once more.

    Of five products in a fused one, of three for dq and of four for dk and dv.
    """
    dq, dkv = (self.kernels.get(f'splash {name}', 0.0) for name in ('dq', 'dkv'))
    cudnn = self.kernels.get('cuDNN attention, backward', 0.0)
    return cudnn / 5 + (dq / 3 + dkv / 2 if dq else dkv / 5)

  def received(self, network: str) -> float:
    """Bytes that a chip receives in a step over 'links' or 'network'."""
    return sum(t.bytes for t in self.collectives if t.network == network)


def read(
  executable: Any,
  axes: Mapping[str, int] | None = None,
  slices: Sequence[int] | None = None,
  assumed: Assumed = Assumed(),
) -> Program:
  """What `jax.stages.Lowered.compile()` gives -> what it costs.

  `axes` are the mesh's, with their sizes, and `slices` says of each device, in the mesh's
  order, which slice or host it is in.
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
  """Optimized HLO as text -> what it costs."""
  program, places = hlo.parse(text), Places(text)
  cost = lambda c, op: flops.of(c, op, assumed.fill)
  idle = lambda c, op: places.of(c, op).file.startswith(assumed.idle)
  runs = loops.count(program, lambda c, op: cost(c, op) or 0.0, idle)
  # Of what hardly ever runs the arrays have their place too.
  reach = loops.count(program, lambda c, op: 0.0) if runs.idle else runs
  total, moved, conditionals = 0.0, 0.0, 0
  kernels: dict[str, float] = defaultdict(float)
  uncounted: dict[str, int] = defaultdict(int)
  work: dict[str, float] = defaultdict(float)
  trips = []
  for name, computation in program.items():
    times, alone = runs.of(name), runs.alone[name]
    if not times:
      continue
    for op in computation.body.values():
      each = cost(computation, op)
      if op.opcode == 'custom-call' and each != 0:
        kernel = flops.kernel(op)
        if each is None:
          uncounted[kernel] += times
        else:
          kernels[kernel] += times * each
      if each:
        total += times * each
        work[places.of(computation, op).file] += times * each
      moved += alone * traffic.of(program, computation, op) if alone else 0
      conditionals += op.opcode == 'conditional'
      if op.opcode == 'while':
        trips.append((op.source or op.name, runs.trips[op.name]))
  return Program(
    flops=total,
    bytes=moved,
    collectives=_collectives(
      program, runs, collectives.Layout(_devices(text), axes, slices)
    ),
    buffers=_arrays(places, _made(program, reach)),
    gathers=_arrays(places, _gathered(program, reach)),
    memory=memory,
    kernels=dict(kernels),
    work=dict(work),
    uncounted=dict(uncounted),
    unknown_loops=tuple(runs.unknown.values()),
    idle_loops=tuple(runs.idle.values()),
    conditionals=conditionals,
    loops=tuple(trips),
  )


def _devices(text: str) -> int:
  """Into how many devices' parts the program was split."""
  header = text.partition('\n')[0]
  numbers = [
    int(n) for n in re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', header)
  ]
  return max([1, *numbers])


def _collectives(program, runs, layout: collectives.Layout) -> tuple[Traffic, ...]:
  found: dict[tuple[str, str, str], list] = defaultdict(lambda: [0, 0.0, 0])

  def add(key, times, size, largest):
    entry = found[key]
    entry[0] += times
    entry[1] += times * size
    entry[2] = max(entry[2], largest)

  for name, computation in program.items():
    times = runs.of(name)
    for op in computation.body.values() if times else ():
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
  entries = [Traffic(*key, *entry) for key, entry in found.items()]
  return tuple(sorted(entries, key=lambda t: -t.bytes))


# Their results are others', or end what another instruction began.
_VIEWS = traffic.VIEWS | {'dynamic-update-slice'}


def _made(program, runs):
  """The program's arguments, and what is made outside of fusions: (where, op, shape)."""
  for name, computation in program.items():
    for op in computation.body.values() if runs.alone[name] else ():
      views = op.opcode in _VIEWS or op.opcode.endswith(('-start', '-update'))
      views = views or op.target in ('ConcatBitcast', 'AsyncCollectiveStart')
      if views or (op.opcode == 'parameter' and not computation.entry):
        continue
      in_place = _updated(program, op) if op.opcode == 'fusion' else set()
      for n, shape in enumerate(op.shapes):
        if n not in in_place:
          yield computation, op, shape


def _gathered(program, runs):
  """Likewise the results of all-gathers, wherever they are."""
  for name, computation in program.items():
    for op in computation.body.values() if runs.of(name) else ():
      if collectives.kind(computation, op) == 'all-gather':
        # What starts one has its operands as results too, which are smaller.
        for shape in op.shapes:
          yield computation, op, shape


def _arrays(places: Places, made) -> tuple[Buffer, ...]:
  count: dict[tuple, int] = defaultdict(int)
  for computation, op, shape in made:
    source = op.source or op.name
    count[shape, op.opcode, source, places.of(computation, op)] += 1
  order = lambda buffer: (-buffer.bytes, str(buffer.shape), buffer.source)
  return tuple(sorted((Buffer(*key, n) for key, n in count.items()), key=order))


def _updated(program, op: hlo.Instruction) -> set[int]:
  """Which of a fusion's results it was given, and hands on or updates in place."""
  callee = program[op.called['calls'][0]]
  root = callee.root
  parts = [root.name] if root.opcode != 'tuple' else root.operands
  found = set()
  for n, name in enumerate(parts):
    part = callee.body[name]
    while part.opcode == 'bitcast':
      part = callee.body[part.operands[0]]
    if part.opcode in ('dynamic-update-slice', 'parameter', 'get-tuple-element'):
      found.add(n)
  return found
