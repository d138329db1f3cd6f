"""The work of a submission: options, points, and the script that each host runs."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yaml import SafeDumper, dump

from gated import storage
from gated.run.exit_codes import FINISHED, REFUSED, UNSTABLE
from gated.sweep.grid import Point, Sweep
from gated.sweep.launch import machines

_HERE = Path(__file__).parent
FOLDER = 'launch'  # The subfolder of a sweep with the submitted files.
FOLLOW = (_HERE / 'follow.sh').read_text()
_CODES = f'refused={REFUSED} unstable={UNSTABLE} finished={FINISHED}'
# The script that each host runs: `bash -c JOB job ARGUMENTS`.
JOB = f'set -euo pipefail\n{_CODES}\n{FOLLOW}{(_HERE / "job.sh").read_text()}'


def _option(default: Any, text: str) -> Any:
  return field(default=default, metadata={'help': text})


@dataclass(frozen=True, kw_only=True)
class Options:
  """How a sweep is submitted: the flags of `scripts/sweep.py submit`."""

  on: str = _option('', 'the scheduler: slurm, skypilot, jobset or tpu')
  accelerator: str = _option('', 'per point: cpu, h100:8 (GPUs a host), v5p:4x4x4')
  nodes: int = _option(1, 'hosts per point; with TPUs the slice sets it')
  slices: int = _option(1, 'TPU slices per point (jobset, tpu)')
  spot: bool = _option(False, 'use preemptible machines (all but slurm)')
  restarts: int = _option(20, 'restarts per point, not counting preemptions')
  interpreter: str = _option('', 'a Python with all requirements; installs nothing')
  cache: str = _option('', 'host folder for sources and packages (~/.cache/gated/jobs)')
  unlocked: bool = _option(False, 'install requirements*.txt, not the .lock files')
  partition: str = _option('', 'slurm: the partition')
  time: str = _option('', 'slurm: time limit HH:MM:SS; longer runs are requeued')
  processes: int = _option(1, 'slurm: processes per host, each with its own devices')
  at_once: int = _option(0, 'slurm: points that run at the same time; 0: all')
  sbatch: tuple[str, ...] = _option((), 'slurm: another option of sbatch, --NAME=VALUE')
  infra: str = _option('', 'skypilot: CLOUD[/REGION[/ZONE]] or k8s[/CONTEXT]')
  queue: str = _option('', "jobset: Kueue's LocalQueue")
  namespace: str = _option('default', 'jobset: the Kubernetes namespace')
  image: str = _option('', 'jobset: an image with bash and Python (python:3.X)')
  service_account: str = _option('', 'jobset, tpu: an account that may write the bucket')
  zone: str = _option('', 'tpu: the zone of Google Cloud')
  project: str = _option('', 'tpu: the project of Google Cloud')
  runtime: str = _option('', 'tpu: the software version, if not the usual one')

  def changed(self) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return {n: v for n, v in vars(self).items() if v != getattr(Options, n)}


# The name and content of a submitted file, and the command that submits it.
Task = tuple[str, str, list[str]]


class Work(NamedTuple):
  """Points of a sweep, and the machines for them."""

  swept: Sweep
  points: Sequence[Point]
  options: Options

  @property
  def folder(self) -> str:
    """The sweep's folder: an absolute path or a URL."""
    return os.fspath(self.swept.folder)

  @property
  def label(self) -> str:
    """The prefix of all job names."""
    return label(self.folder)

  def job(self, point: Point) -> str:
    """A point's name for the scheduler."""
    return f'{self.label}-{[p.name for p in self.swept.points].index(point.name):03d}'

  @property
  def files(self) -> str:
    """The local folder of the submitted files: inside the sweep's folder, or a cache."""
    if not storage.is_remote(self.folder):
      return os.path.join(self.folder, FOLDER)
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(home, 'gated', FOLDER, self.label)

  @property
  def python(self) -> str:
    """The version that made the sweep: '3.11'."""
    return '.'.join(self.swept.made['python'].split('.')[:2])

  @property
  def accelerator(self) -> machines.Accelerator:
    return machines.accelerator(self.options.accelerator)

  def arguments(
    self, point: Point, *, code: str | None = None, processes: str = 'auto'
  ) -> list[str]:
    """A point -> the arguments of job.sh.

    `code` is the path of the sources on a host ('' omits the flag); `processes` selects
    how the processes of a point find each other.
    """
    o = self.options
    count = o.nodes * self.accelerator.hosts * o.slices * o.processes
    extras = {'cpu': [], 'gpu': ['-cuda'], 'tpu': ['-tpu']}[self.accelerator.kind]
    extras += ['-cloud'] if storage.is_remote(self.folder) else []
    suffix = 'txt' if o.unlocked else 'lock'
    values = {
      'code': f'{self.folder}/code.tar.gz' if code is None else code,
      'sha256': self.swept.made['sha256'],
      'requirements': ','.join(f'requirements{name}.{suffix}' for name in ['', *extras]),
      'python': self.python,
      'workdir': os.fspath(self.swept.workdir(point)),
      'processes': processes if count > 1 else 'one',
      'interpreter': o.interpreter,
      'cache': o.cache,
    }
    flags = [f'--{name}={value}' for name, value in values.items() if value]
    return [*flags, '--', *self.swept.command(point)]


def embedded() -> str:
  """Lines of bash that set $job to the script of each host."""
  return f"job=$(\n  cat <<'JOB'\n{JOB}JOB\n)\n"


def quoted(arguments: Iterable[str]) -> str:
  """Arguments -> words of a shell command, one a line."""
  return ' \\\n    '.join(map(shlex.quote, arguments))


class _Blocks(SafeDumper):
  """Writes strings of several lines as YAML blocks."""


def _text(dumper: SafeDumper, text: str) -> Any:
  style = '|' if '\n' in text else None
  return dumper.represent_scalar('tag:yaml.org,2002:str', text, style=style)


_Blocks.add_representer(str, _text)


def yaml(content: Mapping[str, Any]) -> str:
  """A mapping -> YAML, with its keys in their order."""
  return dump(content, Dumper=_Blocks, sort_keys=False)


def label(folder: str) -> str:
  """A sweep's folder -> the prefix of its jobs' names.

  At most 32 lower case letters, digits and dashes: Kubernetes and Google Cloud allow no
  other characters and append suffixes of their own.
  """
  folder = folder.rstrip('/')
  name = re.sub(r'[^a-z0-9]+', '-', folder.rpartition('/')[2].lower())
  name = re.sub(r'^[^a-z]+', '', name)[:24].strip('-') or 'sweep'
  return f'{name}-{hashlib.sha256(folder.encode()).hexdigest()[:7]}'
