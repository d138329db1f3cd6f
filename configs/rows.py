"""The rows of the paper's tables: a recipe, a row's changes to it, the published numbers.

A table maps a row's name to (changes, *published numbers). `changes` maps knobs below
config.model to a value, or to a function of the default, so that one table serves every
scale. None marks a number that the paper does not print.

Scales: `paper` is the paper's own. `proxy` keeps Table 7's ratios of shapes, in a model
for one GPU. By default it trains about 23 epochs of the embedded corpus (3.5M tokens), in
batches for 2 CPU cores. Use more text and a larger batch before trusting a difference.
`test` trains in seconds on a CPU.
"""

from configs import base

# Shared by all recipes at a scale.
SCALES = {
  'paper': dict(
    loss=dict(chunk=4096),
    data=dict(length=4096),
    eval=dict(every=1000, rows=128),
    checkpoint=dict(every=1000),
    log=dict(indicators=100),
  ),
  'proxy': dict(
    steps=20_000,
    batch=8,
    model=dict(vocab=2048, layers='unroll'),
    optim=dict(warmup=200),
    data=dict(length=512, tokenizer='bpe:2048'),
    eval=dict(every=500, rows=128),
    checkpoint=dict(every=1000),
    log=dict(indicators=100),
  ),
  'test': dict(
    steps=20,
    batch=8,
    # Large initial weights, so that the loss falls within 20 steps.
    model=dict(
      vocab=320,
      width=32,
      numerics=dict(compute='float32', init_std=0.1),
      attn=dict(gate=dict(std=0.1)),
    ),
    optim=dict(warmup=2),
    data=dict(length=32),
    eval=dict(every=10, rows=8),
    checkpoint=dict(every=10),
  ),
}

# Our choices for all rows, where the paper gives none.
ASSUMED = (
  "optim.b1, b2, weight_decay: Qwen's usual; the paper says AdamW's defaults",
  "optim.clip, model.numerics.init_std: Megatron's defaults",
  "model.vocab: the default of the authors' code; the released models fit 152,064",
  'model.mask_documents: whether packed documents see each other is not said',
  'data: not published',
)

# Our choices for rows that change this knob, where the paper gives none.
OPEN = {
  'attn.gate.place': 'attn.gate.place: before QK-norm, as Eq. 1 reads literally',
  'attn.gate.mean': 'attn.gate.mean: which side of the sigmoid is averaged is not said',
  'attn.output': 'attn.output: an RMSNorm has a scale for each head and channel',
  'attn.switch.where': 'attn.switch: the paper counts more parameters than it describes',
  'branch_norm': 'model.branch_norm: which norm the sandwich has is not said',
  'branch_clip': 'model.branch_clip: appendix A.6, which prints no numbers',
  'moe.top_k': 'moe.top_k: 12 of 132 is inferred; both numbers are said to grow',
}


def times(factor: float):
  return lambda value: round(factor * value)


def plus(number: int):
  return lambda value: value + number


def gate(position: str, **knobs: str) -> dict:
  """The changes of a gated row, for example gate('sdpa', granularity='headwise')."""
  return {f'attn.gate.{k}': v for k, v in {'position': position, **knobs}.items()}


def switch(where: str, experts: int, top_k: int) -> dict:
  """The changes of a row with SwitchHead's experts for keys and values."""
  knobs = {'where': where, 'experts': experts, 'top_k': top_k}
  return {f'attn.switch.{k}': v for k, v in knobs.items()}


def pick(arg: str, rows: dict, columns: tuple, table: str, start):
  """'ROW,scale=SCALE' -> that row's recipe: `start(scale)` with the row's changes.

  The first column holds the extra parameters in millions, relative to the first row.
  """
  chosen = base.arguments(arg, *rows, scale=tuple(SCALES))
  c = start(chosen['scale'])
  changes, *printed = rows[chosen['']]
  change(c, changes)
  printed = dict(zip(columns, printed, strict=True))
  record(c, table, chosen, baseline=next(iter(rows)), printed=printed, changes=changes)
  return c


def change(c, changes: dict) -> None:
  for knob, value in changes.items():
    *path, last = knob.split('.')
    group = c.model
    for part in path:
      group = group[part]
    group[last] = value(group[last]) if callable(value) else value


def record(c, table: str, chosen: dict, *, baseline: str, printed: dict, changes: dict):
  """Records the row and its published numbers in config.paper."""
  row, scale = chosen[''], chosen['scale']
  c.name = f'{table}-{row}-{scale}'
  numbers = {k: float(v) for k, v in printed.items() if v is not None}
  # The paper gives parameter counts only for its own scale.
  added = numbers.pop('added') if 'added' in numbers else -1.0
  added = added if scale == 'paper' else -1.0
  ours = () if scale == 'paper' else (f'scale={scale}: shapes, steps and data are ours',)
  left_open = tuple(OPEN[knob] for knob in changes if knob in OPEN)
  c.paper.update(
    table=table,
    row=row,
    baseline=f'{table}.py:{baseline},scale={scale}',
    added=added,
    published=numbers,
    assumed=(*c.paper.assumed, *left_open, *ours),
  )
