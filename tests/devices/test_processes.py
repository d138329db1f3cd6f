"""The processes of a run connect, or report the missing ones."""

import contextlib
import http.server
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from faults import process
from jax._src.clusters import cloud_tpu_cluster

from gated.devices import processes
from gated.devices.processes import clusters, meeting

LIMITS = dict(start_timeout=9, peer_timeout=9)

# A child process: starts, shows its view of the run, and handles SIGTERM. Gloo writes to
# standard output in pieces, so the view goes to standard error.
CHILD = """
import os, signal, sys
import jax
from gated.devices import processes
from gated.run import shutdown
show = lambda *words: print('view:', *words, file=sys.stderr, flush=True)
coordinator, count, process, limit = sys.argv[1:]
where = coordinator, int(count), int(process)
try:
  processes.start(*where, start_timeout=float(limit), peer_timeout=10)
except ValueError as error:
  sys.exit(str(error))
show(jax.process_index(), jax.process_count(), jax.device_count())
show(*processes.gather(f'process{jax.process_index()}'))
show('cuda', jax.config._read('jax_cuda_visible_devices'))
if jax.process_count() == 1:
  with shutdown.Sigterm() as sigterm:
    before = sigterm.received()
    os.kill(os.getpid(), signal.SIGTERM)
    show('sigterm', before, sigterm.received())
processes.leave(0)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """All processes are on this machine: short timeouts."""
  monkeypatch.setattr(meeting, 'ANSWER', 1.0)


@pytest.fixture
def together(spawn_python):
  """Each process's (coordinator, environment, --process) -> its output lines."""

  def run(members, count=1, limit=60):
    children = [
      spawn_python(['-c', CHILD, where, count, i, limit], env=env, devices=2)
      for where, env, i in members
    ]
    return [
      [line[6:] for line in err.splitlines() if line.startswith('view: ')]
      for _, err in process.outputs(children, timeout=120)
    ]

  return run


def place(port, count=1, i=0, host='127.0.0.1'):
  return clusters.by_hand(f'{host}:{port}', count, i)


def meeting_of(*places, limit=1.0):
  """Runs `meet` for all places at once, in threads -> each one's error, or ''."""

  def come(where):
    try:
      meeting.meet(where, time.monotonic() + limit)
      return ''
    except ValueError as error:
      return str(error)

  with ThreadPoolExecutor(len(places)) as pool:
    return list(pool.map(come, places))


@pytest.mark.parametrize(
  ('count', 'i', 'output'),
  [(2, 0, '--processes=2 without'), (2, 2, '--process=2 must'), (1, -1, '--process=-1')],
)
def test_several_processes_without_a_coordinator_are_an_error(count, i, output):
  with pytest.raises(ValueError, match=output):
    processes.start('', count, i, **LIMITS)


@pytest.mark.parametrize(
  ('coordinator', 'limit', 'output'),
  [
    ('somewhere', 9, "--coordinator='somewhere' is neither 'auto' nor HOST:PORT"),
    (':1234', 9, "--coordinator=':1234'"),
    ('here:0', 9, "--coordinator='here:0'"),
    ('here:65536', 9, "--coordinator='here:65536'"),
    ('auto', 9, '--processes=2, but --coordinator=auto'),
    ('here:1234', 0, '--start_timeout=0 must be positive'),
    ('here:1234', float('nan'), '--start_timeout=nan must be positive'),
  ],
)
def test_an_invalid_coordinator_or_timeout_is_an_error(coordinator, limit, output):
  with pytest.raises(ValueError, match=output):
    processes.start(coordinator, 2, 1, start_timeout=limit, peer_timeout=9)


def test_start_leaves_a_single_process_alone():
  processes.start('', 1, 0, **LIMITS)
  assert not jax.distributed.is_initialized()


def test_processes_wait_until_all_are_connected():
  port = process.free_port()
  # The last is late, and process 0 is not the first.
  assert meeting_of(*(place(port, 5, i) for i in (3, 1, 0, 4, 2)), limit=9) == [''] * 5
  # The port is free again for JAX, though connections to it were just closed.
  with socket.create_server(('127.0.0.1', port)):
    pass


def test_missing_processes_are_reported_to_all_others():
  port = process.free_port()
  messages = meeting_of(place(port, 12, 0), place(port, 12, 5))
  for output in messages:
    assert output.startswith(f'--coordinator=127.0.0.1:{port}: ')
    assert 'missing of 12: process 1, 2, 3, 4, 6, 7, 8, 9 and 2 more' in output


@contextlib.contextmanager
def knocking(port, **hello):
  """Sends any hello to process 0, as a process would -> the messages it receives."""
  known = {'process': 1, 'host': 'x', 'facts': meeting._facts(2)}
  for _ in range(500):
    with contextlib.suppress(ConnectionRefusedError):
      line = socket.create_connection(('127.0.0.1', port), 9)
      with line, line.makefile('rb') as lines:
        line.sendall(json.dumps(known | hello).encode() + b'\n')
        yield map(json.loads, lines)
        return
    time.sleep(0.01)
  pytest.fail(f'nobody listens at port {port}')


def test_a_process_that_disconnects_is_missing_until_it_returns():
  port = process.free_port()
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(meeting_of, place(port, 3, 0), limit=9)
    with knocking(port, facts=meeting._facts(3)) as messages:
      while 'process 2' not in (why := next(messages)['why']):
        assert 'missing of 3' in why
    with knocking(port, process=2, facts=meeting._facts(3)) as messages:
      while 'process 1' not in next(messages)['why']:
        pass
    assert not first.done()
    assert meeting_of(place(port, 3, 1), place(port, 3, 2), limit=9) == ['', '']
    assert first.result() == ['']


@pytest.mark.parametrize('noise', [dict(process='x'), dict(facts=3)])
def test_a_connection_with_an_invalid_hello_is_closed(noise):
  port = process.free_port()
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(meeting_of, place(port, 2, 0), limit=9)
    with knocking(port, **noise) as messages:
      assert list(messages) == []
    assert meeting_of(place(port, 2, 1), limit=9) == ['']
    assert first.result() == ['']


@pytest.mark.slow
def test_conflicting_processes_are_reported_to_all():
  port = process.free_port()
  messages = meeting_of(*(place(port, 3, i) for i in (0, 1, 1)), limit=9)
  assert len(set(messages)) == 1 and 'two processes have --process=1' in messages[0]
  assert socket.gethostname() in messages[0]
  port = process.free_port()
  messages = meeting_of(place(port, 3, 0), place(port, 2, 1), limit=9)
  assert len(set(messages)) == 1 and '--processes=2 of process 1' in messages[0]
  assert 'but 3 of process 0' in messages[0]


def test_another_version_of_jax_is_reported():
  port, other = process.free_port(), meeting._facts(2) | {'the version of jax': '0.1'}
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(meeting_of, place(port, 2, 0), limit=9)
    with knocking(port, facts=other) as messages:
      wrong = next(messages)['wrong']
    assert wrong in first.result()[0]
  here = f'but {jax.__version__} of process 0'
  assert wrong == f'the version of jax=0.1 of process 1 on x, {here}'


@pytest.mark.slow
def test_a_wrong_host_or_port_is_reported():
  port = process.free_port()
  [output] = meeting_of(place(port, 2, 1))
  assert f'process 1: nothing listens at 127.0.0.1:{port}' in output
  assert '--start_timeout' in output and '(is this its machine?)' not in output
  [output] = meeting_of(place(port, 2, 1, host='no-such-host.invalid'))
  assert "does not know the host 'no-such-host.invalid'" in output


def test_process_0_reports_that_it_may_be_on_the_wrong_machine(monkeypatch):
  """It listens here, while its address leads to another machine."""

  def elsewhere(*_):
    raise ConnectionRefusedError

  monkeypatch.setattr(meeting.socket, 'create_connection', elsewhere)
  [output] = meeting_of(place(process.free_port(), 2, 0))
  assert '(is this its machine?)' in output


@contextlib.contextmanager
def saying(line):
  """A program that sends one line to each connection and closes it -> its port."""
  with socket.create_server(('127.0.0.1', 0)) as other:

    def greet():
      while True:
        try:
          guest, _ = other.accept()
        except OSError:
          return
        guest.sendall(line + b'\n')
        guest.close()

    threading.Thread(target=greet, daemon=True).start()
    yield other.getsockname()[1]
    other.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.parametrize(
  'line', [b'SSH-2.0-OpenSSH_9.2', b'\0\0\x12\x04\xff', b'{"go": 1}']
)
def test_a_port_of_another_program_is_reported(line):
  with saying(line) as port:
    [output] = meeting_of(place(port, 2, 1), limit=0.3)
    assert f'another program than process 0 answers at 127.0.0.1:{port}' in output
    [output] = meeting_of(place(port, 2, 0), limit=0.3)
    assert f'process 0 cannot bind port {port} of its machine' in output


def test_a_process_0_that_disconnects_is_reported():
  with saying(b'{"go": false, "wrong": "", "why": "missing of 2: process 7"}') as port:
    [output] = meeting_of(place(port, 2, 1), limit=0.3)
  # The timeout may also end while the connection is open.
  assert (
    f'process 0 at 127.0.0.1:{port} closed the connection' in output
    or 'process 7' in output
  )


NONE = ('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'JOB', 'JAX_COORDINATOR', 'KUBERNETES_')


@pytest.fixture
def environment(monkeypatch):
  """Sets variables, after removing those of any cluster."""
  for name in [name for name in os.environ if name.startswith(NONE)]:
    monkeypatch.delenv(name)
  return lambda env: [monkeypatch.setenv(*item) for item in env.items()]


def jobset(i, **more):
  env = {'JOBSET_NAME': 'run', 'REPLICATED_JOB_NAME': 'pods', 'PROCESSES_IN_JOB': '2'}
  return env | {'JOB_COMPLETION_INDEX': str(i), 'KUBERNETES_SERVICE_HOST': 'x'} | more


def slurm(i, nodes='127.0.0.1', **more):
  env = {'SLURM_JOB_ID': '4103', 'SLURM_STEP_NODELIST': nodes, 'SLURM_NTASKS': '2'}
  env |= {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i), 'SLURM_STEP_NUM_NODES': '1'}
  return env | more


def mpi(i):
  env = {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1,10.1.2.3:34911'}
  env |= {f'OMPI_COMM_WORLD_{k}': str(i) for k in ('RANK', 'LOCAL_RANK')}
  return env | {f'OMPI_COMM_WORLD_{k}': '2' for k in ('SIZE', 'LOCAL_SIZE')}


def slice_of_two(i):
  """The second of two TPU slices on GKE, or the first, with one host each."""
  env = {'TPU_WORKER_HOSTNAMES': '127.0.0.1', 'TPU_WORKER_ID': '0'}
  env |= {'TPU_SKIP_MDS_QUERY': '1'}  # As GKE sets it.
  env |= {'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1:8080', 'MEGASCALE_NUM_SLICES': '2'}
  return env | {'MEGASCALE_SLICE_ID': str(i), 'JAX_FORCE_TPU_INIT': '1'}


def test_the_pods_of_a_jobset_meet_at_its_first(environment):
  environment(jobset(1))
  first = clusters.find(9)
  assert first[:3] == (f'run-pods-0-0.run:{clusters.PORT}', 2, 1) and not first.shared
  assert str(first) == f'--coordinator=auto (run-pods-0-0.run:{clusters.PORT})'
  environment({'REPLICATED_JOB_REPLICAS': '3', 'JOB_INDEX': '2'})
  environment({'JAX_COORDINATOR_PORT': '99'})
  assert clusters.find(9)[:3] == ('run-pods-0-0.run:99', 6, 5)
  environment({'JAX_COORDINATOR_ADDRESS': 'head:77', 'JOB_COMPLETION_INDEX': '7'})
  assert clusters.find(9)[:3] == ('head:77', 6, 11)
  with pytest.raises(ValueError, match=r'auto \(head:77\): process 11 is outside of 6'):
    processes.start('auto', 1, 0, **LIMITS)


def test_a_missing_variable_of_a_cluster_is_reported(environment, monkeypatch):
  environment(jobset(0))
  monkeypatch.delenv('PROCESSES_IN_JOB')
  with pytest.raises(ValueError, match=r"--coordinator=auto, .*'PROCESSES_IN_JOB' is"):
    clusters.find(9)


def test_without_a_cluster_the_error_lists_the_unset_variables(environment):
  environment({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'})
  with pytest.raises(ValueError) as raised:
    processes.start('auto', 1, 0, **LIMITS)
  output = str(raised.value)
  assert 'SLURM: SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID;' in output
  for name in ('JOBSET_NAME', 'OMPI_MCA_orte_hnp_uri', 'TPU_WORKER_HOSTNAMES', 'libtpu'):
    assert name in output
  assert '--coordinator=HOST:PORT --processes=N --process=I' in output
  assert '\n' not in output


def test_a_process_alone_on_its_machine_keeps_all_devices(environment):
  """JAX alone would take the first of them."""
  environment(slurm(1, nodes='gpu[07-12,30]', SLURM_LOCALID='0'))
  assert clusters.find(9)[:4] == ('gpu07:61447', 2, 1, True)
  environment({'SLURM_STEP_NUM_NODES': '2'})
  assert not clusters.find(9).shared
  environment({'SLURM_STEP_NUM_NODES': '1', 'SLURM_GPUS_PER_TASK': '2'})
  assert not clusters.find(9).shared


def test_slices_of_tpus_on_gke_are_one_run(environment, monkeypatch):
  environment(slice_of_two(1) | {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'})
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  assert clusters.find(9)[:3] == ('127.0.0.1:8482', 4, 3)
  # A JobSet with TPUs is left to JAX.
  environment(jobset(3))
  assert clusters.find(9)[:3] == ('127.0.0.1:8482', 4, 3)


class Metadata(http.server.BaseHTTPRequestHandler):
  """Google's metadata server for a TPU VM, the third host of four."""

  values = {
    'agent-worker-number': '2',
    'worker-network-endpoints': 'x:y:127.0.0.1,x:y:10.0.0.2,x:y:10.0.0.3,x:y:10.0.0.4',
    'tpu-env': "ACCELERATOR_TYPE: 'v5p-32'\nZONE: 'z'",
  }

  def do_GET(self):
    value = self.values.get(self.path.rpartition('/')[2])
    self.send_response(200 if value and self.headers['Metadata-Flavor'] else 404)
    self.end_headers()
    self.wfile.write((value or '').encode())

  def log_message(self, *_):
    pass


def test_the_hosts_of_a_tpu_pod_are_found_by_googles_metadata(environment, monkeypatch):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment({'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'})
    monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
    assert clusters.find(9)[:3] == ('127.0.0.1:8482', 4, 2)
    server.shutdown()


def test_an_unreachable_metadata_server_is_reported_in_one_line(environment, monkeypatch):
  environment({'GCE_METADATA_IP': f'127.0.0.1:{process.free_port()}'})
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  with pytest.raises(ValueError, match='auto, but the cluster cannot be read: Conn'):
    clusters.find(9)


@pytest.mark.full
def test_two_processes_find_each_other_by_hand_in_spite_of_a_proxy(together):
  where, proxy = f'127.0.0.1:{process.free_port()}', {'http_proxy': 'http://127.0.0.1:9'}
  output = together([(where, proxy, i) for i in range(2)], count=2)
  for i in range(2):
    assert output[i] == [f'{i} 2 4', 'process0 process1', 'cuda all']


CLUSTERS = {
  'SLURM': (slurm, ['cuda 0', 'cuda 1']),
  'Open MPI': (mpi, ['cuda 0', 'cuda 1']),
  'TPU slices': (slice_of_two, ['cuda all'] * 2),
  'JobSet': (jobset, ['cuda all'] * 2),
}


@pytest.mark.full
@pytest.mark.parametrize('name', CLUSTERS)
def test_two_processes_find_each_other_as_their_cluster_says(name, together):
  env, devices = CLUSTERS[name]
  port = str(process.free_port())
  here = {'JAX_COORDINATOR_PORT': port}
  if name == 'JobSet':  # Its host names resolve only in its pods.
    here['JAX_COORDINATOR_ADDRESS'] = f'127.0.0.1:{port}'
  output = together([('auto', env(i) | here, 0) for i in range(2)])
  for i in range(2):
    assert output[i] == [f'{i} 2 4', 'process0 process1', devices[i]]


@pytest.mark.slow
def test_one_process_with_a_coordinator_handles_sigterm(together):
  [output] = together([(f'localhost:{process.free_port()}', {}, 0)])
  assert output == ['0 1 2', 'process0', 'cuda all', 'sigterm False True']


@pytest.mark.slow
@pytest.mark.parametrize('story', ['train.py --config=configs/tiny.py', 'eval.py'])
def test_a_story_leaves_with_code_2_and_one_line(story, tmp_path, run_python):
  where = f'127.0.0.1:{process.free_port()}'
  flags = [f'--coordinator={where}', '--processes=2', '--process=1', '--start_timeout=1']
  name, *args = story.split()
  workdir = tmp_path / 'run'
  done = run_python([name, *args, f'--workdir={workdir}', *flags], timeout=60)
  assert done.returncode == 2 and not workdir.exists()
  assert f'nothing listens at {where}' in done.stderr
  assert len(done.stderr.splitlines()) == 1, done.stderr
