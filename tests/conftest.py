"""Eight CPU devices for every test, a clean environment for every child process.

Set GATED_TEST_PLATFORM=cuda (or tpu) to run on an accelerator; tests marked
`accelerator` run only then.
"""

import contextlib
import os
import subprocess
import sys
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
from faults import process

# Whatever stores this machine may write to, tests know servers of their own alone.
for name in [name for name in os.environ if name.startswith(process.STORES)]:
  del os.environ[name]
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # It asks a server at Google.

import jax
import pytest
import servers

# The files that take longest. With several workers (-n 2 --dist loadfile) a file is one
# worker's, and these begin first, so that no worker waits for the other at the end.
LONGEST = (
  'test_launch.py',
  'test_arrangements.py',
  'test_train.py',
  'test_faults.py',
  'test_moe.py',
  'test_preflight.py',
  'test_context.py',
)


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
    clean = process.environment(cache, devices) | {'JAX_PLATFORMS': PLATFORM}
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
  with _unless_missing(), servers.s3() as bucket:
    yield bucket


@pytest.fixture(scope='session')
def gs():
  """As `s3`, a server that speaks Google's: for gcsfs, and for TensorStore itself."""
  with _unless_missing(), servers.gs() as bucket:
    yield bucket


@contextlib.contextmanager
def _unless_missing():
  try:
    yield
  except servers.Missing as missing:
    pytest.skip(str(missing))


# A process that compiles for TPUs takes a lock that is meant for the chips; without chips
# any number of them may run.
TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'JAX_PLATFORMS': 'cpu',
}


@pytest.fixture(scope='session')
def run_for_tpu(tmp_path_factory):
  """Runs `python ARGS` with a JAX that compiles for TPUs -> CompletedProcess.

  It is the Python of $GATED_TPU_PYTHON, or the one that `make tpu` has made.
  """
  python = Path(os.environ.get('GATED_TPU_PYTHON') or ROOT / '.venv/tpu/bin/python')
  if not python.exists():
    pytest.skip(f'no {python}, to compile for TPUs: make tpu, or set GATED_TPU_PYTHON')
  clean = process.environment(tmp_path_factory.mktemp('xla'), 1) | TPU

  def run(args, *, timeout=300):
    command = [str(python), *map(str, args)]
    opts = dict(cwd=ROOT, env=clean, capture_output=True, text=True, timeout=timeout)
    return subprocess.run(command, **opts)

  return run


@pytest.fixture
def remote(s3, tmp_path):
  """A folder in a bucket that is this test's own -> its URL, as tmp_path is on disk."""
  return f'{s3}/{tmp_path.name}'
