"""Where a cluster's own environment says that a run meets: what 'auto' knows.

JAX knows most clusters, if through a module that is private to it. CLUSTERS are asked
before, for what JAX would ask of the cluster's interface, or of another package.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax._src import clusters

PORT = 8476  # Of process 0, where nothing else names one.

# What JAX looks for. It asks Google's metadata server on machines that have TPU chips.
SLURM = 'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID'
KNOWN = {
  'JobSet': ('JOBSET_NAME',),
  'SLURM': (*SLURM, 'SLURM_LOCALID'),
  'Open MPI': ('OMPI_MCA_orte_hnp_uri',),
  'TPUs on GKE': ('TPU_WORKER_HOSTNAMES',),
  'Kubernetes, with its package for Python': ('KUBERNETES_SERVICE_HOST',),
}


class Place(NamedTuple):
  """Where the processes of a run meet, and which of them this is."""

  address: str  # HOST:PORT of process 0
  processes: int
  process: int
  shared: bool  # Whether the processes of a machine take one of its devices each.
  named: str  # How the person who started the run named the place.

  def __str__(self) -> str:
    found = f' ({self.address})' if self.address not in self.named else ''
    return f'{self.named}{found}'


def by_hand(coordinator: str, processes: int, process: int) -> Place:
  """What three flags say -> Place; ValueError, naming the flag, if that is none."""
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise ValueError(f"--coordinator={coordinator!r} is neither 'auto' nor HOST:PORT")
  return Place(coordinator, processes, process, False, f'--coordinator={coordinator}')


def find(limit: float) -> Place:
  """What the environment says -> Place, within about `limit` seconds.

  ValueError if it is of no cluster that is known, or does not say enough.
  """
  named = '--coordinator=auto'
  try:
    for look in CLUSTERS.values():
      if place := look(os.environ):
        return Place(*place, shared=False, named=named)
    auto = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, processes, process, _ = auto(None, None, None, [], None, round(limit))
  except Exception as error:  # Of whatever kind the cluster's own packages raise.
    told = f'{type(error).__name__}: {error}'.partition('\n')[0][:300]
    told = f'{error} is not set' if isinstance(error, KeyError) else told
    raise ValueError(f'{named}, but the cluster cannot be read: {told}') from error
  if address is None or processes is None or process is None:
    unset = {
      name: ', '.join(v for v in variables if v not in os.environ)
      for name, variables in KNOWN.items()
    }
    each = '; '.join(f'{name}: {what}' if what else name for name, what in unset.items())
    raise ValueError(
      f'{named}, but this is no cluster that is known (and what is not set here): '
      f'{each}; a Cloud TPU VM: its chips, and the package libtpu. Elsewhere write '
      '--coordinator=HOST:PORT --processes=N --process=I'
    )
  return Place(address, processes, process, _one_device_each(os.environ), named)


def _one_device_each(env: Mapping[str, str]) -> bool:
  """Whether the devices of a machine are shared out, one to a process, as JAX would.

  Not where a process is alone on its machine, or the scheduler has shared them out.
  """
  tasks, machines = env.get('SLURM_NTASKS'), env.get('SLURM_STEP_NUM_NODES')
  alone = tasks == machines if tasks else env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  return not (alone or 'SLURM_GPUS_PER_TASK' in env)


def _jobset(env: Mapping[str, str]) -> tuple[str, int, int] | None:
  """The variables that a JobSet's pods are given -> where, how many, which.

  JobSet names its pods NAME-REPLICATED_JOB-JOB-POD, in the domain NAME. Where the pods
  hold TPUs, JAX knows better.
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


# Each: the environment -> (HOST:PORT of process 0, how many, which), None if of another.
CLUSTERS: dict[str, Callable] = {'JobSet': _jobset}
