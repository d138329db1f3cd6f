"""Recipes that change experiments/sink: grids over learning rate and weight decay.

A cell is a learning rate with a weight decay. The labels are arm, lr, decay, seed.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from configs import axes, base, rows, table2
from experiments.sink import recipe as sink

Labels = Mapping[str, str]


def scale_of(arg: str) -> str:
  """The argument of a recipe -> its scale."""
  return base.arguments(arg, scale=tuple(sink.SCALES))['scale']


def recipe(name: str, changes: Mapping[str, Mapping], arg: str) -> Any:
  """The recipe of experiments/sink with an experiment's changes at its scale."""
  scale = scale_of(arg)
  c = sink.get_config(f'scale={scale}')
  c.update(changes[scale])
  c.name = f'{name}-{scale}'
  return c


def grid(
  config: Callable[[], Any],
  arms: Mapping[str, dict],
  cells: Iterable[tuple[float, float]],
  seeds: Iterable[int],
  *,
  multiple: int,
) -> list[axes.Point]:
  """Every arm in every cell with every seed, in this order.

  `config` makes the plain model's recipe; `arms` are its changes by name. The FFN is
  narrowed by as many weights as the gate has, to a multiple of `multiple`.
  """
  runs = itertools.product(arms.items(), cells, seeds)
  return [
    _point(config(), arm, changes, values, seed, multiple)
    for (arm, changes), values, seed in runs
  ]


def _point(
  config, arm: str, changes: dict, values: tuple[float, float], seed: int, multiple: int
) -> axes.Point:
  lr, decay = values
  plain = config.model.ffn
  rows.change(config, changes)
  ffn = -int(-(plain - table2.surplus(config.model)) // multiple) * multiple
  # A change may be a function of the plain value.
  knobs = {f'model.{knob}': operator.attrgetter(knob)(config.model) for knob in changes}
  knobs |= {'model.ffn': ffn} if ffn != plain else {}
  knobs |= {'optim.lr': lr, 'optim.weight_decay': decay, 'seed': seed}
  labels = {'arm': arm, 'lr': f'{lr:g}', 'decay': f'{decay:g}', 'seed': str(seed)}
  return axes.Point(labels, knobs)


def cell(labels: Labels) -> tuple[str, str]:
  """The cell of a point or a result."""
  return labels['lr'], labels['decay']


def choose(points, results, groups: Sequence[Sequence[str]]) -> list[str]:
  """One group of arms after another: seed 0 in every cell, then more in the best one."""
  names = []
  for arms in groups:
    arm_points = {arm: [p for p in points if p.labels['arm'] == arm] for arm in arms}
    first_seeds = [p for own in arm_points.values() for p in own if _is_first(p)]
    chosen = {arm: best(own, results) for arm, own in arm_points.items()}
    other_seeds = [
      p
      for arm, own in arm_points.items()
      for p in own
      if chosen[arm] and cell(p.labels) == cell(chosen[arm])
    ]
    names += [p.name for p in (*first_seeds, *other_seeds)]
  return list(dict.fromkeys(names))


def _is_first(labelled) -> bool:
  return labelled.labels['seed'] == '0'


def best(points, results) -> Labels | None:
  """The points of an arm -> the labels of the best one, once seed 0 ended in all cells.

  A cell in which a seed diverged is not stable, and not chosen.
  """
  arm_results = [r for r in results if r.point in {p.name for p in points}]
  seed_0 = [r for r in arm_results if _is_first(r)]
  diverged = {cell(r.labels) for r in arm_results if not r.finished}
  stable = [r for r in seed_0 if cell(r.labels) not in diverged]
  if not stable or len(seed_0) < len({cell(p.labels) for p in points}):
    return None
  return min(stable, key=lambda r: r.loss).labels
