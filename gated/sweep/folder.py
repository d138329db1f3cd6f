"""The folder of a sweep: its recipe, points and sources, enough to run it again.

All points run the packed sources, even if the checkout changes meanwhile.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gated import config, storage
from gated.run import metrics
from gated.run.metrics import provenance
from gated.sweep import judge
from gated.sweep.grid import Point, Sweep, absolute

NAME, CODE = 'sweep.json', 'code.tar.gz'
LIMIT = 1 << 28  # Bytes of a sweep.json or its sources.
FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
# The packed sources: folders, and patterns of files.
CARRIED = 'configs', 'gated', 'scripts'
FILES = 'train.py', 'eval.py', 'pyproject.toml', 'LICENSE', 'requirements*'
LEFT_OUT = '__pycache__', '.pyc', '.partial'
MOST = 1 << 26  # Bytes of all sources; a sweep carries no data.


def write(swept: Sweep, environment: Mapping[str, str] | None = None) -> Sweep:
  """Writes a sweep's folder with the current sources -> the Sweep in it.

  `environment` holds the variables of its points on this machine. An existing folder of
  the same sweep stays as it is. ValueError for a folder of another sweep, listing the
  differences, or one that cannot be written.
  """
  root = swept.folder
  if storage.exists(root / NAME):
    old = open(root)
    _check_same(old, swept)
    return old
  packed = pack(ROOT)
  made = {
    'time': datetime.now(UTC).isoformat(timespec='seconds'),
    'sha256': hashlib.sha256(packed).hexdigest(),
    'git': provenance.git(ROOT),
    'python': platform.python_version(),
    'versions': provenance.versions(),
    'environment': dict(environment or {}),
  }
  content = {
    'format': FORMAT,
    'name': swept.name,
    'recipe': swept.recipe,
    'overrides': swept.overrides,
    'flags': swept.flags,
    'rule': dataclasses.asdict(swept.rule),
    'made': made,
    'points': [p._asdict() | {'command': swept.command(p)} for p in swept.points],
  }
  try:
    storage.write(root / CODE, packed)
    # Last: it marks the folder as complete.
    storage.write_json(root / NAME, metrics.plain(content))
  except OSError as error:
    raise ValueError(f'--dir={root} cannot be written: {error}') from error
  return open(root)


def open(folder: storage.PathLike) -> Sweep:
  """A sweep's folder, which may have been moved -> Sweep.

  ValueError for a missing or damaged sweep.json.
  """
  root = absolute(folder)
  try:
    content = json.loads(storage.read(root / NAME, LIMIT))
  except FileNotFoundError:
    raise ValueError(f'{root} is not a sweep: {NAME} is missing') from None
  except (ValueError, RecursionError, OSError) as error:
    raise ValueError(f'{root / NAME} cannot be read: {error}') from error
  try:
    if content['format'] != FORMAT:
      raise ValueError(f'format {content["format"]}, but only {FORMAT} is supported')
    points = tuple(_point(p) for p in content['points'])
    if not points or len({p.name for p in points}) < len(points):
      raise ValueError('no points, or two with the same name')
    made: dict[str, Any] = {'git': None, **content['made']}
    _texts([made[key] for key in ('time', 'sha256', 'python')])
    _texts([*made['environment'].values(), content['name'], content['recipe']])
    return Sweep(
      folder=root,
      name=content['name'],
      recipe=content['recipe'],
      overrides=_texts(content['overrides']),
      flags=_texts(content['flags']),
      points=points,
      rule=config.build(judge.Rule, content['rule'], 'rule'),
      made=made,
    )
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(f'{root / NAME} is damaged: {error!r}') from error


def _point(entry: Mapping[str, Any]) -> Point:
  """Untrusted JSON -> Point; any of several errors if it is invalid."""
  (name,), (*command, workdir) = _texts([entry['name']]), _texts(entry['command'])
  if not re.fullmatch(r'[\w+-][\w.+-]{0,200}', name, re.ASCII):
    raise ValueError(f'the point {name!r}')
  if command[0] != 'train.py' or not workdir.startswith('--workdir='):
    raise ValueError(f'the command of {name}')
  c = dict(entry['config'])
  _texts(entry['labels'].values())
  # The knobs that are used without a check of the whole recipe.
  for knob, kind in {'steps': int, 'seed': int, 'optim.lr': (int, float)}.items():
    if not isinstance(value := config.dig(c, knob), kind) or isinstance(value, bool):
      raise ValueError(f'config.{knob}={value!r} of {name}')
  return Point(name, entry['labels'], dict(entry['changes']), tuple(command), c)


def _texts(values: Any) -> tuple[str, ...]:
  """Checks that all values are strings."""
  for value in values:
    if not isinstance(value, str):
      raise ValueError(f'{value!r} is not a string')
  return tuple(values)


def _check_same(old: Sweep, new: Sweep) -> None:
  """ValueError with a list of the differences if two sweeps are not the same."""
  before, after = ({p.name: p for p in s.points} for s in (old, new))
  lines = [f'the point {n} is only in the folder' for n in before if n not in after]
  lines += [f'the point {name} is new' for name in after if name not in before]
  changed: dict[str, tuple[Any, Any]] = {}
  for name in before.keys() & after.keys():
    a, b = (
      json.loads(metrics.dumps(s[name].config, indent=None)) for s in (before, after)
    )
    changed |= config.differences(a, b)
  if old.flags != new.flags:
    changed['flags'] = ' '.join(old.flags), ' '.join(new.flags)
  if old.rule != new.rule:
    changed['the rule of divergence'] = old.rule, new.rule
  lines += [f'{name}: {x!r} in the folder, {y!r} now' for name, (x, y) in changed.items()]
  if lines:
    rest = [f'and {len(lines) - 20} more'] if len(lines) > 20 else []
    listed = '\n'.join(f'  {line}' for line in [*lines[:20], *rest])
    raise ValueError(
      f'--dir={old.folder} holds another sweep; differences:\n{listed}\n'
      'Choose another folder, or resume that sweep with --dir alone'
    )


def local(folder: storage.Path) -> Path:
  """A sweep's folder -> its local path; ValueError for one in an object store."""
  if storage.is_remote(folder):
    raise ValueError(
      f'--dir={folder}: `run` needs a local folder for logs and sources; a bucket is for '
      '`scripts/sweep.py submit`'
    )
  return Path(folder)


def is_current(swept: Sweep) -> bool:
  """Whether a sweep's sources equal the current ones."""
  return hashlib.sha256(pack(ROOT)).hexdigest() == swept.made['sha256']


def pack(root: Path) -> bytes:
  """A checkout -> its sources as a .tar.gz, always the same bytes for the same sources.

  ValueError if they are too large.
  """
  paths = [p for pattern in FILES for p in root.glob(pattern)]
  paths += [p for folder in CARRIED for p in (root / folder).rglob('*')]
  paths = [p for p in paths if p.is_file() and not str(p).endswith(LEFT_OUT)]
  paths = sorted(p for p in paths if not set(p.parts) & set(LEFT_OUT))
  size = sum(p.stat().st_size for p in paths)
  if size > MOST:
    largest = max(paths, key=lambda p: p.stat().st_size)
    raise ValueError(
      f'the sources in {root} have {size} bytes, more than a sweep carries '
      f'({MOST}): move {largest} elsewhere'
    )
  out = io.BytesIO()
  with (
    gzip.GzipFile(fileobj=out, mode='wb', mtime=0) as zipped,
    tarfile.open(fileobj=zipped, mode='w', format=tarfile.PAX_FORMAT) as archive,
  ):
    for path in paths:
      content = path.read_bytes()
      entry = tarfile.TarInfo(path.relative_to(root).as_posix())
      entry.size = len(content)
      entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
      archive.addfile(entry, io.BytesIO(content))
  return out.getvalue()


def unpacked(swept: Sweep) -> Path:
  """A sweep in a local folder -> the folder of its unpacked sources.

  ValueError for a remote sweep, or sources that do not match its sweep.json.
  """
  root, sha256 = local(swept.folder), swept.made['sha256']
  packed = storage.read(root / CODE, LIMIT)
  digest = hashlib.sha256(packed).hexdigest()
  if digest != sha256:
    raise ValueError(
      f'{root / CODE} does not match {NAME}: its SHA-256 is {digest}, but {sha256} is '
      'recorded'
    )
  target = root / f'code-{digest[:12]}'
  if target.is_dir():
    return target
  draft = Path(tempfile.mkdtemp(prefix='.code-', dir=root))
  try:
    with tarfile.open(fileobj=io.BytesIO(packed), mode='r:gz') as archive:
      archive.extractall(draft, filter='data')
    draft.chmod(0o755)
    draft.rename(target)
  except OSError:
    if not target.is_dir():  # Another process may have been faster.
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return target
