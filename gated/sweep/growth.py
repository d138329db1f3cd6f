"""Adds points to a sweep: more values of its axes, or a changed grid of its recipe.

A folder has one copy of the sources. All its points are resolved and run with that copy,
so points that need other sources go to another folder. Old points keep their names and
workdirs.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gated import config
from gated.run import metrics
from gated.sweep import folder, grid
from gated.sweep.grid import Entry, Point, Resolve, Sweep, only

SHOWN = 10  # Names of added points that are printed.
# Resolves and checks recipes in the folder of a sweep's sources: a line in, a line out.
# It calls only functions that all sweeps' sources have.
SERVER = """
import json, sys
from gated import config, plan
from scripts import sweep
for line in sys.stdin:
  try:
    recipe = sweep.resolve(json.loads(line))
    config.build(plan.Config, recipe, 'config')
    answer = {'recipe': recipe}
  except ValueError as error:
    answer = {'error': str(error)}
  print(json.dumps(answer), flush=True)
"""


class Growth(NamedTuple):
  """A sweep with the requested points; `added` are not in its folder yet."""

  swept: Sweep
  added: Sequence[Point] = ()
  others: int = 0  # Points of the folder that are not in the requested grid.

  def __str__(self) -> str:
    lines = []
    if self.added:
      old = len(self.swept.points) - len(self.added)
      names = [p.name for p in self.added[:SHOWN]]
      more = len(self.added) - len(names)
      names += [f'and {more} more'] if more else []
      lines.append(f'added {len(self.added)} points to {old}: {", ".join(names)}')
    if self.others:
      lines.append(f'{self.others} points of the folder are not in this grid; they stay')
    return ''.join(f'{line}\n' for line in lines)


@contextlib.contextmanager
def resolver(swept: Sweep, resolve: Resolve) -> Generator[Resolve]:
  """A sweep in a folder -> a function that resolves arguments with the sweep's sources.

  `resolve` resolves with the current sources. ValueError if train.py would refuse them.
  """
  if folder.is_current(swept):
    yield grid.checked(resolve)
    return
  with folder.sources(swept) as code:
    command = [sys.executable, '-c', SERVER]
    pipes: Any = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=code, **pipes) as server:

      def ask(words: Sequence[str]) -> dict:
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(list(words)) + '\n')
        server.stdin.flush()
        answer = json.loads(server.stdout.readline() or '{"error": "it does not start"}')
        if 'error' in answer:
          raise ValueError(
            f"the sweep's sources of {swept.made['time']}: {answer['error']}"
          )
        return answer['recipe']

      yield ask


def check_axis(old: Sweep, name: str) -> None:
  """ValueError for an axis that is a choice, such as `variant`, and not a knob."""
  having = [p for p in old.points if name in p.labels]
  if having and not any(_holds(having, name, knob) for knob in having[0].changes):
    command = f'--config={old.recipe} --dir={old.folder}'
    raise ValueError(
      f'--axis={name}=..., but {name} is a choice of several knobs: add one to the '
      f'get_grid of the recipe and run {command}'
    )


def extend(old: Sweep, axes: Sequence[Entry], own: Resolve, selection: str) -> Growth:
  """A sweep and new values of its axes -> the sweep with more points.

  The values of `axes` are combined with all points of the other axes; an axis may be
  new. `own` resolves with the sweep's sources; `selection` is that of --only.
  """
  names = {knob: _label(old.points, knob) for _, changes, _ in axes for knob in changes}
  rest: dict[str, Entry] = {}
  for point in old.points:
    changes = {k: v for k, v in point.changes.items() if k not in names}
    labels = {k: v for k, v in point.labels.items() if k not in names.values()}
    arg = point.recipe.partition(':')[2] if point.recipe != old.recipe else ''
    rest.setdefault(config.digest([changes, arg]), (labels, changes, arg))
  entries = []
  for labels, changes, arg in rest.values():
    for _, more, _ in axes:
      called = {names[knob]: str(value) for knob, value in more.items()}
      entries.append(({**labels, **called}, {**changes, **more}, arg))
  points = grid.points(
    old.recipe,
    entries,
    base=old.points[0].config,
    resolve=own,
    overrides=old.overrides,
    flags=old.flags,
  )
  return _union(old, only(points, selection))


def join(old: Sweep, draft: Sweep, resolve: Resolve) -> Growth:
  """A sweep in a folder, and one of the current sources -> their union.

  ValueError with the differences if they differ in more than their points.
  """
  lines = folder.changed(old, draft)
  if lines and old.recipe != draft.recipe:
    lines.insert(0, f'--config: {old.recipe} in the folder, {draft.recipe} now')
  folder.refuse(old, lines)
  growth = _union(old, draft.points)
  if growth.added:
    with resolver(old, resolve) as own:
      folder.refuse(old, _changed_recipe(old, draft, growth.added, own))
  drafted = {_key(p.config) for p in draft.points}
  others = sum(_key(p.config) not in drafted for p in old.points)
  return growth._replace(others=others)


def _changed_recipe(
  old: Sweep, draft: Sweep, added: Sequence[Point], own: Resolve
) -> list[str]:
  """The differences of two sweeps' recipes without their grids, and of the new points.

  A new point must resolve to the same recipe with the sweep's own sources.
  """
  first, second = (own((f'--config={s.recipe}', *s.overrides)) for s in (old, draft))
  size = len(old.flags)  # The flags are the last words of a command.
  words = [p.command[1 : len(p.command) - size] for p in added]
  pairs = [(first, second), *((own(w), p.config) for w, p in zip(words, added))]
  return folder.differences((_run(a), _run(b)) for a, b in pairs)


def _union(old: Sweep, points: Sequence[Point]) -> Growth:
  """A sweep and points -> the sweep, with the points that it lacks appended."""
  known = {_key(p.config): p for p in reversed([*old.points, *points])}
  added = [p for p in points if known[_key(p.config)] is p]
  both = _labelled([*old.points, *added])
  grid.check_apart(both)
  return Growth(replace(old, points=tuple(both)), both[len(old.points) :])


def _run(recipe: Mapping[str, Any]) -> dict[str, Any]:
  """A recipe -> the knobs that affect a run: all but its name and config.paper."""
  return {k: v for k, v in recipe.items() if k not in ('name', 'paper')}


def _key(recipe: Mapping[str, Any]) -> str:
  """A recipe -> a digest that equal runs share."""
  return config.digest(metrics.plain(_run(recipe)))


def _label(points: Sequence[Point], knob: str) -> str:
  """The label of a knob's axis in the points of a sweep; for a new axis, its last part.

  ValueError if the points change the knob under a label with other values.
  """
  changing, last = [p for p in points if knob in p.changes], knob.rpartition('.')[2]
  name = _named(changing, knob) if changing else last
  if not name:
    labels = ', '.join(f'{k}={v}' for k, v in changing[0].labels.items())
    raise ValueError(f'--axis={knob}=..., but the point {labels} changes it already')
  if not changing and any(last in p.labels for p in points):
    raise ValueError(f'--axis={knob}=..., but another axis is named {last!r}')
  return name


def _named(points: Sequence[Point], knob: str) -> str:
  """The label that holds the value of a knob in all points; '' if none does."""
  names = dict.fromkeys([knob.rpartition('.')[2], *points[0].labels])
  return next((name for name in names if _holds(points, name, knob)), '')


def _holds(points: Sequence[Point], name: str, knob: str) -> bool:
  """Whether the label of all points equals the value to which they change a knob."""
  both = [p for p in points if name in p.labels and knob in p.changes]
  same = (p.labels[name] == str(p.changes[knob]) for p in both)
  return len(both) == len(points) and all(same)


def _labelled(points: Sequence[Point]) -> list[Point]:
  """Points -> the same, each with a label for every axis."""
  points = list(points)
  for name in dict.fromkeys(name for p in points for name in p.labels):
    having = [p for p in points if name in p.labels]
    knobs = [knob for knob in having[0].changes if _holds(having, name, knob)]
    for i, p in enumerate(points if knobs else []):
      value = str(config.dig(p.config, knobs[0]))
      points[i] = p._replace(labels={**p.labels, name: value})
  return points
