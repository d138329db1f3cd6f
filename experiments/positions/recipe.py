"""Where must a gate be, and in which form, to lower the loss?

python scripts/campaign.py --minutes=25 --per_card=2 --text=DIR positions
python scripts/campaign.py --minutes=3 --scale=test positions
Arms of Tables 1, 3 and 6 x cells of learning rate and weight decay x seeds, in a model of
24M parameters. Seed 0 of an arm runs in every cell, its other seeds in the cell with the
lowest loss.
scale=gpu: 115M tokens a run, about 90 seconds on one H200. scale=test: seconds on a CPU.
"""

from configs import axes, table1, table3, table6
from experiments import tuning

CLAIMS = ('C1', 'C2', 'C3', 'C5', 'C6', 'C7', 'C22')
SHARED = ('C15', 'C16', 'C17', 'C18')  # Of experiments/stability, in the same setting.
BUDGET = {'gpu': 8_000_000_000, 'test': 1_000_000}

# What differs from the model and the training of experiments/sink.
CHANGES = {
  'gpu': dict(
    steps=3500,
    batch=32,
    model=dict(width=384, depth=12, ffn=1152, attn=dict(heads=6, kv_heads=3)),
    eval=dict(every=1750, rows=1024),
    checkpoint=dict(every=3500),
    log=dict(probes=0),
  ),
  'test': {},
}

# Name -> the table with its changes to the baseline, and its row.
ROWS = {
  'baseline': (table1, 'baseline'),
  'elementwise': (table1, 'g1_elementwise'),
  'headwise': (table1, 'g1_headwise'),
  'g2': (table1, 'g2_elementwise'),
  'g3': (table1, 'g3_elementwise'),
  'g4': (table1, 'g4_elementwise'),
  'g5': (table1, 'g5_elementwise'),
  'additive_silu': (table1, 'g1_additive'),
  'multiplicative_silu': (table1, 'g1_silu'),
  'additive_identity': (table3, 'g1_additive_identity'),
  'sdpa_rmsnorm': (table3, 'sdpa_rmsnorm'),
  'sdpa_silu': (table3, 'sdpa_silu'),
  'kv_heads_x2': (table1, 'k8'),
  'heads_x1.5': (table1, 'q48'),
  'switch_v_1top1': (table6, 'switch_v_1top1'),
  'switch_v_4top4': (table6, 'switch_v_4top4'),
  'switch_v_8top2': (table6, 'switch_v_8top2'),
}
ARMS = {name: table.ROWS[row][0] for name, (table, row) in ROWS.items()}
# The arms of claims that are decided together, first the positions.
GROUPS = (
  ('baseline', 'elementwise', 'headwise', 'g2', 'g3', 'g4', 'g5'),
  ('additive_silu', 'multiplicative_silu'),
  ('additive_identity', 'sdpa_rmsnorm', 'sdpa_silu'),
  ('kv_heads_x2', 'heads_x1.5'),
  ('switch_v_1top1', 'switch_v_4top4', 'switch_v_8top2'),
)

# Learning rate, weight decay.
CELLS = {'gpu': ((4e-3, 0.8), (8e-3, 0.4)), 'test': ((4e-3, 1.0),)}
SEEDS = {'gpu': (0, 1, 2), 'test': (0,)}
TRIED = {'gpu': tuple(ARMS), 'test': ('baseline', 'elementwise')}

# The FFN is narrowed by as many weights as a gate has, to a multiple of this.
MULTIPLE = {'gpu': 64, 'test': 1}


def get_config(arg: str = ''):
  return tuning.recipe('positions', CHANGES, arg)


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = tuning.scale_of(arg)
  arms, size = {arm: ARMS[arm] for arm in TRIED[scale]}, MULTIPLE[scale]
  config = lambda: get_config(arg)
  return tuning.grid(config, arms, CELLS[scale], SEEDS[scale], multiple=size)


def choose(points, results) -> list[str]:
  """One group of arms after another: all cells, then more seeds in the best."""
  return tuning.choose(points, results, GROUPS)
