"""Kubernetes: a JobSet for each point, queued by Kueue: what xpk makes.

jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2,
kueue.sigs.k8s.io/docs/tasks/run/jobsets; GKE's labels: its pages "Plan TPUs in GKE" and
"Deploy TPU Multislices in GKE". A pod whose point is to go on fails its Job, upon which
JobSet starts all of its pods again; an exit code that only would come again fails the
JobSet.
"""

import json
import re

from gated.run.exit_codes import FINAL
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import JOB, Options, Work

REPLICATED = 'pods'
CONTAINER = 'train'
_ANNOTATION = "metadata.annotations['jobset.sigs.k8s.io/{}']"
# What --coordinator=auto reads (docs/clusters.md).
VARIABLES = {
  'JOBSET_NAME': 'jobset-name',
  'REPLICATED_JOB_NAME': 'replicatedjob-name',
  'JOB_INDEX': 'job-index',
  'REPLICATED_JOB_REPLICAS': 'replicatedjob-replicas',
}


def files(w: Work) -> dict[str, str]:
  """-> a JobSet's YAML for each point."""
  return {f'{point.job}.yaml': work.yaml(jobset(w, point)) for point in w.points}


def jobset(w: Work, point: work.Point) -> dict:
  """-> what one point's YAML says."""
  o, accelerator = w.options, w.accelerator
  hosts = accelerator.hosts * o.nodes
  metadata: dict = {
    'name': point.job,
    'namespace': o.namespace,
    'labels': {'kueue.x-k8s.io/queue-name': o.queue, 'gated-sweep': w.label},
    'annotations': {'gated-point': point.name},
  }
  if accelerator.kind == 'tpu':
    # A node pool of GKE's is a slice, which takes one Job.
    exclusive = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
    metadata['annotations'][exclusive] = 'cloud.google.com/gke-nodepool'
  rule = {
    'action': 'FailJob',
    'onExitCodes': {'containerName': CONTAINER, 'operator': 'In', 'values': list(FINAL)},
  }
  job = {
    'parallelism': hosts,
    'completions': hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,
    'podFailurePolicy': {'rules': [rule]},
    'template': {
      'metadata': {'labels': {'gated-sweep': w.label}},
      'spec': _pod(w, point, hosts),
    },
  }
  refused = {
    'name': 'refused',
    'action': 'FailJobSet',
    'onJobFailureReasons': ['PodFailurePolicy'],
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      'network': {'enableDNSHostnames': True, 'publishNotReadyAddresses': True},
      'failurePolicy': {'maxRestarts': o.restarts, 'rules': [refused]},
      'replicatedJobs': [
        {'name': REPLICATED, 'replicas': o.slices, 'template': {'spec': job}}
      ],
    },
  }


def _pod(w: Work, point: work.Point, hosts: int) -> dict:
  o, accelerator = w.options, w.accelerator
  selector, tolerations, limits, env = {}, [], {}, []
  if accelerator.kind == 'tpu':
    selector['cloud.google.com/gke-tpu-accelerator'] = machines.GKE[accelerator.name]
    selector['cloud.google.com/gke-tpu-topology'] = accelerator.topology
    tolerations.append({'key': 'google.com/tpu', 'operator': 'Exists'})
    limits['google.com/tpu'] = accelerator.chips_of_host
  elif accelerator.kind == 'gpu':
    name = machines.called(accelerator, machines.GKE, 'GKE')
    selector['cloud.google.com/gke-accelerator'] = name
    tolerations.append({'key': 'nvidia.com/gpu', 'operator': 'Exists'})
    limits['nvidia.com/gpu'] = accelerator.count
    # Where GKE puts the driver.
    env.append({'name': 'LD_LIBRARY_PATH', 'value': '/usr/local/nvidia/lib64'})
  if o.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
    tolerations.append({'key': 'cloud.google.com/gke-spot', 'operator': 'Exists'})
  if accelerator.kind != 'tpu':
    # Of TPUs, GKE tells the processes where they are.
    for name, annotation in VARIABLES.items():
      path = {'fieldRef': {'fieldPath': _ANNOTATION.format(annotation)}}
      env.append({'name': name, 'valueFrom': path})
    env.append({'name': 'PROCESSES_IN_JOB', 'value': str(hosts)})
  container = {
    'name': CONTAINER,
    'image': o.image or f'python:{w.python}',
    'command': ['bash', '-c', escaped(JOB), 'job', *map(escaped, w.arguments(point))],
    'env': env,
    'resources': {'limits': limits},
    'volumeMounts': [{'name': 'shm', 'mountPath': '/dev/shm'}],
  }
  pod = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': 120,
    'nodeSelector': selector,
    'tolerations': tolerations,
    'containers': [container],
    # Readers of data and NCCL share memory, of which a container has 64 MB otherwise.
    'volumes': [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}],
  }
  if accelerator.kind == 'tpu':
    # As xpk does: a slice's hosts speak with other slices over the network of the host.
    pod |= {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
  if o.service_account:
    pod['serviceAccountName'] = o.service_account
  return pod


def escaped(text: str) -> str:
  """Text -> what Kubernetes makes that text of: it reads $(NAME) and $$ in a command."""
  return re.sub(r'\$(?=[$(])', '$$', text)


def submit(w: Work) -> list[list[str]]:
  """-> a command for each point."""
  return [['kubectl', 'create', f'--filename={w.files}/{p.job}.yaml'] for p in w.points]


def _mine(record: dict) -> list[str]:
  space = Options(**record['options']).namespace
  return [f'--namespace={space}', f'--selector=gated-sweep={record["label"]}']


def listing(record: dict) -> list[str]:
  """-> the command that lists what there is of the sweep."""
  return ['kubectl', 'get', 'jobsets', *_mine(record), '--output=json']


def states(record: dict, output: str) -> dict[str, str]:
  """What `listing` printed -> job: its state."""
  found = {}
  for item in json.loads(output)['items']:
    status = item.get('status', {})
    true = [c['type'] for c in status.get('conditions', []) if c['status'] == 'True']
    restarts = status.get('restarts', 0)
    state = status.get('terminalState') or (true[-1] if true else 'Running')
    again = f', restarted {restarts} times' if restarts else ''
    found[item['metadata']['name']] = f'{state}{again}'
  return found


def delete(record: dict) -> list[list[str]]:
  """-> the command that removes all there is of the sweep."""
  return [['kubectl', 'delete', 'jobsets', *_mine(record), '--ignore-not-found']]
