"""The best learning rates of two widths, with muP and without (docs/transfer.md).

python scripts/sweep.py run --config=configs/transfer.py:scale=test,seeds=1
python scripts/sweep.py run --config=configs/transfer.py --config.data.mixture=DIR
A narrow model, and a wide one with optim.transfer=none and mup relative to the narrow
one, at rates a factor of sqrt(2) apart; the report has the best of each. scale=proxy (the
default): widths 256 and 512, 20M and 62M parameters; it needs prepared text with a
vocabulary of at most 8192. scale=test: widths 32 and 128, 18 runs a seed, about 18
minutes on 2 busy CPU cores.
"""

from configs import axes, base, dense_1b7, lr_sweep

WIDTHS = {'proxy': (256, 512), 'test': (32, 128)}
# The first of seven or six rates.
RATES = {'proxy': (2e-3, 7), 'test': (1.6e-2, 6)}
ARGUMENTS = dict(
  scale=('proxy', 'test'),
  optimizer=('adamw', 'muon'),
  gate=('elementwise', 'headwise', 'none'),
  seeds=('3', '1', '2', '4', '5'),
)


def at(m, width: int) -> dict:
  """config.model, a width -> the knobs of a model of this width, with equal heads."""
  heads = width // m.attn.head_dim
  shape = {'width': width, 'ffn': width * m.ffn // m.width}
  shape |= {'attn.heads': heads, 'attn.kv_heads': heads // 2}
  return {f'model.{knob}': value for knob, value in shape.items()}


def get_config(arg: str = ''):
  chosen = base.arguments(arg, **ARGUMENTS)
  c = dense_1b7.at('28l', chosen['scale'])
  c.update(lr_sweep.SCALES[chosen['scale']])
  c.name = f'transfer-{chosen["optimizer"]}-{chosen["gate"]}-{chosen["scale"]}'
  c.model.attn.gate.update(base.GATES[chosen['gate']])
  c.optim.name = chosen['optimizer']
  c.optim.base_width = WIDTHS[chosen['scale']][0]
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  chosen = base.arguments(arg, **ARGUMENTS)
  m, (narrow, wide) = get_config(arg).model, WIDTHS[chosen['scale']]
  first, count = RATES[chosen['scale']]
  models = axes.choice(
    'variant',
    narrow=at(m, narrow),
    wide=at(m, wide),
    wide_mup=at(m, wide) | {'optim.transfer': 'mup'},
  )
  rates = axes.axis('optim.lr', [round(first * 2 ** (i / 2), 6) for i in range(count)])
  return axes.product(models, rates, axes.seeds(int(chosen['seeds'])))
