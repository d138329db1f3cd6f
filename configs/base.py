"""Every knob, its default, and why. Other recipes hold only differences from this page.

On the command line a knob is `--config.` and its path: `--config.optim.lr=4.5e-3`.
"""

from ml_collections import ConfigDict

GATES = {
  'none': dict(position='none'),
  'headwise': dict(position='sdpa', granularity='headwise'),
  'elementwise': dict(position='sdpa', granularity='elementwise'),
}


def get_config(arg: str = '') -> ConfigDict:
  arguments(arg)
  c = ConfigDict()
  c.name = 'base'  # the recipe's slug, in the name of its workdir
  c.seed = 0  # of the weights and of the order of the data
  c.steps = 1000  # optimizer steps
  c.batch = 32  # sequences in a step, over all devices
  c.accum = 1  # micro-batches a step is split into, to save memory
  c.init_from = ''  # WORKDIR or WORKDIR:STEP whose weights a fresh schedule starts from
  c.model = model()
  c.loss = dict(
    z=0.0,  # weight of the squared log-partition; 1e-4 in PaLM, unpublished in the paper
    chunk=1024,  # tokens per device whose logits exist at a time
    balance=0.008,  # of each layer's load-balancing loss; Table 4 of arXiv 2501.11873
    balance_over='global',  # the batch; buffer: its micro-batches so far; micro: each
    router_z=1e-3,  # of each layer's squared router log-partition; ST-MoE's
  )
  c.optim = optim()
  c.data = dict(
    mixture='stdlib',  # the embedded corpus, or DIR[@DOMAIN][=WEIGHT],... as prepared;
    # a DIR may be gs://... or s3://...
    length=256,  # T, tokens in a row
    tokenizer='bytes',  # of the embedded corpus: bytes, or bpe:SIZE
    cache='',  # where that, and what is copied from a store, is kept; '' as the platform
    verify='sha256',  # of each shard when a dataset is opened; or size, for huge ones
    workers=0,  # processes that read rows; 0 reads in threads
    prefetch=8,  # batches read ahead
  )
  c.mesh = dict(
    choice='hand',  # auto: axes at 1 or -1 get the sizes that are estimated fastest
    data=1,  # replicas of the weights, each with its own rows
    fsdp=-1,  # splits the weights and the rows; -1 is all devices left
    expert=1,  # splits experts; other layers see it as data
    tensor=1,  # splits heads, the FFN and the vocabulary
    context=1,  # splits the tokens of a row
  )
  c.eval = dict(
    every=200,  # steps between held-out losses; each save has one too
    rows=64,  # held-out rows read per domain, 0 for all
  )
  c.checkpoint = dict(
    every=500,  # steps between saves; the last step is always saved
    keep=2,  # the newest so many are kept, and the best
    keep_every=0,  # every multiple is kept for good; 0 for none
  )
  c.stability = dict(
    on_spike='none',  # recorded; skip: its update is; rollback: also goes back, and past
    threshold=6.0,  # of a spike: deviations above the mean, of the loss or gradient norm
    window=128,  # steps that mean and deviation are of; no spike before half of them
    max_bad_steps=8,  # skipped in a row (what is not finite always is): back, or stop
    max_rollbacks=8,  # of a whole run, then it stops
    stuck_after=1800.0,  # seconds without a step, and a process dumps stacks and leaves
    peer_timeout=100,  # seconds without a sign of life, and a process counts as lost
  )
  c.log = dict(
    every=1,  # steps between records in metrics.jsonl
    tensorboard=True,
    wandb='',  # a project's name sends metrics to Weights & Biases; '' sends nothing
    profile_first=-1,  # first step of a profiler window; -1 for none
    profile_last=-1,  # its last step
    indicators=0,  # steps between early warnings (gated/indicators.py), each of which
    # costs a forward pass of a few rows; 0 for none, as a short run needs none
  )
  c.paper = dict(
    table='',  # that the recipe is a row of; '' for one that is in no table
    row='',
    baseline='',  # RECIPE.py:ROW that its parameters are counted against
    added=-1.0,  # million parameters over it, as printed; -1 where none is
    published=dict(),  # what the paper measured, by name
    assumed=(),  # what it leaves open, and what stands here instead
  )
  return c


def model() -> dict:
  return dict(
    vocab=512,  # at least the tokenizer's; a multiple of config.mesh.tensor
    width=256,
    depth=4,
    ffn=704,  # hidden size of SwiGLU; of each expert, where there are experts
    tied=True,  # one table embeds and unembeds
    mask_documents=True,  # the paper leaves open whether packed documents see each other
    layers='scan',  # compiles one layer; unroll compiles each, and runs faster
    remat='none',  # full or dots recompute in the backward pass to save memory
    norm='rms',  # gated: a low-rank gate on each norm's output (arXiv 2601.22966)
    norm_rank=16,  # of the gated norm
    branch_norm='none',  # rms: sandwich norm, on what a branch adds to the residual
    branch_clip=0.0,  # clips what a branch adds to (-c, c), appendix A.6; 0 for none
    logit_cap=0.0,  # c tanh(logit / c) before the loss (arXiv 2408.00118); 0 for none
    numerics=dict(
      weights='float32',
      compute='bfloat16',
      init_std=0.02,  # Megatron's default; the paper does not say
      residual_init='plain',  # depth divides by sqrt(2 * depth) before the residual
      norm_eps=1e-6,
    ),
    attn=dict(
      heads=4,
      kv_heads=2,
      head_dim=64,  # independent of width / heads
      qk_norm=True,  # Table 7
      bias=False,
      out_bias=False,
      rope_base=10_000.0,
      yarn=dict(
        factor=1.0,  # by which the context is stretched (arXiv 2309.00071); 1 for none
        original=4096,  # tokens of context before that
        beta_fast=32.0,  # dims that turn more often over `original` stay as they are
        beta_slow=1.0,  # dims that turn less often are stretched whole
        attention=0.0,  # scales queries and keys; 0 for YaRN's own 0.1 ln(factor) + 1
      ),
      normalizer='softmax',  # off_by_one, sink_logit, sigmoid, softpick: other remedies
      sink_tokens=0,  # learned keys and values that every token sees
      sink_values='learned',  # zero: such a token takes attention and adds nothing
      logit_cap=0.0,  # c tanh(score / c) on attention scores; 0 for none
      output='none',  # rms_norm or silu on each head's output (Table 3)
      switch=dict(
        where='none',  # value or key_value: SwitchHead's experts (Table 6)
        experts=1,
        top_k=1,
      ),
      backend='auto',
      max_segments=16,  # documents a packed row may hold; fused kernels pay for each
      gate=gate(),
    ),
    moe=dict(
      experts=0,  # 0: one dense FFN
      top_k=8,  # experts that a token goes to
      norm_topk=True,  # their weights sum to 1; the paper does not say, Qwen3 does so
      shared=0,  # experts that every token goes to, beside those
      dispatch='dropless',  # capacity: an expert takes only so many tokens
      capacity=1.25,  # times the mean load, for dispatch='capacity'
      backend='auto',
    ),
  )


def gate() -> dict:
  return dict(
    position='none',  # query G4, key G3, value G2, sdpa G1, out G5
    granularity='elementwise',
    heads='specific',
    mean='after',  # a shared gate averages scores; the paper does not say which side
    form='multiply',
    activation='sigmoid',
    source='input',  # parameter: the same for every token; value: from V, not from X
    init='normal',
    std=0.02,  # as any other weight in the authors' code
    lr=1.0,
    place='before',  # Eq. 1 read literally: after the projection, before QK-norm
  )


def optim() -> dict:
  return dict(
    name='adamw',  # or muon, for the matrices of the layers, and AdamW for the rest
    lr=1e-3,
    schedule='cosine',
    warmup=100,
    decay=100,  # steps of the final decay, for wsd
    floor=1e-5,
    b1=0.9,  # with b2 the usual pair of Qwen's reports; the paper says AdamW's defaults
    b2=0.95,
    eps=1e-8,
    muon=dict(
      momentum=0.95,  # with nesterov and 5 steps: Keller Jordan's, kept by Moonlight
      nesterov=True,
      steps=5,  # of the iteration by Newton and Schulz
      rms=0.2,  # of an update: as AdamW's, so that lr and decay suit both (2502.16982)
    ),
    weight_decay=0.1,
    decay_by='lr',  # schedule decays at a rate independent of the peak learning rate
    clip=1.0,  # Megatron's default; the paper does not say
  )


def rule() -> dict[str, float]:
  """When a run of a sweep has diverged, unless its recipe has a `get_rule`."""
  return dict(
    multiple=1.5,  # of the best final loss, beyond what any sound learning rate makes
    rise=0.5,  # nats above its lowest level at its end: far beyond the noise of a level
    tail=0.05,  # of a run's logged losses, whose median is its level
  )


def arguments(arg: str, *words: str, **values: tuple[str, ...]) -> dict[str, str]:
  """'48l,gate=headwise' -> {'': '48l', 'gate': 'headwise'}, checked.

  `words` are the allowed bare words (the first is the default), `values` the allowed
  values by key (likewise).
  """
  chosen = {'': words[0] if words else ''} | {k: v[0] for k, v in values.items()}
  for part in filter(None, arg.split(',')):
    key, equals, value = part.partition('=')
    key, value = (key, value) if equals else ('', part)
    allowed = words if key == '' else values.get(key, ())
    if value not in allowed:
      known = [*words, *(f'{k}={v}' for k, vs in values.items() for v in vs)]
      expected = f'allowed are {", ".join(known)}' if known else 'this recipe takes none'
      raise ValueError(f'recipe argument {part!r}: {expected}')
    chosen[key] = value
  return chosen
