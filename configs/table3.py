"""Table 3: the effect of a non-linearity between value and output projection.

python train.py --config=configs/table3.py:sdpa_rmsnorm[,scale=proxy|test]
python scripts/sweep.py run --config=configs/table3.py:scale=test   (all rows)
Time and hardware as in moe_15b.py. ROWS holds the published perplexities: 6.026 for the
baseline, 5.761 with the gate, 5.847 with a norm and no gate.

Rows shared with Table 1 have the same names. g1_additive_identity is linear in both X and
the attention's output; it reaches half of the gate's gain.
"""

from configs import axes, moe_15b, rows

# The paper prints no added parameters here; the text says "almost no" for sdpa_rmsnorm.
COLUMNS = ('added', 'ppl', 'hellaswag', 'mmlu', 'gsm8k', 'ceval')
ROWS = {
  'baseline': ({}, None, 6.026, 73.07, 58.79, 52.92, 60.26),
  'g1_elementwise': (rows.gate('sdpa'), None, 5.761, 74.64, 60.82, 55.27, 62.20),
  'g2_elementwise': (rows.gate('value'), None, 5.820, 74.38, 59.17, 53.97, 61.00),
  'g1_additive': (
    rows.gate('sdpa', form='add', activation='silu'),
    *(None, 5.821, 74.81, 60.06, 53.30, 60.98),
  ),
  'sdpa_rmsnorm': (
    {'attn.output': 'rms_norm'},
    *(None, 5.847, 74.10, 60.15, 53.75, 61.14),
  ),
  'sdpa_silu': ({'attn.output': 'silu'}, None, 5.975, 73.34, 59.55, 53.19, 60.90),
  'g1_additive_identity': (
    rows.gate('sdpa', form='add', activation='identity'),
    *(None, 5.882, 74.17, 59.20, 52.77, 59.86),
  ),
}


def get_config(arg: str = ''):
  return rows.pick(arg, ROWS, COLUMNS, 'table3', moe_15b.at)


def get_grid(arg: str = '') -> list[axes.Point]:
  return axes.rows(arg, ROWS)
