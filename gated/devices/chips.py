"""What accelerators can do, from their makers' pages: speed, memory, links, slices.

One chip is what JAX calls one device (a TPU7x has two). Speeds are the makers' peaks; how
much of a peak a program reaches is assumed in `estimate.py`, not here.

TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "system architecture".
GPUs: NVIDIA's data sheets (A100, L4, L40S, H100, H200, GH200, HGX B200), which print most
figures with 2:4 sparsity: halved here.
"""

import itertools
import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
  """One device of a kind; bytes, bytes per second and FLOP/s."""

  name: str
  device_kinds: tuple[str, ...]  # what `jax.Device.device_kind` says of it
  flops: float  # dense, bfloat16
  memory: float | None  # that a program may use; None where it is no bound
  memory_bandwidth: float
  link_bandwidth: float  # what a chip sends to its neighbours, over all of its links
  network_bandwidth: float  # what a chip sends to other slices or hosts
  slice_size: int  # chips that the fast links reach at most
  torus_dims: int  # of the links' grid; 1 is a switch
  torus_from: int  # chips of a slice from which the grid's rows close to rings


def _tpu(name: str, kinds: str, **facts) -> Chip:
  return Chip(name=name, device_kinds=tuple(kinds.split(', ')), **facts)


def _gpu(name, kinds: str, tflops, gib, memory, link, network) -> Chip:
  """TFLOP/s, GiB, and GB/s of memory, NVLink (one way) or PCIe, and network."""
  return Chip(
    name=name,
    device_kinds=tuple(kinds.split(', ')),
    flops=tflops * 1e12,
    memory=gib * GIB,
    memory_bandwidth=memory * 1e9,
    link_bandwidth=link * 1e9,
    network_bandwidth=network * 1e9,
    slice_size=8,  # An HGX board; the pages of other cards name no switch either.
    torus_dims=1,
    torus_from=1,
  )


# Of a TPU's nominal memory the compiler leaves itself a part: it reports 15.75 GiB of 16
# on v5e, 95.74 of 96 on v5p, 31.25 of 32 on v6e, 30.75 of 32 on v4; a TPU7x is assumed to
# be as v5p. Links, a chip and way: 2,400 Gbit/s on v4, 1,600 on v5e, 4,800 on v5p, 3,200
# on v6e (newer pages print twice that, "bidirectional"). Network: what a pod has over its
# chips, 6.4 Tbit/s over 256 on v5e and 25.6 on v6e; 50 Gbit/s a chip on v4 and v5p, where
# four share a host's 200. GPUs: a NIC each, of 200 (A100), 400 or, for those on PCIe,
# 100 Gbit/s.
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    _tpu(
      'v4',
      'TPU v4',
      flops=275e12,
      memory=30.75 * GIB,
      memory_bandwidth=1228e9,
      link_bandwidth=300e9,
      network_bandwidth=6.25e9,
      slice_size=4096,
      torus_dims=3,
      torus_from=64,
    ),
    _tpu(
      'v5e',
      'TPU v5 lite, TPU v5e',
      flops=197e12,
      memory=15.75 * GIB,
      memory_bandwidth=819e9,
      link_bandwidth=200e9,
      network_bandwidth=3.125e9,
      slice_size=256,
      torus_dims=2,
      torus_from=256,
    ),
    _tpu(
      'v5p',
      'TPU v5, TPU v5p',
      flops=459e12,
      memory=95.74 * GIB,
      memory_bandwidth=2765e9,
      link_bandwidth=600e9,
      network_bandwidth=6.25e9,
      slice_size=8960,
      torus_dims=3,
      torus_from=64,
    ),
    _tpu(
      'v6e',
      'TPU v6 lite, TPU v6e',
      flops=918e12,
      memory=31.25 * GIB,
      memory_bandwidth=1640e9,
      link_bandwidth=400e9,
      network_bandwidth=12.5e9,
      slice_size=256,
      torus_dims=2,
      torus_from=256,
    ),
    _tpu(
      'v7x',
      'TPU7x',
      flops=2307e12 / 2,
      memory=95.74 * GIB,
      memory_bandwidth=7380e9 / 2,
      link_bandwidth=600e9 / 2,
      network_bandwidth=12.5e9 / 2,
      slice_size=9216,
      torus_dims=3,
      torus_from=64,
    ),
    _gpu('a100-40', 'NVIDIA A100-SXM4-40GB', 312, 39.4, 1555, 300, 25),
    _gpu('a100', 'NVIDIA A100-SXM4-80GB', 312, 79.1, 2039, 300, 25),
    _gpu('a100-40-pcie', 'NVIDIA A100-PCIE-40GB', 312, 39.4, 1555, 32, 12.5),
    _gpu('a100-pcie', 'NVIDIA A100 80GB PCIe', 312, 79.1, 1935, 32, 12.5),
    _gpu('l4', 'NVIDIA L4', 121, 22.0, 300, 32, 12.5),
    _gpu('l40s', 'NVIDIA L40S', 362, 44.4, 864, 32, 12.5),
    _gpu('h100', 'NVIDIA H100 80GB HBM3', 989, 79.1, 3350, 450, 50),
    _gpu('h100-pcie', 'NVIDIA H100 PCIe', 756, 79.1, 2000, 64, 50),
    _gpu('h100-nvl', 'NVIDIA H100 NVL', 835, 93.1, 3900, 300, 50),
    _gpu('h200', 'NVIDIA H200', 989, 139.8, 4800, 450, 50),
    _gpu('h200-nvl', 'NVIDIA H200 NVL', 835, 139.8, 4800, 450, 50),
    _gpu('gh200', 'NVIDIA GH200 480GB', 989, 94.5, 4000, 450, 50),
    _gpu('b200', 'NVIDIA B200', 2250, 178.3, 8000, 900, 50),
    # A stand-in with round numbers, so that meshes can be compared on simulated devices
    # and on those that are not in this table. Its memory, the host's, is no bound.
    Chip(
      name='cpu',
      device_kinds=('cpu',),
      flops=1e12,
      memory=None,
      memory_bandwidth=20e9,
      link_bandwidth=10e9,
      network_bandwidth=1e9,
      slice_size=1024,
      torus_dims=1,
      torus_from=1,
    ),
  )
}

# Sides of the largest slice that one may ask for. Google's pages: a v4 or v5p slice below
# a cube of 4x4x4 is one of _SMALL, a larger one has sides that are multiples of 4.
_SIDES = {
  'v4': (12, 16, 16),
  'v5e': (16, 16),
  'v5p': (16, 16, 24),
  'v6e': (16, 16),
}
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def of(device_kind: str) -> Chip | None:
  """What JAX calls a device's kind -> the chip; None for one not in the table."""
  kinds = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}
  return kinds.get(device_kind)


def topologies(name: str) -> tuple[tuple[int, ...], ...]:
  """A TPU's name -> the slice shapes there are, smallest first; () for anything else.

  The compiler takes more ('v5e:16x32', 'v5p:2x2x8'), but no such slice can be had.
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
