"""What do the gates of Table 4 do inside a model whose baseline has a sink?

python scripts/campaign.py --minutes=25 --text=DIR inside
python scripts/campaign.py --minutes=3 --scale=test inside
Gates x cells of learning rate and weight decay x seeds, in a model of 61M parameters.
Seed 0 of an arm runs in every cell, its other seeds in the cell with the lowest loss.
scale=gpu: 433M tokens a run, about 11 minutes on one H200. scale=test: seconds on a CPU.
"""

from configs import axes, table4
from experiments import tuning

CLAIMS = ('C1', 'C3', 'C4', 'C8', 'C9', 'C10', 'C11', 'C12', 'C13', 'C14')
BUDGET = {'gpu': 12_200_000_000, 'test': 1_000_000}

# What differs from the model and the training of experiments/sink.
CHANGES = {
  'gpu': dict(
    steps=6600,
    optim=dict(warmup=400),
    eval=dict(every=1650, rows=512),
    checkpoint=dict(every=3300),
  ),
  'test': {},
}

# Name -> its changes to the baseline, as in Table 4.
ARMS = {
  name: table4.ROWS[row][0]
  for name, row in dict(
    baseline='baseline',
    elementwise='g1_elementwise',
    headwise='g1_headwise',
    shared='g1_shared',
    g2='g2_elementwise',
    ns_sigmoid='ns_sigmoid',
    input_independent='input_independent',
  ).items()
}

# Learning rate, weight decay.
CELLS = {'gpu': ((4e-3, 1.8), (6e-3, 1.2)), 'test': ((4e-3, 1.0),)}
SEEDS = {'gpu': (0, 1, 2), 'test': (0,)}
TRIED = {'gpu': tuple(ARMS), 'test': ('baseline', 'elementwise')}
FIRST = 'elementwise', 'baseline'  # The claims on sinks need both; C8 and C14 one.

# The FFN is narrowed by as many weights as the gate has, to a multiple of this.
MULTIPLE = {'gpu': 64, 'test': 1}


def get_config(arg: str = ''):
  return tuning.recipe('inside', CHANGES, arg)


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = tuning.scale_of(arg)
  arms, size = {arm: ARMS[arm] for arm in TRIED[scale]}, MULTIPLE[scale]
  config = lambda: get_config(arg)
  return tuning.grid(config, arms, CELLS[scale], SEEDS[scale], multiple=size)


def choose(points, results) -> list[str]:
  """Two arms first, then one after another: all cells, then more seeds in the best."""
  groups = [FIRST, *((arm,) for arm in ARMS if arm not in FIRST)]
  return tuning.choose(points, results, groups)
