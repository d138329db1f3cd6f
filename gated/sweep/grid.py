"""A recipe and its grid -> the points of a sweep, checked before anything is run."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gated import config, storage
from gated import plan as plans
from gated.sweep import judge

# A command line of train.py, without its name -> the recipe as it is resolved there.
Resolve = Callable[[Sequence[str]], dict]


class Point(NamedTuple):
  """One run of a sweep."""

  name: str  # A slug to be read, and a digest of what it changes; its folder's name.
  labels: Mapping[str, str]
  changes: Mapping[str, Any]  # Knobs, without `config.`.
  command: tuple[str, ...]  # train.py --config=... --workdir=...
  config: Mapping[str, Any]  # The resolved recipe.


@dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep.json says."""

  folder: storage.Path
  name: str
  recipe: str  # configs/lr_sweep.py:scale=test
  overrides: tuple[str, ...]  # --config.steps=100, of all points
  flags: tuple[str, ...]  # Others of train.py's, of all points.
  points: tuple[Point, ...]
  rule: judge.Rule
  made: Mapping[str, Any] = field(default_factory=dict)  # Code, versions, environment.

  def workdir(self, point: Point) -> storage.Path:
    return self.folder / 'points' / point.name

  def log(self, point: Point) -> storage.Path:
    return self.folder / 'logs' / f'{point.name}.log'

  def moved(self, folder: storage.Path) -> 'Sweep':
    """The same sweep in another folder."""
    points = tuple(
      p._replace(command=(*p.command[:-1], _workdir(folder, p.name))) for p in self.points
    )
    return replace(self, folder=folder, points=points)


def plan(
  recipe: str,
  grid: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]],
  *,
  resolve: Resolve,
  rule: judge.Rule,
  overrides: Sequence[str] = (),
  flags: Sequence[str] = (),
  folder: str = '',
) -> Sweep:
  """A recipe and the labels and changes of its points -> Sweep, with nothing written.

  `overrides` are `--config.x=y` of all points. '' as `folder` is sweeps/ with a name that
  tells the grid. ValueError, naming the knob or the points, if one is no knob or takes no
  such value, two points are the same, an override is changed by the grid, or there is no
  point.
  """
  if not grid:
    raise ValueError(f'--config={recipe}: its grid is empty')
  base = resolve([f'--config={recipe}', *overrides])
  known = list(config.flatten(base))
  fixed = {word.partition('=')[0].removeprefix('--') for word in overrides}
  points: list[Point] = []
  for labels, changes in grid:
    for knob, value in changes.items():
      name = f'config.{knob}'
      if name not in known:
        raise ValueError(f'{name} is no knob{config.nearest(name, known)}')
      if name in fixed:
        raise ValueError(f'--{name} is given, but an axis of the grid changes it')
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{name}={value} is not finite')
    points.append(_point(recipe, labels, changes, overrides=overrides, resolve=resolve))
  _check_apart(points)
  for point in points:
    _check_paths(point)
  where = storage.path(folder or f'sweeps/{base["name"]}-{_digest(points, flags)}')
  if not storage.is_remote(where):
    where = storage.Path(os.path.abspath(where))
  points = [
    p._replace(command=(*p.command, *flags, _workdir(where, p.name))) for p in points
  ]
  return Sweep(
    folder=where,
    name=base['name'],
    recipe=recipe,
    overrides=tuple(overrides),
    flags=tuple(flags),
    points=tuple(points),
    rule=rule,
  )


def only(points: Sequence[Point], wanted: str) -> list[Point]:
  """Points and 'variant=baseline,lr=0.001,lr=0.002' -> those with one of each label.

  ValueError for a label or a value that no point has.
  """
  chosen: dict[str, list[str]] = {}
  for part in filter(None, wanted.split(',')):
    name, _, value = part.partition('=')
    there = list(dict.fromkeys(p.labels[name] for p in points if name in p.labels))
    if not there:
      names = dict.fromkeys(label for p in points for label in p.labels)
      raise ValueError(f'--only={part}, but labels are {", ".join(names)}')
    same = [text for text in there if _same(text, value)]
    if not same:
      raise ValueError(f'--only={part}, but of {name} there are {", ".join(there)}')
    chosen.setdefault(name, []).extend(same)
  meant = lambda p: all(p.labels.get(k) in values for k, values in chosen.items())
  found = [p for p in points if meant(p)]
  if not found:
    raise ValueError(f'--only={wanted}, but no point has all of that')
  return found


def _point(recipe, labels, changes, *, overrides, resolve) -> Point:
  """One point; its flags of all points and its workdir are yet to come."""
  words = [f'--config.{knob}={_text(value)}' for knob, value in changes.items()]
  command = [f'--config={recipe}', *overrides, *words]
  name = '-'.join(filter(None, [_slug(labels), config.digest(dict(changes))[:6]]))
  try:
    resolved = resolve(command)
    config.build(plans.Config, resolved, 'config')
    for knob, value in changes.items():
      there = config.dig(resolved, knob)
      if _plain(there) != _plain(value) or isinstance(there, bool) != isinstance(
        value, bool
      ):
        raise ValueError(f'config.{knob}={value!r} cannot be: it becomes {there!r}')
  except ValueError as error:
    raise ValueError(f'the point {name}: {config.plain(error)}') from error
  return Point(name, dict(labels), dict(changes), ('train.py', *command), resolved)


def _check_apart(points: Sequence[Point]) -> None:
  """ValueError for two points that are the same run, or cannot be told apart."""
  seen: dict[str, Point] = {}
  named: dict[tuple[str, ...], Point] = {}
  for point in points:
    c = {k: v for k, v in point.config.items() if k not in ('name', 'paper')}
    other = seen.setdefault(config.digest(c), point)
    if other is not point:
      raise ValueError(
        f'the points {other.name} and {point.name} of the grid are the same run'
      )
    labels = tuple(sorted(f'{k}={v}' for k, v in point.labels.items()))
    other = named.setdefault(labels, point)
    if other is not point:
      raise ValueError(
        f'the points {other.name} and {point.name} of the grid have the same labels, but '
        f'change {dict(other.changes)} and {dict(point.changes)}: label them apart'
      )


def check_here(points: Sequence[Point]) -> None:
  """ValueError for data that are not on this machine, where points are to run."""
  for place in sorted({place for point in points for place in _data(point)}):
    if os.path.isabs(place) and not storage.exists(place):
      raise ValueError(f'config.data.mixture names {place}, which is not there')


def _data(point: Point) -> list[str]:
  """A point -> the folders and buckets that its mixture names."""
  terms = point.config['data']['mixture'].split(',')
  return [term.split('@')[0].split('=')[0].strip() for term in terms]


def _check_paths(point: Point) -> None:
  """ValueError for a relative path: points run in the folder of the sweep's sources."""
  named = [('data.mixture', place) for place in _data(point)]
  named += [('data.cache', point.config['data']['cache'])]
  named += [('init_from', point.config['init_from'])]
  for knob, place in named:
    remote = storage.is_remote(place) or place in ('', 'stdlib')
    if not (remote or os.path.isabs(place)):
      value = config.dig(point.config, knob)
      raise ValueError(
        f'config.{knob}={value!r} has a relative path, but points run in a folder of '
        f'their own: write {os.path.abspath(place)}'
      )


def _digest(points: Sequence[Point], flags: Sequence[str]) -> str:
  """What names a sweep's default folder."""
  configs = [{k: v for k, v in p.config.items() if k != 'paper'} for p in points]
  return config.digest([configs, list(flags)])[:8]


def _slug(labels: Mapping[str, str]) -> str:
  """{'variant': 'baseline', 'lr': '0.001'} -> 'baseline-lr0.001'."""
  bare = re.compile(r'[-+.\d]|(True|False)$')  # Says nothing without its label.
  words = [k + v if bare.match(v) else v for k, v in labels.items()]
  return '-'.join(re.sub(r'[^A-Za-z0-9._+]+', '_', word) for word in words)[:80]


def _workdir(folder: storage.Path, name: str) -> str:
  return f'--workdir={os.fspath(folder / "points" / name)}'


def _text(value: Any) -> str:
  """A knob's value -> as a command line has it, so that it comes back as it was."""
  return value if isinstance(value, str) else repr(value)


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _same(text: str, value: str) -> bool:
  try:
    return text == value or float(text) == float(value)
  except ValueError:
    return False
