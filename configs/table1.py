"""Table 1: positions and variants of the gate, in the mixture of experts.

python train.py --config=configs/table1.py:g1_headwise
python train.py --config=configs/table1.py:g1_headwise,scale=proxy      (or scale=test)
python scripts/preflight.py --config=configs/table1.py:g1_headwise --count
python scripts/sweep.py run --config=configs/table1.py:scale=test     (all rows)
Time and hardware as in moe_15b.py. ROWS holds the published perplexities: 6.026 without a
gate, 5.761 with the best one.

Contradictions: plus4_experts adds 453M here, 400M in the paper (see moe_15b.py). GSM8k of
g2_elementwise is 53.97 in this table, 51.33 in Table 4. Figure 1 (middle) shows g1, g2,
g4 and the baseline: its third bar is the query's, not the key's.
"""

from configs import axes, moe_15b, rows

COLUMNS = ('added', 'ppl', 'hellaswag', 'mmlu', 'gsm8k', 'ceval')
G1, G2 = rows.gate('sdpa'), rows.gate('value')
ROWS = {
  'baseline': ({}, 0, 6.026, 73.07, 58.79, 52.92, 60.26),
  'k8': ({'attn.kv_heads': rows.times(2)}, 50, 5.979, 73.51, 59.78, 52.16, 62.26),
  'q48': ({'attn.heads': rows.times(1.5)}, 201, 5.953, 73.59, 58.45, 53.30, 59.67),
  'plus4_experts': (
    {'moe.experts': rows.plus(4), 'moe.top_k': rows.times(1.5)},
    *(400, 5.964, 73.19, 58.84, 52.54, 63.19),
  ),
  'g1_elementwise': (G1, 201, 5.761, 74.64, 60.82, 55.27, 62.20),
  'g2_elementwise': (G2, 25, 5.820, 74.38, 59.17, 53.97, 61.00),
  'g3_elementwise': (
    rows.gate('key', place='before'),
    *(25, 6.016, 72.88, 59.18, 50.49, 61.74),
  ),
  'g4_elementwise': (
    rows.gate('query', place='before'),
    *(201, 5.981, 73.01, 58.74, 53.97, 62.14),
  ),
  'g5_elementwise': (rows.gate('out'), 100, 6.017, 73.32, 59.41, 50.87, 59.43),
  'g1_headwise': (
    rows.gate('sdpa', granularity='headwise'),
    *(1.6, 5.792, 74.50, 60.05, 54.44, 62.61),
  ),
  'g2_headwise': (
    rows.gate('value', granularity='headwise'),
    *(0.2, 5.808, 74.38, 59.32, 53.53, 62.61),
  ),
  'g1_shared': (
    rows.gate('sdpa', heads='shared', mean='after'),
    *(201, 5.801, 74.34, 60.06, 53.15, 61.01),
  ),
  'g2_shared': (
    rows.gate('value', heads='shared', mean='after'),
    *(25, 5.867, 74.10, 59.02, 53.03, 60.61),
  ),
  'g1_additive': (
    rows.gate('sdpa', form='add', activation='silu'),
    *(201, 5.821, 74.81, 60.06, 53.30, 60.98),
  ),
  'g1_silu': (
    rows.gate('sdpa', activation='silu'),
    *(201, 5.822, 74.22, 60.49, 54.59, 62.34),
  ),
}


def get_config(arg: str = ''):
  return rows.pick(arg, ROWS, COLUMNS, 'table1', moe_15b.at)


def get_grid(arg: str = '') -> list[axes.Point]:
  return axes.rows(arg, ROWS)
