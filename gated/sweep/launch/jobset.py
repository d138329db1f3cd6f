"""Kubernetes: a JobSet for each point in a Kueue queue, as xpk creates them.

jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2,
kueue.sigs.k8s.io/docs/tasks/run/jobsets; GKE's labels: its pages "Plan TPUs in GKE" and
"Deploy TPU Multislices in GKE". A resumable exit code fails the Job, and JobSet restarts
all of its pods. A final exit code fails the JobSet.
"""

import json
import re
from collections.abc import Iterator

from gated.run.exit_codes import FINAL
from gated.sweep.grid import Point
from gated.sweep.launch import machines, work
from gated.sweep.launch.work import JOB, Options, Work

REPLICATED = 'pods'
CONTAINER = 'train'
_ANNOTATION = "metadata.annotations['jobset.sigs.k8s.io/{}']"
# Variables that --coordinator=auto reads (docs/clusters.md) -> annotations of JobSet.
VARIABLES = {
  'JOBSET_NAME': 'jobset-name',
  'REPLICATED_JOB_NAME': 'replicatedjob-name',
  'JOB_INDEX': 'job-index',
  'REPLICATED_JOB_REPLICAS': 'replicatedjob-replicas',
}


def tasks(w: Work) -> Iterator[work.Task]:
  """Work -> a YAML file for each point."""
  for p in w.points:
    name = f'{w.job(p)}.yaml'
    command = ['kubectl', 'create', f'--filename={w.files}/{name}']
    yield name, work.yaml(jobset(w, p)), command


def jobset(w: Work, point: Point) -> dict:
  """A point -> its JobSet."""
  o, accelerator = w.options, w.accelerator
  hosts = accelerator.hosts * o.nodes
  metadata: dict = {
    'name': w.job(point),
    'namespace': o.namespace,
    'labels': {'kueue.x-k8s.io/queue-name': o.queue, 'gated-sweep': w.label},
    'annotations': {'gated-point': point.name},
  }
  if accelerator.kind == 'tpu':
    # A GKE node pool is one slice and runs one Job.
    exclusive = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
    metadata['annotations'][exclusive] = 'cloud.google.com/gke-nodepool'
  final = {'containerName': CONTAINER, 'operator': 'In', 'values': list(FINAL)}
  refused = {'name': 'refused', 'action': 'FailJobSet'}
  refused['onJobFailureReasons'] = ['PodFailurePolicy']
  job = {
    'parallelism': hosts,
    'completions': hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': final}]},
    'template': {
      'metadata': {'labels': {'gated-sweep': w.label}},
      'spec': _pod(w, point, hosts),
    },
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


def _pod(w: Work, point: Point, hosts: int) -> dict:
  o, accelerator = w.options, w.accelerator
  selector, tolerations, limits, env = {}, [], {}, []
  if accelerator.kind == 'tpu':
    selector['cloud.google.com/gke-tpu-accelerator'] = machines.TPUS[accelerator.name].gke
    selector['cloud.google.com/gke-tpu-topology'] = accelerator.topology
    tolerations.append({'key': 'google.com/tpu', 'operator': 'Exists'})
    limits['google.com/tpu'] = accelerator.chips_of_host
  elif accelerator.kind == 'gpu':
    selector['cloud.google.com/gke-accelerator'] = accelerator.gpu_on('GKE')
    tolerations.append({'key': 'nvidia.com/gpu', 'operator': 'Exists'})
    limits['nvidia.com/gpu'] = accelerator.count
    # GKE installs the driver there.
    env.append({'name': 'LD_LIBRARY_PATH', 'value': '/usr/local/nvidia/lib64'})
  if o.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
    tolerations.append({'key': 'cloud.google.com/gke-spot', 'operator': 'Exists'})
  if accelerator.kind != 'tpu':
    # With TPUs, GKE itself sets the variables that locate the processes.
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
    # Data readers and NCCL use shared memory; the default of a container is 64 MB.
    'volumes': [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}],
  }
  if accelerator.kind == 'tpu':
    # Like xpk: hosts reach other slices over the host network.
    pod |= {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
  if o.service_account:
    pod['serviceAccountName'] = o.service_account
  return pod


def escaped(text: str) -> str:
  """Escapes $(NAME) and $$, which Kubernetes expands in a command."""
  return re.sub(r'\$(?=[$(])', '$$', text)


def _selection(record: dict) -> list[str]:
  namespace = Options(**record['options']).namespace
  return [f'--namespace={namespace}', f'--selector=gated-sweep={record["label"]}']


def listing(record: dict) -> list[str]:
  """A record -> the command that lists the sweep's JobSets."""
  return ['kubectl', 'get', 'jobsets', *_selection(record), '--output=json']


def states(record: dict, output: str) -> dict[str, str]:
  """The output of `listing` -> job: its state."""
  states = {}
  for item in json.loads(output)['items']:
    # All fields of a status are optional, and absent at first.
    status = item.get('status', {})
    true = [c['type'] for c in status.get('conditions', []) if c['status'] == 'True']
    restarts = status.get('restarts', 0)
    state = status.get('terminalState') or (true[-1] if true else 'Running')
    suffix = f', restarted {restarts} times' if restarts else ''
    states[item['metadata']['name']] = f'{state}{suffix}'
  return states


def delete(record: dict) -> list[list[str]]:
  """A record -> the command that deletes the sweep's JobSets."""
  return [['kubectl', 'delete', 'jobsets', *_selection(record), '--ignore-not-found']]
