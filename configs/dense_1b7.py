"""Table 7's dense 1.7B models, as Table 2 trains them for 400B tokens.

python train.py --config=configs/dense_1b7.py:28l        28 layers, 1.72B parameters
python train.py --config=configs/dense_1b7.py:48l,gate=elementwise
A step is 1024 * 4096 tokens; for one GPU with 139 GiB add --config.batch=8.

Published: the architecture, the peak learning rate, the batch and the tokens. Assumed,
because unpublished for the dense models: warm-up 1k steps and floor 3e-5 (the MoE's,
section 3.1), weight decay 0.1, clipping at 1.0, init std 0.02. The FFN is not narrowed
for the gate here; table2 does that.
"""

from configs import base

SHAPES = {
  '28l': dict(depth=28, width=2048, ffn=6144),
  '48l': dict(depth=48, width=1536, ffn=4608),
}


def get_config(arg: str = ''):
  chosen = base.arguments(arg, *SHAPES, gate=tuple(base.GATES))
  c = base.get_config()
  c.name = f'dense-1b7-{chosen[""]}-{chosen["gate"]}'
  c.steps, c.batch = 95_367, 1024  # 400B tokens
  c.model.update(SHAPES[chosen['']], vocab=151_936, tied=True, layers='unroll')
  c.model.attn.update(heads=16, kv_heads=8, head_dim=128)
  c.model.attn.gate.update(base.GATES[chosen['gate']])
  c.optim.update(lr=4e-3, warmup=1000, floor=3e-5)  # warm-up and floor are assumed
  c.loss.chunk = 4096
  c.data.length = 4096
  c.eval.update(every=1000, rows=128)
  c.checkpoint.update(every=1000)
  return c
