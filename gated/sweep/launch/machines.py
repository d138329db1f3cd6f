"""The accelerator of a point, and its name for each scheduler.

  cpu      h100:8 (GPUs of a host)      v5p:4x4x4 (the slice)

GPU names: SkyPilot's catalog (`sky show-gpus`), and GKE's node labels
(cloud.google.com/kubernetes-engine/docs/how-to/gpus). TPU names: "TPU versions" of
docs.cloud.google.com/tpu/docs and "Plan TPUs in GKE"; software versions: its page
"TPU software versions".
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from gated.devices import chips

# GPU -> its name on SkyPilot and on GKE; '' where it is not available.
GPUS = {
  'a100-40': ('A100', 'nvidia-tesla-a100'),
  'a100': ('A100-80GB', 'nvidia-a100-80gb'),
  'l4': ('L4', 'nvidia-l4'),
  'l40s': ('L40S', ''),
  'h100': ('H100', 'nvidia-h100-80gb'),
  'h200': ('H200', 'nvidia-h200-141gb'),
  'gh200': ('GH200', ''),
  'b200': ('B200', 'nvidia-b200'),
}
SCHEDULERS = 'SkyPilot', 'GKE'  # The columns of GPUS.


class Tpu(NamedTuple):
  """The names of a TPU."""

  gke: str
  prefix: str  # Cloud TPU's accelerator type is PREFIX-SIZE.
  per_chip: int  # SIZE counts the two cores of each chip of v4 and v5p, else chips.
  runtime: str  # The software version.


TPUS = {
  'v4': Tpu('tpu-v4-podslice', 'v4', 2, 'tpu-ubuntu2204-base'),
  'v5e': Tpu('tpu-v5-lite-podslice', 'v5litepod', 1, 'v2-alpha-tpuv5-lite'),
  'v5p': Tpu('tpu-v5p-slice', 'v5p', 2, 'v2-alpha-tpuv5'),
  'v6e': Tpu('tpu-v6e-slice', 'v6e', 1, 'v2-alpha-tpuv6e'),
}


@dataclass(frozen=True)
class Accelerator:
  """The accelerators of one host, or of one TPU slice."""

  name: str  # 'cpu', or a key of chips.CHIPS
  count: int = 0  # GPUs of a host, chips of a slice
  topology: str = ''  # of a slice: '4x4x4'

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
    tpu = TPUS[self.name]
    return f'{tpu.prefix}-{self.count * tpu.per_chip}'

  def gpu_on(self, scheduler: str) -> str:
    """A GPU's name on one of SCHEDULERS; ValueError if it has none."""
    column = SCHEDULERS.index(scheduler)
    names = {gpu: row[column] for gpu, row in GPUS.items() if row[column]}
    if self.name not in names:
      raise ValueError(
        f'--accelerator={self.name} has no known name on {scheduler}; allowed are '
        f'{", ".join(names)}'
      )
    return names[self.name]


def accelerator(spec: str) -> Accelerator:
  """'cpu', 'h100:8' or 'v5p:4x4x4' -> Accelerator; ValueError if it is invalid."""
  name, _, size = spec.partition(':')
  if name in TPUS:
    shapes = {'x'.join(map(str, shape)): shape for shape in chips.topologies(name)}
    if size not in shapes:
      smallest = ', '.join(f'{name}:{shape}' for shape in list(shapes)[:12])
      raise ValueError(
        f'--accelerator={spec!r} is not an available slice; allowed are {smallest}, ...'
      )
    return Accelerator(name, math.prod(shapes[size]), size)
  gpus = [n for n in chips.CHIPS if n not in (*TPUS, 'cpu', 'v7x')]
  if spec == 'cpu' or (name in gpus and size in map(str, range(1, 17))):
    return Accelerator(name, int(size or 0))
  raise ValueError(
    f'--accelerator={spec!r}, but allowed are cpu; a GPU and the number per host, 1 to '
    f'16 ({", ".join(gpus)}; h100:8); a TPU and its slice ({", ".join(TPUS)}; '
    'v5p:4x4x4)'
  )
