"""The cost of a compiled program, read from its optimized HLO text.

  program = compiled.read(lowered.compile().as_text())
  program.flops, program.bytes, program.collectives, program.buffers

Counts are per chip and run. XLA's `cost_analysis()` counts a loop's body once and skips
most kernels. Here, a loop's body counts once per trip, and a table counts kernels.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Program:
  """The cost of a compiled program, per chip and run."""

  flops: float  # of matrix products
  bytes: float  # read from and written to main memory; an estimate
  collectives: tuple[Traffic, ...]
  buffers: tuple[Buffer, ...]  # arrays outside fusions, the largest first
  gathers: tuple[Buffer, ...]  # results of all-gathers, the largest first
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
    kernels = defaultdict(float, self.kernels)
    dq, dkv = kernels['splash dq'], kernels['splash dkv']
    splash = dq / 3 + dkv / 2 if dq else dkv / 5
    return splash + kernels['cuDNN attention, backward'] / 5


def read(
  text: str,
  axes: Mapping[str, int] | None = None,
  slices: Sequence[int] | None = None,
  *,
  fill: float = 1.0,
  idle: tuple[str, ...] = (),
) -> Program:
  """Optimized HLO, as `jax.stages.Compiled.as_text()` returns it -> its cost.

  `axes` maps the mesh's axes to their sizes; `slices` lists each device's slice or host,
  in the mesh's order. `fill` is the share of the rows of grouped products that hold
  tokens. Loops without a trip count in the files `idle` are assumed never to run.
  """
  program, places = hlo.parse(text), Places(text)
  cost = lambda c, op: flops.of(c, op, fill)
  never = lambda c, op: places.of(c, op).file.startswith(idle)
  runs = loops.count(program, lambda c, op: cost(c, op) or 0.0, never)
  # Arrays of idle loops also need memory.
  reach = loops.count(program, lambda c, op: 0.0) if runs.idle else runs
  moved, conditionals = 0.0, 0
  kernels: dict[str, float] = defaultdict(float)
  uncounted: dict[str, int] = defaultdict(int)
  work: dict[str, float] = defaultdict(float)
  for computation, op, times in _reached(program, runs):
    one_run = cost(computation, op)
    if one_run is None:
      uncounted[flops.kernel(op)] += times
    elif one_run:
      work[places.of(computation, op).file] += times * one_run
      if op.opcode == 'custom-call':
        kernels[flops.kernel(op)] += times * one_run
    alone = runs.alone[computation.name]
    moved += alone * traffic.of(program, computation, op) if alone else 0
    conditionals += op.opcode == 'conditional'
  layout = collectives.Layout(_devices(text), axes, slices)
  return Program(
    flops=sum(work.values()),
    bytes=moved,
    collectives=_collectives(program, runs, layout),
    buffers=_buffers(places, _arrays(program, reach)),
    gathers=_buffers(places, _gathers(program, reach)),
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
  numbers = re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', header)
  return max([1, *map(int, numbers)])


Ran = Iterator[tuple[hlo.Computation, hlo.Instruction, int]]


def _reached(program, runs: loops.Runs) -> Ran:
  """-> (computation, instruction, runs) of each one that runs, also inside fusions."""
  for name, computation in program.items():
    times = runs.of(name)
    for op in computation.body.values() if times else ():
      yield computation, op, times


def _collectives(program, runs, layout: collectives.Layout) -> tuple[Traffic, ...]:
  totals: dict[tuple[str, str, str], list] = defaultdict(lambda: [0, 0.0, 0])
  for computation, op, times in _reached(program, runs):
    kind = collectives.kind(computation, op)
    groups = layout.groups(op) if kind else []
    between = collectives.between_slices(op)
    if kind and groups:
      key = kind, layout.axis(groups), layout.network(groups)
      size, largest = max(map(len, groups)), max(s.bytes for s in op.shapes)
      whole = collectives.whole(computation, op, kind, size)
    elif between:
      key = between, layout.crossing, 'network'
      size, largest = layout.slices, op.shapes[0].bytes
      whole = largest * size if between == 'reduce-scatter' else largest
    else:
      continue
    entry = totals[key]
    entry[0] += times
    entry[1] += times * collectives.received(key[0], whole, size)
    entry[2] = max(entry[2], largest)
  entries = [Traffic(*key, *entry) for key, entry in totals.items()]
  return tuple(sorted(entries, key=lambda t: -t.bytes))


# These return an operand, or end an operation that another instruction started.
_VIEWS = traffic.VIEWS | {'dynamic-update-slice'}
# As results of a fusion, these are operands that are returned or updated in place.
_IN_PLACE = ('dynamic-update-slice', 'parameter', 'get-tuple-element')


def _arrays(program, runs: loops.Runs):
  """-> (computation, instruction, shape): arguments, and results outside fusions."""
  for computation, op, _ in _reached(program, runs):
    views = op.opcode in _VIEWS or op.opcode.endswith(('-start', '-update'))
    views = views or op.target in ('ConcatBitcast', 'AsyncCollectiveStart')
    inner = op.opcode == 'parameter' and not computation.entry
    if views or inner or not runs.alone[computation.name]:
      continue
    shapes = op.shapes
    if op.opcode == 'fusion':
      parts = traffic.results(program[op.called['calls'][0]], op)
      shapes = [s for part, made in parts if part.opcode not in _IN_PLACE for s in made]
    for shape in shapes:
      yield computation, op, shape


def _gathers(program, runs: loops.Runs):
  """-> (computation, instruction, shape): results of all-gathers, fused ones too."""
  for computation, op, _ in _reached(program, runs):
    if collectives.kind(computation, op) == 'all-gather':
      # The result of a start holds the operands too, which are smaller.
      for shape in op.shapes:
        yield computation, op, shape


def _buffers(places: Places, arrays) -> tuple[Buffer, ...]:
  count = Counter(
    (shape, op.opcode, op.source or op.name, places.of(computation, op))
    for computation, op, shape in arrays
  )
  order = lambda buffer: (-buffer.bytes, str(buffer.shape), buffer.source)
  return tuple(sorted((Buffer(*key, n) for key, n in count.items()), key=order))
