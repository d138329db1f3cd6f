"""The processes of a run: how they find each other, and what they tell each other."""

import platform

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(coordinator: str, processes: int, process: int, *, peer_timeout: int) -> None:
  """Joins the other processes of a run; call it before anything touches a device.

  `coordinator` is '' for a run of one process, 'auto' to ask the cluster's own
  environment (TPU pods, SLURM, Kubernetes), or 'host:port'. A process that gives no sign
  of life for `peer_timeout` seconds ends the others, which name it.
  """
  if not 0 <= process < processes:
    raise ValueError(f'--process={process} must be in [0, --processes={processes})')
  if not coordinator:
    if processes > 1:
      raise ValueError(f'--processes={processes} without --coordinator=HOST:PORT')
    return
  host, _, port = coordinator.rpartition(':')
  if coordinator != 'auto' and not (host and port.isdecimal()):
    raise ValueError(f"--coordinator={coordinator!r} is neither 'auto' nor HOST:PORT")
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if coordinator == 'auto':
    jax.distributed.initialize(heartbeat_timeout_seconds=peer_timeout)
  else:
    where = coordinator, processes, process
    jax.distributed.initialize(*where, heartbeat_timeout_seconds=peer_timeout)


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
