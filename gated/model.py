"""The decoder: blocks of gated attention and SwiGLU, stacked, and what a token costs.

Pre-norm: x += attention(norm(x)); x += ffn(norm(x)). The layers' parameters are stacked
along a leading dim, and run by `jax.lax.scan` or by an unrolled loop.

B batch  T tokens  D width  V vocabulary  L layers
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gated import attention, config, mesh
from gated.layers import Embed, Numerics, RMSNorm, SwiGLU, named, rope_angles

_POLICIES = jax.checkpoint_policies

# What the forward pass keeps for the backward pass; the rest is computed again.
REMAT = {
  'none': None,  # keep everything: fastest, most memory
  'full': _POLICIES.nothing_saveable,  # keep only each layer's input
  'dots': _POLICIES.dots_with_no_batch_dims_saveable,  # keep the outputs of projections
}


@dataclass(frozen=True, kw_only=True)
class Config:
  """A dense decoder."""

  vocab: int  # V
  width: int  # D
  depth: int  # L
  ffn: int  # hidden size of SwiGLU
  tied: bool  # one table embeds and unembeds
  mask_documents: bool  # a token attends within its own document; else a row is one
  layers: str  # scan, or unroll
  remat: str  # of REMAT
  numerics: Numerics
  attn: attention.Config

  def __post_init__(self):
    for name in ('vocab', 'width', 'depth', 'ffn'):
      config.at_least(f'config.model.{name}', getattr(self, name), 1)
    config.one_of('config.model.layers', self.layers, ('scan', 'unroll'))
    config.one_of('config.model.remat', self.remat, REMAT)


class Block(nnx.Module):
  """One layer: x_BTD -> x_BTD."""

  def __init__(self, cfg: Config, key: jax.Array):
    std_out = cfg.numerics.residual_std(cfg.depth)
    opts: dict[str, Any] = dict(width=cfg.width, std_out=std_out, numerics=cfg.numerics)
    self.attn_norm = RMSNorm(cfg.width, axes=(None,), numerics=cfg.numerics)
    self.attn = attention.Attention(cfg.attn, named(key, 'attn'), **opts)
    self.ffn_norm = RMSNorm(cfg.width, axes=(None,), numerics=cfg.numerics)
    self.ffn = SwiGLU(named(key, 'ffn'), hidden=cfg.ffn, **opts)

  def __call__(self, x_BTD, angle_BTk, segment_BT) -> jax.Array:
    x_BTD = mesh.constrain(x_BTD, 'batch', 'tokens', None)
    x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), angle_BTk, segment_BT)
    return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nnx.Module):
  """A language model: `model(tokens) -> logits`; training goes through `hidden`."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.cfg = cfg
    table = functools.partial(Embed, vocab=cfg.vocab, width=cfg.width)
    self.embed = table(named(key, 'embed'), numerics=cfg.numerics)
    keys = jax.random.split(named(key, 'blocks'), cfg.depth)
    self.blocks = jax.vmap(lambda k: Block(cfg, k))(keys)
    self.norm = RMSNorm(cfg.width, axes=(None,), numerics=cfg.numerics)
    head = named(key, 'head')
    self.head = None if cfg.tied else table(head, numerics=cfg.numerics)

  def hidden(self, token_BT, segment_BT=None, position_BT=None) -> jax.Array:
    """Tokens -> the final, normalised hidden states x_BTD, in the compute dtype.

    Without segments a row is one document; without positions they count from 0. So it is
    too, whatever is given, where `mask_documents` is off.
    """
    cfg = self.cfg
    if not cfg.mask_documents:
      segment_BT = position_BT = None
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    angle_BTk = rope_angles(position_BT, cfg.attn.head_dim, cfg.attn.rope_base)
    run = lambda x, block: block(x, angle_BTk, segment_BT)
    if cfg.remat != 'none':
      run = jax.checkpoint(run, policy=REMAT[cfg.remat], prevent_cse=cfg.layers != 'scan')
    x_BTD = self.embed(token_BT)
    if cfg.layers == 'scan':
      x_BTD, _ = jax.lax.scan(lambda x, b: (run(x, b), None), x_BTD, self.blocks)
    else:
      for block in unstack(self.blocks, cfg.depth):
        x_BTD = run(x_BTD, block)
    return self.norm(mesh.constrain(x_BTD, 'batch', 'tokens', None))

  def unembedding(self) -> jax.Array:
    """The weight w_VD whose product with the hidden states is the logits."""
    return (self.embed if self.head is None else self.head).table[...]

  def __call__(self, token_BT, segment_BT=None, position_BT=None) -> jax.Array:
    """Tokens -> logits_BTV in float32, all of them at once: for evaluation and parity."""
    x_BTD = self.hidden(token_BT, segment_BT, position_BT)
    w_VD = self.unembedding().astype(x_BTD.dtype)
    return jnp.einsum('btd,vd->btv', x_BTD, w_VD, preferred_element_type=jnp.float32)


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


def flops_per_token(cfg: Config, length: int) -> float:
  """Model FLOPs per trained token: 6 per weight of a matrix, and causal attention.

  2 per multiply-add, forward once and backward twice; the embedding's lookup is free,
  recomputation is not counted, and a packed row counts as one document.
  """
  is_parameter = lambda x: isinstance(x, nnx.Variable)
  parameters = jax.tree.leaves(abstract(cfg).blocks, is_leaf=is_parameter)
  matrices = [p for p in parameters if 'embed' in p.axes and len(p.axes) > 1]
  weights = count(matrices) + cfg.vocab * cfg.width
  pairs = (length + 1) / 2  # keys that a query meets, on average
  return 6.0 * weights + 12.0 * cfg.depth * cfg.attn.heads * cfg.attn.head_dim * pairs
