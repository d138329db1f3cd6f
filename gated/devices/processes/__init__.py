"""The processes of a run: how they connect, and small messages between them."""

import atexit
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gated.devices.processes import clusters, meeting

# gRPC reaches the hosts in these variables without a proxy.
DIRECT = 'no_grpc_proxy', 'no_proxy'


def start(
  coordinator: str,
  processes: int,
  process: int,
  *,
  start_timeout: float,
  peer_timeout: int,
) -> None:
  """Connects the processes of a run; call it before anything touches a device.

  `coordinator` is '' for a single process, 'auto' to read the cluster's environment
  (docs/clusters.md), or 'host:port' of process 0. ValueError, listing the missing
  processes, unless all connect within `start_timeout` seconds. Later, if a process sends
  no heartbeat for `peer_timeout` seconds, the others end and report it.
  """
  if not start_timeout > 0:
    raise ValueError(f'--start_timeout={start_timeout} must be positive')
  if not 0 <= process < processes:
    raise ValueError(f'--process={process} must be in [0, --processes={processes})')
  if not coordinator:
    if processes > 1:
      raise ValueError(f'--processes={processes} without --coordinator=HOST:PORT')
    return _open_backend()
  end = time.monotonic() + start_timeout
  if coordinator == 'auto':
    if processes > 1:
      raise ValueError(
        f'--processes={processes}, but --coordinator=auto sets the number itself'
      )
    place = clusters.find(start_timeout)
  else:
    place = clusters.by_hand(coordinator, processes, process)
  if place.process not in range(place.processes):
    raise ValueError(
      f'{place}: process {place.process} is outside of {place.processes} processes'
    )
  meeting.meet(place, end)
  _go_direct(place.address)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    place.address,
    place.processes,
    place.process,
    cluster_detection_method=None if place.shared else 'deactivate',
    heartbeat_timeout_seconds=peer_timeout,
  )


def _open_backend() -> None:
  """ValueError, with JAX's reason, if the platform of JAX_PLATFORMS cannot be opened."""
  try:
    jax.devices()
  except RuntimeError as error:
    chosen = f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}'
    raise ValueError(f'{chosen}: {error}'.partition('\n')[0]) from error


def _go_direct(address: str) -> None:
  """Excludes process 0 from web proxies; gRPC would hang on a proxy."""
  before = [os.environ[name] for name in DIRECT if os.environ.get(name)]
  host = address.rpartition(':')[0].strip('[]')
  os.environ[DIRECT[0]] = ','.join([*before, host])
  jax.config.update('jax_check_proxy_envs', False)  # Silences a warning about proxies.


def leave(code: int) -> int:
  """Ends a process of a run of several with the exit code; else -> the code.

  Its exit handlers run first: JAX's waits until every process has come so far. Python
  would then destroy Gloo's connections, which in rare cases never ends.
  """
  if jax.distributed.is_initialized():
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def gather(text: str) -> list[str]:
  """Each process's text, cut to 1000 bytes; all processes must call it."""
  if jax.process_count() == 1:
    return [text]
  row = np.zeros(1000, np.uint8)
  encoded = text.encode()[: len(row)]
  row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(row))
  return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in rows]


def share(content: bytes) -> bytes:
  """The bytes of process 0; all processes must call it."""
  if jax.process_count() == 1:
    return content
  take = multihost_utils.broadcast_one_to_all
  row = np.zeros(int(take(np.int64(len(content)))), np.uint8)
  if jax.process_index() == 0:
    row[:] = np.frombuffer(content, np.uint8)
  return np.asarray(take(row), np.uint8).tobytes()


def agree(subject: str, digest: str) -> None:
  """Raises ValueError unless the digest is equal in all processes."""
  if set(gather(digest)) != {digest}:
    process = jax.process_index()
    raise ValueError(
      f'{subject} of process {process} differ from those of another process'
    )


def same_host(subject: str) -> None:
  """Raises ValueError unless all processes of a run are on one machine."""
  if len(set(gather(platform.node()))) > 1:
    raise ValueError(f'{subject} need all processes of the run on one machine')


def this() -> str:
  """For example 'This was process 1 of 4.'"""
  return f'This was process {jax.process_index()} of {jax.process_count()}.'


def define(flags: Any) -> Callable[[], dict[str, Any]]:
  """Defines the flags of a run of several processes -> a function that reads them.

  `flags` is absl's module; the values are arguments of `start`.
  """
  coordinator = flags.DEFINE_string(
    'coordinator', '', "'auto', or HOST:PORT of process 0; '' for a single process."
  )
  count = flags.DEFINE_integer('processes', 1, 'Number of processes of the run.')
  process = flags.DEFINE_integer('process', 0, 'Number of this process, from 0.')
  timeout = flags.DEFINE_float('start_timeout', 300, 'Seconds to wait for all processes.')
  return lambda: dict(
    coordinator=coordinator.value,
    processes=count.value,
    process=process.value,
    start_timeout=timeout.value,
  )
