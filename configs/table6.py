"""Table 6: SwitchHead's experts of keys and values (arXiv 2312.07987).

python train.py --config=configs/table6.py:switch_v_1top1[,scale=proxy|test]
python scripts/sweep.py run --config=configs/table6.py:scale=test   (all rows)
Time and hardware as in moe_15b.py. ROWS holds the published perplexities: 6.026 for the
baseline, 5.808 with one expert per KV head, which is Table 1's g2_headwise.

For that row the paper gives 3M extra parameters here and 0.2M in Table 1; our model has
2048 * 4 * 24 = 0.197M. The paper's description explains no number in this column: its
rows with value experts match 3.1M per expert, or 2048 * 64 * 24, but an expert of
SwitchHead has 25M.
"""

from configs import axes, moe_15b, rows

COLUMNS = ('added', 'ppl', 'mmlu', 'gsm8k', 'hellaswag', 'ceval')
ROWS = {
  'baseline': ({}, None, 6.026, 58.79, 52.92, 73.07, 60.26),
  'switch_kv_8top8': (
    rows.switch('key_value', 8, 8),
    *(38, 5.847, 59.17, 52.54, 73.32, 61.01),
  ),
  'switch_kv_4top4': (
    rows.switch('key_value', 4, 4),
    *(13, 5.935, 58.14, 53.27, 73.75, 59.67),
  ),
  'switch_v_4top4': (
    rows.switch('value', 4, 4),
    *(13, 5.820, 59.02, 52.77, 73.34, 61.74),
  ),
  'switch_v_8top2': (
    rows.switch('value', 8, 2),
    *(25, 5.870, 59.10, 53.53, 74.17, 62.34),
  ),
  'switch_v_1top1': (
    rows.switch('value', 1, 1),
    *(3, 5.808, 59.32, 53.53, 74.38, 62.61),
  ),
}


def get_config(arg: str = ''):
  return rows.pick(arg, ROWS, COLUMNS, 'table6', moe_15b.at)


def get_grid(arg: str = '') -> list[axes.Point]:
  return axes.rows(arg, ROWS)
