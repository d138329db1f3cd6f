"""Parameter counts and FLOPs of a model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gated.devices import trees
from gated.model.decoder import Config, abstract


def count(tree) -> int:
  """Number of elements in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parts(cfg: Config) -> dict[str, Any]:
  """Parameter counts: total, active per token, and by part.

  `attention` excludes the gates. `gate` sums them; `gates` has each by its name in
  `attention.Config.named`. `experts` counts the routed experts, of which `active`
  includes the top k.
  """
  sizes = {name: leaf.size for name, leaf in trees.flatten(abstract(cfg)).items()}
  within = lambda *groups: sum(
    size for name, size in sizes.items() if any(f'{g}.' in f'{name}.' for g in groups)
  )
  gates = {name: within(f'blocks.attn.{name}') for name in cfg.attn.named}
  gate, experts = sum(gates.values()), within('ffn.experts')
  inactive = experts * (cfg.moe.experts - cfg.moe.top_k) // max(cfg.moe.experts, 1)
  return {
    'total': sum(sizes.values()),
    'active': sum(sizes.values()) - inactive,
    'embedding': within('embed', 'head'),
    'attention': within('blocks.attn') - gate,
    'gate': gate,
    'gates': gates,
    'experts': experts,
  }


def flops_per_token(
  cfg: Config, length: int, position_BT: jax.Array | None = None
) -> Any:
  """Model FLOPs per trained token: 6 per matrix weight, plus causal attention.

  6 = 2 per multiply-add, times one forward and two backward matrix products. Only the
  top k experts count; the embedding lookup and recomputation do not. Attention counts the
  visible pairs of queries and keys. `position_BT`, the positions of tokens in their
  documents, limits them to documents; without it, a row is one document.
  """
  is_parameter = lambda x: isinstance(x, nnx.Variable)
  blocks = abstract(cfg).blocks
  parameters = jax.tree.leaves(blocks, is_leaf=is_parameter)
  matrices = [p for p in parameters if 'embed' in p.axes and len(p.axes) > 1]
  routed = sum(p.size for p in matrices if 'experts' in p.axes)
  weights = count(matrices) + cfg.vocab * cfg.width
  weights += routed * cfg.moe.top_k // max(cfg.moe.experts, 1) - routed
  for gate in blocks.attn.gates.values():
    # A matrix that reads a part of X, or head channels, has no axis 'embed'.
    if gate.cfg.source != 'parameter' and 'embed' not in gate.weight.axes:
      weights += gate.weight.size
  return 6.0 * weights + 3 * attention_flops(cfg, length, position_BT)


def attention_flops(
  cfg: Config, length: int, position_BT: jax.Array | None = None
) -> Any:
  """A config -> FLOPs of attention scores and weighted values per token, forward pass.

  The mean over tokens; `position_BT` as for `flops_per_token`. The values of a
  differential head are twice as wide.
  """

  def keys(window: int) -> Any:
    """The mean number of keys per query."""
    seen = min(window or length, length)
    if position_BT is not None and cfg.mask_documents:
      return jnp.minimum(position_BT + 1, seen).mean() + cfg.attn.sink_tokens
    return seen - seen * (seen - 1) / (2 * length) + cfg.attn.sink_tokens

  windowed = len(cfg.windowed)
  pairs = (cfg.depth - windowed) * keys(0) + windowed * keys(cfg.attn.window)
  products = 6 if cfg.attn.differential else 4
  return 1.0 * products * cfg.attn.heads * cfg.attn.head_dim * pairs
