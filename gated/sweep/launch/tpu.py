"""Cloud TPU: a queued resource for each point, whose hosts run it as they start.

cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources;
docs.cloud.google.com/tpu/docs/queued-resources. A spot slice that is taken back stays
SUSPENDED, and nothing revives it: it is deleted, and created again, by the same `submit`.
A slice whose point has ended deletes itself, if its service account may.
"""

import json
import shlex

from gated.run.exit_codes import PREEMPTED, RESUMABLE
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import Work

GCLOUD = ['gcloud', 'compute', 'tpus', 'queued-resources']
DEAD = ('SUSPENDED', 'FAILED')  # States that no resource leaves but by being deleted.


def files(w: Work) -> dict[str, str]:
  """-> a startup script for each point."""
  if w.accelerator.kind != 'tpu':
    told = f'--accelerator={w.options.accelerator} with --on=tpu'
    raise ValueError(f'{told}, but allowed are {", ".join(machines.CLOUD_TPU)}')
  return {f'{point.job}.sh': _startup(w, point) for point in w.points}


def _startup(w: Work, point: work.Point) -> str:
  codes = ' | '.join(map(str, RESUMABLE))
  removal = shlex.join(_delete(point.job, _where(w.options.zone, w.options.project)))
  return f"""\
#!/usr/bin/env bash
# Run by every host of {point.job} as it starts, as root.
set -euo pipefail
export HOME=${{HOME:-/root}}
{work.embedded()}
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
restarts=0
while :; do
  code=0
  bash -c "$job" job {work.words(w.arguments(point))} || code=$?
  case $code in
    {codes}) ;;
    *) break ;;
  esac
  # A host that is being taken back is gone before this one comes again.
  if [[ $code -ne {PREEMPTED} ]]; then restarts=$((restarts + 1)); fi
  if [[ $restarts -gt {w.options.restarts} ]]; then break; fi
  sleep 30
done
echo "{point.job} left with exit code $code"
worker=$(curl -sf -H Metadata-Flavor:Google "$metadata/agent-worker-number" || echo 0)
if [[ $code -eq 0 && $worker -eq 0 ]]; then
  {removal} ||
    echo 'this slice cannot delete itself: scripts/sweep.py delete' >&2
fi
exit "$code"
"""


def _where(zone: str, project: str) -> list[str]:
  return [f'--zone={zone}', f'--project={project}']


def _delete(job: str, where: list[str]) -> list[str]:
  return [*GCLOUD, 'delete', job, *where, '--force', '--async', '--quiet']


def create(w: Work, job: str) -> list[str]:
  """-> the command that asks for one point's slices."""
  o, accelerator = w.options, w.accelerator
  nodes = [f'--node-id={job}']
  if o.slices > 1:
    nodes = [f'--node-count={o.slices}', f'--node-prefix={job}']
  return [
    *GCLOUD,
    'create',
    job,
    *_where(o.zone, o.project),
    f'--accelerator-type={accelerator.type}',
    f'--runtime-version={o.runtime or machines.RUNTIMES[accelerator.name]}',
    *nodes,
    *(['--spot'] if o.spot else []),
    *([f'--service-account={o.service_account}'] if o.service_account else []),
    '--scopes=https://www.googleapis.com/auth/cloud-platform',
    f'--labels=gated-sweep={w.label}',
    f'--metadata-from-file=startup-script={w.files}/{job}.sh',
    '--async',
    '--quiet',
  ]


def submit(w: Work) -> list[list[str]]:
  """-> a command for each point."""
  return [create(w, point.job) for point in w.points]


def _there(record: dict) -> list[str]:
  return _where(record['options']['zone'], record['options']['project'])


def listing(record: dict) -> list[str]:
  """-> the command that lists the zone's queued resources."""
  return [*GCLOUD, 'list', *_there(record), '--format=json']


def states(record: dict, output: str) -> dict[str, str]:
  """What `listing` printed -> job: its state."""
  mine = {job['job'] for job in record['jobs']}
  rows = {row['name'].rpartition('/')[2]: row for row in json.loads(output)}
  return {name: row['state']['state'] for name, row in rows.items() if name in mine}


def delete(record: dict) -> list[list[str]]:
  """-> a command for each point; one that is gone already is told, and no fault."""
  return [_delete(job['job'], _there(record)) for job in record['jobs']]


def renew(w: Work, record: dict, found: dict[str, str]) -> list[list[str]]:
  """States by job -> the commands that put new slices where dead or no ones are.

  `w` has the points that have not ended. Deleting takes its time; a name is free after.
  """
  commands = []
  for point in w.points:
    state = found.get(point.job, '')
    if state in DEAD:
      removal = _delete(point.job, _there(record))
      commands.append([word for word in removal if word != '--async'])
    if state in (*DEAD, ''):
      commands.append(create(w, point.job))
  return commands
