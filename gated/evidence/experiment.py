"""An experiment: a question, the claims that it serves, and the points that answer it.

experiments/NAME/README.md   question, prediction, recipe and grid, cost, figure, verdict
experiments/NAME/recipe.py   get_config, get_grid (as a sweep's recipe), and
  CLAIMS                     the claims that it serves, such as ('C9', 'C10')
  SHARED                     optional: claims of another experiment for which its results
                             count as well, since both have the same setting
  BUDGET                     training tokens that it may use at each scale
  choose(points, results)    optional: the names of the points to run next, highest
                             priority first; default: all, in the order of the grid
experiments/NAME/results/    what the campaigns measured
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated import plan, storage
from gated.evidence import result
from gated.evidence.result import Result
from gated.sweep import Point, Sweep

SCALES = 'gpu', 'test'
# The points of a grid and the results so far -> names of the points to run next.
Choose = Callable[[Sequence[Point], Sequence[Result]], Sequence[str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
  """An experiment at one scale, and its results so far."""

  name: str
  scale: str
  claims: tuple[str, ...]
  budget: int  # tokens
  swept: Sweep  # its recipe and grid
  choose: Choose
  results: list[Result]

  @property
  def tokens(self) -> int:
    """Training tokens of its results."""
    return sum(r.tokens for r in self.results)

  def wanted(self) -> list[Point]:
    """The points to run next, highest priority first: without result, within budget."""
    points = {p.name: p for p in self.swept.points}
    done, left = {r.point for r in self.results}, self.budget - self.tokens
    wanted = []
    for name in dict.fromkeys(self.choose(self.swept.points, self.results)):
      point = points[name]
      if name not in done and tokens(point) <= left:
        left -= tokens(point)
        wanted.append(point)
    return wanted

  def status(self) -> str:
    """One line: results, tokens, and the next points."""
    states = [r.state for r in self.results]
    counts = ', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states)) or 'none'
    spent = f'{plan.amount(self.tokens)} of {plan.amount(self.budget)} tokens'
    wanted = self.wanted()
    return (
      f'{self.name} ({self.scale}): results: {counts}; {spent}; '
      f'{len(wanted)} points wanted'
    )


def tokens(point: Point) -> int:
  """The training tokens of a point."""
  c = point.config
  return c['steps'] * c['batch'] * c['data']['length']


def in_order(points: Sequence[Point], results: Sequence[Result]) -> list[str]:
  """The default of `choose`: every point, in the order of the grid."""
  return [p.name for p in points]


def opened(
  root: storage.Path,
  name: str,
  scale: str,
  *,
  swept: Sweep,
  settings: Mapping[str, Any],
) -> Experiment:
  """A checkout, and an experiment's planned sweep and recipe settings -> Experiment.

  ValueError if a result is damaged, or its recipe is not that of the grid's point.
  """
  results = result.read_all(root, name, scale)
  points = {p.name: p for p in swept.points}
  for old in results:
    path = result.folder(root, name, scale) / f'{old.point}.json'
    if old.point not in points:
      raise ValueError(
        f'{path} is of no point of experiments/{name}/recipe.py: its grid has changed; '
        f'restore it, or move the result to another folder'
      )
    changed = result.changes(old.config, points[old.point].config)
    if changed:
      listed = '; '.join(f'{k} was {a!r} and is {b!r}' for k, (a, b) in changed.items())
      raise ValueError(
        f'{path} is of another recipe ({listed}): restore experiments/{name}/recipe.py, '
        'or move the result to another folder'
      )
  return Experiment(
    name=name,
    scale=scale,
    claims=tuple(settings['CLAIMS']),
    budget=int(settings['BUDGET'][scale]),
    swept=swept,
    choose=settings.get('choose') or in_order,
    results=results,
  )
