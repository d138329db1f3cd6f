"""The accelerator of a point, and its name for each scheduler.

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
# Cloud TPU's accelerator type is PREFIX-SIZE. SIZE counts the cores of v4 and v5p, two a
# chip, and the chips of the others.
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
  """The accelerators of one host, or of one TPU slice."""

  name: str  # 'cpu', or a key of chips.CHIPS
  count: int  # GPUs of a host, chips of a slice; 0 for CPUs
  topology: str  # of a slice, '4x4x4'; '' for anything else

  @property
  def kind(self) -> str:
    """'cpu', 'gpu' or 'tpu'."""
    return 'tpu' if self.topology else 'gpu' if self.count else 'cpu'

  @property
  def chips_of_host(self) -> int:
    """Up to 8 chips of v5e or v6e are one host; larger slices have 4 chips a host."""
    flat = self.name in ('v5e', 'v6e')
    return self.count if flat and self.count <= 8 else min(self.count, 4)

  @property
  def hosts(self) -> int:
    """The number of hosts of one slice."""
    return self.count // self.chips_of_host if self.topology else 1

  @property
  def type(self) -> str:
    """Cloud TPU's accelerator type of a slice: 'v5p-128'."""
    name, cores = CLOUD_TPU[self.name]
    return f'{name}-{self.count * cores}'


def accelerator(spec: str) -> Accelerator:
  """'cpu', 'h100:8' or 'v5p:4x4x4' -> Accelerator; ValueError if it is invalid."""
  name, _, size = spec.partition(':')
  if name == 'cpu' and not size:
    return Accelerator(name=name, count=0, topology='')
  if name in CLOUD_TPU:
    shapes = {'x'.join(map(str, shape)): shape for shape in chips.topologies(name)}
    if size not in shapes:
      smallest = ', '.join(f'{name}:{shape}' for shape in list(shapes)[:12])
      raise ValueError(
        f'--accelerator={spec!r} is not an available slice; allowed are {smallest}, ...'
      )
    return Accelerator(name=name, count=math.prod(shapes[size]), topology=size)
  gpus = [n for n in chips.CHIPS if n not in (*CLOUD_TPU, 'cpu', 'v7x')]
  if name in gpus and size in map(str, range(1, 17)):
    return Accelerator(name=name, count=int(size), topology='')
  raise ValueError(
    f'--accelerator={spec!r}, but allowed are cpu; a GPU and the number per host, 1 to '
    f'16 ({", ".join(gpus)}; h100:8); a TPU and its slice ({", ".join(CLOUD_TPU)}; '
    'v5p:4x4x4)'
  )


def name_of(accelerator: Accelerator, names: dict[str, str], scheduler: str) -> str:
  """A scheduler's name of an accelerator; ValueError if the table `names` has none."""
  if accelerator.name not in names:
    raise ValueError(
      f'--accelerator={accelerator.name} has no known name on {scheduler}; allowed are '
      f'{", ".join(names)}'
    )
  return names[accelerator.name]
