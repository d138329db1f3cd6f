"""Eight CPU devices for every test, a clean environment for every child process.

Set GATED_TEST_PLATFORM=cuda (or tpu) to run on an accelerator; tests marked
`accelerator` run only then.
"""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = os.environ.get('GATED_TEST_PLATFORM', 'cpu')

# JAX reads these as it is imported, so they stand before the import. Eight devices on
# two cores share one pool of threads; numpy's own pool would fight it.
os.environ['JAX_PLATFORMS'] = PLATFORM
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['OMP_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
sys.path.insert(0, str(ROOT))
# What says where stores are, and who we are to them. Whatever this machine may write to,
# tests know servers of their own alone.
STORES = ('AWS_', 'GOOGLE_', 'GCE_', 'GCSFS_', 'NO_GCE_', 'STORAGE_', 'TENSORSTORE_')
for name in [name for name in os.environ if name.startswith(STORES)]:
  del os.environ[name]
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # It asks a server at Google.

import jax
import pytest

# What a child process keeps of ours. HOME and XDG_CACHE_HOME keep the real cache, where
# the embedded corpus was built once; nothing that JAX or a logger reads comes along.
KEPT = ('PATH', 'HOME', 'XDG_CACHE_HOME', 'TMPDIR', 'LANG', 'LC_ALL', 'LD_LIBRARY_PATH')


# The files that take longest. With several workers (-n 2 --dist loadfile) a file is one
# worker's, and these begin first, so that no worker waits for the other at the end.
LONGEST = ('test_train.py', 'test_faults.py', 'test_moe.py')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in LONGEST)
  if PLATFORM == 'cpu':
    skip = pytest.mark.skip(reason='needs an accelerator: set GATED_TEST_PLATFORM')
    for item in items:
      if item.get_closest_marker('accelerator'):
        item.add_marker(skip)


@pytest.fixture
def no_transfers():
  """Implicit copies between host and device raise: for tests of the hot path.

  Build the state and place the batch first, then step under it: a step that reads a
  metric by the way, or is handed numpy, dies here rather than slowing a run.
  """
  with jax.transfer_guard('disallow'):
    yield


@pytest.fixture(scope='session')
def spawn_python(tmp_path_factory):
  """Starts `python ARGS` from the checkout's root -> Popen; what is left is killed.

  spawn_python(['train.py', '--config=...'], env={'NAME': 'value'}, devices=8)

  Standard output and error are pipes of text. Children share one compilation cache, so
  what one has compiled the next one loads.
  """
  cache = tmp_path_factory.mktemp('xla')
  children = []

  def spawn(args, *, env=None, devices=1):
    clean = {name: os.environ[name] for name in KEPT if name in os.environ}
    clean |= {k: v for k, v in os.environ.items() if k.startswith(STORES)}
    clean |= {
      'JAX_PLATFORMS': PLATFORM,
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'PYTHONPATH': str(ROOT),
    }
    command = [sys.executable, *map(str, args)]
    child = subprocess.Popen(
      command,
      cwd=ROOT,
      env=clean | (env or {}),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    children.append(child)
    return child

  yield spawn
  for child in children:
    child.kill()
    child.communicate()


@pytest.fixture(scope='session')
def run_python(spawn_python):
  """Runs `python ARGS` to its end -> CompletedProcess with returncode, stdout, stderr.

  As `spawn_python`, with a timeout in seconds. A failure is the test's to judge.
  """

  def run(args, *, env=None, devices=1, timeout=300):
    with spawn_python(args, env=env, devices=devices) as child:
      try:
        out, err = child.communicate(timeout=timeout)
      except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        pytest.fail(f'{args} took over {timeout} s\n{out[-2000:]}\n{err[-4000:]}')
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)

  return run


@pytest.fixture(scope='session')
def s3():
  """A server that speaks S3, on this machine alone -> the URL of a bucket in it.

  The environment names it, of this process and of every child, while the session lasts.
  """
  environment = {
    'AWS_ACCESS_KEY_ID': 'nobody',
    'AWS_SECRET_ACCESS_KEY': 'nothing',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_CONFIG_FILE': os.devnull,
    'AWS_SHARED_CREDENTIALS_FILE': os.devnull,
    'AWS_EC2_METADATA_DISABLED': 'true',
  }
  command = ['moto.server', '-H', '127.0.0.1', '-p']
  with _server(('moto', 's3fs'), command, ['AWS_ENDPOINT_URL'], environment) as url:
    urllib.request.urlopen(urllib.request.Request(f'{url}/bucket', method='PUT')).close()
    yield 's3://bucket'


@pytest.fixture(scope='session')
def gs():
  """As `s3`, a server that speaks Google's: for gcsfs, and for TensorStore itself."""
  environment = {
    'GOOGLE_CLOUD_PROJECT': 'nobody',
    'NO_GCE_CHECK': 'true',
    'GCE_METADATA_HOST': '127.0.0.1:1',  # TensorStore then needs no credentials.
  }
  names = ['STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL']
  command = ['gcp_storage_emulator', 'start', '--in-memory', '--default-bucket=bucket']
  command += ['--host=127.0.0.1', '--port']
  with _server(('gcp_storage_emulator', 'gcsfs'), command, names, environment):
    yield 'gs://bucket'


@contextlib.contextmanager
def _server(packages, command, names, environment):
  """Runs `python -m COMMAND PORT` until the end -> its URL, once it answers.

  The variables `names` say the URL, and `environment` stands beside them.
  """
  for package in packages:
    if not importlib.util.find_spec(package):
      pytest.skip(f'needs {package}: pip install -r requirements-dev.txt')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  with pytest.MonkeyPatch.context() as patch:
    for name in ('no_proxy', 'NO_PROXY'):
      patch.setenv(name, '127.0.0.1', prepend=',')
    for name, value in (environment | dict.fromkeys(names, url)).items():
      patch.setenv(name, value)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([sys.executable, '-m', *command, str(port)], **quiet) as server:
      try:
        until = time.monotonic() + 60
        while not _answers(port):
          assert server.poll() is None, f'{command[0]} ended with {server.returncode}'
          assert time.monotonic() < until, f'{command[0]} does not answer'
          time.sleep(0.05)
        yield url
      finally:
        server.kill()


def _answers(port):
  try:
    socket.create_connection(('127.0.0.1', port), timeout=5).close()
    return True
  except OSError:
    return False


@pytest.fixture
def remote(s3, tmp_path):
  """A folder in a bucket that is this test's own -> its URL, as tmp_path is on disk."""
  return f'{s3}/{tmp_path.name}'
