"""A sweep's folder: written when it is begun, read by whoever goes on with it."""

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
  """Writes a sweep's folder, with the sources as they are -> Sweep, as it stands there.

  `environment` is what its points are given on this machine. A folder that has the same
  sweep already is left as it is; ValueError, telling what differs, if it has another one,
  or cannot be written.
  """
  where = swept.folder
  if storage.exists(where / NAME):
    old = open(where)
    _refuse(old, swept)
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
  whole = {
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
    storage.write(where / CODE, packed)
    # Last, as it says that all of it is there.
    storage.write_json(where / NAME, metrics.plain(whole))
  except OSError as error:
    raise ValueError(f'--dir={where} cannot be written: {error}') from error
  return open(where)


def open(folder: storage.PathLike) -> Sweep:
  """A sweep's folder, wherever it has been moved to -> Sweep, from its sweep.json alone.

  ValueError if there is none, or one that no sweep wrote.
  """
  where = storage.path(folder)
  if not storage.is_remote(where):
    where = storage.Path(os.path.abspath(where))
  try:
    whole = json.loads(storage.read(where / NAME, LIMIT))
  except FileNotFoundError:
    raise ValueError(f'{where} is no sweep: there is no {NAME}') from None
  except (ValueError, RecursionError, OSError) as error:
    raise ValueError(f'{where / NAME} cannot be read: {error}') from error
  try:
    if whole['format'] != FORMAT:
      raise ValueError(f'format {whole["format"]}, but {FORMAT} is known')
    points = tuple(_point(p) for p in whole['points'])
    if not points or len({p.name for p in points}) < len(points):
      raise ValueError('no points, or two of one name')
    return Sweep(
      folder=where,
      name=_text(whole['name']),
      recipe=_text(whole['recipe']),
      overrides=tuple(map(_text, whole['overrides'])),
      flags=tuple(map(_text, whole['flags'])),
      points=points,
      rule=config.build(judge.Rule, whole['rule'], 'rule'),
      made=_made(whole['made']),
    ).moved(where)
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(f'{where / NAME} is damaged: {error!r}') from error


def unpacked(swept: Sweep) -> Path:
  """A sweep in a local folder -> where its sources stand there, whole.

  ValueError if they are not what its sweep.json says, or it is in a store.
  """
  where = local(swept.folder)
  packed = storage.read(where / CODE, LIMIT)
  return code.unpack(packed, where, sha256=swept.made['sha256'])


def local(folder: storage.Path) -> Path:
  """A sweep's folder -> the same, of this machine; ValueError for one in a store."""
  if storage.is_remote(folder):
    raise ValueError(
      f'--dir={folder}: what runs here keeps its logs and sources in a local folder; a '
      'bucket is for `scripts/sweep.py submit`'
    )
  return Path(folder)


def is_current(swept: Sweep) -> bool:
  """Whether the sources that a sweep carries are those that stand here."""
  return hashlib.sha256(code.pack(ROOT)).hexdigest() == swept.made['sha256']


def _point(found: Mapping[str, Any]) -> Point:
  """A stranger's JSON -> Point; any of several errors if it is none."""
  name, command = _text(found['name']), tuple(map(_text, found['command']))
  if not re.fullmatch(r'[\w+-][\w.+-]{0,200}', name, re.ASCII):
    raise ValueError(f'the point {name!r}')
  if command[0] != 'train.py' or not command[-1].startswith('--workdir='):
    raise ValueError(f'the command of {name}')
  c = dict(found['config'])
  # What is read of a point without a look at the rest of its recipe.
  for knob, kind in {'steps': int, 'seed': int, 'optim.lr': (int, float)}.items():
    if not isinstance(value := config.dig(c, knob), kind) or isinstance(value, bool):
      raise ValueError(f'config.{knob}={value!r} of {name}')
  return Point(name, _texts(found['labels']), dict(found['changes']), command, c)


def _made(found: Mapping[str, Any]) -> dict[str, Any]:
  known = {key: _text(found[key]) for key in ('time', 'sha256', 'python')}
  return (
    {'git': None} | dict(found) | known | {'environment': _texts(found['environment'])}
  )


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
  return {_text(key): _text(value) for key, value in found.items()}


def _text(found: Any) -> str:
  if not isinstance(found, str):
    raise ValueError(f'{found!r} is no text')
  return found


def _refuse(old: Sweep, new: Sweep) -> None:
  """ValueError, telling what differs, if two sweeps are not the same."""
  there, here = ({p.name: p for p in s.points} for s in (old, new))
  told = [f'the point {name} is there only' for name in there if name not in here]
  told += [f'the point {name} is new' for name in here if name not in there]
  for name in there.keys() & here.keys():
    a, b = (json.loads(metrics.dumps(s[name].config, indent=None)) for s in (there, here))
    changed = config.differences(a, b)
    told += [f'{k}: {x!r} there, {y!r} here' for k, (x, y) in changed.items()]
  if old.flags != new.flags:
    told.append(f'flags: {" ".join(old.flags)!r} there, {" ".join(new.flags)!r} here')
  if old.rule != new.rule:
    told.append(f'the rule of divergence: {old.rule!r} there, {new.rule!r} here')
  told = list(dict.fromkeys(told))
  if told:
    rest = [f'and {len(told) - 20} more'] if len(told) > 20 else []
    listed = '\n'.join(f'  {line}' for line in [*told[:20], *rest])
    raise ValueError(
      f'--dir={old.folder} has a sweep that differs in\n{listed}\n'
      'Name another folder; or go on with that sweep as it is recorded, by --dir alone'
    )
