"""Bytes and FLOPs of a step -> its least time: the slowest of compute, memory and links.

Estimates by arithmetic and counts of a compiled program use the same assumptions, which
every report prints.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gated.devices.chips import Chip

# Name -> (a share, its meaning). Most are the share of a peak that a program reaches.
ASSUMED: dict[str, tuple[float, str]] = {
  'matmul': (0.70, 'of peak FLOP/s in dense products (an H200 reaches 0.75 at 8192^3)'),
  'attention': (0.40, 'of peak FLOP/s in attention, counting causal work alone (0.41)'),
  'grouped': (0.45, 'of peak FLOP/s in grouped products'),
  'memory': (0.70, 'of memory bandwidth (an H200 reaches 0.69, copying)'),
  'link': (0.80, 'of link bandwidth'),
  'network': (0.70, 'of network bandwidth'),
  'overlap': (0.90, 'of the traffic of weights and gradients hides behind compute'),
  'open grid': (0.50, 'of the links help in a slice too small for its rows to be rings'),
  'spare': (0.05, 'of memory is left free when something is to fit'),
}


def assumed(name: str) -> float:
  """The share of this name in ASSUMED."""
  return ASSUMED[name][0]


@dataclass(frozen=True, kw_only=True)
class Traffic:
  """The bytes that a chip sends in a step along one mesh axis over one network."""

  axis: str  # of the mesh
  network: str  # 'links' inside a slice, 'network' between slices
  bytes: float
  share: float  # of a chip's links that lie along the axis
  hidden: bool  # whether it overlaps with compute
  kind: str = ''  # all-gather, reduce-scatter, all-reduce, all-to-all
  purpose: str = ''  # weights, gradients, tokens, ...


def share(inside: int, chips: int, chip: Chip) -> float:
  """The sizes of a mesh axis and a slice -> the share of a chip's links along the axis.

  The axes share the dims of the links' grid by the logarithms of their sizes.
  """
  if inside == 1 or chip.torus_dims == 1:
    return 1.0
  dims = max(1, round(chip.torus_dims * math.log(inside) / math.log(chips)))
  rings = 1.0 if chips >= chip.torus_from else assumed('open grid')
  return rings * min(dims, chip.torus_dims) / chip.torus_dims


@dataclass(frozen=True, kw_only=True)
class Roofline:
  """A step's least time, and its terms, in seconds."""

  compute: float
  memory: float
  hidden: Mapping[
    str, float
  ]  # traffic that overlaps with compute: 'fsdp (links)' -> time
  exposed: Mapping[str, float]  # traffic that does not
  step: float

  @property
  def bound(self) -> str:
    """The slowest term."""
    overlap = assumed('overlap')
    terms = {'compute': self.compute, 'memory': self.memory, **self.exposed}
    terms |= {name: overlap * seconds for name, seconds in self.hidden.items()}
    return max(terms, key=terms.__getitem__)


def roofline(
  *, flops: Mapping[str, float], moved: float, sent: Iterable[Traffic], chip: Chip
) -> Roofline:
  """A chip's work in a step -> its time.

  `flops` by kind: matmul, attention, grouped. `moved`: bytes of memory read and written.

    step = max(compute, memory, o * links, o * network) + (1 - o) * (links + network)
           + exposed      o: the overlap; links, network: hidden traffic
  """
  compute = sum(n / (chip.flops * assumed(kind)) for kind, n in flops.items())
  memory = moved / (chip.memory_bandwidth * assumed('memory'))
  hidden: dict[str, float] = defaultdict(float)
  exposed: dict[str, float] = defaultdict(float)
  totals = {'links': 0.0, 'network': 0.0}
  speeds = {
    'links': chip.link_bandwidth * assumed('link'),
    'network': chip.network_bandwidth * assumed('network'),
  }
  for t in sent:
    share = t.share if t.network == 'links' else 1.0
    seconds = t.bytes / (speeds[t.network] * share)
    terms = hidden if t.hidden else exposed
    terms[f'{t.axis} ({t.network})'] += seconds
    totals[t.network] += seconds if t.hidden else 0.0
  overlap = assumed('overlap')
  busy = max(compute, memory, *(overlap * seconds for seconds in totals.values()))
  rest = (1 - overlap) * sum(totals.values())
  return Roofline(
    compute=compute,
    memory=memory,
    hidden=dict(hidden),
    exposed=dict(exposed),
    step=busy + rest + sum(exposed.values()),
  )
