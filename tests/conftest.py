"""Eight CPU devices for every test, a clean environment for every child process.

Set GATED_TEST_PLATFORM=cuda (or tpu) to run on an accelerator; tests marked
`accelerator` run only then. `make fast` skips the tests marked `slow` or `full`,
`make test` those marked `full`.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = os.environ.get('GATED_TEST_PLATFORM', 'cpu')

# JAX reads these at its import. Eight devices on two cores share one thread pool; a
# second pool of numpy would compete with it.
os.environ['JAX_PLATFORMS'] = PLATFORM
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['OMP_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
# XLA aborts a process whose devices meet too late, which busy cores may cause.
PATIENT = '--xla_cpu_collective_call_terminate_timeout_seconds=240'
sys.path.insert(0, str(ROOT))
from faults import process

os.environ['XLA_FLAGS'] = f'{process.xla_flags(8, PLATFORM)} {PATIENT}'
os.environ |= process.THREADS

# A shell starts background commands with Ctrl-C ignored, which children would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests may reach their own object-store servers only, never a store of this machine.
for name in [name for name in os.environ if name.startswith(process.STORES)]:
  del os.environ[name]
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # Contacts Google.

import jax
import pytest
import servers

# Compiled programs, shared by all tests and their child processes, and kept between runs.
CACHE = ROOT / '.pytest_cache/xla'
CACHE.mkdir(parents=True, exist_ok=True)
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

# The slowest files, slowest first. With `--dist loadfile` a worker runs a whole file;
# starting with these keeps both workers busy until the end.
LONGEST = (
  'test_faults.py',
  'test_train.py',
  'test_arrangements.py',
  'test_attention_kernels.py',
  'model/test_moe.py',
  'test_hf.py',
  'test_generate.py',
  'test_remedies.py',
  'test_launch.py',
  'test_measure.py',
  'test_placement.py',
  'test_gate.py',
  'test_gates.py',
  'test_load.py',
  'test_checkpoint.py',
  'test_indicators.py',
  'test_force.py',
  'test_examples.py',
  'test_decoder.py',
  'test_configs.py',
  'test_samples.py',
  'test_campaign.py',
  'test_context.py',
  'test_sweep.py',
  'test_replay.py',
)
# Fixtures that need the extra environments of `make tpu` and `make sky`.
EXTRA_ENVIRONMENTS = {'run_for_tpu', 'sky'}


def _start(item) -> int:
  """The position of an item's file in LONGEST; files outside it come last."""
  path = item.path.as_posix()
  positions = (i for i, name in enumerate(LONGEST) if path.endswith(f'/{name}'))
  return next(positions, len(LONGEST))


@pytest.hookimpl(tryfirst=True)  # Before -m selects by marker.
def pytest_collection_modifyitems(items):
  items.sort(key=_start)
  skip = pytest.mark.skip(reason='needs an accelerator: set GATED_TEST_PLATFORM')
  for item in items:
    if EXTRA_ENVIRONMENTS.intersection(item.fixturenames):
      item.add_marker(pytest.mark.full)
    if PLATFORM == 'cpu' and item.get_closest_marker('accelerator'):
      item.add_marker(skip)


@pytest.fixture
def no_transfers():
  """Implicit copies between host and device raise an error, for tests of the hot path.

  Build the state and place the batch before the step: a step that reads a metric or
  takes a numpy array fails here.
  """
  with jax.transfer_guard('disallow'):
    yield


@pytest.fixture(scope='session')
def spawn_python(tmp_path_factory):
  """Starts `python ARGS`, by default from the root -> Child, killed at the end if alive.

  spawn_python(['train.py', '--config=...'], env={'NAME': 'value'}, devices=8)

  A script of this checkout is a fork of a process that has imported the packages.
  """
  names = itertools.count()
  folder = tmp_path_factory.mktemp('children')
  forks = process.Forks(process.environment(CACHE, 1, PLATFORM))
  with contextlib.ExitStack() as ending:
    ending.callback(forks.close)

    def spawn(args, *, env=None, devices=1, cwd=ROOT):
      clean = process.environment(CACHE, devices, PLATFORM) | (env or {})
      stem = folder / str(next(names))
      child = process.start(args, clean, stem, cwd=cwd, forks=forks)
      ending.callback(child.kill)
      return child

    yield spawn


@pytest.fixture(scope='session')
def run_python(spawn_python):
  """Runs `python ARGS` to its end -> CompletedProcess with returncode, stdout, stderr.

  As `spawn_python`, with a timeout in seconds. The test checks the exit code.
  """

  def run(args, *, env=None, devices=1, cwd=ROOT, timeout=300):
    child = spawn_python(args, env=env, devices=devices, cwd=cwd)
    done = child.wait(timeout)
    return subprocess.CompletedProcess(child.args, done.code, done.out, done.err)

  return run


@pytest.fixture(scope='session')
def s3():
  """A local S3 server -> the URL of a bucket in it.

  For the session, the environment of this process and its children names the server.
  """
  with _unless_missing(), servers.s3() as bucket:
    yield bucket


@pytest.fixture(scope='session')
def gs():
  """A local Google Cloud Storage server, as `s3`: for gcsfs and TensorStore."""
  with _unless_missing(), servers.gs() as bucket:
    yield bucket


@contextlib.contextmanager
def _unless_missing():
  try:
    yield
  except servers.Missing as missing:
    pytest.skip(str(missing))


# libtpu locks the chips; without chips several processes may compile at once.
TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'JAX_PLATFORMS': 'cpu',
}


@pytest.fixture(scope='session')
def run_for_tpu():
  """Runs `python ARGS` with a JAX that compiles for TPUs -> CompletedProcess.

  Uses $GATED_TPU_PYTHON, or the environment that `make tpu` created.
  """
  python = Path(os.environ.get('GATED_TPU_PYTHON') or ROOT / '.venv/tpu/bin/python')
  if not python.exists():
    pytest.skip(f'no {python}, to compile for TPUs: make tpu, or set GATED_TPU_PYTHON')
  clean = process.environment(CACHE, 1) | TPU

  def run(args, *, timeout=300):
    command = [str(python), *map(str, args)]
    opts = dict(cwd=ROOT, env=clean, capture_output=True, text=True, timeout=timeout)
    return subprocess.run(command, **opts)

  return run


@pytest.fixture
def remote(s3, tmp_path):
  """The URL of an empty folder in a bucket, as tmp_path is on disk."""
  return f'{s3}/{tmp_path.name}'
