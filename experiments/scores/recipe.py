"""Are gate scores sparse, and the losses of gated models free of spikes, in short runs?

python scripts/campaign.py --minutes=25 --text=DIR scores
python scripts/campaign.py --minutes=3 --scale=test scores
The baseline and the elementwise gate of experiments/inside, with two thirds of its steps
and larger learning rates. Seed 0 runs in every cell of learning rate and weight decay,
the other seeds in the cell with the lowest loss.
scale=gpu: 288M tokens a run, about 8 minutes on one H200. scale=test: seconds on a CPU.
"""

from configs import axes
from experiments import tuning
from experiments.inside import recipe as inside

CLAIMS = ('C1', 'C8', 'C14')
BUDGET = {'gpu': 3_000_000_000, 'test': 1_000_000}

# What differs from the training of experiments/inside.
CHANGES = {
  'gpu': dict(steps=4400, eval=dict(every=1100), checkpoint=dict(every=2200)),
  'test': {},
}
# Learning rate, weight decay.
CELLS = {'gpu': ((8e-3, 1.2), (6e-3, 1.6)), 'test': inside.CELLS['test']}


def get_config(arg: str = ''):
  c = inside.get_config(arg)
  c.update(CHANGES[tuning.scale_of(arg)])
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = tuning.scale_of(arg)
  arms, size = {arm: inside.ARMS[arm] for arm in inside.FIRST}, inside.MULTIPLE[scale]
  config = lambda: get_config(arg)
  return tuning.grid(config, arms, CELLS[scale], inside.SEEDS[scale], multiple=size)


def choose(points, results) -> list[str]:
  """Seed 0 of both arms in all cells, then more seeds in the best cell of each."""
  return tuning.choose(points, results, [inside.FIRST])
