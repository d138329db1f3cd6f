"""How many points this machine runs at a time, and what environment each is given."""

import importlib.metadata
import importlib.util
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gated import config
from gated import plan as plans
from gated.devices import chips, mesh
from gated.pods import estimate
from gated.sweep.grid import Point

# Bytes of a process that trains on CPU beside its arrays: Python, JAX, the compiler.
PROCESS = 1 << 30
# So many times the estimate of a step, for what XLA keeps on a CPU besides.
SPARE = 1.5
# Of a GPU's memory, for all the points that share it.
SHARED = 0.9


class Slot(NamedTuple):
  """Room for one point at a time."""

  name: str  # 'CPU', 'GPU 3'
  environment: Mapping[str, str]  # What says which devices are meant.


class Room(NamedTuple):
  """All that runs at a time."""

  slots: tuple[Slot, ...]
  # Of every point, for the same losses whenever it runs again; kept in sweep.json.
  environment: Mapping[str, str]
  why: str


def room(points: Sequence[Point], jobs: int) -> Room:
  """The points and `--jobs` (0: as many as there is room for) -> Room."""
  if jobs < 0:
    raise ValueError(f'--jobs={jobs} must not be negative; 0 is as many as fit')
  kind = platform()
  if kind == 'gpu':
    return _on_gpus(jobs)
  if kind == 'tpu':
    if jobs > 1:
      raise ValueError(f'--jobs={jobs}, but a TPU is taken by one process at a time')
    return Room((Slot('TPU', {}),), {}, 'one point on all TPUs of this machine')
  return _on_cpus(points, jobs)


def platform() -> str:
  """-> what JAX would run on here: cpu, gpu or tpu, without touching a device."""
  named = os.environ.get('JAX_PLATFORMS', '').split(',')[0].strip().lower()
  if named:
    return 'gpu' if named in ('cuda', 'rocm', 'gpu') else named
  plugins = {e.name for e in importlib.metadata.entry_points(group='jax_plugins')}
  if any('cuda' in name for name in plugins) and gpus():
    return 'gpu'
  chips_here = [*Path('/dev').glob('accel[0-9]*'), *Path('/dev/vfio').glob('[0-9]*')]
  if chips_here and importlib.util.find_spec('libtpu'):
    return 'tpu'
  return 'cpu'


def gpus() -> list[str]:
  """-> the GPUs of this machine as CUDA_VISIBLE_DEVICES names them, or lets be seen."""
  allowed = os.environ.get('CUDA_VISIBLE_DEVICES')
  if allowed is not None:
    return [name.strip() for name in allowed.split(',') if name.strip()]
  try:
    done = subprocess.run(
      ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'],
      capture_output=True,
      text=True,
      check=True,
      timeout=60,
    )
    return done.stdout.split()
  except (OSError, subprocess.SubprocessError):
    devices = Path('/dev').glob('nvidia[0-9]*')
    return sorted((p.name.removeprefix('nvidia') for p in devices), key=int)


def _on_gpus(jobs: int) -> Room:
  found = gpus()
  if not found:
    raise ValueError('JAX_PLATFORMS asks for GPUs, but nvidia-smi finds none here')
  jobs = jobs or len(found)
  slots = []
  if jobs <= len(found):
    per = len(found) // jobs
    for i in range(jobs):
      names = ','.join(found[i * per : (i + 1) * per])
      slots.append(Slot(f'GPU {names}', {'CUDA_VISIBLE_DEVICES': names}))
    return Room(tuple(slots), {}, f'{len(found)} GPUs, {per} for a point')
  each = math.ceil(jobs / len(found))
  fraction = {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{SHARED / each:.3f}'}
  for i in range(jobs):
    name = found[i % len(found)]
    slots.append(Slot(f'GPU {name}', {'CUDA_VISIBLE_DEVICES': name} | fraction))
  return Room(tuple(slots), {}, f'{len(found)} GPUs, {each} points share one')


def _on_cpus(points: Sequence[Point], jobs: int) -> Room:
  cores = len(os.sched_getaffinity(0))
  need, free = max(map(_bytes, _shapes(points)), default=PROCESS), available()
  fit = int(free // need) if free else cores
  why = f'{cores} cores'
  if fit < (jobs or cores):
    gib = f'{need / 2**30:.1f} GiB each by estimate, {free / 2**30:.1f} free'
    why += f', and memory for {fit or "none"}: {gib}'
  jobs = jobs or max(1, min(cores, fit, len(points)))
  # XLA's pool of threads is as large as this says, and how sums are split with it.
  threads = max(1, cores // jobs)
  return Room((Slot('CPU', {}),) * jobs, {'NPROC': str(threads)}, why)


def available() -> int:
  """-> bytes of memory that may be taken here; 0 where that is not told."""
  found = []
  try:
    for line in Path('/proc/meminfo').read_text().splitlines():
      if line.startswith('MemAvailable:'):
        found.append(int(line.split()[1]) * 1024)
    limit, used = (
      Path(f'/sys/fs/cgroup/memory.{name}').read_text().strip()
      for name in ('max', 'current')
    )
    if limit != 'max':
      found.append(int(limit) - int(used))
  except (OSError, ValueError):
    pass  # No Linux, or no limit.
  return max(0, min(found, default=0))


def _shapes(points: Sequence[Point]) -> list[plans.Config]:
  """Points -> a recipe of each kind that may need memory of its own."""
  kinds = {}
  for point in points:
    c = point.config
    told = [c['model'], c['batch'], c['accum'], c['data']['length'], c['loss']]
    kinds.setdefault(config.digest([*told, c['optim']['name']]), c)
  return [config.build(plans.Config, c, 'config') for c in kinds.values()]


def _bytes(cfg: plans.Config) -> float:
  """A recipe -> memory of a process that trains it on a CPU, by estimate."""
  sizes = dict.fromkeys(mesh.AXES, 1)
  return PROCESS + SPARE * estimate.of(cfg, sizes, chips.CHIPS['cpu']).bytes
