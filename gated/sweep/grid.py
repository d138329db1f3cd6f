"""A recipe and its grid -> the points of a sweep, checked before any of them runs."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gated import config, data, storage
from gated import plan as plans
from gated.data import mixture as mixtures
from gated.sweep import judge

# Arguments of train.py -> the recipe that they resolve to.
Resolve = Callable[[Sequence[str]], dict]
# A point's labels, changed knobs and own argument of the recipe (configs/axes.py).
Entry = tuple[Mapping[str, str], Mapping[str, Any], str]


class Point(NamedTuple):
  """One run of a sweep."""

  name: str  # Its folder: a readable slug, and a digest of its changes.
  labels: Mapping[str, str]
  changes: Mapping[str, Any]  # Knobs, without `config.`.
  command: tuple[str, ...]  # train.py --config=..., without its --workdir
  config: Mapping[str, Any]  # The resolved recipe.

  @property
  def steps(self) -> int:
    return self.config['steps']

  @property
  def recipe(self) -> str:
    """configs/table4.py:g1_headwise,scale=test"""
    return self.command[1].removeprefix('--config=')


@dataclass(frozen=True, kw_only=True)
class Sweep:
  """The contents of a sweep.json."""

  folder: storage.Path
  name: str
  recipe: str  # configs/lr_sweep.py:scale=test
  overrides: tuple[str, ...]  # Knobs of all points: --config.steps=100
  flags: tuple[str, ...]  # Other flags of train.py, of all points.
  points: tuple[Point, ...]
  rule: judge.Rule
  made: Mapping[str, Any] = field(default_factory=dict)  # Code, versions, environment.

  def workdir(self, point: Point) -> storage.Path:
    return self.folder / 'points' / point.name

  def command(self, point: Point) -> tuple[str, ...]:
    """train.py --config=... --workdir=..."""
    return *point.command, f'--workdir={os.fspath(self.workdir(point))}'

  def log(self, point: Point) -> storage.Path:
    return self.folder / 'logs' / f'{point.name}.log'


def plan(
  recipe: str,
  grid: Sequence[Entry],
  *,
  resolve: Resolve,
  rule: judge.Rule,
  overrides: Sequence[str] = (),
  flags: Sequence[str] = (),
  folder: str = '',
) -> Sweep:
  """A recipe and its grid -> Sweep; writes nothing.

  `overrides` are `--config.x=y` of all points. The default folder is sweeps/NAME-DIGEST.
  ValueError for an unknown knob, a bad value, an empty grid, two equal points, or a knob
  in both the overrides and the grid.
  """
  base = resolve((f'--config={recipe}', *overrides))
  entire = points(
    recipe,
    grid,
    base=base,
    resolve=checked(resolve),
    overrides=overrides,
    flags=flags,
  )
  check_apart(entire)
  configs = [{k: v for k, v in p.config.items() if k != 'paper'} for p in entire]
  digest = config.digest([configs, list(flags)])[:8]
  name = base['name'] if not any(arg for *_, arg in grid) else _title(recipe)
  return Sweep(
    folder=absolute(folder or f'sweeps/{name}-{digest}'),
    name=name,
    recipe=recipe,
    overrides=tuple(overrides),
    flags=tuple(flags),
    points=tuple(entire),
    rule=rule,
  )


def checked(resolve: Resolve) -> Resolve:
  """-> the same, with a ValueError for a recipe that train.py would refuse."""

  def resolve_and_check(words: Sequence[str]) -> dict:
    recipe = resolve(words)
    config.build(plans.Config, recipe, 'config')
    return recipe

  return resolve_and_check


def points(
  recipe: str,
  grid: Sequence[Entry],
  *,
  base: Mapping[str, Any],
  resolve: Resolve,
  overrides: Sequence[str],
  flags: Sequence[str],
) -> list[Point]:
  """A recipe and its grid -> its points, which may include equal runs.

  `base` is a resolved recipe with all knobs; `resolve` also checks its result.
  """
  if not grid:
    raise ValueError(f'--config={recipe}: its grid is empty')
  known = list(config.flatten(base))
  fixed = {word.partition('=')[0].removeprefix('--') for word in overrides}
  entire: list[Point] = []
  for labels, changes, arg in grid:
    for knob, value in changes.items():
      name = f'config.{knob}'
      if name not in known:
        raise ValueError(f'{name} is not a knob{config.nearest(name, known)}')
      if name in fixed:
        raise ValueError(f'--{name} is given, but an axis of the grid changes it')
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{name}={value} is not finite')
    own = f'{recipe.partition(":")[0]}:{arg}' if arg else recipe
    command = ('train.py', f'--config={own}', *overrides)
    point = _point(command, (labels, changes, arg), resolve)
    _check_paths(point)
    entire.append(point._replace(command=(*point.command, *flags)))
  return entire


def absolute(folder: storage.PathLike) -> storage.Path:
  """A sweep's or run's folder -> its absolute path, or its URL."""
  path = storage.path(folder)
  return path if storage.is_remote(path) else storage.Path(os.path.abspath(path))


def only(points: Sequence[Point], selection: str) -> list[Point]:
  """Points and 'variant=baseline,lr=0.001,lr=0.002' -> the points that match.

  A point matches if each label has one of its listed values. ValueError for a label or a
  value that no point has.
  """
  chosen: dict[str, list[str]] = {}
  for part in filter(None, selection.split(',')):
    name, _, value = part.partition('=')
    values = list(dict.fromkeys(p.labels[name] for p in points if name in p.labels))
    if not values:
      names = dict.fromkeys(label for p in points for label in p.labels)
      raise ValueError(f'--only={part}, but the labels are {", ".join(names)}')
    same = [text for text in values if _same(text, value)]
    if not same:
      raise ValueError(f'--only={part}, but {name} has the values {", ".join(values)}')
    chosen.setdefault(name, []).extend(same)
  match = lambda p: all(p.labels.get(k) in values for k, values in chosen.items())
  matches = [p for p in points if match(p)]
  if not matches:
    raise ValueError(f'--only={selection}, but no point matches all of it')
  return matches


def _same(text: str, value: str) -> bool:
  try:
    return text == value or float(text) == float(value)
  except ValueError:
    return False


def _title(recipe: str) -> str:
  """'configs/table4.py:scale=test' -> 'table4-test'."""
  file, _, arg = recipe.partition(':')
  words = (part.rpartition('=')[2] for part in arg.split(',') if part)
  return '-'.join([file.rpartition('/')[2].removesuffix('.py'), *words])


def _point(command: Sequence[str], entry: Entry, resolve: Resolve) -> Point:
  """A command without the point's changes, and its entry in the grid -> Point."""
  labels, changes, arg = entry
  # `repr` keeps every bit of a float; strings are passed unchanged.
  texts = {k: v if isinstance(v, str) else repr(v) for k, v in changes.items()}
  command = (*command, *(f'--config.{knob}={text}' for knob, text in texts.items()))
  own = [dict(changes), arg] if arg else dict(changes)
  name = '-'.join(filter(None, [_slug(labels), config.digest(own)[:6]]))
  try:
    resolved = resolve(command[1:])
    for knob, value in changes.items():
      actual = config.dig(resolved, knob)
      same_kind = isinstance(actual, bool) == isinstance(value, bool)
      if _plain(actual) != _plain(value) or not same_kind:
        raise ValueError(f'config.{knob}={value!r} is read as {actual!r}')
  except ValueError as error:
    raise ValueError(f'the point {name}: {config.plain(error)}') from error
  return Point(name, dict(labels), dict(changes), command, resolved)


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _slug(labels: Mapping[str, str]) -> str:
  """{'variant': 'baseline', 'lr': '0.001'} -> 'baseline-lr0.001'."""
  bare = re.compile(r'[-+.\d]|(True|False)$')  # Values that need their label.
  words = [k + v if bare.match(v) else v for k, v in labels.items()]
  return '-'.join(re.sub(r'[^A-Za-z0-9._+]+', '_', word) for word in words)[:80]


def check_apart(points: Sequence[Point]) -> None:
  """ValueError for two points with the same recipe or the same labels."""
  seen: dict[Any, Point] = {}  # By the digest of a recipe, and by labels.
  for point in points:
    c = {k: v for k, v in point.config.items() if k not in ('name', 'paper')}
    other = seen.setdefault(config.digest(c), point)
    if other is not point:
      raise ValueError(
        f'the points {other.name} and {point.name} of the grid are the same run'
      )
    other = seen.setdefault(frozenset(point.labels.items()), point)
    if other is not point:
      raise ValueError(
        f'the points {other.name} and {point.name} of the grid have the same labels, but '
        f'change {dict(other.changes)} and {dict(point.changes)}: add a label'
      )


def inputs(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
  """A recipe -> the knobs that name data or weights, with each folder or URL."""
  mixture, weights = recipe['data']['mixture'], recipe['init_from']
  terms = [] if mixture == data.STDLIB else mixtures.terms(mixture)
  places = [('data.mixture', term.directory) for term in terms]
  return places + ([('init_from', os.path.expanduser(weights))] if weights else [])


def check_here(points: Sequence[Point]) -> None:
  """ValueError for a dataset that is missing on this machine."""
  for knob, place in sorted({pair for p in points for pair in inputs(p.config)}):
    remote = storage.is_remote(place)
    if knob == 'data.mixture' and not remote and not storage.exists(place):
      raise ValueError(f'config.data.mixture names {place}, which does not exist')


def _check_paths(point: Point) -> None:
  """ValueError for a relative path: points run in another working directory."""
  cache = point.config['data']['cache']
  for knob, place in [*inputs(point.config), ('data.cache', cache)]:
    if place and not storage.is_remote(place) and not os.path.isabs(place):
      value = config.dig(point.config, knob)
      raise ValueError(
        f'config.{knob}={value!r} has a relative path, but points run in the folder '
        f"of the sweep's sources: write {os.path.abspath(place)}"
      )
