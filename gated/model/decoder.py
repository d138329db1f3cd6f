"""The decoder: embedding, blocks, final norm and logits.

Pre-norm blocks: x += attention(norm(x)); x += ffn(norm(x)), where ffn is SwiGLU or a
mixture of experts. The parameters of all layers are stacked along a leading dim; the
layers run in `jax.lax.scan` or in an unrolled loop.

B batch  T tokens  D width  V vocabulary  L layers
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config, kernels
from gated.devices import mesh
from gated.model import attention, differential, moe, stacks
from gated.model.embedding import Embed
from gated.model.layers import (
  Numerics,
  RMSNorm,
  SwiGLU,
  child_key,
  rope_angles,
  rope_frequencies,
)
from gated.model.norms import EMBEDDINGS_SCALED, NORMS, Scale

_POLICIES = jax.checkpoint_policies

# Upper limits of the knobs, far above any existing model: a typo or an untrusted config
# must not exhaust the machine's memory or time.
LIMITS = {'vocab': 1 << 24, 'width': 1 << 20, 'depth': 1 << 12, 'ffn': 1 << 22}

# Tensors that the forward pass stores for the backward pass; the rest is recomputed.
REMAT = {
  'none': None,  # everything: fastest, most memory
  'full': _POLICIES.nothing_saveable,  # each layer's input only
  'dots': _POLICIES.dots_with_no_batch_dims_saveable,  # outputs of projections
}


@dataclass(frozen=True, kw_only=True)
class Config:
  """Model configuration: `config.model`."""

  vocab: int  # V
  width: int  # D
  depth: int  # L
  ffn: int  # hidden size of SwiGLU, or of each expert
  tied: bool  # the unembedding is the embedding table
  mask_documents: bool  # attend within documents; False: a row is one document
  layers: str  # scan, or unroll
  remat: str  # a key of REMAT
  norm: str  # norm before each branch: a key of NORMS
  norm_rank: int  # rank of the gated norm
  norm_alpha: tuple[float, float]  # initial alpha of dyt: before attention, elsewhere
  branch_norm: str  # norm after each branch: none, or rms (sandwich norm, section 4.3)
  branch_clip: float  # clips each branch's output to (-c, c) (appendix A.6); 0: off
  logit_cap: float  # c tanh(logit / c) on the output; 0: off
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
    if len(self.norm_alpha) != 2 or min(self.norm_alpha) <= 0:
      raise ValueError(
        f'config.model.norm_alpha={self.norm_alpha}, but two numbers above 0 are expected'
      )
    config.one_of('config.model.branch_norm', self.branch_norm, ('none', 'rms'))
    config.at_least('config.model.branch_clip', self.branch_clip, 0.0)
    config.at_least('config.model.logit_cap', self.logit_cap, 0.0)
    # A gate that is off is checked too.
    for name, gate in ({'gate': self.attn.gate} | self.attn.named).items():
      config.layers(f'{self.attn.knob(name)}.layers', gate.layers, self.depth)
      if gate.part[1] > self.width:
        raise ValueError(
          f'{self.attn.knob(name)}.inputs={gate.inputs!r}, but X has only '
          f'config.model.width={self.width} dims'
        )
    # These raise ValueError for a pattern that does not fit.
    self._pattern('normalizer_layers')
    if self.attn.window and not self.windowed:
      raise ValueError(
        f'config.model.attn.global_layers={self.attn.global_layers!r} are all layers, so '
        f'that none has config.model.attn.window={self.attn.window}'
      )

  @functools.cached_property
  def gated(self) -> dict[str, tuple[int, ...]]:
    """The layers of each gate, by its name in `attention.Config.named`."""
    return {
      name: config.layers(f'{self.attn.knob(name)}.layers', gate.layers, self.depth)
      for name, gate in self.attn.named.items()
    }

  @functools.cached_property
  def windowed(self) -> tuple[int, ...]:
    """The layers whose attention has a window."""
    every = self._pattern('global_layers') if self.attn.window else range(self.depth)
    return tuple(i for i in range(self.depth) if i not in every)

  def _pattern(self, name: str) -> tuple[int, ...]:
    """The layers of a knob of `attn`; () if it is empty."""
    text = getattr(self.attn, name)
    return config.layers(f'config.model.attn.{name}', text, self.depth) if text else ()

  @functools.cached_property
  def normalizer_layers(self) -> tuple[int, ...]:
    """The layers with `attn.normalizer`; the others have the softmax."""
    return self._pattern('normalizer_layers') or tuple(range(self.depth))

  @property
  def modules(self) -> dict[str, tuple[int, ...]]:
    """Attention modules that not all layers have -> the layers that have them."""
    return self.gated | dict.fromkeys(('sinks', 'elastic'), self.normalizer_layers)

  @property
  def runs(self) -> list[tuple[frozenset[str], int]]:
    """Runs of layers with the same modules, normalizer and window: (names, layers)."""
    also = {'normalizer': self.normalizer_layers, 'window': self.windowed}
    parts = self.modules | also
    of = lambda i: frozenset(name for name, layers in parts.items() if i in layers)
    groups = itertools.groupby(range(self.depth), of)
    return [(names, len([*run])) for names, run in groups]


class BlockTrace(NamedTuple):
  """Tensors inside one layer; under jit, unused fields cost nothing.

  All but `attn` and `report` are (B, T, D).
  """

  attn: attention.Trace
  attn_branch: jax.Array  # the summand of attention in the residual stream
  middle: jax.Array  # the residual stream between the branches
  ffn_branch: jax.Array  # the summand of the FFN
  output: jax.Array  # the residual stream after the layer
  report: moe.Report | None  # the router's statistics


class Block(nnx.Module):
  """One layer: x_BTD -> (x_BTD, the router's report or None)."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.clip = cfg.branch_clip
    std_out = cfg.numerics.residual_std(cfg.depth)
    opts: dict[str, Any] = dict(width=cfg.width, std_out=std_out, numerics=cfg.numerics)
    norm = lambda name, alpha: NORMS[cfg.norm](cfg, child_key(key, name), alpha)
    sandwich = cfg.branch_norm == 'rms'
    branch_norm = lambda: RMSNorm(cfg.width, axes=(None,), numerics=cfg.numerics)
    self.attn_norm = norm('attn_norm', cfg.norm_alpha[0])
    self.attn = attention.Attention(cfg.attn, child_key(key, 'attn'), **opts)
    self.attn_branch_norm = branch_norm() if sandwich else None
    self.ffn_norm = norm('ffn_norm', cfg.norm_alpha[1])
    if cfg.moe.experts:
      self.ffn = moe.MoE(cfg.moe, child_key(key, 'ffn'), hidden=cfg.ffn, **opts)
    else:
      self.ffn = SwiGLU(child_key(key, 'ffn'), hidden=cfg.ffn, **opts)
    self.ffn_branch_norm = branch_norm() if sandwich else None

  def __call__(
    self, x_BTD, angle_BTk, segment_BT, live_BT
  ) -> tuple[jax.Array, moe.Report | None]:
    trace = self.trace(x_BTD, angle_BTk, segment_BT, live_BT)
    return trace.output, trace.report

  def trace(
    self,
    x_BTD,
    angle_BTk,
    segment_BT,
    live_BT,
    cache: attention.Cache | None = None,
    *,
    lse: bool = False,
  ) -> BlockTrace:
    """The same computation -> all its tensors; `Attention.trace` has the options."""
    x_BTD = mesh.constrain(x_BTD, 'batch', 'tokens', None)
    attn = self.attn.trace(self.attn_norm(x_BTD), angle_BTk, segment_BT, cache, lse=lse)
    attn_BTD = self._branch(attn.update, self.attn_branch_norm)
    middle_BTD = x_BTD + attn_BTD
    y_BTD, report = self.ffn_norm(middle_BTD), None
    if isinstance(self.ffn, moe.MoE):
      y_BTD, report = self.ffn(y_BTD, live_BT)
    else:
      y_BTD = self.ffn(y_BTD)
    ffn_BTD = self._branch(y_BTD, self.ffn_branch_norm)
    return BlockTrace(attn, attn_BTD, middle_BTD, ffn_BTD, middle_BTD + ffn_BTD, report)

  def _branch(self, y_BTD: jax.Array, norm: RMSNorm | None) -> jax.Array:
    """A branch's output, normalized and clipped if configured."""
    y_BTD = y_BTD if norm is None else norm(y_BTD)
    return jnp.clip(y_BTD, -self.clip, self.clip) if self.clip else y_BTD


# Called in place of a block: (block, x_BTD, angle_BTk, segment_BT, live_BT) -> (x_BTD,
# extra). `extra` is a pytree of arrays. live_BT is False at padding. With a cache, the
# layer's part of the cache is one more argument.
Through = Callable[..., tuple[jax.Array, Any]]


class Transformer(nnx.Module):
  """A language model: `model(tokens) -> logits`; training calls `hidden`."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.cfg = cfg
    table = functools.partial(Embed, vocab=cfg.vocab, width=cfg.width)
    self.embed = table(child_key(key, 'embed'), numerics=cfg.numerics)
    scaled = cfg.norm in EMBEDDINGS_SCALED
    self.embed_scale = Scale((), cfg.width**0.5) if scaled else None
    keys = jax.random.split(child_key(key, 'blocks'), cfg.depth)
    self.blocks = jax.vmap(lambda k: Block(cfg, k))(keys)
    # Layers without a gate or a normalizer have no parameters for it.
    for name, own in cfg.modules.items():
      keep = lambda leaf, own=own: leaf[jnp.array(own)] if len(own) < cfg.depth else leaf
      setattr(self.blocks.attn, name, jax.tree.map(keep, getattr(self.blocks.attn, name)))
    self.norm = NORMS[cfg.norm](cfg, child_key(key, 'norm'), cfg.norm_alpha[1])
    head = child_key(key, 'head')
    self.head = None if cfg.tied else table(head, numerics=cfg.numerics)

  def hidden(
    self,
    token_BT,
    segment_BT=None,
    position_BT=None,
    *,
    through: Through = Block.__call__,
    cache: Any = None,
  ) -> tuple[jax.Array, Any]:
    """Tokens -> (final normalized hidden states x_BTD, the blocks' second results).

    The states are in the compute dtype. The second results are stacked over layers; those
    of a block itself are the routers' reports (None without experts). Without segments,
    or with `mask_documents` off, a row is one document. Without positions, or with
    `mask_documents` off, positions count from 0.

    `through` replaces the call of each block. Use it to measure activations or to
    intervene on them without changing the model; it runs under scan, remat, sharding and
    gradients like the block itself. To read the gate scores of all layers:

      def scores(block, x_BTD, angle_BTk, segment_BT, live_BT):
        score = block.attn.gate.score(block.attn_norm(x_BTD))
        x_BTD, _ = block(x_BTD, angle_BTk, segment_BT, live_BT)
        return x_BTD, score

      x_BTD, score_LBTHK = model.hidden(tokens, segments, positions, through=scores)

    `cache` is a tree stacked over the layers, such as keys and values of earlier tokens.
    `through` gets its layer's part of the cache as one more argument. With a cache,
    `position_BT` is used even if `mask_documents` is off.
    """
    cfg = self.cfg
    # Segment 0 is padding.
    live_BT = jnp.ones_like(token_BT, bool) if segment_BT is None else segment_BT > 0
    if not cfg.mask_documents:
      segment_BT = None
      position_BT = None if cache is None else position_BT
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    frequency_k = rope_frequencies(cfg.attn.head_dim, cfg.attn.rope_base, cfg.attn.yarn)
    angle_BTk = rope_angles(position_BT, frequency_k)
    run = lambda x, layer: through(
      layer[0], x, angle_BTk, segment_BT, live_BT, *layer[1:]
    )
    if cfg.remat != 'none':
      run = jax.checkpoint(run, policy=REMAT[cfg.remat], prevent_cse=cfg.layers != 'scan')
    x_BTD, results = self.embed(token_BT), []
    x_BTD = x_BTD if self.embed_scale is None else self.embed_scale(x_BTD)
    for layers, (_, count) in zip(self._runs(cache), cfg.runs):
      if cfg.layers == 'scan':
        x_BTD, stacked = jax.lax.scan(run, x_BTD, layers)
      else:
        extras = []
        for layer in stacks.unstack(layers, count):
          x_BTD, extra = run(x_BTD, layer)
          extras.append(extra)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *extras)
      results.append(stacked)
    x_BTD = mesh.constrain(x_BTD, 'batch', 'tokens', None)
    return self.norm(x_BTD), stacks.joined(results)

  def _runs(self, cache: Any) -> Iterable[tuple]:
    """-> (blocks, cache if given) of each run of layers with the same parts.

    Each run is compiled by itself under scan.
    """
    also, blocks = () if cache is None else (cache,), self.blocks
    if self.cfg.attn.differential:
      blocks = stacks.copied(blocks)
      start_L = jnp.array([differential.start(i) for i in range(self.cfg.depth)])
      blocks.attn.differential.start = nnx.Variable(start_L, axes=())
    names, sizes = zip(*self.cfg.runs)
    if len(sizes) == 1:
      return [(blocks, *also)]
    modules = {name: getattr(blocks.attn, name) for name in self.cfg.modules}
    bare, cfg = stacks.copied(blocks), self.cfg.attn
    for name in modules:
      setattr(bare.attn, name, None)
    parts = stacks.split((bare, *also), sizes)
    for part, inside in zip(parts, names):
      part[0].attn.window = cfg.window if 'window' in inside else 0
      part[0].attn.normalizer = cfg.normalizer if 'normalizer' in inside else 'softmax'
    for name, stack in modules.items():
      own = [i for i, inside in enumerate(names) if name in inside]
      for i, module in zip(own, stacks.split(stack, [sizes[i] for i in own])):
        setattr(parts[i][0].attn, name, module)
    return parts

  def at_step(self, step: jax.Array | int) -> 'Transformer':
    """The same weights, with gates as far open as after `step` training steps."""
    done = step if isinstance(step, int) else 0
    opening = [name for name, cfg in self.cfg.attn.named.items() if cfg.opens[1] > done]
    net = stacks.copied(self) if opening else self
    for name in opening:
      gate = getattr(net.blocks.attn, name)
      share_L = stacks.opened(step, gate.cfg.opens, len(self.cfg.gated[name]))
      gate.open = nnx.Variable(share_L, axes=())
    return net

  def unembedding(self) -> jax.Array:
    """The weight w_VD that maps hidden states to logits."""
    return (self.embed if self.head is None else self.head).table[...]

  def __call__(self, token_BT, segment_BT=None, position_BT=None) -> jax.Array:
    """Tokens -> logits_BTV in float32, for evaluation; training uses `vocab_loss`."""
    return self.logits(self.hidden(token_BT, segment_BT, position_BT)[0])

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Final hidden states -> logits_BTV in float32."""
    w_VD = self.unembedding().astype(x_BTD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return kernels.soft_cap(product('btd,vd->btv', x_BTD, w_VD), self.cfg.logit_cap)


def abstract(cfg: Config) -> Transformer:
  """The model as a tree of shapes; allocates nothing."""
  return jax.eval_shape(lambda: Transformer(cfg, jax.random.key(0)))
