"""Grids of a sweep: the knobs that each run changes, as plain data.

A recipe that has a grid defines `get_grid(arg='')` beside `get_config(arg='')`:

  def get_grid(arg=''):
    variant = axes.choice(
      'variant', baseline={}, sandwich={'model.branch_norm': 'rms'}
    )
    return axes.product(variant, axes.axis('optim.lr', [1e-3, 2e-3]), axes.seeds(3))

A knob is named as in configs/base.py, without `config.`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Point(NamedTuple):
  """One run of a sweep."""

  labels: dict[str, str]  # {'variant': 'baseline', 'lr': '0.001'}, for display
  changes: dict[str, Any]  # {'optim.lr': 0.001}: knobs and their values
  arg: str = ''  # 'k8,scale=test': its own argument of the recipe; '' for the sweep's


def axis(knob: str, values: Iterable[Any], name: str = '') -> list[Point]:
  """A knob and its values -> one point each, labelled `name` or the knob's last part."""
  name = name or knob.rpartition('.')[2]
  values = [_plain(value) for value in values]
  return [Point({name: text(value)}, {knob: value}) for value in values]


def choice(name: str, /, **variants: Mapping[str, Any]) -> list[Point]:
  """Variants by name, each with its changed knobs -> one point each."""
  return [
    Point({name: variant}, {knob: _plain(value) for knob, value in knobs.items()})
    for variant, knobs in variants.items()
  ]


def rows(arg: str, names: Iterable[str]) -> list[Point]:
  """'scale=test' -> a point for each row of a table; 'ROW,scale=test' -> that row alone.

  A row is an argument of its recipe, so that each point has its own `config.paper`.
  """
  words = list(filter(None, arg.split(',')))
  options = [word for word in words if '=' in word]
  named = [word for word in words if '=' not in word]
  return [
    Point({'row': row}, {}, ','.join([row, *options])) for row in named[-1:] or names
  ]


def seeds(count: int) -> list[Point]:
  """Seeds 0 to count - 1, for the weights and the order of the data."""
  return axis('seed', range(count))


def product(*grids: Sequence[Point]) -> list[Point]:
  """Every point of one grid with every point of the others; the first varies slowest."""
  points = [Point({}, {})]
  for grid in grids:
    points = [_both(a, b) for a in points for b in grid]
  return points


def zipped(*grids: Sequence[Point]) -> list[Point]:
  """The first points of all grids together, the second ones, and so on."""
  sizes = [len(grid) for grid in grids]
  if len(set(sizes)) > 1:
    raise ValueError(
      f'grids of {sizes} points cannot be zipped: all must have the same size'
    )
  zipped_points = []
  for points in zip(*grids, strict=True):
    zipped_points += product(*([point] for point in points))
  return zipped_points


def chain(*grids: Sequence[Point]) -> list[Point]:
  """The points of all grids, one grid after another."""
  return [point for grid in grids for point in grid]


def text(value: Any) -> str:
  """A knob's value -> text; a float survives the round trip exactly."""
  return repr(value) if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
  """NumPy scalars -> Python numbers, so that np.geomspace can give learning rates."""
  return value.item() if hasattr(value, 'item') else value


def _both(a: Point, b: Point) -> Point:
  """Merges two points; ValueError if they change the same knob."""
  for knob in a.changes:
    # A group also clashes with a knob inside it.
    same = [k for k in b.changes if f'{k}.'.startswith(f'{knob}.')]
    same += [k for k in b.changes if f'{knob}.'.startswith(f'{k}.')]
    if same:
      raise ValueError(f'two axes change config.{same[0]}')
  names = a.labels.keys() & b.labels.keys()
  if names:
    raise ValueError(f'two axes are named {min(names)!r}: rename one of them')
  if a.arg and b.arg:
    raise ValueError(f'two axes give the recipe an argument: {a.arg} and {b.arg}')
  return Point(a.labels | b.labels, a.changes | b.changes, a.arg or b.arg)
