"""The folder of a sweep: its recipe, points and sources, enough to run it again.

All points run the packed sources, even if the checkout changes later.
"""

import contextlib
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
from collections.abc import Generator, Iterable, Mapping, Sequence
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
FILES += 'experiments/*.py', 'experiments/*/recipe.py'
LEFT_OUT = '__pycache__', '.pyc', '.partial'
MOST = 1 << 26  # Bytes of all sources; a sweep carries no data.


def write(swept: Sweep, environment: Mapping[str, str] | None = None) -> Sweep:
  """Writes a sweep's folder with the current sources -> the Sweep in it.

  `environment` holds the variables of its points on this machine. An existing folder of
  the same sweep does not change, except that it gets added points.
  ValueError for a folder of another sweep, listing the differences, or one that cannot be
  written.
  """
  root = swept.folder
  if storage.exists(root / NAME):
    old = open(root)
    if swept.made:
      return _add(old, swept)
    lines = [f'the point {name} is {where}' for name, where in _apart(old, swept).items()]
    refuse(old, lines + changed(old, swept))
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
  return _written(dataclasses.replace(swept, made=made), packed)


def _written(swept: Sweep, packed: bytes | None) -> Sweep:
  """Writes a sweep.json, and the sources if there are any -> the Sweep in its folder."""
  root = swept.folder
  content = {
    'format': FORMAT,
    'name': swept.name,
    'recipe': swept.recipe,
    'overrides': swept.overrides,
    'flags': swept.flags,
    'rule': dataclasses.asdict(swept.rule),
    'made': swept.made,
    'points': [p._asdict() | {'command': swept.command(p)} for p in swept.points],
  }
  try:
    if packed is not None:
      storage.write(root / CODE, packed)
    # Last: it marks the folder as complete.
    storage.write_json(root / NAME, metrics.plain(content))
  except OSError as error:
    raise ValueError(f'--dir={root} cannot be written: {error}') from error
  return open(root)


def _add(old: Sweep, swept: Sweep) -> Sweep:
  """A sweep in its folder and one with more points -> the sweep with all points.

  Points that another process added in the meantime stay. `made` lists each addition.
  """
  known = {p.name for p in old.points}
  added = [p for p in swept.points if p.name not in known]
  if not added:
    return old
  labels = {p.name: p.labels for p in swept.points}
  before = [
    p._replace(labels=labels[p.name]) if p.name in labels else p for p in old.points
  ]
  time = datetime.now(UTC).isoformat(timespec='seconds')
  note = {'time': time, 'points': [p.name for p in added]}
  made = {**old.made, 'added': [*old.made['added'], note]}
  return _written(dataclasses.replace(old, points=(*before, *added), made=made), None)


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
    made: dict[str, Any] = {'git': None, 'added': [], **content['made']}
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
  """Untrusted JSON -> Point; raises one of several errors if it is invalid."""
  (name,), (*command, workdir) = _texts([entry['name']]), _texts(entry['command'])
  if not re.fullmatch(r'[\w+-][\w.+-]{0,200}', name, re.ASCII):
    raise ValueError(f'the point {name!r}')
  if command[0] != 'train.py' or not workdir.startswith('--workdir='):
    raise ValueError(f'the command of {name}')
  c = dict(entry['config'])
  _texts(entry['labels'].values())
  # The knobs that are used before the whole recipe is checked.
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


def _apart(old: Sweep, new: Sweep) -> dict[str, str]:
  """Two sweeps -> {name of a point that only one of them has: which one}."""
  before, after = ({p.name for p in s.points} for s in (old, new))
  return dict.fromkeys(sorted(before - after), 'only in the folder') | dict.fromkeys(
    sorted(after - before), 'new'
  )


def changed(old: Sweep, new: Sweep) -> list[str]:
  """A sweep in its folder and a new one -> their differences, except in their points.

  The recipes of points with the same name are compared.
  """
  before, after = ({p.name: p.config for p in s.points} for s in (old, new))
  lines = differences([(before[n], after[n]) for n in before if n in after])
  texts = {
    'flags': (' '.join(old.flags), ' '.join(new.flags)),
    'the rule of divergence': (old.rule, new.rule),
  }
  return lines + [_line(n, x, y) for n, (x, y) in texts.items() if x != y]


def differences(recipes: Iterable[tuple[Mapping, Mapping]]) -> list[str]:
  """Pairs of recipes, in the folder and now -> a line for each knob that differs."""
  lines = []
  for pair in recipes:
    a, b = (json.loads(metrics.dumps(recipe, indent=None)) for recipe in pair)
    lines += [_line(name, x, y) for name, (x, y) in config.differences(a, b).items()]
  return list(dict.fromkeys(lines))


def _line(name: str, old: Any, new: Any) -> str:
  return f'{name}: {old!r} in the folder, {new!r} now'


def refuse(old: Sweep, lines: Sequence[str]) -> None:
  """ValueError with the differences from the sweep in a folder, if there are any."""
  if lines:
    rest = [f'and {len(lines) - 20} more'] if len(lines) > 20 else []
    listed = '\n'.join(f'  {line}' for line in [*lines[:20], *rest])
    raise ValueError(
      f'--dir={old.folder} holds another sweep; differences:\n{listed}\n'
      'Choose another folder, or leave out --config: --dir alone resumes that sweep, and '
      '--dir with --axis or --seeds adds points to it'
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
  return current() == swept.made['sha256']


def current() -> str:
  """-> the SHA-256 of the current sources."""
  return hashlib.sha256(pack(ROOT)).hexdigest()


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


def _packed(swept: Sweep) -> bytes:
  """A sweep -> its packed sources; ValueError if they do not match its sweep.json."""
  packed = storage.read(swept.folder / CODE, LIMIT)
  digest, sha256 = hashlib.sha256(packed).hexdigest(), swept.made['sha256']
  if digest != sha256:
    raise ValueError(
      f'{swept.folder / CODE} does not match {NAME}: its SHA-256 is {digest}, but '
      f'{sha256} is recorded'
    )
  return packed


def _extract(packed: bytes, target: Path) -> None:
  with tarfile.open(fileobj=io.BytesIO(packed), mode='r:gz') as archive:
    archive.extractall(target, filter='data')


@contextlib.contextmanager
def sources(swept: Sweep) -> Generator[Path]:
  """A sweep -> a temporary folder with its sources, also if the sweep is in a store."""
  packed = _packed(swept)
  with tempfile.TemporaryDirectory(prefix='gated-sources-') as place:
    _extract(packed, Path(place))
    yield Path(place)


def unpacked(swept: Sweep) -> Path:
  """A sweep in a local folder -> the folder of its unpacked sources.

  ValueError for a remote sweep, or sources that do not match its sweep.json.
  """
  root, packed = local(swept.folder), _packed(swept)
  target = root / f'code-{swept.made["sha256"][:12]}'
  if target.is_dir():
    return target
  draft = Path(tempfile.mkdtemp(prefix='.code-', dir=root))
  try:
    _extract(packed, draft)
    draft.chmod(0o755)
    draft.rename(target)
  except OSError:
    if not target.is_dir():  # Unless another process has unpacked it.
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return target
