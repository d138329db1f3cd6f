"""Which machines a point is run on: one accelerator, as each scheduler calls it.

  cpu      h100:8 (GPUs of a host)      v5p:4x4x4 (the slice)

GPU names: SkyPilot's catalog (`sky show-gpus`), and GKE's node labels
(cloud.google.com/kubernetes-engine/docs/how-to/gpus). TPU names: "TPU versions" of
docs.cloud.google.com/tpu/docs and "Plan TPUs in GKE"; software versions: its page
"TPU software versions".
"""

import math
from dataclasses import dataclass

from gated.devices import chips

SKYPILOT = {
  'a100-40': 'A100',
  'a100': 'A100-80GB',
  'l4': 'L4',
  'l40s': 'L40S',
  'h100': 'H100',
  'h200': 'H200',
  'gh200': 'GH200',
  'b200': 'B200',
}
GKE = {
  'a100-40': 'nvidia-tesla-a100',
  'a100': 'nvidia-a100-80gb',
  'l4': 'nvidia-l4',
  'h100': 'nvidia-h100-80gb',
  'h200': 'nvidia-h200-141gb',
  'b200': 'nvidia-b200',
  'v4': 'tpu-v4-podslice',
  'v5e': 'tpu-v5-lite-podslice',
  'v5p': 'tpu-v5p-slice',
  'v6e': 'tpu-v6e-slice',
}
# What stands before the size of a Cloud TPU's accelerator type, and what it counts: cores
# of v4 and v5p, which have two, chips of the others.
CLOUD_TPU = {
  'v4': ('v4', 2),
  'v5e': ('v5litepod', 1),
  'v5p': ('v5p', 2),
  'v6e': ('v6e', 1),
}
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
  """What one host, or one slice of TPUs, has."""

  name: str  # 'cpu', or a key of chips.CHIPS
  count: int  # GPUs of a host, chips of a slice; 0 for CPUs
  topology: str  # of a slice, '4x4x4'; '' for anything else

  @property
  def kind(self) -> str:
    """'cpu', 'gpu' or 'tpu'."""
    if self.topology:
      return 'tpu'
    return 'gpu' if self.count else 'cpu'

  @property
  def chips_of_host(self) -> int:
    """A slice of up to 8 v5e or v6e is one host's; all larger ones have four a host."""
    flat = self.name in ('v5e', 'v6e')
    return self.count if flat and self.count <= 8 else min(self.count, 4)

  @property
  def hosts(self) -> int:
    """Of one slice."""
    return self.count // self.chips_of_host if self.topology else 1

  @property
  def type(self) -> str:
    """A slice -> Cloud TPU's accelerator type: 'v5p-128'."""
    name, cores = CLOUD_TPU[self.name]
    return f'{name}-{self.count * cores}'

  @property
  def requirements(self) -> str:
    """The stem of the file that says what a run on it needs."""
    return {'cpu': 'requirements', 'gpu': 'requirements-cuda', 'tpu': 'requirements-tpu'}[
      self.kind
    ]


def accelerator(spec: str) -> Accelerator:
  """'cpu', 'h100:8' or 'v5p:4x4x4' -> Accelerator; ValueError for what is none."""
  name, _, size = spec.partition(':')
  told = f'--accelerator={spec!r}'
  if name == 'cpu' and not size:
    return Accelerator(name=name, count=0, topology='')
  if name in CLOUD_TPU:
    shapes = {'x'.join(map(str, shape)): shape for shape in chips.topologies(name)}
    if size not in shapes:
      some = ', '.join(f'{name}:{shape}' for shape in list(shapes)[:12])
      raise ValueError(f'{told} is no slice that can be had; there are {some}, ...')
    return Accelerator(name=name, count=math.prod(shapes[size]), topology=size)
  if name in chips.CHIPS and name not in ('cpu', 'v7x') and size in _COUNTS:
    return Accelerator(name=name, count=int(size), topology='')
  gpus = ', '.join(n for n in chips.CHIPS if n not in (*CLOUD_TPU, 'cpu', 'v7x'))
  raise ValueError(
    f'{told}, but allowed are cpu; a GPU and how many a host has, 1 to 16 ({gpus}; '
    f'h100:8); a TPU and its slice ({", ".join(CLOUD_TPU)}; v5p:4x4x4)'
  )


_COUNTS = tuple(map(str, range(1, 17)))


def called(accelerator: Accelerator, names: dict[str, str], by: str) -> str:
  """What a scheduler calls it; ValueError where it has no name that is known here."""
  if accelerator.name not in names:
    raise ValueError(
      f'--accelerator={accelerator.name}, for which {by} has no name that is known here; '
      f'allowed are {", ".join(names)}'
    )
  return names[accelerator.name]
