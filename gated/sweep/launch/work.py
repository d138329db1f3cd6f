"""What is to be run, however it is launched: points, and what each host does for one."""

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from yaml import SafeDumper, dump

from gated import storage
from gated.run.exit_codes import FINISHED, REFUSED, UNSTABLE
from gated.sweep.launch import machines

_HERE = Path(__file__).parent
FOLLOW = (_HERE / 'follow.sh').read_text()
_CODES = f'refused={REFUSED} unstable={UNSTABLE} finished={FINISHED}'
# The script that each host runs: `bash -c JOB job ARGUMENTS`.
JOB = f'set -euo pipefail\n{_CODES}\n{FOLLOW}{(_HERE / "job.sh").read_text()}'


def _option(default: Any, told: str) -> Any:
  return field(default=default, metadata={'help': told})


@dataclass(frozen=True, kw_only=True)
class Options:
  """How a sweep is submitted: the flags of `scripts/sweep.py submit`."""

  on: str = _option('', 'the scheduler: slurm, skypilot, jobset or tpu')
  accelerator: str = _option('', 'of a point: cpu, h100:8 (GPUs a host), v5p:4x4x4')
  nodes: int = _option(1, 'hosts of a point; of TPUs the slice says it')
  slices: int = _option(1, 'slices of TPUs of a point (jobset, tpu)')
  spot: bool = _option(False, 'machines that may be taken back (all but slurm)')
  restarts: int = _option(20, 'of a point for any reason but having been told to leave')
  interpreter: str = _option('', 'a Python with all a run needs: nothing is installed')
  cache: str = _option('', 'folder on the hosts for sources and packages; ~/.cache/gated')
  unlocked: bool = _option(False, 'installs from requirements*.txt, not the .lock files')
  partition: str = _option('', 'slurm: where to run')
  time: str = _option('', 'slurm: limit of a session, HH:MM:SS; a longer run is requeued')
  processes: int = _option(1, 'slurm: processes of a host, each with its own devices')
  at_once: int = _option(0, 'slurm: points that run at a time; 0 for all')
  sbatch: tuple[str, ...] = _option((), 'slurm: more of its options, --NAME=VALUE')
  infra: str = _option('', 'skypilot: CLOUD[/REGION[/ZONE]] or k8s[/CONTEXT]')
  queue: str = _option('', "jobset: Kueue's LocalQueue")
  namespace: str = _option('default', 'jobset: of Kubernetes')
  image: str = _option('', 'jobset: with bash and Python; python:3.X as here otherwise')
  service_account: str = _option('', 'jobset, tpu: who may write to the bucket')
  zone: str = _option('', 'tpu: of Google Cloud')
  project: str = _option('', 'tpu: of Google Cloud')
  runtime: str = _option('', "tpu: the software version, otherwise the TPU's usual one")


class Point(NamedTuple):
  """One run of a sweep."""

  job: str  # What a scheduler calls it.
  name: str
  command: tuple[str, ...]  # train.py --config=... --workdir=...
  workdir: str


@dataclass(frozen=True, kw_only=True)
class Work:
  """A sweep's points, and the machines they are for."""

  label: str  # Names and labels of all that is created carry it.
  folder: str  # The sweep's, absolute, or in an object store.
  files: str  # The local folder of what is submitted.
  sha256: str  # Of FOLDER/code.tar.gz.
  python: str  # '3.11': the version that the sweep was made with.
  points: tuple[Point, ...]
  options: Options

  @property
  def accelerator(self) -> machines.Accelerator:
    return machines.accelerator(self.options.accelerator)

  @property
  def processes(self) -> int:
    """All of a point's."""
    hosts = self.options.nodes * self.accelerator.hosts * self.options.slices
    return hosts * self.options.processes

  def arguments(self, point: Point, *, code: str = '', meet: str = 'auto') -> list[str]:
    """What job.sh is given for a point.

    `code` is where a host finds the sources, `meet` how processes find each other.
    """
    # A set, in order: an accelerator's file only adds to requirements.txt.
    stems = list(dict.fromkeys(['requirements', self.accelerator.requirements]))
    stems += ['requirements-cloud'] if storage.is_remote(self.folder) else []
    kind = 'txt' if self.options.unlocked else 'lock'
    given = {
      'code': code or f'{self.folder}/code.tar.gz',
      'sha256': self.sha256,
      'requirements': ','.join(f'{stem}.{kind}' for stem in stems),
      'python': self.python,
      'workdir': point.workdir,
      'processes': meet if self.processes > 1 else 'one',
      'interpreter': self.options.interpreter,
      'cache': self.options.cache,
    }
    flags = [f'--{name}={value}' for name, value in given.items() if value]
    return [*flags, '--', *point.command]


def embedded() -> str:
  """-> lines of bash after which $job holds what each host runs."""
  return f"job=$(\n  cat <<'JOB'\n{JOB}JOB\n)\n"


def words(arguments: list[str] | tuple[str, ...]) -> str:
  """Arguments -> the words of a shell, a line each."""
  return ' \\\n    '.join(map(shlex.quote, arguments))


class _Blocks(SafeDumper):
  """Writes texts of several lines as they are read."""


def _text(dumper: SafeDumper, text: str) -> Any:
  style = '|' if '\n' in text else None
  return dumper.represent_scalar('tag:yaml.org,2002:str', text, style=style)


_Blocks.add_representer(str, _text)


def yaml(made: Mapping[str, Any]) -> str:
  """-> YAML, its keys in the order that they have."""
  return dump(made, Dumper=_Blocks, sort_keys=False)


def label(folder: str) -> str:
  """A sweep's folder -> what names all that is created for it.

  Lower case letters, digits and dashes, at most 32: Kubernetes and Google Cloud take no
  other names, and put something of their own behind them.
  """
  folder = folder.rstrip('/')
  name = re.sub(r'[^a-z0-9]+', '-', folder.rpartition('/')[2].lower())
  name = re.sub(r'^[^a-z]+', '', name)[:24].strip('-') or 'sweep'
  return f'{name}-{hashlib.sha256(folder.encode()).hexdigest()[:7]}'


def changed(options: Options) -> Mapping[str, Any]:
  """Options -> those that differ from their defaults."""
  every = {f.name: (getattr(options, f.name), f.default) for f in fields(options)}
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, (value, default) in every.items()
    if value != default
  }
