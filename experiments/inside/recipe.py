"""What do the gates of Table 4 do inside a model whose baseline has a sink?

python scripts/campaign.py --minutes=25 --text=DIR inside
python scripts/campaign.py --minutes=3 --scale=test inside
Gates x cells of learning rate and weight decay x seeds, in a model of 61M parameters.
scale=gpu: 262M tokens a run, about 8 minutes on one H200. scale=test: seconds on a CPU.
"""

from configs import axes, base, rows, table2, table4
from experiments.sink import recipe as sink

CLAIMS = ('C1', 'C3', 'C4', 'C8', 'C9', 'C10', 'C11', 'C12', 'C13', 'C14')
BUDGET = {'gpu': 14_000_000_000, 'test': 1_000_000}

SCALES = tuple(sink.SCALES)
# What differs from the model and the training of experiments/sink.
CHANGES = {
  'gpu': dict(
    steps=8000,
    batch=32,
    eval=dict(rows=512),
    checkpoint=dict(every=4000),
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

# Learning rate, weight decay. All seeds train in the first cell, seed 0 also in the next.
CELLS = {'gpu': ((5e-3, 1.0), (1e-2, 0.5)), 'test': ((4e-3, 1.0),)}
SEEDS = {'gpu': (0, 1, 2), 'test': (0,)}
TRIED = {'gpu': tuple(ARMS), 'test': ('baseline', 'elementwise')}

# The FFN is narrowed by as many weights as the gate has, to a multiple of this.
MULTIPLE = {'gpu': 64, 'test': 1}


def get_config(arg: str = ''):
  scale = _scale(arg)
  c = sink.get_config(f'scale={scale}')
  c.update(CHANGES[scale])
  c.name = f'inside-{scale}'
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  """The points in their order: the claims on sinks first, then the other gates."""
  scale = _scale(arg)
  runs = [
    (arm, cell, seed)
    for part in (TRIED[scale][:3], TRIED[scale][3:])
    for cell in range(len(CELLS[scale]))
    for seed in SEEDS[scale][: None if cell == 0 else 1]
    for arm in part
  ]
  return [point(*run, scale) for run in runs]


def point(arm: str, cell: int, seed: int, scale: str) -> axes.Point:
  """One run; the FFN of a gated model is narrowed to match."""
  lr, decay = CELLS[scale][cell]
  c = get_config(f'scale={scale}')
  rows.change(c, ARMS[arm])
  multiple = MULTIPLE[scale]
  ffn = -int(-(c.model.ffn - table2.surplus(c.model)) // multiple) * multiple
  changes = {f'model.{knob}': value for knob, value in ARMS[arm].items()}
  changes |= {'model.ffn': ffn} if ffn != c.model.ffn else {}
  changes |= {'optim.lr': lr, 'optim.weight_decay': decay, 'seed': seed}
  labels = {'arm': arm, 'lr': f'{lr:g}', 'decay': f'{decay:g}', 'seed': str(seed)}
  return axes.Point(labels, changes)


def _scale(arg: str) -> str:
  return base.arguments(arg, scale=SCALES)['scale']
