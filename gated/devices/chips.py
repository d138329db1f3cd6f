"""The table of accelerators: speed, memory, links, slices, from the vendors' pages.

A chip is one JAX device (a TPU7x has two). Speeds are the vendors' peaks;
`pods/estimate/roofline.py` holds the assumed fraction of a peak that a program reaches.

TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "system architecture".
GPUs: NVIDIA's data sheets (A100, L4, L40S, H100, H200, GH200, HGX B200). They print most
figures with 2:4 sparsity; those are halved here.
"""

import itertools
import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
  """One device of a kind; bytes, bytes per second and FLOP/s."""

  name: str
  device_kinds: tuple[str, ...]  # the values of `jax.Device.device_kind`
  flops: float  # dense, bfloat16
  memory: float | None  # available to a program; None for no limit
  memory_bandwidth: float
  link_bandwidth: float  # sent over all links to the chips around it
  network_bandwidth: float  # sent to other slices or hosts
  slice_size: int  # the most chips that the links connect
  torus_dims: int  # dims of the links' grid; 1 for a switch
  torus_from: int  # the smallest slice whose rows of chips are rings

  @property
  def is_gpu(self) -> bool:
    return self.device_kinds[0].startswith('NVIDIA')


def _chip(
  name, kinds: str, tflops, gib, memory, link, network, slice_size=8, dims=1, rings=1
) -> Chip:
  """TFLOP/s, GiB, and GB/s of memory, links (one way) and network.

  The defaults are those of GPUs: an HGX board has 8, behind a switch.
  """
  return Chip(
    name=name,
    device_kinds=tuple(kinds.split(', ')),
    flops=tflops * 1e12,
    memory=gib and gib * GIB,
    memory_bandwidth=memory * 1e9,
    link_bandwidth=link * 1e9,
    network_bandwidth=network * 1e9,
    slice_size=slice_size,
    torus_dims=dims,
    torus_from=rings,
  )


# The TPU compiler reserves a part of the nominal memory: it reports 15.75 GiB of 16 on
# v5e, 95.74 of 96 on v5p, 31.25 of 32 on v6e, 30.75 of 32 on v4; v7x is assumed to equal
# v5p. Links, per chip and direction: 2,400 Gbit/s on v4, 1,600 on v5e, 4,800 on v5p and
# 3,200 on v6e (newer pages print the double, "bidirectional"). Network: a pod's bandwidth
# over its chips, 6.4 Tbit/s over 256 on v5e and 25.6 on v6e; 50 Gbit/s a chip on v4 and
# v5p, where four share a host's 200. GPUs: NVLink, or PCIe for cards without it, and a
# NIC each of 200 (A100) or 400 Gbit/s, or 100 for those on PCIe.
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    _chip('v4', 'TPU v4', 275, 30.75, 1228, 300, 6.25, 4096, 3, 64),
    _chip('v5e', 'TPU v5 lite, TPU v5e', 197, 15.75, 819, 200, 3.125, 256, 2, 256),
    _chip('v5p', 'TPU v5, TPU v5p', 459, 95.74, 2765, 600, 6.25, 8960, 3, 64),
    _chip('v6e', 'TPU v6 lite, TPU v6e', 918, 31.25, 1640, 400, 12.5, 256, 2, 256),
    _chip('v7x', 'TPU7x', 2307 / 2, 95.74, 7380 / 2, 600 / 2, 12.5 / 2, 9216, 3, 64),
    _chip('a100-40', 'NVIDIA A100-SXM4-40GB', 312, 39.4, 1555, 300, 25),
    _chip('a100', 'NVIDIA A100-SXM4-80GB', 312, 79.1, 2039, 300, 25),
    _chip('a100-40-pcie', 'NVIDIA A100-PCIE-40GB', 312, 39.4, 1555, 32, 12.5),
    _chip('a100-pcie', 'NVIDIA A100 80GB PCIe', 312, 79.1, 1935, 32, 12.5),
    _chip('l4', 'NVIDIA L4', 121, 22.0, 300, 32, 12.5),
    _chip('l40s', 'NVIDIA L40S', 362, 44.4, 864, 32, 12.5),
    _chip('h100', 'NVIDIA H100 80GB HBM3', 989, 79.1, 3350, 450, 50),
    _chip('h100-pcie', 'NVIDIA H100 PCIe', 756, 79.1, 2000, 64, 50),
    _chip('h100-nvl', 'NVIDIA H100 NVL', 835, 93.1, 3900, 300, 50),
    _chip('h200', 'NVIDIA H200', 989, 139.8, 4800, 450, 50),
    _chip('h200-nvl', 'NVIDIA H200 NVL', 835, 139.8, 4800, 450, 50),
    _chip('gh200', 'NVIDIA GH200 480GB', 989, 94.5, 4000, 450, 50),
    _chip('b200', 'NVIDIA B200', 2250, 178.3, 8000, 900, 50),
    # Round numbers, to compare meshes on simulated devices and on devices missing from
    # this table. The memory is the host's and has no limit here.
    _chip('cpu', 'cpu', 1, None, 20, 10, 1, 1024),
  )
}

# Sides of the largest slice that Google offers. By its pages, v4 and v5p slices below
# 4x4x4 are those of _SMALL, and the sides of larger slices are multiples of 4.
_SIDES = {
  'v4': (12, 16, 16),
  'v5e': (16, 16),
  'v5p': (16, 16, 24),
  'v6e': (16, 16),
}
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def of(device_kind: str) -> Chip | None:
  """A `jax.Device.device_kind` -> its chip; None if the table lacks it."""
  kinds = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}
  return kinds.get(device_kind)


def topologies(name: str) -> tuple[tuple[int, ...], ...]:
  """A TPU's name -> the slice shapes on offer, smallest first; () for anything else.

  The compiler accepts more ('v5e:16x32', 'v5p:2x2x8'), which Google does not offer.
  """
  sides = _SIDES.get(name, ())
  if len(sides) == 2:
    powers = [2**i for i in range(1, int(math.log2(sides[-1])) + 1)]
    shapes = [(a, b) for a, b in itertools.pairwise(sorted(powers * 2))]
  elif sides:
    cubes = itertools.product(*(range(4, side + 1, 4) for side in sides))
    shapes = [*_SMALL, *(s for s in cubes if list(s) == sorted(s))]
  else:
    shapes = []
  return tuple(sorted(set(shapes), key=lambda shape: (math.prod(shape), shape)))
