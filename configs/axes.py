"""Grids of runs, as data: what a sweep varies, beside the recipe that it varies.

A grid is a list of points; a point says what its run changes in the recipe, and what that
is called. A recipe with a grid has a `get_grid(arg)` beside its `get_config(arg)`:

  product(
    choice('variant', baseline={}, headwise={'model.attn.gate.position': 'sdpa', ...}),
    axis('optim.lr', (1e-3, 2e-3, 4e-3)),
    seeds(3),
  )
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Point(NamedTuple):
  """One run of a grid; labels and changes keep the order of their axes."""

  labels: dict[str, str]  # by axis: {'variant': 'baseline', 'lr': '0.001', 'seed': '0'}
  changes: dict[str, Any]  # by knob, without 'config.': {'optim.lr': 1e-3, 'seed': 0}


Grid = list[Point]


def axis(knob: str, values: Iterable[Any], name: str = '') -> Grid:
  """A knob and its values -> a point for each, called by the last part of the knob."""
  name = name or knob.rpartition('.')[2]
  return [Point({name: label(value)}, {knob: value}) for value in values]


def choice(name: str, **named: Mapping[str, Any]) -> Grid:
  """Changes that have a name together -> a point for each: choice('variant', a={...})."""
  return [Point({name: each}, dict(changes)) for each, changes in named.items()]


def seeds(count: int) -> Grid:
  """So many seeds, from 0 on."""
  return axis('seed', range(count))


def product(*grids: Grid) -> Grid:
  """Every point of one with every point of the others; the last varies fastest."""
  return [_merged(points) for points in itertools.product(*grids)]


def zipped(*grids: Grid) -> Grid:
  """The first points of all, the second ones, and so on; they must be equally many."""
  if len(sizes := {len(grid) for grid in grids}) > 1:
    raise ValueError(f'zipped axes of {sorted(sizes)} points, but they must be as many')
  return [_merged(points) for points in zip(*grids, strict=True)]


def chain(*grids: Grid) -> Grid:
  """The points of one after those of another."""
  return [point for grid in grids for point in grid]


def label(value: Any) -> str:
  """A value -> the word for it, which for a number is as it would be typed."""
  if isinstance(value, (tuple, list)):
    return '+'.join(map(label, value))
  return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def _merged(points: Iterable[Point]) -> Point:
  labels: dict[str, str] = {}
  changes: dict[str, Any] = {}
  for point in points:
    for taken, given, what in (
      (labels, point.labels, 'axis'),
      (changes, point.changes, 'knob'),
    ):
      for key in given:
        if key in taken:
          raise ValueError(f'two axes of a grid have the {what} {key!r}')
      taken.update(given)
  return Point(labels, changes)
