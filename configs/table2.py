"""Table 2: the dense 1.7B models with more layers, larger learning rates and batches.

python train.py --config=configs/table2.py:48l_8e-3_sandwich[,scale=proxy|test]
python train.py --config=configs/table2.py:28l_4e-3_elementwise,match=128
python scripts/sweep.py run --config=configs/table2.py:scale=test   (all rows)
A row's name is LAYERS[_TOKENS]_RATE_CHANGE. TOKENS is omitted for 400B; RATE is the peak
learning rate. CHANGE is baseline, elementwise or headwise (a gate after attention),
sandwich, or clip300 and clip100 of appendix A.6. Time and hardware as in dense_1b7.py;
ROWS holds the published perplexities.

The FFN of a gated row is narrower by as many parameters as its gate adds. match=exact,
the default, takes the nearest integer (5461 for 6144), which does not split over a tensor
axis. match=128 rounds up to a multiple of 128, as in the released elementwise model
(5504). match=none keeps the FFN. Every scale uses the paper's rates. The paper's baseline
diverged with 1T tokens at 8e-3, and with clipping at 8e-3. The 3.5T rows are 3T in the
camera-ready's Figure 1, and the released curves end at 3.02T.
"""

from configs import axes, base, dense_1b7, rows

# Setting -> shape, peak learning rate, batch, steps.
SETTINGS = {
  '28l_4e-3': ('28l', 4e-3, 1024, 95_367),  # 400B tokens, or 100k steps
  '28l_3.5t_4.5e-3': ('28l', 4.5e-3, 2048, 417_233),
  '48l_4e-3': ('48l', 4e-3, 1024, 95_367),
  '48l_8e-3': ('48l', 8e-3, 1024, 95_367),
  '48l_1t_5.3e-3': ('48l', 5.3e-3, 4096, 59_605),
  '48l_1t_8e-3': ('48l', 8e-3, 4096, 59_605),
}

CHANGES = {
  'baseline': {},
  'elementwise': rows.gate('sdpa', granularity='elementwise'),
  'headwise': rows.gate('sdpa', granularity='headwise'),
  'sandwich': {'branch_norm': 'rms'},
  'clip300': {'branch_clip': 300.0},
  'clip100': {'branch_clip': 100.0},
}

COLUMNS = ('ppl', 'humaneval', 'mmlu', 'gsm8k', 'hellaswag', 'ceval', 'cmmlu')
NOTHING = (None,) * len(COLUMNS)
ROWS = {
  '28l_4e-3_baseline': (7.499, 28.66, 50.21, 27.82, 64.94, 49.15, 49.52),
  '28l_4e-3_elementwise': (7.404, 29.27, 51.15, 28.28, 65.48, 50.72, 50.72),
  '28l_3.5t_4.5e-3_baseline': (6.180, 34.15, 59.10, 69.07, 68.02, 68.19, 64.95),
  '28l_3.5t_4.5e-3_elementwise': (6.130, 37.80, 59.61, 70.20, 68.84, 68.52, 65.76),
  '48l_4e-3_baseline': (7.421, 28.05, 52.04, 32.98, 65.96, 51.11, 51.86),
  '48l_8e-3_baseline': (9.195, 21.34, 44.28, 15.24, 57.00, 43.11, 42.63),
  '48l_8e-3_sandwich': (7.407, 30.49, 52.07, 32.90, 66.00, 52.04, 51.72),
  '48l_4e-3_elementwise': (7.288, 31.71, 52.44, 32.37, 66.28, 52.06, 52.29),
  '48l_4e-3_headwise': (7.370, 31.10, 53.83, 34.12, 65.59, 55.07, 52.38),
  '48l_8e-3_elementwise': (7.325, 31.10, 54.47, 36.62, 66.40, 53.91, 53.80),
  '48l_1t_5.3e-3_baseline': (7.363, 29.88, 54.44, 32.22, 65.43, 53.72, 53.37),
  '48l_1t_8e-3_baseline': NOTHING,  # diverged
  '48l_1t_5.3e-3_elementwise': (7.101, 34.15, 55.70, 36.69, 67.17, 54.51, 54.68),
  '48l_1t_8e-3_elementwise': (7.078, 31.71, 56.47, 39.73, 67.38, 55.52, 55.77),
  # Appendix A.6: neither converged.
  '48l_8e-3_clip300': NOTHING,
  '48l_8e-3_clip100': NOTHING,
}

NARROWED = (
  'model.ffn: by how much it is narrowed is not said; the released model has 5504'
)

# Name -> (FFN size, channels to remove -> narrowed FFN size).
MATCHES = {
  'exact': lambda ffn, less: round(ffn - less),
  '128': lambda ffn, less: min(ffn, int(-(-(ffn - less) // 128) * 128)),
  'none': lambda ffn, less: ffn,
}


def get_config(arg: str = ''):
  scales, matches = tuple(dense_1b7.SCALES), tuple(MATCHES)
  chosen = base.arguments(arg, *ROWS, scale=scales, match=matches)
  setting, _, change = chosen[''].rpartition('_')
  shape, lr, batch, steps = SETTINGS[setting]
  c = dense_1b7.at(shape, chosen['scale'])
  c.optim.lr = lr
  # Other scales keep the ratio to the rows of 400B tokens.
  c.batch = c.batch * batch // 1024
  c.steps = round(c.steps * steps / 95_367)
  rows.change(c, CHANGES[change])
  c.model.ffn = MATCHES[chosen['match']](c.model.ffn, surplus(c.model))
  if c.model.attn.gate.position != 'none':
    c.paper.assumed = (*c.paper.assumed, NARROWED)
  printed = {'max_lr': lr} | dict(zip(COLUMNS, ROWS[chosen['']], strict=True))
  rows.record(
    c,
    'table2',
    chosen,
    baseline=f'{setting}_baseline',
    printed=printed,
    changes=CHANGES[change],
  )
  if chosen['match'] != matches[0]:
    c.name += f'-match-{chosen["match"]}'
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  return axes.rows(arg, ROWS)


def surplus(m) -> float:
  """Channels of a SwiGLU's hidden size with as many weights as the gate."""
  attn, gate = m.attn, m.attn.gate
  if gate.position == 'none' or gate.source == 'parameter':
    return 0.0
  heads = attn.kv_heads if gate.position in ('key', 'value') else attn.heads
  return {'elementwise': heads * attn.head_dim, 'headwise': heads}[gate.granularity] / 3
