"""Bytes of memory that one chip needs for a train step, by what they are.

What stands through the step (weights, optimizer, gradients), what the forward pass keeps,
and the largest of what comes and goes: a layer's backward pass, or a chunk of the loss.
"""

from gated.devices import collectives
from gated.kernels import cross_entropy
from gated.model import embedding
from gated.pods.estimate.layout import WIDE, Layout

# Of everything that a layer makes, how much exists at once in its backward pass: results
# made again, and their gradients. With it small dense and MoE models, compiled for
# v5e:2x2, take 1.02 and 1.04 times the estimate.
LIVE = 2.0
# Float32 chunks of logits that exist at once: they, and their gradient in halves. Dense
# 28l on v5e:4x4, where they are a half of all, takes 1.06 times the estimate.
LOGITS = 2


def held(layout: Layout) -> dict[str, float]:
  """A recipe on a mesh -> bytes by name; the chip needs their sum."""
  cfg = layout.cfg
  numbers = layout.held()
  depth = cfg.model.depth
  # A scan over micro-batches adds to sums what a backward pass has made whole.
  gradients = numbers * WIDE * (1 if cfg.accum == 1 else 2)
  return {
    'weights': layout.stored,
    'optimizer': WIDE * layout.moments,
    'gradients': gradients,
    'activations': depth * kept(layout, cfg.model.remat),
    'working set': max(_layer(layout), _loss(layout), _table(layout)),
  }


def kept(layout: Layout, remat: str) -> float:
  """Bytes of one layer that its backward pass finds there."""
  return layout.tokens * layout.compute * _elements(layout)[remat]


def _elements(layout: Layout) -> dict[str, float]:
  """Numbers that a layer keeps for each token of a chip, by remat policy."""
  m = layout.cfg.model
  D, q, kv, gate, F = m.width, layout.query, layout.key, layout.gate, layout.ffn
  projected = q + 2 * kv + gate
  # Queries and keys before and after RoPE, what attention returns, and that gated.
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
  """A layer's backward pass: everything it makes, and its weights, gathered."""
  depth = layout.cfg.model.depth
  gathered = layout.held('layers', but=('embed',)) / depth * layout.compute
  # This layer's, the next one's on their way, and the gradient before it is scattered.
  return LIVE * kept(layout, 'none') + 3 * gathered + _experts(layout)


def _experts(layout: Layout) -> float:
  """Where experts are split, the tokens of all who share them, and sums in float32."""
  m = layout.cfg.model
  if not m.moe.experts or layout.expert == 1:
    return 0.0
  tokens = layout.tokens * layout.expert
  rows = 0.5 * layout.tokens * m.moe.top_k  # Of a pass, over the mean.
  own = rows * (2 * m.width + 3 * layout.ffn) * layout.compute
  return 2 * tokens * m.width * (WIDE + layout.compute) + own


def neighbours(layout: Layout) -> int:
  """How many chips share their tokens in the vocabulary loss, as it decides."""
  group = collectives.Group(('fsdp',), layout.fsdp)
  return cross_entropy.inner_size(
    group, layout.vocab, layout.cfg.model.width, layout.tokens
  )


def _loss(layout: Layout) -> float:
  """A chunk of logits, the unembedding and its gradient, all states and theirs."""
  D, near = layout.cfg.model.width, neighbours(layout)
  chunk = min(layout.cfg.loss.chunk, layout.tokens)
  rows = layout.vocab / near
  logits = LOGITS * chunk * near * rows * WIDE
  states = 2 * layout.tokens * D * layout.compute
  return logits + rows * D * (layout.compute + WIDE) + states


def readers(layout: Layout) -> int:
  """How many chips share their tokens in the embedding, as `embedding.Embed` decides."""
  width = layout.cfg.model.width
  group = collectives.Group(('fsdp',), layout.fsdp)
  return max(n for n in group.sizes() if n == 1 or n * embedding.COLUMNS <= width)


def _table(layout: Layout) -> float:
  """The embedding's backward pass: columns of a table, their gradient, and all states."""
  D = layout.cfg.model.width
  table = layout.vocab * D / readers(layout) * (layout.compute + WIDE)
  return table + layout.tokens * D * (2 * layout.compute + WIDE)
