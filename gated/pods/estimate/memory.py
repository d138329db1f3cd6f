"""Bytes of memory that one chip needs for a train step, by name.

Arrays that last through the step (weights, optimizer, gradients), the activations that
the forward pass keeps, and the largest working set: a layer's backward pass, a chunk of
the loss, or the embedding's backward pass.
"""

import jax.numpy as jnp

from gated.devices import collectives
from gated.kernels import cross_entropy
from gated.kernels.attention import cudnn
from gated.model import embedding
from gated.pods.estimate.layout import WIDE, Layout

# Recomputed results of a layer and their gradients that exist at once in its backward
# pass, as a multiple of the results. With it, small dense and MoE models compiled for
# v5e:2x2 take 1.02 and 1.04 times the estimate.
LIVE = 2.0
# Float32 chunks of logits that exist at once: the logits, and two halves of their
# gradient. Dense 28l on v5e:4x4, where logits are half of the memory, takes 1.06 times
# the estimate.
LOGITS = 2


def held(layout: Layout, *, gpu: bool) -> dict[str, float]:
  """A recipe on a mesh -> bytes by name; the chip needs their sum."""
  cfg = layout.cfg
  # A scan over micro-batches holds sums beside the gradients of one backward pass.
  gradients = layout.held() * WIDE * (1 if cfg.accum == 1 else 2)
  return {
    'weights': layout.stored,
    'optimizer': jnp.dtype(cfg.optim.moments).itemsize * layout.moments,
    'gradients': gradients,
    'activations': cfg.model.depth * kept(layout, cfg.model.remat),
    'working set': max(
      _layer(layout) + gpu * _segments(layout),
      _loss(layout),
      _table(layout),
      gpu * _rounded(layout),
    ),
  }


def kept(layout: Layout, remat: str) -> float:
  """Bytes that a layer's forward pass keeps for its backward pass."""
  return layout.tokens * layout.compute * _elements(layout)[remat]


def _elements(layout: Layout) -> dict[str, float]:
  """Elements that a layer keeps for each token of a chip, by remat policy."""
  m = layout.cfg.model
  D, q, kv, gate, F = m.width, layout.query, layout.key, layout.gate, layout.ffn
  projected = q + 2 * kv + gate
  # Queries and keys before and after RoPE, attention's result, and the gated result.
  attention = projected + q + kv + 2 * kv * layout.context + q + (q if gate else 0)
  if m.moe.experts:
    k = m.moe.top_k
    shared = 3 * m.moe.shared * F
    # The router in float32; each selection's input, two halves, their product, result.
    ffn = D * WIDE / layout.compute + 4 * m.moe.experts + k * (2 * D + 3 * F) + shared
    dots = m.moe.experts * WIDE / layout.compute + 2 * m.moe.shared * F
  else:
    ffn, dots = 3 * F, 2 * F + D
  return {
    'full': D,
    'dots': D + projected + D + dots,
    'none': 2 * D + attention + 2 * D + ffn,
  }


def _layer(layout: Layout) -> float:
  """A layer's backward pass: its results, and its gathered weights."""
  depth = layout.cfg.model.depth
  gathered = layout.held('layers', but=('embed',)) / depth * layout.compute
  # The weights of this layer and the next, and the gradient before it is scattered.
  return LIVE * kept(layout, 'none') + 3 * gathered + _experts(layout)


def _experts(layout: Layout) -> float:
  """With split experts: the tokens of the whole expert axis, and sums in float32."""
  m = layout.cfg.model
  if not m.moe.experts or layout.expert == 1:
    return 0.0
  tokens = layout.tokens * layout.expert
  rows = 0.5 * layout.tokens * m.moe.top_k  # Of a pass, over the mean.
  own = rows * (2 * m.width + 3 * layout.ffn) * layout.compute
  return 2 * tokens * m.width * (WIDE + layout.compute) + own


def _rounded(layout: Layout) -> float:
  """Moments in bfloat16 are not updated in place: their copy, and the largest in float32.

  With it, the 15B model on two H200 takes 0.995 times the estimate.
  """
  itemsize = jnp.dtype(layout.cfg.optim.moments).itemsize
  if itemsize == WIDE:
    return 0.0
  largest = max(w.size / layout.split(w.axes) for w in layout.weights)
  return itemsize * layout.moments + WIDE * largest


def _segments(layout: Layout) -> float:
  """Memory of cuDNN's backward pass of packed rows.

  For each document that it has room for, it takes `cudnn.bytes_of` for every token of a
  row and every query head.
  """
  m = layout.cfg.model
  packed = m.mask_documents and m.attn.max_segments > 1
  if not packed or m.attn.backend not in ('auto', 'cudnn') or m.attn.logit_cap:
    return 0.0
  heads = layout.query / m.attn.head_dim
  rows = max(1, layout.tokens // layout.cfg.data.length)
  each = layout.tokens / rows * heads * cudnn.bytes_of(m.attn.head_dim, layout.compute)
  room = cudnn.usual_room(rows, m.attn.mean_segments, m.attn.max_segments, each)
  # A batch for which the room is too small runs row by row.
  return max(room * rows, m.attn.max_segments) * each


def neighbours(layout: Layout) -> int:
  """The number of chips that share their tokens in the vocabulary loss."""
  group = collectives.Group(('fsdp',), layout.fsdp)
  return cross_entropy.inner_size(
    group, layout.vocab, layout.cfg.model.width, layout.tokens
  )


def _loss(layout: Layout) -> float:
  """A chunk of logits; the unembedding, all hidden states, and the gradients of both."""
  D, near = layout.cfg.model.width, neighbours(layout)
  chunk = min(layout.cfg.loss.chunk, layout.tokens)
  rows = layout.vocab / near
  logits = LOGITS * chunk * near * rows * WIDE
  states = 2 * layout.tokens * D * layout.compute
  return logits + rows * D * (layout.compute + WIDE) + states


def readers(layout: Layout) -> int:
  """The number of chips that share their tokens in the embedding (`embedding.Embed`)."""
  width = layout.cfg.model.width
  group = collectives.Group(('fsdp',), layout.fsdp)
  return max(n for n in group.sizes() if n == 1 or n * embedding.COLUMNS <= width)


def _table(layout: Layout) -> float:
  """The embedding's backward pass: columns, their gradient, and all hidden states."""
  D = layout.cfg.model.width
  table = layout.vocab * D / readers(layout) * (layout.compute + WIDE)
  return table + layout.tokens * D * (2 * layout.compute + WIDE)
