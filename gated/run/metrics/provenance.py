"""run.json: what a run is made of, and every session that worked on it.

`config` and `data` are those of the latest session. Each start adds one entry to
`sessions`: when, from which step, which knobs differ from the session before ({knob:
[before, now]}), the command, versions, devices and environment, whether the run was to be
deterministic, and the code's commit.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from gated import storage
from gated.devices import determinism
from gated.run.metrics.records import plain

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'array_record',
  'ml_collections',
  'tokenizers',
  'numpy',
)

# What steers the compiler and the collectives, and so can change numbers; NPROC is how
# many threads XLA has on CPUs.
ENVIRONMENT = ('XLA_', 'LIBTPU_', 'JAX_', 'NCCL_', 'NPROC')

MAX_BYTES = 1 << 26  # Of a run.json.
# Names of what must not be told. A flag's are whole words: a tokenizer is no token.
HIDDEN = re.compile('KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.IGNORECASE)
HIDDEN_FLAG = re.compile(
  r'(key|token|(secret|passw(or)?d|credential)s?)(?![a-z0-9])', re.IGNORECASE
)
LOGIN = re.compile(r'(\w://)[^/\s]*:[^/\s]*@')
MASK = '***'


def manifest(
  path: storage.PathLike,
  *,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  restored: int | None,
  changed: Mapping[str, Any],
) -> dict:
  """Resolved config, data fingerprint, the step restored (None: fresh) -> run.json.

  A run.json that is there keeps its sessions. Call it on process 0 alone.
  """
  sessions = []
  if storage.exists(path):
    sessions = json.loads(storage.read(path, MAX_BYTES))['sessions']
  entry = {
    'restored_step': -1 if restored is None else restored,
    'changed': changed,
  } | session()
  run = {'config': config, 'data': data, 'sessions': [*sessions, entry]}
  storage.write_json(path, plain(run))
  return run


def session() -> dict:
  """-> this process's time, command, code, versions, devices and compiler flags."""
  devices = jax.devices()
  return {
    'time': datetime.now(UTC).isoformat(timespec='seconds'),
    'command': command(sys.argv),
    'git': git(Path(__file__).resolve().parents[2]),
    'versions': versions(),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'backend': jax.default_backend(),
    'device_kind': devices[0].device_kind,
    'devices': len(devices),
    'processes': jax.process_count(),
    'environment': environment(os.environ),
    'deterministic': determinism.enabled(os.environ),
  }


def environment(every: Mapping[str, str]) -> dict[str, str]:
  """Environment -> what steers the numbers; what may be a credential is left out."""
  told = {k: v for k, v in every.items() if k.startswith(ENVIRONMENT)}
  return {k: _without_login(v) for k, v in told.items() if not HIDDEN.search(k)}


def command(argv: Sequence[str]) -> list[str]:
  """Command line -> the same, with *** for what its flags' names or a login give away."""
  told, mask_next = [], False
  for word in argv:
    name, equals, _ = word.partition('=')
    hidden = bool(HIDDEN_FLAG.search(name))
    if mask_next and not word.startswith('-'):
      told.append(MASK)
    else:
      told.append(name + equals + MASK if hidden and equals else _without_login(word))
    mask_next = hidden and not equals and word.startswith('-')
  return told


def _without_login(text: str) -> str:
  """Text -> the same, with *** for the user and the password of a URL."""
  return LOGIN.sub(rf'\1{MASK}@', text)


def versions() -> dict[str, str | None]:
  """-> package -> its installed version; None where it is not."""
  found: dict[str, str | None] = dict.fromkeys(PACKAGES)
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def git(checkout: Path) -> dict | None:
  """Folder -> its commit, and whether tracked files differ from it.

  None without git, or where the folder is not the top of a checkout of its own.
  """

  def ask(*words: str) -> str:
    command = ['git', '-C', str(checkout), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()

  try:
    if Path(ask('rev-parse', '--show-toplevel')).resolve() != checkout.resolve():
      return None
    changes = ask('status', '--porcelain', '--untracked-files=no')
    return {'commit': ask('rev-parse', 'HEAD'), 'dirty': bool(changes)}
  except (OSError, subprocess.SubprocessError):
    return None
