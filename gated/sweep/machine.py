"""How many points this machine runs at a time, and the environment of each."""

import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gated import config
from gated import plan as plans
from gated.devices import chips, mesh
from gated.pods import estimate
from gated.sweep.grid import Point

# Bytes of a process on a CPU besides its arrays: Python, JAX, the compiler.
PROCESS = 1 << 30
SPARE = 1.5  # Memory of XLA on a CPU, as a multiple of the estimate of a step.
SHARED = 0.9  # The fraction of a GPU's memory for all points that share it.


class Slot(NamedTuple):
  """Room for one point at a time."""

  name: str  # 'CPU', 'GPU 3'
  environment: Mapping[str, str]  # Selects the devices.


class Room(NamedTuple):
  """The slots of this machine."""

  slots: tuple[Slot, ...]
  # For every point, so that a resumed point has the same losses; recorded in sweep.json.
  environment: Mapping[str, str]
  reason: str


def room(points: Sequence[Point], jobs: int) -> Room:
  """The points and `--jobs` (0: as many as fit) -> Room."""
  if jobs < 0:
    raise ValueError(f'--jobs={jobs} must not be negative; 0 is as many as fit')
  kind = platform()
  if kind == 'gpu':
    return _on_gpus(jobs)
  if kind == 'tpu':
    if jobs > 1:
      raise ValueError(f'--jobs={jobs}, but only one process can use a TPU')
    return Room((Slot('TPU', {}),), {}, 'one point on all TPUs of this machine')
  return _on_cpus(points, jobs)


def platform() -> str:
  """-> JAX's platform here: cpu, gpu or tpu; initializes no device."""
  named = os.environ.get('JAX_PLATFORMS', '').split(',')[0].strip().lower()
  if named:
    return 'gpu' if named in ('cuda', 'rocm', 'gpu') else named
  plugins = {e.name for e in importlib.metadata.entry_points(group='jax_plugins')}
  if any('cuda' in name for name in plugins) and gpus():
    return 'gpu'
  accelerators = [*Path('/dev').glob('accel[0-9]*'), *Path('/dev/vfio').glob('[0-9]*')]
  if accelerators and importlib.util.find_spec('libtpu'):
    return 'tpu'
  return 'cpu'


def gpus() -> list[str]:
  """-> the visible GPUs of this machine, as named in CUDA_VISIBLE_DEVICES."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [name.strip() for name in visible.split(',') if name.strip()]
  try:
    return _query('index')
  except (OSError, subprocess.SubprocessError):
    devices = Path('/dev').glob('nvidia[0-9]*')
    return sorted((p.name.removeprefix('nvidia') for p in devices), key=int)


def gpu_memory() -> int | None:
  """-> bytes of the smallest GPU of this machine; None if unknown."""
  try:
    return min(int(mib) << 20 for mib in _query('memory.total'))
  except (OSError, subprocess.SubprocessError, ValueError):
    return None


def _query(name: str) -> list[str]:
  """A property -> its value for each GPU, without units."""
  command = ['nvidia-smi', f'--query-gpu={name}', '--format=csv,noheader,nounits']
  result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
  return result.stdout.split()


def _on_gpus(jobs: int) -> Room:
  devices = gpus()
  if not devices:
    raise ValueError('JAX_PLATFORMS selects GPUs, but nvidia-smi lists none')
  count, jobs = len(devices), jobs or len(devices)
  if jobs <= count:
    per = count // jobs
    groups = [','.join(devices[i * per : (i + 1) * per]) for i in range(jobs)]
    memory, reason = {}, f'{count} GPUs, {per} for a point'
  else:
    sharing = math.ceil(jobs / count)
    groups = [devices[i % count] for i in range(jobs)]
    memory = {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{SHARED / sharing:.3f}'}
    reason = f'{count} GPUs, {sharing} points share one'
  slots = [Slot(f'GPU {g}', {'CUDA_VISIBLE_DEVICES': g} | memory) for g in groups]
  return Room(tuple(slots), {}, reason)


def _on_cpus(points: Sequence[Point], jobs: int) -> Room:
  cores = len(os.sched_getaffinity(0))
  need, free = _need(points), available()
  fit = int(free // need) if free else cores
  reason = f'{cores} cores'
  if fit < (jobs or cores):
    gib = f'{need / 2**30:.1f} GiB each by estimate, {free / 2**30:.1f} free'
    reason += f', and memory for {fit or "none"}: {gib}'
  jobs = jobs or max(1, min(cores, fit, len(points)))
  # NPROC sets the size of XLA's thread pool, which decides how sums are split.
  threads = max(1, cores // jobs)
  return Room((Slot('CPU', {}),) * jobs, {'NPROC': str(threads)}, reason)


def available() -> int:
  """-> bytes of free memory here; 0 if unknown."""
  group, limits = Path('/sys/fs/cgroup'), []
  try:
    free = re.search(r'MemAvailable: *(\d+) kB', Path('/proc/meminfo').read_text())
    limits += [int(free[1]) * 1024] if free else []
    # 'max' means no limit; int() then raises ValueError.
    limit = int((group / 'memory.max').read_text())
    limits.append(limit - int((group / 'memory.current').read_text()))
  except (OSError, ValueError):
    pass  # Not Linux, or no limit.
  return max(0, min(limits, default=0))


def _need(points: Sequence[Point]) -> float:
  """The largest estimated memory of a process that trains a point on a CPU."""
  recipes = {}
  for point in points:
    c = point.config  # Only these knobs change its memory.
    sizes = [c['model'], c['batch'], c['accum'], c['data']['length'], c['loss']]
    recipes.setdefault(config.digest([*sizes, c['optim']['name']]), c)
  axes, cpu = dict.fromkeys(mesh.AXES, 1), chips.CHIPS['cpu']
  estimates = []
  for c in recipes.values():
    try:
      built = config.build(plans.Config, c, 'config')
    except ValueError:
      continue  # Other sources resolved it, before a knob was added or removed.
    estimates.append(estimate.Estimate(built, axes, cpu).bytes)
  return PROCESS + SPARE * max(estimates, default=0)
