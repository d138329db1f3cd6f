"""Best learning rates of two widths, with muP and without (docs/transfer.md).

python scripts/sweep.py run --config=configs/transfer.py
python scripts/sweep.py run --config=configs/transfer.py:optimizer=muon,gate=none,seeds=3
A byte model of two layers and width 64; one of width 256 with the standard
parametrization (wide) and with muP relative to 64 (wide_mup). 15 runs a seed of 150
steps, about 6 minutes on 2 idle CPU cores.
"""

from configs import axes, base

NARROW, WIDE, HEAD_DIM = 64, 256, 32
ARGUMENTS = dict(
  gate=('elementwise', 'headwise', 'none'),
  optimizer=('adamw', 'muon'),
  seeds=('1', '2', '3', '4', '5'),
)
RATES = tuple(2.0**power * 1e-3 for power in range(2, 7))


def get_config(arg: str = ''):
  chosen = base.arguments(arg, **ARGUMENTS)
  c = base.get_config()
  c.name = f'transfer-{chosen["optimizer"]}-{chosen["gate"]}'
  c.steps, c.batch, c.data.length = 150, 8, 64
  c.model.update(vocab=320, depth=2, **_sizes(NARROW))
  c.model.numerics.compute = 'float32'
  c.model.attn.update(head_dim=HEAD_DIM, **_heads(NARROW))
  c.model.attn.gate.update(base.GATES[chosen['gate']])
  c.optim.update(name=chosen['optimizer'], lr=1e-2, warmup=15, floor=0.0)
  c.optim.base_width = NARROW
  c.eval.update(every=150, rows=64)
  c.checkpoint.update(every=150)
  c.log.tensorboard = False
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  chosen = base.arguments(arg, **ARGUMENTS)
  wide = {f'model.{knob}': value for knob, value in _sizes(WIDE).items()}
  wide |= {f'model.attn.{knob}': value for knob, value in _heads(WIDE).items()}
  variants = axes.choice(
    'variant', narrow={}, wide=wide, wide_mup=wide | {'optim.transfer': 'mup'}
  )
  rates = axes.axis('optim.lr', RATES)
  return axes.product(variants, rates, axes.seeds(int(chosen['seeds'])))


def _sizes(width: int) -> dict[str, int]:
  return dict(width=width, ffn=2 * width)


def _heads(width: int) -> dict[str, int]:
  return dict(heads=width // HEAD_DIM, kv_heads=width // HEAD_DIM // 2)
