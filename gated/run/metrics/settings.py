"""The settings of a session in run.json: devices, versions, environment; what matters.

Two sessions with other settings may compute other numbers, at least in the last bits.
"""

from collections.abc import Mapping
from typing import Any

# Beginnings of variables, and of flags in the variables FLAGS, that change no number:
# those of memory, caches, logs, dumps, checks and connections. Devices are compared by
# themselves.
VARIABLES = (
  'XLA_PYTHON_CLIENT_',
  'XLA_CLIENT_MEM_',
  'JAX_CHECK_',
  'JAX_COMPILATION_CACHE_',
  'JAX_COORDINATOR_',
  'JAX_CUDA_VISIBLE_DEVICES',
  'JAX_DEBUG_LOG_MODULES',
  'JAX_DISTRIBUTED_',
  'JAX_DUMP_',
  'JAX_ENABLE_COMPILATION_CACHE',
  'JAX_EXPLAIN_CACHE_MISSES',
  'JAX_INCLUDE_',
  'JAX_LOG_',
  'JAX_LOGGING_LEVEL',
  'JAX_NUM_PROCESSES',
  'JAX_NUMPY_RANK_PROMOTION',
  'JAX_PERSISTENT_CACHE_',
  'JAX_PLATFORM',
  'JAX_PROCESS_ID',
  'JAX_PROFILER_',
  'JAX_RAISE_PERSISTENT_CACHE_ERRORS',
  'JAX_TRACEBACK_',
  'JAX_TRACER_',
  'JAX_TRANSFER_GUARD',
  'NCCL_DEBUG',
  'NCCL_IB_',
  'NCCL_SOCKET_',
)
FLAGS = 'XLA_FLAGS', 'LIBTPU_INIT_ARGS'
_FLAGS = (
  '--xla_dump_',
  '--xla_force_host_platform_device_count',
  '--xla_gpu_force_compilation_parallelism',
  '--xla_gpu_per_fusion_autotune_cache_dir',
  '--xla_hlo_profile',
  '--xla_tpu_dump_',
)
# Keys of a session in run.json -> their names in the output.
SESSION = {
  'backend': 'backend',
  'device_kind': 'device',
  'devices': 'devices',
  'processes': 'processes',
  'deterministic': '--deterministic',
  'python': 'Python',
}
# Beginnings of the names in `of` that change no number; 'platform' is that of the
# kernel.
HARMLESS = ('platform', *(f'${name}' for name in VARIABLES))
HARMLESS += tuple(f'${name} {flag}' for name in FLAGS for flag in _FLAGS)


def of(session: Mapping[str, Any]) -> dict[str, Any]:
  """A session of run.json -> its settings by their names in the output."""
  settings = {name: session.get(key) for key, name in SESSION.items()}
  settings |= session.get('versions') or {}
  variables = session.get('environment') or {}
  for name in sorted(variables):
    if name not in FLAGS:
      settings[f'${name}'] = variables[name]
      continue
    for word in variables[name].split():
      flag, _, value = word.partition('=')
      settings[f'${name} {flag}'] = value or 'true'
  return settings | {'platform': session.get('platform')}


def changed(a: Mapping, b: Mapping) -> dict[str, tuple[Any, Any]]:
  """Two mappings -> name: (value, other value), where they differ."""
  return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}
