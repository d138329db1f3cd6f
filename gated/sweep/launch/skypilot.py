"""SkyPilot: a managed job for each point, on any cloud that it knows.

docs.skypilot.co/en/latest/reference/yaml-spec.html; tried with SkyPilot 0.14.1. Machines
that are taken back are replaced by SkyPilot, and the point goes on from the bucket.
"""

import json

from gated.run.exit_codes import PREEMPTED
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import Work

CODE = '~/gated/code.tar.gz'  # Where SkyPilot puts the sources on every host.


def files(w: Work) -> dict[str, str]:
  """-> a task's YAML for each point."""
  return {f'{point.job}.yaml': work.yaml(task(w, point)) for point in w.points}


def task(w: Work, point: work.Point) -> dict:
  """-> what one point's YAML says."""
  accelerator, o = w.accelerator, w.options
  resources: dict = {'infra': o.infra} if o.infra else {}
  if accelerator.kind == 'tpu':
    resources['infra'] = o.infra or 'gcp'
    resources['accelerators'] = f'tpu-{accelerator.type}'
    resources['accelerator_args'] = {
      'runtime_version': machines.RUNTIMES[accelerator.name]
    }
  elif accelerator.kind == 'gpu':
    name = machines.name_of(accelerator, machines.SKYPILOT, 'SkyPilot')
    resources['accelerators'] = f'{name}:{accelerator.count}'
  resources |= {
    'use_spot': o.spot,
    'labels': {'gated-sweep': w.label},
    'job_recovery': {
      'max_restarts_on_errors': o.restarts,
      'recover_on_exit_codes': [PREEMPTED],
    },
  }
  # A slice's hosts find each other by Google's metadata, others by what SkyPilot tells.
  meet = 'auto' if accelerator.kind == 'tpu' else 'skypilot'
  arguments = w.arguments(point, code='CODE', meet=meet)
  return {
    'name': point.job,
    'num_nodes': o.nodes,
    'resources': resources,
    'file_mounts': {CODE: f'{w.folder}/code.tar.gz'},
    'run': run(arguments),
  }


def run(arguments: list[str]) -> str:
  """-> what every host runs."""
  arguments = [word for word in arguments if word != '--code=CODE']
  return (
    f'set -euo pipefail\n{work.embedded()}'
    f'exec bash -c "$job" job --code="$HOME{CODE[1:]}" \\\n    {work.words(arguments)}\n'
  )


def submit(w: Work) -> list[list[str]]:
  """-> a command for each point."""
  launch = ['sky', 'jobs', 'launch', '--yes', '--detach-run']
  return [[*launch, f'--name={p.job}', f'{w.files}/{p.job}.yaml'] for p in w.points]


def listing(record: dict) -> list[str]:
  """-> the command that lists all managed jobs."""
  return ['sky', 'jobs', 'queue', '--all', '--output=json']


def states(record: dict, output: str) -> dict[str, str]:
  """What `listing` printed -> job: its state."""
  lines = output.splitlines()  # It may tell of what it does before.
  begins = next(i for i, line in enumerate(lines) if line.startswith('['))
  rows = json.loads('\n'.join(lines[begins:]))
  mine = {job['job'] for job in record['jobs']}
  # The newest comes first, and a name may have been used before.
  return {
    row['job_name']: row['status'] for row in reversed(rows) if row['job_name'] in mine
  }


def delete(record: dict) -> list[list[str]]:
  """-> the commands that end what was submitted, and what it runs on."""
  return [
    ['sky', 'jobs', 'cancel', '--yes', f'--name={j["job"]}'] for j in record['jobs']
  ]
