"""What grids with several learning rates and weight decays share.

A cell is a learning rate with a weight decay. The labels are arm, lr, decay, seed.
"""

from collections.abc import Callable, Mapping, Sequence

from configs import axes, rows, table2

Labels = Mapping[str, str]


def point(
  config, arm: str, changes: dict, cell: tuple[float, float], seed: int, *, multiple: int
):
  """A run of an arm in a cell; the FFN is narrowed by as many weights as the gate has.

  `config` is the plain model's recipe, and is changed. The FFN's width stays a multiple
  of `multiple`.
  """
  lr, decay = cell
  plain = config.model.ffn
  rows.change(config, changes)
  ffn = -int(-(plain - table2.surplus(config.model)) // multiple) * multiple
  knobs = {f'model.{knob}': value for knob, value in changes.items()}
  knobs |= {'model.ffn': ffn} if ffn != plain else {}
  knobs |= {'optim.lr': lr, 'optim.weight_decay': decay, 'seed': seed}
  labels = {'arm': arm, 'lr': f'{lr:g}', 'decay': f'{decay:g}', 'seed': str(seed)}
  return axes.Point(labels, knobs)


def choose(
  points, results, groups: Sequence[Sequence[str]], same: Callable[[Labels], object]
) -> list[str]:
  """One group of arms after another: seed 0 of every cell, then more seeds of some.

  These are the points that are the `same`, by their labels, as the best point of seed 0.
  """
  names = []
  for arms in groups:
    own = {arm: [p for p in points if p.labels['arm'] == arm] for arm in arms}
    tuning = [p for arm in arms for p in own[arm] if p.labels['seed'] == '0']
    best = {arm: _best(own[arm], results) for arm in arms}
    more = [
      p
      for arm in arms
      for p in own[arm]
      if best[arm] and same(p.labels) == same(best[arm])
    ]
    names += [p.name for p in (*tuning, *more)]
  return list(dict.fromkeys(names))


def _best(points, results) -> Labels | None:
  """The points of an arm -> the labels of the best one, once seed 0 ended in all cells.

  A cell in which a seed diverged is not stable, and not chosen.
  """
  cell = lambda labelled: (labelled.labels['lr'], labelled.labels['decay'])
  own = [r for r in results if r.point in {p.name for p in points}]
  first = [r for r in own if r.labels['seed'] == '0']
  diverged = {cell(r) for r in own if not r.finished}
  stable = [r for r in first if cell(r) not in diverged]
  if not stable or len(first) < len({cell(p) for p in points}):
    return None
  return min(stable, key=lambda r: r.loss).labels
