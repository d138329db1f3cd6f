"""Which points share a recipe, and the names of their lines.

The recipe decides, not the labels: points of a line differ only in their seed and their
learning rate, with the optimizer's knobs that follow it. Knobs that change no loss count
if a grid changes them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated import config, storage, sweep
from gated.sweep.compare import HARMLESS
from gated.sweep.report.logs import Log

SEED, RATE, OPTIMIZER = 'config.seed', 'config.optim.lr', 'config.optim.'
ROW = 'config.paper.table', 'config.paper.row'
BARE = re.compile(r'[-+.\d]|(True|False|none)$')  # Values that need their label.
MOST = 3  # Knobs in a name.


class Named(NamedTuple):
  """A point of a sweep, and its line."""

  point: sweep.Point
  workdir: storage.Path
  name: str  # unique; of several sweeps, with its folder
  line: str  # unique to the recipe without its seed and learning rate
  labels: Mapping[str, str]  # of the line
  run: str  # the digest of its recipe, which equal runs share


def of_points(sweeps: Sequence[sweep.Sweep]) -> list[Named]:
  """Sweeps -> their points with the names of their lines."""
  points = [p for swept in sweeps for p in swept.points]
  flat = [config.flatten(p.config) for p in points]
  varied = {f'config.{knob}' for p in points for knob in p.changes}
  apart = {RATE, *_tied(flat)}
  recipes = [_recipe(knobs, varied) for knobs in flat]
  keys = [
    config.digest({k: v for k, v in r.items() if k not in {SEED, *apart}})
    for r in recipes
  ]
  labels = [own for swept in sweeps for own in _labels(swept)]
  # A label that differs within a line is no label of the line.
  own = {key: [x for x, k in zip(labels, keys, strict=True) if k == key] for key in keys}
  shared = {
    key: {k: v for k, v in all_[0].items() if all(x.get(k) == v for x in all_)}
    for key, all_ in own.items()
  }
  of_line = {key: recipes[keys.index(key)] for key in shared}
  first = {key: points[keys.index(key)] for key in shared}
  lines = {
    key: _text(shared[key], first[key].changes) or str(first[key].config['name'])
    for key in shared
  }
  lines = _distinct(lines, {key: str(p.config['name']) for key, p in first.items()})
  lines = _distinct(lines, _differences(lines, of_line))
  folders = [swept for swept in sweeps for _ in swept.points]
  return [
    Named(
      point=p,
      workdir=swept.workdir(p),
      name=p.name if len(sweeps) == 1 else f'{swept.folder.name}/{p.name}',
      line=lines[key],
      labels=shared[key],
      run=config.digest(recipe),
    )
    for p, swept, key, recipe in zip(points, folders, keys, recipes, strict=True)
  ]


def once(named: Sequence[Named], read: Sequence[Log]) -> list[int]:
  """Points and their logs -> the indices of distinct runs.

  Of equal runs on the same data, it keeps the first that has ended, or else the first.
  """
  data = {p.run: log.data for p, log in zip(named, read, strict=True) if log.data}
  kept: dict[tuple[str, str], int] = {}
  for i, (p, log) in enumerate(zip(named, read, strict=True)):
    # A point that has not started has no data of its own.
    key = p.run, log.data or data.get(p.run, '')
    j = kept.setdefault(key, i)
    if log.state in sweep.ENDED and read[j].state not in sweep.ENDED:
      kept[key] = i
  return sorted(kept.values())


def _recipe(knobs: Mapping[str, Any], varied: Collection[str]) -> dict[str, Any]:
  """Flat knobs -> those that distinguish runs."""
  kept = {*varied, *ROW}
  return {k: v for k, v in knobs.items() if k in kept or not k.startswith(HARMLESS)}


def _tied(flat: Sequence[Mapping[str, Any]]) -> set[str]:
  """The optimizer's knobs that are a function of the learning rate in all points."""
  tied = set()
  for knob in {k for knobs in flat for k in knobs if k.startswith(OPTIMIZER)}:
    pairs = {(knobs[RATE], str(knobs.get(knob))) for knobs in flat}
    if len(pairs) == len({lr for lr, _ in pairs}):
      tied.add(knob)
  return tied


def _labels(swept: sweep.Sweep) -> list[dict[str, str]]:
  """A sweep -> the labels of its points, without learning rate and seed."""
  lrs = [p.config['optim']['lr'] for p in swept.points]
  seeds = [p.config['seed'] for p in swept.points]
  axes = _label(swept.points, 'lr', lrs), _label(swept.points, 'seed', seeds)
  return [{k: v for k, v in p.labels.items() if k not in axes} for p in swept.points]


def _label(points: Sequence[sweep.Point], axis: str, values: Sequence[float]) -> str:
  """The name of the label that holds the values of an axis; '' if no label does.

  If no label is called `axis`, it is the label whose values equal the axis's.
  """
  labels = list(dict.fromkeys(name for p in points for name in p.labels))
  for name in [] if axis in labels or len(set(values)) == 1 else labels:
    texts = [p.labels.get(name, '') for p in points]
    try:
      if np.allclose([*map(float, texts)], values, rtol=1e-3, atol=0):
        return name
    except ValueError:
      continue  # Not a number.
  return axis


def _text(labels: Mapping[str, str], changes: Mapping[str, Any]) -> str:
  """{'variant': 'baseline', 'qk_norm': 'True'} -> 'baseline, qk_norm=True'."""
  knobs = {knob.rpartition('.')[2] for knob in changes}
  named = lambda k, v: k in knobs or BARE.match(v)
  return ', '.join(f'{k}={v}' if named(k, v) else v for k, v in labels.items())


def _distinct(lines: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
  """Names of lines -> the same, with `more` appended to equal names."""
  texts = [*lines.values()]
  add = lambda key, name: texts.count(name) > 1 and more[key] and more[key] != name
  return {k: f'{name}, {more[k]}' if add(k, name) else name for k, name in lines.items()}


def _differences(
  lines: Mapping[str, str], recipes: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
  """-> for each line, the knobs in which it differs from lines of the same name."""
  texts = {}
  for key, name in lines.items():
    same = [recipes[k] for k, other in lines.items() if other == name]
    knobs = {k for r in same for k in r if k not in (SEED, RATE)}
    value = lambda knob, r: str(r.get(knob, 'absent'))
    apart = sorted(k for k in knobs if len({value(k, r) for r in same}) > 1)
    shown = [
      f'{k.removeprefix("config.")}={value(k, recipes[key])}' for k in apart[:MOST]
    ]
    shown += [f'recipe {key[:6]}'] if len(apart) > MOST else []
    texts[key] = ', '.join(shown)
  return texts
