"""Finds process 0 of a run in the environment of a cluster, for --coordinator=auto.

CLUSTERS are tried first: they read environment variables only, while JAX would need the
cluster's API or another package. A private module of JAX detects the other clusters.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax._src import clusters

PORT = 8476  # The default port of process 0.

# The variables that JAX reads. On machines with TPU chips it queries Google's metadata
# server.
SLURM = 'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID'
KNOWN = {
  'JobSet': ('JOBSET_NAME',),
  'SLURM': (*SLURM, 'SLURM_LOCALID'),
  'Open MPI': ('OMPI_MCA_orte_hnp_uri',),
  'TPUs on GKE': ('TPU_WORKER_HOSTNAMES',),
  'Kubernetes, with its package for Python': ('KUBERNETES_SERVICE_HOST',),
}


class Place(NamedTuple):
  """The address of process 0, the number of processes, and the number of this one."""

  address: str  # HOST:PORT of process 0
  processes: int
  process: int
  shared: bool  # Whether each process takes one device of its machine.
  named: str  # The flag that chose the address, for messages.

  def __str__(self) -> str:
    address = f' ({self.address})' if self.address not in self.named else ''
    return f'{self.named}{address}'


def by_hand(coordinator: str, processes: int, process: int) -> Place:
  """The three flags -> Place; ValueError if --coordinator is not HOST:PORT."""
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise ValueError(f"--coordinator={coordinator!r} is neither 'auto' nor HOST:PORT")
  return Place(coordinator, processes, process, False, f'--coordinator={coordinator}')


def find(limit: float) -> Place:
  """The environment -> Place, within about `limit` seconds.

  ValueError if no known cluster is detected, or if a variable is missing.
  """
  named = '--coordinator=auto'
  try:
    for look in CLUSTERS.values():
      if place := look(os.environ):
        return Place(*place, shared=False, named=named)
    auto = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, processes, process, _ = auto(None, None, None, [], None, round(limit))
  except Exception as error:  # The clusters' packages may raise any exception.
    reason = f'{type(error).__name__}: {error}'.partition('\n')[0][:300]
    reason = f'{error} is not set' if isinstance(error, KeyError) else reason
    message = f'{named}, but the cluster cannot be read: {reason}'
    raise ValueError(message) from error
  if address is None or processes is None or process is None:
    unset = {
      name: ', '.join(v for v in variables if v not in os.environ)
      for name, variables in KNOWN.items()
    }
    known = '; '.join(
      f'{name}: {names}' if names else name for name, names in unset.items()
    )
    raise ValueError(
      f'{named}, but this is not a known cluster. Known clusters and their variables '
      f'that are not set: {known}; a Cloud TPU VM: TPU chips and the package libtpu. '
      'Elsewhere use --coordinator=HOST:PORT --processes=N --process=I'
    )
  return Place(address, processes, process, _one_device_each(os.environ), named)


def _one_device_each(env: Mapping[str, str]) -> bool:
  """Whether JAX should give each process one device of its machine.

  False if a process is alone on its machine, or if the scheduler assigns the devices.
  """
  tasks, machines = env.get('SLURM_NTASKS'), env.get('SLURM_STEP_NUM_NODES')
  alone = tasks == machines if tasks else env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  return not (alone or 'SLURM_GPUS_PER_TASK' in env)


def _jobset(env: Mapping[str, str]) -> tuple[str, int, int] | None:
  """The variables of a JobSet's pod -> (address, processes, process).

  JobSet names its pods NAME-REPLICATED_JOB-JOB-POD, in the domain NAME. Pods with TPUs
  are left to JAX.
  """
  if 'JOBSET_NAME' not in env or 'TPU_WORKER_HOSTNAMES' in env:
    return None
  name, job, pods = (
    env[k] for k in ('JOBSET_NAME', 'REPLICATED_JOB_NAME', 'PROCESSES_IN_JOB')
  )
  first = f'{name}-{job}-0-0.{name}:{env.get("JAX_COORDINATOR_PORT", PORT)}'
  jobs = int(env.get('REPLICATED_JOB_REPLICAS', 1))
  process = int(env.get('JOB_INDEX', 0)) * int(pods) + int(env['JOB_COMPLETION_INDEX'])
  return env.get('JAX_COORDINATOR_ADDRESS', first), jobs * int(pods), process


# The environment -> (HOST:PORT of process 0, processes, process); None if not set.
CLUSTERS: dict[str, Callable] = {'JobSet': _jobset}
