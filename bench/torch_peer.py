"""The steps of bench/train_step.py in PyTorch: torch.compile, SDPA and fused AdamW.

  python bench/torch_peer.py configs/dense_1b7.py:28l batch=8 -- gate=headwise
  python bench/torch_peer.py configs/moe_15b.py batch=8 model.depth=4 model.remat=none
  python bench/torch_peer.py --check configs/dense_1b7.py:28l,scale=test,gate=headwise

The same recipe, overrides, batches, learning rates and count of FLOPs; rows are whole:
causal attention over one document. Needs torch 2.10 or newer in our environment; JAX
leaves the GPU alone. The compile time is that of the first step. A knob that
bench/torch_model.py does not model is refused. With model.numerics.weights=bfloat16,
AdamW's moments are bfloat16, too, as is usual in PyTorch; ours stay float32.

--check trains both from our initial weights, in float32, for some steps. It fails if the
first losses or gradient norms differ by more than 1e-5 of them.
"""

import argparse
import dataclasses
import functools
import gc
import math
import statistics
import sys
import time

import jax
import numpy as np
import timing
from train_step import STEPS, random_batch, recipe, variants

from configs import base
from gated import config, model
from gated.devices import chips, mesh, trees
from gated.plan import Config, Plan
from gated.train import optim

TOLERANCE = 1e-5  # relative, of the first loss and the first gradient norm
CHECKED = 5  # steps

# --sdpa
SDPA = {
  'cudnn': 'CUDNN_ATTENTION',
  'flash': 'FLASH_ATTENTION',
  'efficient': 'EFFICIENT_ATTENTION',
  'math': 'MATH',
}

# Knobs that the peer models, and those that change nothing here.
MODELLED = {
  'model': 'vocab width depth ffn tied mask_documents layers',
  'model.numerics': 'weights compute init_std residual_init norm_eps',
  'model.attn': 'heads kv_heads head_dim qk_norm rope_base backend max_segments',
  'model.attn.gate': 'position granularity std',
  'model.moe': 'experts top_k norm_topk backend',
  'loss': 'chunk balance balance_over router_z',
  'optim': 'lr schedule warmup decay floor b1 b2 eps weight_decay clip',
}
KNOWN = {f'config.{g}.{knob}' for g, knobs in MODELLED.items() for knob in knobs.split()}


def check_knobs(cfg):
  """ValueError names a knob whose value the peer does not model."""
  default = config.build(Config, base.get_config().to_dict(), 'config')
  computed = lambda c: {
    'accum': c.accum,
    **{
      group: dataclasses.asdict(getattr(c, group)) for group in ('model', 'loss', 'optim')
    },
  }
  for knob, (allowed, value) in config.differences(
    computed(default), computed(cfg)
  ).items():
    if knob not in KNOWN:
      raise ValueError(f'{knob}={value!r}, but the PyTorch peer has only {allowed!r}')
  config.one_of(
    'config.model.attn.gate.position', cfg.model.attn.gate.position, ('none', 'sdpa')
  )


class Peer:
  """The PyTorch model of a recipe, its optimizer and its step."""

  def __init__(self, cfg, options, steps):
    import torch
    import torch_model

    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(cfg.seed)
    with torch.device(self.device):
      self.model = torch_model.Model(cfg.model, cfg.loss, cfg.data.length)
    self.run = self.model
    if options.compile:
      self.run = torch.compile(self.model, dynamic=False, mode=options.mode)
    o = cfg.optim
    groups, opts = self.model.groups(o.weight_decay), dict(betas=(o.b1, o.b2), eps=o.eps)
    self.optimizer = torch.optim.AdamW(groups, fused=True, **opts)
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, foreach=True)
    self.clip = functools.partial(clip, [*self.model.parameters()], o.clip or math.inf)
    rate = optim.schedule(o, cfg.steps)
    self.rates = [float(rate(i)) for i in range(steps)]
    as_tensor = lambda a: torch.from_numpy(np.asarray(a, np.int64)).to(self.device)
    self.place = lambda batch: (as_tensor(batch.tokens), as_tensor(batch.targets))

  def step(self, number, token_BT, target_BT):
    """-> the cross-entropy, and the norm of the gradient before it is clipped."""
    total, loss = self.run(token_BT, target_BT)
    total.backward()
    norm = self.clip()
    for group in self.optimizer.param_groups:
      group['lr'] = self.rates[number]
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def measure(cfg, options):
  """Runs the steps -> a line of the table."""
  import torch

  peer = Peer(cfg, options, STEPS + 2)
  cuda, times = peer.device == 'cuda', []
  wait = torch.cuda.synchronize if cuda else lambda: None
  rng = np.random.default_rng(0)
  batches = [peer.place(random_batch(cfg, 1, rng)) for _ in range(4)]
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  for i in range(STEPS + 2):
    wait()
    begun = time.perf_counter()
    loss, _ = peer.step(i, *batches[i % len(batches)])
    wait()
    times.append(time.perf_counter() - begun)
  seconds = statistics.median(times[2:])
  rate = cfg.batch * cfg.data.length / seconds
  chip = chips.of(torch.cuda.get_device_name()) if cuda else None
  peak = chip.flops if chip else math.nan
  mfu = rate * model.flops_per_token(cfg.model, cfg.data.length) / peak
  used, held = math.nan, math.nan
  if cuda:
    used = torch.cuda.max_memory_allocated() / 2**30
    held = torch.cuda.max_memory_reserved() / 2**30
  return (
    f'{1e3 * seconds:8.1f} ms {rate:10,.0f} tok/s  mfu {mfu:.3f}  {used:6.1f} GiB '
    f'peak {held:6.1f} reserved  compile {times[0]:4.0f} s  loss {float(loss):.3f}'
  )


def check(cfg, options):
  """Trains both from the same weights -> lines of a table; ValueError if they differ."""
  import torch_model

  numerics = cfg.model.numerics
  for name in ('weights', 'compute'):
    config.one_of(f'config.model.numerics.{name}', getattr(numerics, name), ('float32',))
  plan, peer = Plan(cfg), Peer(cfg, options, CHECKED)
  step, state = plan.train_step().compile(), plan.init()
  leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(state.model).items()}
  torch_model.load(peer.model, leaves)
  rng, lines = np.random.default_rng(0), []
  for i in range(CHECKED):
    batch = random_batch(cfg, 1, rng)
    theirs = [float(value) for value in peer.step(i, *peer.place(batch))]
    state, values = step(state, mesh.place(batch, plan.mesh, cfg.batch))
    ours = [float(values[name]) for name in ('loss', 'grad_norm')]
    errors = [abs(a - b) / abs(a) for a, b in zip(ours, theirs)]
    columns = zip(('loss', 'gradient norm'), ours, theirs, errors)
    lines += [
      f'step {i}  {name:13}  ours {a:.7f}  PyTorch {b:.7f}  relative difference {e:.1e}'
      for name, a, b, e in columns
    ]
    if i == 0 and not max(errors) <= TOLERANCE:
      raise ValueError('\n'.join(['they differ:', *lines]))
  return '\n' + '\n'.join(lines)


def title(cfg, options):
  """The first line, and the SDPA backend that PyTorch chooses for this recipe."""
  import torch
  from torch.nn.attention import SDPBackend

  cuda, own = torch.cuda.is_available(), cfg.model.attn
  made = functools.partial(
    torch.zeros,
    device='cuda' if cuda else 'cpu',
    dtype=getattr(torch, cfg.model.numerics.compute),
    requires_grad=True,
  )
  shapes = [
    (1, n, cfg.data.length, own.head_dim) for n in (own.heads, own.kv_heads, own.kv_heads)
  ]
  chosen = torch._fused_sdp_choice(*map(made, shapes), None, 0.0, True, enable_gqa=True)
  device = torch.cuda.get_device_name() if cuda else 'cpu'
  compiled = f'torch.compile {options.mode}' if options.compile else 'not compiled'
  return (
    f'{device}, torch {torch.__version__}, {compiled}, SDPA allowed {options.sdpa}, '
    f'chosen {SDPBackend(chosen).name}, whole rows only: causal, one document each'
  )


def main():
  parser = timing.options(__doc__, check=False, mode='default', sdpa='cudnn,flash')
  how = dict(action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--compile', help='torch.compile, in the mode of --mode', **how)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  overrides = 'KNOB=VALUE ... [-- KNOB=VALUE ...]'
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help=overrides)
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')  # JAX would take most of the GPU's memory.
  common, groups = variants(a.overrides)
  try:
    for name in a.sdpa.split(','):
      config.one_of('--sdpa', name, SDPA)
    cfgs = [recipe(a.recipe, common + group) for group in groups]
    for cfg in cfgs:
      check_knobs(cfg)
  except ValueError as problem:
    parser.error(str(problem))
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  allowed = [getattr(SDPBackend, SDPA[name]) for name in a.sdpa.split(',')]
  with sdpa_kernel(allowed, set_priority=True):
    print(title(cfgs[0], a), ' '.join([a.recipe, *common]), sep=', ')
    failed = False
    for group, cfg in zip(groups, cfgs):
      try:
        line = (check if a.check else measure)(cfg, a)
      except Exception as problem:
        failed, line = True, f'failed: {type(problem).__name__}: {str(problem)[:900]}'
      print(f'{" ".join(group) or "no override":48} {line}', flush=True)
      gc.collect()
      torch.compiler.reset()
      torch.cuda.empty_cache()
  sys.exit(failed)


if __name__ == '__main__':
  main()
