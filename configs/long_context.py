"""Table 5: trains a model further on longer rows, with a larger RoPE base: claim C20.

python train.py --config=configs/long_context.py:baseline,stage=start --workdir=/A \\
  --config.data.mixture=DIR
python train.py --config=configs/long_context.py:baseline --workdir=/B \\
  --config.init_from=/A --config.data.mixture=LONG \\
  --allow_change=config.model.attn.rope_base
python eval.py --workdir=/B --domain=books=FILE --length=16384 --yarn=4 --by_position
Likewise with `elementwise`, the gated model, whose FFN is narrower as in Table 2. LONG is
the text of DIR packed with --length=4096. YaRN needs no training: eval.py applies it.

Published: the base grows from 10k to 1M, the rows from 4096 to 32,768 tokens, for 80B
tokens; YaRN extends it to 128k. Assumed: everything else; the factor 4 is 128k / 32k.
scale=proxy (the default): 62M parameters, 433M tokens at 1024 and 52M at 4096; the start
trains as a point of experiments/inside, under conditions that give its baseline a sink;
it needs prepared text with a vocabulary of at most 8192.
scale=test: seconds on a CPU, from 32 to 128 tokens of the embedded corpus.
"""

from configs import base, table2

SCALES = {
  # Stage -> its differences from Table 2's model of 3.5T tokens.
  'paper': {
    'start': {},
    'extend': dict(
      steps=19_073,  # 80B tokens
      batch=128,  # 4.2M tokens, as in the rows of 400B
      data=dict(length=32_768),
      optim=dict(lr=4.5e-4, warmup=500),
      model=dict(attn=dict(max_segments=128)),
    ),
  },
  'proxy': {
    'start': dict(
      steps=6600,
      batch=64,
      data=dict(length=1024),
      optim=dict(lr=4e-3, weight_decay=1.8, warmup=400),
      model=dict(vocab=8192),
    ),
    'extend': dict(
      steps=800,
      batch=16,
      data=dict(length=4096),
      optim=dict(lr=4e-4, weight_decay=1.8, warmup=50),
      model=dict(vocab=8192, attn=dict(max_segments=64)),
    ),
  },
  'test': {
    'start': {},
    'extend': dict(
      batch=4,
      data=dict(length=128),
      optim=dict(lr=4.5e-4),
      model=dict(attn=dict(max_segments=64)),
    ),
  },
}
ASSUMED = (
  'optim.lr, warmup, floor: a tenth of the first peak, and the same end',
  'batch: the tokens of a step of the rows of 400B',
  'YaRN: factor 4 by the lengths, and its usual values',
)


def get_config(arg: str = ''):
  variants, stages = ('baseline', 'elementwise'), ('extend', 'start')
  scales = ('proxy', 'paper', 'test')
  chosen = base.arguments(arg, *variants, stage=stages, scale=scales)
  variant, stage, scale = (chosen[key] for key in ('', 'stage', 'scale'))
  match = '128' if scale == 'proxy' else 'exact'  # A GPU is slow with an odd FFN.
  c = table2.get_config(f'28l_3.5t_4.5e-3_{variant},scale={scale},match={match}')
  c.update(SCALES[scale][stage])
  c.name = f'long-context-{variant}-{stage}-{scale}'
  if stage == 'extend':
    c.model.attn.rope_base = 1e6
    c.init_from = 'START'  # Refused: --config.init_from must name a folder.
    c.paper.update(table='table5', published={}, assumed=(*c.paper.assumed, *ASSUMED))
  return c
