"""The demo: a 1.8M-parameter byte model of the standard library, elementwise gate.

python train.py --config=configs/tiny.py[:gate=none|headwise|elementwise]
2 CPU cores, about 2 minutes; held-out about 2.4 bits per byte on code, 3.3 on prose.
"""

from configs import base


def get_config(arg: str = ''):
  gate = base.arguments(arg, gate=('elementwise', 'headwise', 'none'))['gate']
  c = base.get_config()
  c.name = f'tiny-{gate}'
  c.steps, c.batch = 280, 8
  c.model.update(vocab=320, width=192, depth=4, ffn=512)
  c.model.numerics.compute = 'float32'
  c.model.attn.update(heads=6, kv_heads=2, head_dim=32)
  c.model.attn.gate.update(base.GATES[gate])
  c.optim.update(lr=4e-3, warmup=30, floor=4e-4)
  c.eval.update(every=70, rows=64)
  c.checkpoint.update(every=140)
  return c
