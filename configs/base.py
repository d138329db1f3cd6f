"""Every knob, its default and the reason.

Other recipes hold only their differences. Set a knob on the command line by its path:
`--config.optim.lr=4.5e-3`. "The paper" is arXiv 2505.06708; "unpublished" means that it
gives no value.
"""

from ml_collections import ConfigDict

GATES = {
  'none': dict(position='none'),
  'headwise': dict(position='sdpa', granularity='headwise'),
  'elementwise': dict(position='sdpa', granularity='elementwise'),
}

# Named values of a group of knobs, for messages.
PRESETS = {'model.attn.gate': GATES}


def get_config(arg: str = '') -> ConfigDict:
  arguments(arg)
  c = ConfigDict()
  c.name = 'base'  # name of the recipe, used in the default workdir
  c.seed = 0  # seeds the initial weights and the order of the data
  c.steps = 1000  # optimizer steps
  c.batch = 32  # sequences per step, over all devices
  c.accum = 1  # micro-batches per step; more of them need less memory
  # WORKDIR, WORKDIR:STEP or a Hugging Face folder to take initial weights from.
  c.init_from = ''
  # A Hugging Face folder whose config.json sets knobs of `model`: shapes, RoPE, norms,
  # experts, gates. Knobs on the command line take precedence.
  c.model_from = ''
  c.model = model()
  c.loss = dict(
    z=0.0,  # weight of the squared log-partition; PaLM uses 1e-4; unpublished
    chunk=1024,  # tokens per device per block of logits; smaller saves memory
    balance=0.008,  # weight of each load-balancing loss; Table 4 of arXiv 2501.11873
    # Expert loads are counted over the batch (global), over its micro-batches so far
    # (buffer), or over each micro-batch (micro).
    balance_over='global',
    router_z=1e-3,  # weight of the squared router log-partition, per layer; from ST-MoE
  )
  c.optim = optim()
  c.data = dict(
    # The embedded corpus, or DIR[@DOMAIN][=WEIGHT],... with directories (also gs:// or
    # s3://) from scripts/prepare_data.py.
    mixture='stdlib',
    length=256,  # tokens per row, T
    tokenizer='bytes',  # bytes or bpe:SIZE; only for the embedded corpus
    # Folder for the embedded corpus and for copies of remote datasets; '' is the
    # platform's cache folder.
    cache='',
    verify='sha256',  # check of each shard at start; size is faster, for huge datasets
    workers=0,  # processes that read rows; 0 reads in threads
    prefetch=8,  # batches read ahead
  )
  c.mesh = dict(
    choice='hand',  # auto replaces axes of 1 or -1 by the estimated fastest sizes
    data=1,  # replicas of the weights; each reads its own rows
    fsdp=-1,  # shards weights and rows; -1 takes all remaining devices
    expert=1,  # shards experts; acts as a data axis in the other layers
    tensor=1,  # shards heads, the FFN and the vocabulary
    context=1,  # shards the tokens of a row
  )
  c.eval = dict(
    every=200,  # steps between held-out losses; each save also measures one
    rows=64,  # held-out rows per domain; 0 for all
  )
  c.checkpoint = dict(
    every=500,  # steps between saves; the last step is always saved
    keep=2,  # number of newest checkpoints kept, besides the best
    keep_every=0,  # checkpoints at multiples of this step are never deleted; 0 for none
  )
  c.stability = dict(
    # none records a spike; skip also drops its update; rollback also restores the last
    # checkpoint and skips the batches up to the spike. Non-finite updates are always
    # dropped.
    on_spike='none',
    # A spike: the loss or the gradient norm is this many standard deviations above its
    # mean over the last `window` steps. Detection starts after half a window.
    threshold=6.0,
    window=128,
    max_bad_steps=8,  # dropped updates in a row before the run rolls back or stops
    max_rollbacks=8,  # rollbacks in a run before it stops
    # Seconds without progress before a process prints its stacks and exits; 0 for never.
    stuck_after=1800.0,
    peer_timeout=100,  # seconds without a heartbeat before a process counts as lost
  )
  c.log = dict(
    every=1,  # steps between records in metrics.jsonl
    tensorboard=True,
    wandb='',  # Weights & Biases project; '' for none
    profile_first=-1,  # first step to profile; -1 for none
    profile_last=-1,  # last step to profile
    # Steps between early-warning measurements (gated/probes/indicators.py). Each costs a
    # forward pass of a few rows; 0 for none.
    indicators=0,
    # Steps between probes (docs/probes.md). Each costs some forward passes of a few rows;
    # 0 for none.
    probes=0,
    # Steps between samples: continuations of a few prompts, in WORKDIR/samples/STEP.json
    # and TensorBoard (docs/evaluation.md); 0 for none.
    samples=0,
    sample_prompts=(),  # texts to continue; () for the beginnings of held-out documents
    sample_tokens=64,  # new tokens of a sample, at most
    sample_temperature=0.8,  # divides the logits; 0 takes the most probable token
  )
  c.paper = dict(
    table='',  # table of the paper; '' for a recipe outside its tables
    row='',  # row of that table
    baseline='',  # RECIPE.py:ROW of the baseline for `added`
    added=-1.0,  # published extra parameters in millions; -1 for none published
    published=dict(),  # published metrics by name
    assumed=(),  # our choices where the paper is silent
  )
  return c


def model() -> dict:
  return dict(
    vocab=512,  # at least the tokenizer's; a multiple of config.mesh.tensor
    width=256,
    depth=4,
    ffn=704,  # hidden size of SwiGLU, or of each expert in a mixture of experts
    tied=True,  # one table for input and output embeddings
    mask_documents=True,  # no attention across documents in a packed row; unpublished
    layers='scan',  # compiles one layer; unroll compiles every layer and runs faster
    remat='none',  # full or dots: recompute activations in the backward pass
    # gated adds a low-rank gate to each norm's output, pre_affine a scale to its input
    # (arXiv 2601.22966); dyt has no norms, but tanh (arXiv 2503.10622)
    norm='rms',
    norm_rank=16,  # rank of that gate
    # Initial alpha of dyt before attention, and elsewhere; the authors' smallest models
    # have the largest: (0.8, 0.2) for 7B parameters.
    norm_alpha=(1.0, 1.0),
    branch_norm='none',  # rms is sandwich norm: normalizes each branch's output
    branch_clip=0.0,  # c: clips each branch's output to (-c, c), appendix A.6; 0 for none
    logit_cap=0.0,  # c: logits become c tanh(logit / c) (arXiv 2408.00118); 0 for none
    numerics=dict(
      weights='float32',
      compute='bfloat16',
      init_std=0.02,  # Megatron's default; unpublished
      residual_init='plain',  # depth: std of branch outputs is divided by sqrt(2 * depth)
      norm_eps=1e-6,
      # fp8: products of attention's projections and of dense FFNs and shared experts in
      # eight bits, on GPUs that have them (docs/recipes.md)
      matmul='compute',
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
        factor=1.0,  # context extension (arXiv 2309.00071); 1 for none
        original=4096,  # context length before the extension, in tokens
        beta_fast=32.0,  # dims with more rotations over `original` are unchanged
        beta_slow=1.0,  # dims with fewer rotations are interpolated by `factor`
        truncate=True,  # round the ends of the interpolated range to whole pairs
        # Scale of queries and keys, at any factor. 0: with r(m) = 0.1 m ln(factor) + 1,
        # r(1), as in the paper, or r(mscale) / r(mscale_all_dim), as in transformers.
        attention=0.0,
        mscale=0.0,  # 0 for r(1)
        mscale_all_dim=0.0,  # 0 for r(1)
      ),
      # or off_by_one, sink_logit, sigmoid, softpick, clipped, elastic
      normalizer='softmax',
      normalizer_layers='',  # as for `gate.layers`: others have the softmax; '' for all
      clip_gamma=-0.03,  # clipped: weights w become clip((zeta - gamma) w + gamma, 0, 1)
      clip_zeta=1.0,  # the values of arXiv 2306.12929, which also has gamma = -4 / T
      elastic_tau=-1.0,  # elastic: initial tau of max(0, w + tau / keys) (2601.00919)
      differential=False,  # two heads are the maps of one differential head (2410.05258)
      window=0,  # tokens that a token sees, itself included; 0 for all
      global_layers='',  # layers without the window, as for `gate.layers`; '' for none
      # flash: rounds like fused kernels; repaired: the same without their bias (arXiv
      # 2510.04212). Both need the reference kernel.
      rounding='backend',
      sink_tokens=0,  # learned keys and values that every token attends to
      sink_values='learned',  # zero: a sink token takes attention and adds nothing
      logit_cap=0.0,  # c: attention scores become c tanh(score / c); 0 for none
      output='none',  # rms_norm or silu on each head's output (Table 3)
      # V-scale (arXiv 2603.17771), v r / (r + C) with r = |v|^2: C fixed, or learned
      value_scale='none',
      switch=dict(
        where='none',  # value or key_value: SwitchHead's experts (Table 6)
        experts=1,
        top_k=1,
      ),
      backend='auto',  # fastest kernel for the device
      max_segments=16,  # limit of documents per row; fused kernels cost more for more
      mean_segments=0.0,
      gate=gate(),
      # Further gates, 'POSITION [FIELD=VALUE ...]; ...'; their other fields are those of
      # `gate`. 'value granularity=headwise' gives G1 + G2.
      gates='',
    ),
    moe=dict(
      experts=0,  # 0 for a dense FFN
      top_k=8,  # routed experts per token
      norm_topk=True,  # routing weights sum to 1, as in Qwen3; unpublished
      shared=0,  # extra experts that process every token
      dispatch='dropless',  # capacity: an expert drops tokens beyond its capacity
      capacity=1.25,  # tokens per expert over the mean load, for dispatch='capacity'
      backend='auto',  # fastest grouped matmul for the device
    ),
  )


def gate() -> dict:
  return dict(
    position='none',  # query G4, key G3, value G2, sdpa G1, out G5
    granularity='elementwise',  # headwise: one score per head
    heads='specific',  # shared: one gate for all heads
    mean='after',  # shared gates average over heads after the activation; unpublished
    form='multiply',  # or add
    activation='sigmoid',  # or one of gate.ACTIVATIONS
    source='input',  # parameter: the same for every token; value: from V instead of X
    inputs='all',  # first:N reads the first N dims of X, rank:R maps X to R features
    init='normal',  # or zero
    std=0.02,  # the authors' code uses this for all weights
    bias=False,  # the authors' code has one only with qkv_bias
    bias_init=0.0,  # sigmoid gates start open with 4, closed with -4
    lr=1.0,  # multiplier of the learning rate
    weight_decay=-1.0,  # of the gate's weights; -1 for config.optim.weight_decay
    place='before',  # before: gates query or key before QK-norm, by the wording of Eq. 1
    score='float32',  # compute: scores in the compute dtype, as in the authors' code
    opens=(0, 0),  # (a, b): no gating up to step a, full from step b on; (0, 0): always
    layers='all',  # or every:N (each N-th), first:N, last:N, or a list such as 0,5-7
  )


def optim() -> dict:
  return dict(
    name='adamw',  # muon: Muon for the layers' matrices, AdamW for the rest
    lr=1e-3,
    schedule='cosine',  # or one of optim.SCHEDULES
    warmup=100,  # steps
    decay=100,  # steps of the final decay, for schedule='wsd'
    floor=1e-5,  # final learning rate
    b1=0.9,  # with b2: common in Qwen's reports; the paper says AdamW's defaults
    b2=0.95,
    eps=1e-8,
    muon=dict(
      momentum=0.95,  # with nesterov and steps: Keller Jordan's values, as in Moonlight
      nesterov=True,
      steps=5,  # Newton-Schulz iterations
      rms=0.2,  # RMS of an update, as in AdamW, so lr fits both (arXiv 2502.16982)
    ),
    weight_decay=0.1,
    # Decay per step: lr * weight_decay (lr), or lr / peak lr * weight_decay (schedule).
    decay_by='lr',
    clip=1.0,  # limit of the gradient norm; Megatron's default; unpublished
    # QK-clip's tau: if a head's attention logits exceed it, its weights are scaled down
    # after the step (100 in Kimi K2); 0 for none. Needs model.attn.qk_norm=False.
    qk_clip=0.0,
    gates_first=0,  # first steps in which only gates learn, if added to a trained model
    # bfloat16 halves the moments' memory; stochastic rounding keeps their means.
    moments='float32',
    # True stores only the means of rows and columns of AdamW's second moments, as in
    # Adafactor: almost no memory, but not exactly AdamW's updates.
    factored=False,
    # mup: the learning rate of a model of width `base_width` suits all wider ones
    # (arXiv 2203.03466; docs/transfer.md). The other sizes grow with the width.
    transfer='none',
    base_width=256,
    base_head_dim=0,  # head_dim of that model; 0 for the same as here
  )


def rule() -> dict[str, float]:
  """The default rule for a diverged run of a sweep; a recipe's `get_rule` replaces it.

  A run's level is the median of the last `tail` of its logged losses.
  """
  return dict(
    multiple=1.5,  # final loss over the best run's; no sound learning rate exceeds it
    rise=0.5,  # nats from a run's lowest level to its final one; far above the noise
    tail=0.05,  # fraction of the logged losses
  )


def arguments(arg: str, *words: str, **values: tuple[str, ...]) -> dict[str, str]:
  """'48l,gate=headwise' -> {'': '48l', 'gate': 'headwise'}, checked.

  `words` are the allowed bare words, `values` the allowed values by key; the first of
  each is the default.
  """
  chosen = {'': words[0] if words else ''} | {k: v[0] for k, v in values.items()}
  for part in filter(None, arg.split(',')):
    key, equals, value = part.partition('=')
    key, value = (key, value) if equals else ('', part)
    allowed = words if key == '' else values.get(key, ())
    if value not in allowed:
      known = [*words, *(f'{k}={v}' for k, vs in values.items() for v in vs)]
      expected = f'allowed are {", ".join(known)}' if known else 'this recipe takes none'
      meant = [f'{k}={value}' for k, vs in values.items() if value in vs and not equals]
      hint = f'; did you mean {meant[0]}?' if meant else ''
      raise ValueError(f'recipe argument {part!r}: {expected}{hint}')
    chosen[key] = value
  return chosen
