"""The supported schedulers, with their modules and options."""

from types import ModuleType
from typing import NamedTuple

from gated.sweep.launch import jobset, skypilot, slurm, tpu


class Target(NamedTuple):
  """A scheduler."""

  module: ModuleType  # Has files, submit, listing, states and delete.
  command: str  # Its command-line program.
  install: str  # How to install `command`.
  needs: tuple[str, ...]  # Required options.
  takes: tuple[str, ...]  # Options that it supports.
  stores: tuple[str, ...]  # Allowed prefixes of a sweep's folder; () allows any.


TARGETS = {
  'slurm': Target(
    slurm,
    'sbatch',
    'run this on a login node of the cluster',
    ('partition',),
    ('nodes', 'restarts', 'partition', 'time', 'processes', 'at_once', 'sbatch'),
    (),
  ),
  'skypilot': Target(
    skypilot,
    'sky',
    "pip install 'skypilot[gcp]' (or aws, kubernetes, ...) in its own environment, then "
    'sky check',
    (),
    ('nodes', 'restarts', 'spot', 'infra'),
    ('gs://', 's3://'),
  ),
  'jobset': Target(
    jobset,
    'kubectl',
    'https://kubernetes.io/docs/tasks/tools; the cluster needs JobSet and Kueue, as xpk '
    'sets them up',
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
    'https://cloud.google.com/sdk/docs/install',
    ('zone', 'project'),
    ('slices', 'restarts', 'spot', 'service_account', 'zone', 'project', 'runtime'),
    ('gs://',),
  ),
}
