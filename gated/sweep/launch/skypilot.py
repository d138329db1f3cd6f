"""SkyPilot: a managed job for each point, on any cloud that it supports.

docs.skypilot.co/en/latest/reference/yaml-spec.html; tested with SkyPilot 0.14.1. SkyPilot
replaces preempted machines, and the point resumes from the bucket.
"""

import json
from collections.abc import Iterator

from gated.run.exit_codes import PREEMPTED
from gated.sweep.grid import Point
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import Work

CODE = '~/gated/code.tar.gz'  # The path of the sources on every host.


def tasks(w: Work) -> Iterator[work.Task]:
  """Work -> a YAML file for each point."""
  launch = ['sky', 'jobs', 'launch', '--yes', '--detach-run']
  for p in w.points:
    name = f'{w.job(p)}.yaml'
    command = [*launch, f'--name={w.job(p)}', f'{w.files}/{name}']
    yield name, work.yaml(task(w, p)), command


def task(w: Work, point: Point) -> dict:
  """A point -> its task."""
  accelerator, o = w.accelerator, w.options
  resources: dict = {'infra': o.infra} if o.infra else {}
  if accelerator.kind == 'tpu':
    runtime = machines.TPUS[accelerator.name].runtime
    resources['infra'] = o.infra or 'gcp'
    resources['accelerators'] = f'tpu-{accelerator.type}'
    resources['accelerator_args'] = {'runtime_version': runtime}
  elif accelerator.kind == 'gpu':
    gpu = accelerator.gpu_on('SkyPilot')
    resources['accelerators'] = f'{gpu}:{accelerator.count}'
  resources |= {
    'use_spot': o.spot,
    'labels': {'gated-sweep': w.label},
    'job_recovery': {
      'max_restarts_on_errors': o.restarts,
      'recover_on_exit_codes': [PREEMPTED],
    },
  }
  # Hosts of a slice find each other by Google's metadata, others by SkyPilot's variables.
  processes = 'auto' if accelerator.kind == 'tpu' else 'skypilot'
  arguments = w.arguments(point, code='', processes=processes)
  return {
    'name': w.job(point),
    'num_nodes': o.nodes,
    'resources': resources,
    'file_mounts': {CODE: f'{w.folder}/code.tar.gz'},
    'run': (
      f'set -euo pipefail\n{work.embedded()}exec bash -c "$job" job '
      f'--code="$HOME{CODE[1:]}" \\\n    {work.quoted(arguments)}\n'
    ),
  }


def listing(record: dict) -> list[str]:
  """A record -> the command that lists all managed jobs."""
  return ['sky', 'jobs', 'queue', '--all', '--output=json']


def states(record: dict, output: str) -> dict[str, str]:
  """The output of `listing` -> job: its state."""
  # Log lines may precede the JSON, whose first line starts with a bracket.
  rows = json.loads('[' + f'\n{output}'.partition('\n[')[2])
  jobs = {job['job'] for job in record['jobs']}
  # Rows start with the newest job, and an earlier job may have the same name.
  states = {row['job_name']: row['status'] for row in reversed(rows)}
  return {job: states[job] for job in jobs & states.keys()}


def delete(record: dict) -> list[list[str]]:
  """A record -> the commands that end its jobs and release their machines."""
  cancel = ['sky', 'jobs', 'cancel', '--yes']
  return [[*cancel, f'--name={job["job"]}'] for job in record['jobs']]
