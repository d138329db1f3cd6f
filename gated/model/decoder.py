"""The decoder: blocks of gated attention and SwiGLU or experts, stacked, and their count.

Pre-norm: x += attention(norm(x)); x += ffn(norm(x)). The layers' parameters are stacked
along a leading dim, and run by `jax.lax.scan` or by an unrolled loop.

B batch  T tokens  D width  V vocabulary  L layers
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config, kernels
from gated.devices import mesh, trees
from gated.model import attention, moe
from gated.model.embedding import Embed
from gated.model.layers import (
  NORMS,
  Numerics,
  RMSNorm,
  SwiGLU,
  named,
  rope_angles,
  rope_frequencies,
)

_POLICIES = jax.checkpoint_policies

# The most that a knob may ask for: far beyond every model there is. A larger number is a
# slip of the hand, or a stranger's, and would take the memory or the time of the machine.
LIMITS = {'vocab': 1 << 24, 'width': 1 << 20, 'depth': 1 << 12, 'ffn': 1 << 22}

# What the forward pass keeps for the backward pass; the rest is computed again.
REMAT = {
  'none': None,  # keep everything: fastest, most memory
  'full': _POLICIES.nothing_saveable,  # keep only each layer's input
  'dots': _POLICIES.dots_with_no_batch_dims_saveable,  # keep the outputs of projections
}


@dataclass(frozen=True, kw_only=True)
class Config:
  """A decoder."""

  vocab: int  # V
  width: int  # D
  depth: int  # L
  ffn: int  # hidden size of SwiGLU; of each expert, where there are experts
  tied: bool  # one table embeds and unembeds
  mask_documents: bool  # a token attends within its own document; else a row is one
  layers: str  # scan, or unroll
  remat: str  # of REMAT
  norm: str  # before each branch: rms, or gated (arXiv 2601.22966)
  norm_rank: int  # of the gated norm
  branch_norm: str  # on what a branch adds: none, or rms (sandwich norm, section 4.3)
  branch_clip: float  # clips what a branch adds to (-c, c) (appendix A.6); 0 for none
  logit_cap: float  # c tanh(logit / c) on the output; 0 for none
  numerics: Numerics
  attn: attention.Config
  moe: moe.Config

  def __post_init__(self):
    for name, most in LIMITS.items():
      config.within(f'config.model.{name}', getattr(self, name), 1, most)
    config.one_of('config.model.layers', self.layers, ('scan', 'unroll'))
    config.one_of('config.model.remat', self.remat, REMAT)
    config.one_of('config.model.norm', self.norm, NORMS)
    config.within('config.model.norm_rank', self.norm_rank, 1, LIMITS['width'])
    config.one_of('config.model.branch_norm', self.branch_norm, ('none', 'rms'))
    config.at_least('config.model.branch_clip', self.branch_clip, 0.0)
    config.at_least('config.model.logit_cap', self.logit_cap, 0.0)


class Block(nnx.Module):
  """One layer: x_BTD -> (x_BTD, its router's report, or None)."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.clip = cfg.branch_clip
    std_out = cfg.numerics.residual_std(cfg.depth)
    opts: dict[str, Any] = dict(width=cfg.width, std_out=std_out, numerics=cfg.numerics)
    norm = lambda name: NORMS[cfg.norm](
      named(key, name), cfg.width, cfg.norm_rank, cfg.numerics
    )
    sandwich = cfg.branch_norm == 'rms'
    branch_norm = lambda: RMSNorm(cfg.width, axes=(None,), numerics=cfg.numerics)
    self.attn_norm = norm('attn_norm')
    self.attn = attention.Attention(cfg.attn, named(key, 'attn'), **opts)
    self.attn_branch_norm = branch_norm() if sandwich else None
    self.ffn_norm = norm('ffn_norm')
    if cfg.moe.experts:
      self.ffn = moe.MoE(cfg.moe, named(key, 'ffn'), hidden=cfg.ffn, **opts)
    else:
      self.ffn = SwiGLU(named(key, 'ffn'), hidden=cfg.ffn, **opts)
    self.ffn_branch_norm = branch_norm() if sandwich else None

  def __call__(
    self, x_BTD, angle_BTk, segment_BT, live_BT
  ) -> tuple[jax.Array, moe.Report | None]:
    x_BTD = mesh.constrain(x_BTD, 'batch', 'tokens', None)
    y_BTD = self.attn(self.attn_norm(x_BTD), angle_BTk, segment_BT)
    x_BTD = x_BTD + self._branch(y_BTD, self.attn_branch_norm)
    y_BTD, report = self.ffn_norm(x_BTD), None
    if isinstance(self.ffn, moe.MoE):
      y_BTD, report = self.ffn(y_BTD, live_BT)
    else:
      y_BTD = self.ffn(y_BTD)
    return x_BTD + self._branch(y_BTD, self.ffn_branch_norm), report

  def _branch(self, y_BTD: jax.Array, norm: RMSNorm | None) -> jax.Array:
    """What a branch adds to the residual, normalised and clipped if so configured."""
    y_BTD = y_BTD if norm is None else norm(y_BTD)
    return jnp.clip(y_BTD, -self.clip, self.clip) if self.clip else y_BTD


class Transformer(nnx.Module):
  """A language model: `model(tokens) -> logits`; training goes through `hidden`."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.cfg = cfg
    table = functools.partial(Embed, vocab=cfg.vocab, width=cfg.width)
    self.embed = table(named(key, 'embed'), numerics=cfg.numerics)
    keys = jax.random.split(named(key, 'blocks'), cfg.depth)
    self.blocks = jax.vmap(lambda k: Block(cfg, k))(keys)
    self.norm = NORMS[cfg.norm](
      named(key, 'norm'), cfg.width, cfg.norm_rank, cfg.numerics
    )
    head = named(key, 'head')
    self.head = None if cfg.tied else table(head, numerics=cfg.numerics)

  def hidden(
    self,
    token_BT,
    segment_BT=None,
    position_BT=None,
    *,
    through: Callable[..., tuple[jax.Array, Any]] = Block.__call__,
  ) -> tuple[jax.Array, Any]:
    """Tokens -> (the final, normalised hidden states x_BTD, the routers' reports).

    The states are in the compute dtype; the reports are stacked over layers, or None
    without experts. Without segments a row is one document; without positions they count
    from 0. So it is too, whatever is given, where `mask_documents` is off. `through` is
    called in the place of each block, with it and what it is called with.
    """
    cfg = self.cfg
    # Segment 0 is padding.
    live_BT = jnp.ones_like(token_BT, bool) if segment_BT is None else segment_BT > 0
    if not cfg.mask_documents:
      segment_BT = position_BT = None
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    frequency_k = rope_frequencies(cfg.attn.head_dim, cfg.attn.rope_base, cfg.attn.yarn)
    angle_BTk = rope_angles(position_BT, frequency_k)
    run = lambda x, block: through(block, x, angle_BTk, segment_BT, live_BT)
    if cfg.remat != 'none':
      run = jax.checkpoint(run, policy=REMAT[cfg.remat], prevent_cse=cfg.layers != 'scan')
    x_BTD = self.embed(token_BT)
    if cfg.layers == 'scan':
      x_BTD, reports = jax.lax.scan(run, x_BTD, self.blocks)
    else:
      each = []
      for block in unstack(self.blocks, cfg.depth):
        x_BTD, report = run(x_BTD, block)
        each.append(report)
      reports = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return self.norm(mesh.constrain(x_BTD, 'batch', 'tokens', None)), reports

  def unembedding(self) -> jax.Array:
    """The weight w_VD whose product with the hidden states is the logits."""
    return (self.embed if self.head is None else self.head).table[...]

  def __call__(self, token_BT, segment_BT=None, position_BT=None) -> jax.Array:
    """Tokens -> logits_BTV in float32, all of them at once: for evaluation and parity."""
    x_BTD, _ = self.hidden(token_BT, segment_BT, position_BT)
    w_VD = self.unembedding().astype(x_BTD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return kernels.soft_cap(product('btd,vd->btv', x_BTD, w_VD), self.cfg.logit_cap)


def unstack(blocks: Block, depth: int) -> list[Block]:
  """Stacked layers -> a list of them; the gradient is one concatenation per parameter."""
  leaves, tree = jax.tree.flatten(blocks)
  split = [jax.lax.split(leaf, (1,) * depth) for leaf in leaves]
  return [
    jax.tree.unflatten(tree, [jnp.squeeze(s[i], 0) for s in split]) for i in range(depth)
  ]


def abstract(cfg: Config) -> Transformer:
  """The model's shapes, without memory or computation."""
  return jax.eval_shape(lambda: Transformer(cfg, jax.random.key(0)))


def count(tree) -> int:
  """How many numbers a tree of arrays or shapes holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parts(cfg: Config) -> dict[str, int]:
  """How many parameters a model has: total, active for a token, and by part.

  `attention` is all of the attention layers but the gate; `experts` those that a router
  chooses among, of which a token visits the active ones.
  """
  sizes = {name: leaf.size for name, leaf in trees.flatten(abstract(cfg)).items()}
  within = lambda *groups: sum(
    size for name, size in sizes.items() if any(f'{g}.' in f'{name}.' for g in groups)
  )
  gate, experts = within('attn.gate'), within('ffn.experts')
  asleep = experts * (cfg.moe.experts - cfg.moe.top_k) // max(cfg.moe.experts, 1)
  return {
    'total': sum(sizes.values()),
    'active': sum(sizes.values()) - asleep,
    'embedding': within('embed', 'head'),
    'attention': within('blocks.attn') - gate,
    'gate': gate,
    'experts': experts,
  }


def flops_per_token(cfg: Config, length: int) -> float:
  """Model FLOPs per trained token: 6 per weight of a matrix, and causal attention.

  2 per multiply-add, forward once and backward twice; of experts, those that a token
  visits. The embedding's lookup is free, recomputation is not counted, and a packed row
  counts as one document.
  """
  is_parameter = lambda x: isinstance(x, nnx.Variable)
  parameters = jax.tree.leaves(abstract(cfg).blocks, is_leaf=is_parameter)
  matrices = [p for p in parameters if 'embed' in p.axes and len(p.axes) > 1]
  routed = sum(p.size for p in matrices if 'experts' in p.axes)
  weights = count(matrices) + cfg.vocab * cfg.width
  weights += routed * cfg.moe.top_k // max(cfg.moe.experts, 1) - routed
  pairs = (length + 1) / 2  # keys that a query meets, on average
  if cfg.attn.gate.position == cfg.attn.gate.source == 'value':
    # Its matrix stands between heads' channels, not at the width.
    weights += parts(cfg)['gate']
  pairs += cfg.attn.sink_tokens
  return 6.0 * weights + 12.0 * cfg.depth * cfg.attn.heads * cfg.attn.head_dim * pairs
