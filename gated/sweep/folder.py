"""The folder of a sweep: written at the start, read to resume it."""

import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gated import config, storage
from gated.run import metrics
from gated.run.metrics import provenance
from gated.sweep import code, judge
from gated.sweep.grid import Point, Sweep

NAME, CODE = 'sweep.json', 'code.tar.gz'
LIMIT = 1 << 28  # Bytes of a sweep.json or its sources.
FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]


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
  packed = code.pack(ROOT)
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
    'points': [p._asdict() for p in swept.points],
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
  root = storage.path(folder)
  if not storage.is_remote(root):
    root = storage.Path(os.path.abspath(root))
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
    return Sweep(
      folder=root,
      name=_text(content['name']),
      recipe=_text(content['recipe']),
      overrides=tuple(map(_text, content['overrides'])),
      flags=tuple(map(_text, content['flags'])),
      points=points,
      rule=config.build(judge.Rule, content['rule'], 'rule'),
      made=_made(content['made']),
    ).moved(root)
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(f'{root / NAME} is damaged: {error!r}') from error


def unpacked(swept: Sweep) -> Path:
  """A sweep in a local folder -> the folder of its unpacked sources.

  ValueError for a remote sweep, or sources that do not match its sweep.json.
  """
  root = local(swept.folder)
  packed = storage.read(root / CODE, LIMIT)
  return code.unpack(packed, root, sha256=swept.made['sha256'])


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
  return hashlib.sha256(code.pack(ROOT)).hexdigest() == swept.made['sha256']


def _point(entry: Mapping[str, Any]) -> Point:
  """Untrusted JSON -> Point; any of several errors if it is invalid."""
  name, command = _text(entry['name']), tuple(map(_text, entry['command']))
  if not re.fullmatch(r'[\w+-][\w.+-]{0,200}', name, re.ASCII):
    raise ValueError(f'the point {name!r}')
  if command[0] != 'train.py' or not command[-1].startswith('--workdir='):
    raise ValueError(f'the command of {name}')
  c = dict(entry['config'])
  # The knobs that are used without a check of the whole recipe.
  for knob, kind in {'steps': int, 'seed': int, 'optim.lr': (int, float)}.items():
    if not isinstance(value := config.dig(c, knob), kind) or isinstance(value, bool):
      raise ValueError(f'config.{knob}={value!r} of {name}')
  return Point(name, _texts(entry['labels']), dict(entry['changes']), command, c)


def _made(entry: Mapping[str, Any]) -> dict[str, Any]:
  checked: dict[str, Any] = {k: _text(entry[k]) for k in ('time', 'sha256', 'python')}
  checked['environment'] = _texts(entry['environment'])
  return {'git': None} | dict(entry) | checked


def _texts(entry: Mapping[str, Any]) -> dict[str, str]:
  return {_text(key): _text(value) for key, value in entry.items()}


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError(f'{value!r} is not a string')
  return value


def _check_same(old: Sweep, new: Sweep) -> None:
  """ValueError with a list of the differences if two sweeps are not the same."""
  before, after = ({p.name: p for p in s.points} for s in (old, new))
  lines = [
    f'the point {name} is only in the folder' for name in before if name not in after
  ]
  lines += [f'the point {name} is new' for name in after if name not in before]
  for name in before.keys() & after.keys():
    a, b = (
      json.loads(metrics.dumps(s[name].config, indent=None)) for s in (before, after)
    )
    changed = config.differences(a, b)
    lines += [f'{k}: {x!r} in the folder, {y!r} now' for k, (x, y) in changed.items()]
  settings = {
    'flags': (' '.join(old.flags), ' '.join(new.flags)),
    'the rule of divergence': (old.rule, new.rule),
  }
  for name, (x, y) in settings.items():
    lines += [f'{name}: {x!r} in the folder, {y!r} now'] if x != y else []
  lines = list(dict.fromkeys(lines))
  if lines:
    rest = [f'and {len(lines) - 20} more'] if len(lines) > 20 else []
    listed = '\n'.join(f'  {line}' for line in [*lines[:20], *rest])
    raise ValueError(
      f'--dir={old.folder} holds another sweep; differences:\n{listed}\n'
      'Choose another folder, or resume that sweep with --dir alone'
    )
