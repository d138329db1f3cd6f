"""run.json: the recipe and the data of a run, and all of its sessions.

`config` and `data` are those of the latest session. Each start adds one entry to
`sessions`: its time, the restored step, the knobs changed since the session before
({knob: [before, now]}), the command, versions, devices and environment, the flag
`--deterministic`, and the code's commit.
"""

import contextlib
import importlib.metadata
import logging
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
from gated.run.metrics import settings
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

# Variables that can change numbers, through the compiler, the collectives or libraries of
# kernels; NPROC sets the number of XLA's threads on CPUs.
ENVIRONMENT = ('XLA_', 'LIBTPU_', 'JAX_', 'NCCL_', 'NPROC', 'TF_XLA_', 'TF_CUDNN_')
ENVIRONMENT += ('NVIDIA_TF32_OVERRIDE', 'CUBLAS', 'CUDNN_')

MAX_BYTES = 1 << 26  # The largest run.json.
# Names of secrets. In a flag they are whole words: --tokenizer is not secret.
HIDDEN = re.compile('KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.IGNORECASE)
HIDDEN_FLAG = re.compile(
  r'(key|token|(secret|passw(or)?d|credential)s?)(?![a-z0-9])', re.IGNORECASE
)
LOGIN = re.compile(r'(\w://)[^/\s]*:[^/\s]*@')
MASK = '***'

_log = logging.getLogger('gated')


def manifest(
  path: storage.PathLike,
  *,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  restored: int | None,
  changed: Mapping[str, Any],
) -> dict:
  """Resolved config, data fingerprint, the step restored (None: fresh) -> run.json.

  An existing run.json keeps its sessions. Call it only on process 0.
  """
  old = storage.read_json(path, MAX_BYTES) if storage.exists(path) else {'sessions': []}
  entry = {'restored_step': -1 if restored is None else restored, 'changed': changed}
  entry |= session()
  # A session of an earlier version, or one that was edited, may not say them all.
  with contextlib.suppress(KeyError, IndexError, TypeError, ValueError, AttributeError):
    _report_changes(old['sessions'][-1], entry)
  run = {'config': config, 'data': data, 'sessions': [*old['sessions'], entry]}
  storage.write_json(path, plain(run))
  return run


def _report_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  """Warns of settings that differ between two sessions and may change numbers."""
  both = ({'environment': s['environment'], **s} for s in (old, new))
  changed = settings.changed(*map(settings.of, both))
  shown = [
    f'{name} {a} -> {b}'
    for name, (a, b) in changed.items()
    if not name.startswith(settings.HARMLESS)
  ]
  if shown:
    _log.warning(
      'changed since the last session: %s; the last bits may differ', ', '.join(shown)
    )


def amend(path: storage.PathLike, changed: Mapping[str, Any]) -> None:
  """Corrects knobs that the last session of run.json has changed."""
  run = storage.read_json(path, MAX_BYTES)
  run['sessions'][-1]['changed'] |= plain(changed)
  storage.write_json(path, run)


def session() -> dict:
  """-> the time, command, code, versions, devices and environment of this process."""
  devices = jax.devices()
  return {
    'time': datetime.now(UTC).isoformat(timespec='seconds'),
    'command': command(sys.argv),
    'git': git(Path(__file__).resolve().parents[3]),
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
  """Environment -> the variables that can change numbers, without credentials."""
  shown = lambda name: name.startswith(ENVIRONMENT) and not HIDDEN.search(name)
  return {name: _without_login(every[name]) for name in every if shown(name)}


def command(argv: Sequence[str]) -> list[str]:
  """Command line -> the same, with *** for values of secret flags and for logins."""
  words, mask_next = [], False
  for word in argv:
    name, equals, _ = word.partition('=')
    hidden = bool(HIDDEN_FLAG.search(name))
    if mask_next and not word.startswith('-'):
      words.append(MASK)
    else:
      words.append(name + equals + MASK if hidden and equals else _without_login(word))
    mask_next = hidden and not equals and word.startswith('-')
  return words


def _without_login(text: str) -> str:
  """Text -> the same, with *** for the user and the password in a URL."""
  return LOGIN.sub(rf'\1{MASK}@', text)


def versions() -> dict[str, str | None]:
  """-> {package: its installed version}; None if it is not installed."""
  installed: dict[str, str | None] = dict.fromkeys(PACKAGES)
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[package] = importlib.metadata.version(package)
  return installed


def git(checkout: Path) -> dict | None:
  """Folder -> its commit, and whether tracked files differ from it.

  None without git, or if the folder is not the root of a checkout.
  """

  def ask(*words: str) -> str:
    command = ['git', '-C', str(checkout), *words]
    pipes: Any = dict(capture_output=True, text=True, errors='replace', env=env)
    return subprocess.run(command, check=True, timeout=20, **pipes).stdout.strip()

  # A hook of git sets GIT_DIR and more, which would name another repository.
  env = {name: os.environ[name] for name in os.environ if not name.startswith('GIT_')}

  try:
    if Path(ask('rev-parse', '--show-toplevel')).resolve() != checkout.resolve():
      return None
    changes = ask('status', '--porcelain', '--untracked-files=no')
    return {'commit': ask('rev-parse', 'HEAD'), 'dirty': bool(changes)}
  except (OSError, subprocess.SubprocessError):
    return None
