"""The schedulers there are: what each needs, and which module speaks its language."""

from types import ModuleType
from typing import NamedTuple

from gated.sweep.launch import jobset, skypilot, slurm, tpu


class Target(NamedTuple):
  """A scheduler."""

  module: ModuleType  # files, submit, listing, states, delete
  command: str  # That speaks with it.
  install: str
  needs: tuple[str, ...]  # Options that it cannot do without.
  takes: tuple[str, ...]  # Those that mean something to it.
  stores: tuple[str, ...]  # What a sweep's folder may begin with; () is anywhere.


_GOOGLE = 'https://cloud.google.com/sdk/docs/install'
TARGETS = {
  'slurm': Target(
    slurm,
    'sbatch',
    'run this where SLURM is, on a login node of the cluster',
    ('partition',),
    ('nodes', 'restarts', 'partition', 'time', 'processes', 'at_once', 'sbatch'),
    (),
  ),
  'skypilot': Target(
    skypilot,
    'sky',
    "pip install 'skypilot[gcp]' (or aws, kubernetes, ...) in an environment of its own, "
    'then sky check',
    (),
    ('nodes', 'restarts', 'spot', 'infra'),
    ('gs://', 's3://'),
  ),
  'jobset': Target(
    jobset,
    'kubectl',
    'https://kubernetes.io/docs/tasks/tools, and JobSet and Kueue in the cluster (xpk '
    'makes such a one)',
    ('queue',),
    (
      *('nodes', 'slices', 'restarts', 'spot', 'queue', 'namespace', 'image'),
      'service_account',
    ),
    ('gs://', 's3://'),
  ),
  'tpu': Target(
    tpu,
    'gcloud',
    _GOOGLE,
    ('zone', 'project'),
    ('slices', 'restarts', 'spot', 'service_account', 'zone', 'project', 'runtime'),
    ('gs://',),
  ),
}
