"""Does the gate allow larger learning rates, and does it remove loss spikes?

python scripts/campaign.py --minutes=25 --text=DIR stability
python scripts/campaign.py --minutes=3 --scale=test stability
Arms x learning rates x weight decays x seeds, in a model of 61M parameters. Seed 0 of an
arm runs in every cell, its other seeds at all rates with its best weight decay.
scale=gpu: 131M tokens a run, about 5 minutes on one H200. scale=test: seconds on a CPU.
"""

import itertools

from configs import axes, table2
from experiments import tuning

CLAIMS = ('C15', 'C16', 'C17', 'C18')
BUDGET = {'gpu': 6_000_000_000, 'test': 1_000_000}

# What differs from the model and the training of experiments/sink.
CHANGES = {
  'gpu': dict(
    steps=4000,
    batch=32,
    eval=dict(every=1000, rows=512),
    checkpoint=dict(every=2000),
  ),
  'test': {},
}

# As in Table 2.
ARMS = {
  name: table2.CHANGES[name]
  for name in ('baseline', 'elementwise', 'sandwich', 'clip300', 'clip100')
}
FIRST = 'baseline', 'elementwise'
TRIED = {'gpu': tuple(ARMS), 'test': ('baseline', 'elementwise')}
RATES = {'gpu': (4e-3, 8e-3, 1.6e-2), 'test': (4e-3, 8e-3)}
DECAYS = {'gpu': (1.2, 0.6), 'test': (1.0,)}
SEEDS = {'gpu': (0, 1, 2), 'test': (0,)}
MULTIPLE = {'gpu': 64, 'test': 1}  # Of the FFN's width.


def get_config(arg: str = ''):
  return tuning.recipe('stability', CHANGES, arg)


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = tuning.scale_of(arg)
  cells = [*itertools.product(RATES[scale], DECAYS[scale])]
  arms, size = {arm: ARMS[arm] for arm in TRIED[scale]}, MULTIPLE[scale]
  config = lambda: get_config(arg)
  return tuning.grid(config, arms, cells, SEEDS[scale], multiple=size)


def choose(points, results) -> list[str]:
  """The baseline and the gate first: all cells, then more seeds at the best decay.

  The gate also gets more seeds in the baseline's best cell, where spikes are compared.
  """
  baseline, gate = FIRST
  order = lambda *groups: tuning.choose(points, results, groups, lambda x: x['decay'])
  of = lambda arm: [p for p in points if p.labels['arm'] == arm]
  best = tuning.best(of(baseline), results)
  beside = [p for p in of(gate) if best and tuning.cell(p.labels) == tuning.cell(best)]
  others = [(arm,) for arm in ARMS if arm not in FIRST]
  return [*dict.fromkeys([*order(FIRST), *(p.name for p in beside), *order(*others)])]
