"""The processes of a run: how they find each other, and what they tell each other."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gated.devices.processes import clusters, meeting

# The variables in which gRPC finds the hosts that it reaches without a proxy.
DIRECT = 'no_grpc_proxy', 'no_proxy'


def start(
  coordinator: str,
  processes: int,
  process: int,
  *,
  start_timeout: float,
  peer_timeout: int,
) -> None:
  """Joins the other processes of a run; call it before anything touches a device.

  `coordinator` is '' for a run that is one process, 'auto' to ask the cluster's own
  environment (docs/clusters.md), or 'host:port' of process 0, also for one process.
  ValueError if not all have come after `start_timeout` seconds, naming who is missing. A
  process that later gives no sign of life for `peer_timeout` seconds ends the others,
  which name it.
  """
  if not start_timeout > 0:
    raise ValueError(f'--start_timeout={start_timeout} must be positive')
  if not 0 <= process < processes:
    raise ValueError(f'--process={process} must be in [0, --processes={processes})')
  if not coordinator:
    if processes > 1:
      raise ValueError(f'--processes={processes} without --coordinator=HOST:PORT')
    return
  end = time.monotonic() + start_timeout
  if coordinator == 'auto':
    if processes > 1:
      raise ValueError(f'--processes={processes}, but --coordinator=auto finds them out')
    place = clusters.find(start_timeout)
  else:
    place = clusters.by_hand(coordinator, processes, process)
  if place.process not in range(place.processes):
    raise ValueError(f'{place}: there is no process {place.process} of {place.processes}')
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


def _go_direct(address: str) -> None:
  """Keeps JAX's runtime from looking for process 0 through a proxy for the web.

  gRPC would, wherever the environment names one, and then waits for ever.
  """
  before = [os.environ[name] for name in DIRECT if os.environ.get(name)]
  host = address.rpartition(':')[0].strip('[]')
  os.environ[DIRECT[0]] = ','.join([*before, host])
  jax.config.update('jax_check_proxy_envs', False)  # It would warn of them.


def gather(text: str) -> list[str]:
  """Each process's text, at most 1000 bytes of it, by process; all must call it."""
  if jax.process_count() == 1:
    return [text]
  mine = np.zeros(1000, np.uint8)
  encoded = text.encode()[: len(mine)]
  mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  every = np.asarray(multihost_utils.process_allgather(mine))
  return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in every]


def agree(what: str, digest: str) -> None:
  """Raises ValueError unless all processes of a run hold the same hexadecimal digest."""
  if set(gather(digest)) != {digest}:
    process = jax.process_index()
    raise ValueError(f'{what} of process {process} differ from those of another')


def same_host(what: str) -> None:
  """Raises ValueError unless all processes of a run are on one machine."""
  if len(set(gather(platform.node()))) > 1:
    raise ValueError(f'{what} need all processes of the run on one machine')


def this() -> str:
  """'This was process 1 of 4.'"""
  return f'This was process {jax.process_index()} of {jax.process_count()}.'


def define(flags: Any) -> Callable[[], dict[str, Any]]:
  """Defines the flags of a run of several processes -> a call that gives their values.

  `flags` is absl's module. The values are the arguments of `start`.
  """
  coordinator = flags.DEFINE_string(
    'coordinator', '', "'auto', or HOST:PORT of process 0; '' for a single process."
  )
  count = flags.DEFINE_integer('processes', 1, 'Number of processes of the run.')
  process = flags.DEFINE_integer('process', 0, 'Number of this process, from 0.')
  timeout = flags.DEFINE_float('start_timeout', 300, 'Seconds to wait for all of them.')
  return lambda: dict(
    coordinator=coordinator.value,
    processes=count.value,
    process=process.value,
    start_timeout=timeout.value,
  )
