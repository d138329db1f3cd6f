"""Does the gate allow larger learning rates, and does it remove loss spikes?

python scripts/campaign.py --minutes=25 --per_card=2 --text=DIR stability
python scripts/campaign.py --minutes=3 --scale=test stability
Arms x learning rates x seeds, with the model and the training of experiments/positions,
which has the baseline and the elementwise gate in its own cells already.
scale=gpu: 115M tokens a run, about 90 seconds on one H200. scale=test: seconds on a CPU.
"""

from configs import axes, table2
from experiments import tuning
from experiments.positions import recipe as positions

CLAIMS = ('C15', 'C16', 'C17', 'C18')
BUDGET = {'gpu': 6_000_000_000, 'test': 1_000_000}

# As in Table 2.
ARMS = {
  name: table2.CHANGES[name]
  for name in ('baseline', 'elementwise', 'sandwich', 'clip300', 'clip100')
}
FIRST = 'baseline', 'elementwise'
# Learning rate, weight decay. In experiments/positions, each of seven arms was better in
# the first of its two cells; so all rates have that one's decay.
CELLS = {'gpu': ((8e-3, 0.8), (1.6e-2, 0.8)), 'test': ((8e-3, 1.0),)}


def get_config(arg: str = ''):
  return tuning.recipe('stability', positions.CHANGES, arg)


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = tuning.scale_of(arg)
  seeds, size = positions.SEEDS[scale], positions.MULTIPLE[scale]
  config = lambda: get_config(arg)
  first = {name: ARMS[name] for name in FIRST}
  points = tuning.grid(config, first, CELLS[scale], seeds, multiple=size)
  if scale == 'gpu':
    later = {name: arm for name, arm in ARMS.items() if name not in FIRST}
    cells = *positions.CELLS[scale], *CELLS[scale]
    points += tuning.grid(config, later, cells, seeds, multiple=size)
  return points


def choose(points, results) -> list[str]:
  """The baseline and the gate first, the smaller rate first; then arm after arm.

  Other weight decays than the first need one seed, to show that they are worse.
  """
  decay = next((p.labels['decay'] for p in points), '')
  wanted = [p for p in points if p.labels['decay'] == decay or p.labels['seed'] == '0']
  later = [name for name in ARMS if name not in FIRST]

  def rank(point) -> tuple[int, float]:
    arm = point.labels['arm']
    return later.index(arm) if arm in later else -1, float(point.labels['lr'])

  return [p.name for p in sorted(wanted, key=rank)]
