"""Bytes and FLOPs of a step -> its least time: the slowest of compute, memory and links.

What is counted by arithmetic (`estimate.of`) and what a compiler has counted go through
the same assumptions, which stand in one table and are printed with every result.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gated.devices.chips import Chip

# Of a peak, the share that is reached; or another share, as it says.
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

# Factors on the bytes that each chip of a ring of n sends, to get or give R bytes whole.
_RING = {
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
}


def assumed(name: str) -> float:
  return ASSUMED[name][0]


@dataclass(frozen=True, kw_only=True)
class Traffic:
  """What a chip sends in a step for one purpose along one mesh axis, in bytes."""

  what: str  # weights, gradients, tokens, ...
  kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all
  axis: str  # of the mesh
  link: float  # over the links of its slice
  network: float  # to other slices
  share: float  # of a chip's links that lie along the axis
  hidden: bool  # whether compute may go on meanwhile


def traffic(
  what: str,
  kind: str,
  axis: str,
  whole: float,
  *,
  sizes: Mapping[str, int],
  chip: Chip,
  slices: int,
  hidden: bool,
) -> Traffic:
  """A collective on `whole` bytes (gathered, or not yet scattered) -> what a chip sends.

  On an axis that crosses slices it runs inside of each slice first, so that only a chip's
  own part crosses the network.
  """
  across = slices if axis == crossing(sizes, slices) else 1
  inside = sizes[axis] // across
  return Traffic(
    what=what,
    kind=kind,
    axis=axis,
    link=whole * _RING[kind](inside),
    network=whole / inside * _RING[kind](across),
    share=share(inside, math.prod(sizes.values()) // slices, chip),
    hidden=hidden,
  )


def crossing(sizes: Mapping[str, int], slices: int) -> str | None:
  """The axis that lies between slices, as `mesh.make` places it; None in a single one.

  Raises ValueError where no axis that may cross divides into them.
  """
  if slices == 1:
    return None
  axis = next((a for a in ('data', 'fsdp') if sizes[a] % slices == 0), None)
  if axis is None:
    raise ValueError(
      f'config.mesh.data={sizes["data"]} or config.mesh.fsdp={sizes["fsdp"]} must be a '
      f'multiple of the {slices} slices, whose slow network no other axis may cross'
    )
  return axis


def share(inside: int, chips: int, chip: Chip) -> float:
  """A mesh axis's size, and a slice's -> the share of a chip's links along the axis.

  The links' dims are dealt out to the axes by the logarithms of their sizes.
  """
  if inside == 1 or chip.torus_dims == 1:
    return 1.0
  dims = max(1, round(chip.torus_dims * math.log(inside) / math.log(chips)))
  rings = 1.0 if chips >= chip.torus_from else assumed('open grid')
  return rings * min(dims, chip.torus_dims) / chip.torus_dims


@dataclass(frozen=True, kw_only=True)
class Roofline:
  """A step's least time in seconds, and what it is made of."""

  compute: float
  memory: float
  hidden: Mapping[str, float]  # by what travels where; behind compute as far as assumed
  exposed: Mapping[str, float]  # added to the time of computing
  step: float

  @property
  def bound(self) -> str:
    """What takes the most of the step."""
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
           + what cannot hide         links, network: what can; o: the overlap assumed
  """
  compute = sum(n / (chip.flops * assumed(kind)) for kind, n in flops.items())
  memory = moved / (chip.memory_bandwidth * assumed('memory'))
  hidden: dict[str, float] = {}
  exposed: dict[str, float] = {}
  totals = {'links': 0.0, 'network': 0.0}
  for t in sent:
    link = t.link / (chip.link_bandwidth * t.share * assumed('link'))
    network = t.network / (chip.network_bandwidth * assumed('network'))
    for where, seconds in (('links', link), ('network', network)):
      if not seconds:
        continue
      group = hidden if t.hidden else exposed
      name = f'{t.axis} ({where})'
      group[name] = group.get(name, 0.0) + seconds
      if t.hidden:
        totals[where] += seconds
  overlap = assumed('overlap')
  busy = max(compute, memory, *(overlap * seconds for seconds in totals.values()))
  left = (1 - overlap) * sum(totals.values())
  return Roofline(
    compute=compute,
    memory=memory,
    hidden=hidden,
    exposed=exposed,
    step=busy + left + sum(exposed.values()),
  )
