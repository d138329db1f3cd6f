"""Table 7's dense 1.7B models, as Table 2 trains them for 400B tokens.

python train.py --config=configs/dense_1b7.py:28l        28 layers, 1.72B parameters
python train.py --config=configs/dense_1b7.py:48l,gate=elementwise
python train.py --config=configs/dense_1b7.py:48l,scale=proxy
A step is 1024 * 4096 tokens; add --config.batch=8 for one GPU with 139 GiB. Estimated
time: 59 h (28l) or 63 h (48l) on 64 H200 at 35% MFU; published perplexity 7.499 or 7.421.

Published: the architecture, the peak learning rate, the batch and the tokens. Assumed,
because unpublished for the dense models: warm-up 1k steps and floor 3e-5 (the MoE's,
section 3.1), weight decay 0.1, clipping at 1.0, init std 0.02. table2.py narrows the FFN
of gated models; this recipe does not.
"""

from configs import base, rows

SHAPES = {
  '28l': {
    'paper': dict(depth=28, width=2048, ffn=6144),
    'proxy': dict(depth=18, width=512, ffn=1536),
    'test': dict(depth=2, width=32, ffn=96),
  },
  # This shape is deeper, narrower and less stable.
  '48l': {
    'paper': dict(depth=48, width=1536, ffn=4608),
    'proxy': dict(depth=30, width=384, ffn=1152),
    'test': dict(depth=4, width=24, ffn=72),
  },
}

SCALES = {
  'paper': dict(
    steps=95_367,  # 400B tokens
    batch=1024,
    model=dict(
      vocab=151_936,
      layers='unroll',
      attn=dict(heads=16, kv_heads=8, head_dim=128),
    ),
    optim=dict(lr=4e-3, warmup=1000, floor=3e-5),  # warm-up and floor are assumed
  ),
  'proxy': dict(
    model=dict(attn=dict(heads=8, kv_heads=4, head_dim=64)),
    optim=dict(lr=4e-3, floor=3e-5),
  ),
  'test': dict(
    model=dict(attn=dict(heads=4, kv_heads=2, head_dim=8)),
    optim=dict(lr=4e-3, floor=3e-5),
  ),
}

ASSUMED = (
  *rows.ASSUMED,
  "optim.warmup, floor: the MoE's; nothing is said of the dense models",
  'steps: the tokens over the batch; 400B may be 100k steps, as of the MoE',
)


def get_config(arg: str = ''):
  chosen = base.arguments(arg, *SHAPES, gate=tuple(base.GATES), scale=tuple(SCALES))
  c = at(chosen[''], chosen['scale'])
  size = '' if chosen['scale'] == 'paper' else f'-{chosen["scale"]}'
  c.name = f'dense-1b7-{chosen[""]}-{chosen["gate"]}{size}'
  c.model.attn.gate.update(base.GATES[chosen['gate']])
  return c


def at(shape: str, scale: str):
  """A shape and a scale -> the ungated model's recipe."""
  c = base.get_config()
  c.update(rows.SCALES[scale])
  c.update(SCALES[scale])
  c.model.update(SHAPES[shape][scale])
  c.paper.assumed = ASSUMED
  return c
