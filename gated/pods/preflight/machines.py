"""The target of a preflight: slices of TPUs, a number of GPUs, or the devices here."""

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from gated.devices import chips

HERE = 'here'
GET = (
  'compiling for TPUs needs libtpu: run `pip install -r requirements-tpu.txt` in an '
  'environment of its own (`make tpu` makes .venv/tpu), or take --estimate'
)


@dataclass(frozen=True, kw_only=True)
class Machine:
  """The target of a preflight."""

  topology: str
  chip: chips.Chip | None  # None for a device that is not in chips.CHIPS
  count: int  # chips, over all slices
  slices: int
  compiles: bool  # whether XLA can compile for it on this machine


def machine(topology: str, slices: int) -> Machine:
  """'v5p:4x4x4', 'h100:64', 'cpu:8' or 'here' -> the machine, or ValueError."""
  if slices < 1:
    raise ValueError(f'--slices={slices}, but it must be at least 1')
  if topology == HERE:
    chip, count = chips.of(jax.devices()[0].device_kind), jax.device_count()
    return Machine(topology=HERE, chip=chip, count=count, slices=1, compiles=True)
  name, _, size = topology.partition(':')
  if name not in chips.CHIPS:
    known = ', '.join(chips.CHIPS)
    raise ValueError(f'--topology={topology}, but chips are {known}, or {HERE}')
  chip = chips.CHIPS[name]
  shapes = ['x'.join(map(str, shape)) for shape in chips.topologies(name)]
  if shapes and size not in shapes:
    raise ValueError(
      f'--topology={topology}, but slices of {name} are {" ".join(shapes)}'
    )
  if not shapes and not re.fullmatch(r'[1-9]\d{0,6}', size):
    raise ValueError(f'--topology={topology}, but it must be {name}:COUNT')
  count = math.prod(map(int, size.split('x'))) * slices
  if not shapes and slices == 1:
    # GPUs that fast links connect count as a slice.
    slices = -(-count // chip.slice_size)
  return Machine(
    topology=topology, chip=chip, count=count, slices=slices, compiles=bool(shapes)
  )


def devices(target: Machine) -> list[Any]:
  """The devices to compile for; raises NotImplementedError where libtpu is missing."""
  if target.topology == HERE:
    return jax.devices()
  if importlib.util.find_spec('libtpu') is None:
    raise NotImplementedError(GET)
  from jax.experimental import topologies

  opts = {'num_slices': target.slices} if target.slices > 1 else {}
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=target.topology, **opts
  )
  return list(description.devices)
