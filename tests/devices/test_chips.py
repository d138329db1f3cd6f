"""The table of chips agrees with itself and with what a compiler says of them."""

import math

import pytest

from gated.devices import chips
from gated.run import metrics

TPUS = ('v4', 'v5e', 'v5p', 'v6e')


def test_every_kind_of_device_has_one_chip():
  kinds = [kind for chip in chips.CHIPS.values() for kind in chip.device_kinds]
  assert len(kinds) == len(set(kinds))
  assert all(chip.name == name for name, chip in chips.CHIPS.items())
  assert all(chips.of(k) in chips.CHIPS.values() for k in kinds)
  assert chips.of('TPU v99') is None


def test_numbers_are_in_their_units():
  """A slip of a thousand, or of bits for bytes, lies outside of these bounds."""
  for chip in chips.CHIPS.values():
    if chip.name == 'cpu':
      continue
    assert 1e14 < chip.flops < 1e16, chip
    assert chip.memory and 8 * chips.GIB < chip.memory < 300 * chips.GIB, chip
    assert 2e11 < chip.memory_bandwidth < 1e13, chip
    assert 1e9 < chip.network_bandwidth < chip.link_bandwidth < chip.memory_bandwidth


@pytest.mark.parametrize('name', TPUS)
def test_slices_are_whole_hosts_up_to_their_pod(name):
  shapes = chips.topologies(name)
  sizes = [math.prod(shape) for shape in shapes]
  assert sizes == sorted(sizes) and len(set(shapes)) == len(shapes)
  assert sizes[0] == 4 and sizes[-1] <= chips.CHIPS[name].slice_size
  assert all(a % 2 == 0 and b % 2 == 0 for a, b, *_ in shapes)
  assert {len(shape) for shape in shapes} == {chips.CHIPS[name].torus_dims}


def test_flat_slices_are_the_seven_that_are_offered():
  offered = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
  assert chips.topologies('v5e') == chips.topologies('v6e') == offered
  assert chips.topologies('h100') == ()


def test_mfu_is_told_against_the_table_and_never_of_a_cpu():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  assert metrics.peak(Device('TPU v5 lite')) == chips.CHIPS['v5e'].flops
  assert metrics.peak(Device('NVIDIA H200')) == 989e12
  assert metrics.peak(Device('cpu')) is None
  assert metrics.peak(Device('an unknown card')) is None


_ASK = """
from jax.experimental import topologies
import sys
for name in sys.argv[1:]:
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  print(name, len({(*d.coords,) for d in devices}), devices[0].device_kind, sep='|')
"""


@pytest.mark.slow
def test_the_compiler_knows_every_slice(run_for_tpu):
  sizes = {
    f'{name}:{"x".join(map(str, shape))}': math.prod(shape)
    for name in TPUS
    for shape in chips.topologies(name)
  }
  done = run_for_tpu(['-c', _ASK, *sizes])
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [line.split('|') for line in done.stdout.splitlines()]
  assert {name: int(size) for name, size, _ in lines} == sizes
  assert all(chips.of(kind) is chips.CHIPS[n.split(':')[0]] for n, _, kind in lines)
