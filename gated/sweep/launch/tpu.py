"""Cloud TPU: a queued resource for each point; a startup script runs the point.

cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources;
docs.cloud.google.com/tpu/docs/queued-resources. A preempted spot slice stays SUSPENDED
until the same `submit` deletes and creates it again. A slice deletes itself after its
point has ended, if its service account has the permission.
"""

import json
import shlex
from collections.abc import Iterator

from gated.run.exit_codes import PREEMPTED, RESUMABLE
from gated.sweep.grid import Point
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import Options, Work

GCLOUD = ['gcloud', 'compute', 'tpus', 'queued-resources']
DEAD = ('SUSPENDED', 'FAILED')  # Final states: the resource must be deleted.


def tasks(w: Work) -> Iterator[work.Task]:
  """Work -> a startup script for each point."""
  if w.accelerator.kind != 'tpu':
    allowed, wrong = ', '.join(machines.TPUS), w.options.accelerator
    raise ValueError(f'--accelerator={wrong} with --on=tpu, but allowed are {allowed}')
  for point in w.points:
    job = w.job(point)
    yield f'{job}.sh', _startup(w, point), create(w, job)


def _startup(w: Work, point: Point) -> str:
  codes, job = ' | '.join(map(str, RESUMABLE)), w.job(point)
  removal = shlex.join(_delete(job, w.options))
  return f"""\
#!/usr/bin/env bash
# Every host of {job} runs this at its start, as root.
set -euo pipefail
export HOME=${{HOME:-/root}}
{work.embedded()}
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
restarts=0
while :; do
  code=0
  bash -c "$job" job {work.quoted(w.arguments(point))} || code=$?
  case $code in
    {codes}) ;;
    *) break ;;
  esac
  # A preempted host is gone before the next try.
  if [[ $code -ne {PREEMPTED} ]]; then restarts=$((restarts + 1)); fi
  if [[ $restarts -gt {w.options.restarts} ]]; then break; fi
  sleep 30
done
echo "{job} exited with code $code"
worker=$(curl -sf -H Metadata-Flavor:Google "$metadata/agent-worker-number" || echo 0)
if [[ $code -eq 0 && $worker -eq 0 ]]; then
  {removal} ||
    echo 'this slice cannot delete itself: use scripts/sweep.py delete' >&2
fi
exit "$code"
"""


def _location(o: Options) -> list[str]:
  return [f'--zone={o.zone}', f'--project={o.project}']


def _delete(job: str, o: Options) -> list[str]:
  return [*GCLOUD, 'delete', job, *_location(o), '--force', '--async', '--quiet']


def create(w: Work, job: str) -> list[str]:
  """A point's job -> the command that creates its slices."""
  o, accelerator = w.options, w.accelerator
  several = [f'--node-count={o.slices}', f'--node-prefix={job}']
  return [
    *GCLOUD,
    'create',
    job,
    *_location(o),
    f'--accelerator-type={accelerator.type}',
    f'--runtime-version={o.runtime or machines.TPUS[accelerator.name].runtime}',
    *(several if o.slices > 1 else [f'--node-id={job}']),
    *(['--spot'] if o.spot else []),
    *([f'--service-account={o.service_account}'] if o.service_account else []),
    '--scopes=https://www.googleapis.com/auth/cloud-platform',
    f'--labels=gated-sweep={w.label}',
    f'--metadata-from-file=startup-script={w.files}/{job}.sh',
    '--async',
    '--quiet',
  ]


def listing(record: dict) -> list[str]:
  """A record -> the command that lists the zone's queued resources."""
  return [*GCLOUD, 'list', *_location(Options(**record['options'])), '--format=json']


def states(record: dict, output: str) -> dict[str, str]:
  """The output of `listing` -> job: its state."""
  jobs = {job['job'] for job in record['jobs']}
  rows = {row['name'].rpartition('/')[2]: row for row in json.loads(output)}
  return {name: row['state']['state'] for name, row in rows.items() if name in jobs}


def delete(record: dict) -> list[list[str]]:
  """A record -> a command for each job."""
  options = Options(**record['options'])
  return [_delete(job['job'], options) for job in record['jobs']]


def renew(w: Work, states: dict[str, str]) -> list[list[str]]:
  """States by job -> the commands that create lost or missing slices again.

  `w` has the points that have not ended. A slice is deleted before it is created again,
  because both have the same name.
  """
  commands = []
  for job in map(w.job, w.points):
    state = states.get(job, '')
    if state in DEAD:
      commands.append([x for x in _delete(job, w.options) if x != '--async'])
    if state in (*DEAD, ''):
      commands.append(create(w, job))
  return commands
