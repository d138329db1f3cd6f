"""A chip's work in a train step: FLOPs, bytes of memory moved, bytes sent.

All counts are per step, over all micro-batches. A pass is a micro-batch going forward,
backward, or forward again for recomputation or for counting the routers' choices.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from gated import model
from gated.devices import mesh
from gated.devices.chips import Chip
from gated.pods.compiled.collectives import received
from gated.pods.estimate import memory
from gated.pods.estimate.layout import WIDE, Layout, flops_per_token
from gated.pods.estimate.roofline import Traffic, share

# The mesh axes that split the tokens -> the logical axis of the weights they also split.
COPIES = {'data': '', 'fsdp': 'embed', 'expert': 'experts', 'context': ''}
# The traffic that overlaps with compute.
HIDDEN = ('weights', 'gradients')


class Passes(NamedTuple):
  """Passes of each kind in a step."""

  forward: int  # including the routers' own
  again: int  # for recomputation
  backward: int


def passes(layout: Layout) -> Passes:
  """-> the passes of a step, over all micro-batches."""
  accum = layout.cfg.accum
  again = 0 if layout.cfg.model.remat == 'none' else accum
  return Passes((1 + layout.counting) * accum, again, accum)


def flops(layout: Layout) -> dict[str, float]:
  """-> executed FLOPs by kind: dense products, attention, grouped products."""
  cfg, m = layout.cfg, layout.cfg.model
  tokens = cfg.batch * cfg.data.length / layout.devices
  attention = model.attention_flops(m, cfg.data.length)
  grouped = 6.0 * m.depth * m.moe.top_k * m.width * m.ffn if m.moe.experts else 0.0
  vocab = 2.0 * m.vocab * m.width
  forward = flops_per_token(m, cfg.data.length) / 3
  dense = forward - attention - grouped - vocab
  again = {'none': (0, 0, 0), 'dots': (0, 1, 1), 'full': (1, 1, 1)}[m.remat]
  times = [3 + layout.counting + extra for extra in again]
  # No gradient needs the result of a layer's last product, so it is not recomputed. With
  # all experts on each device it is: the router's weights multiply the result.
  last = again[0] * 2.0 * m.depth * m.width * m.ffn
  last_grouped = last * m.moe.top_k if m.moe.experts and layout.expert > 1 else 0.0
  last = 0.0 if m.moe.experts else last
  return {
    'matmul': tokens * (dense * times[0] + 3 * vocab - last),
    'attention': tokens * attention * times[1],
    'grouped': tokens * (grouped * times[2] - last_grouped),
  }


def moved(layout: Layout) -> float:
  """-> bytes of memory read and written.

  A forward pass writes and reads each result of a layer once, a backward pass twice. Each
  pass writes and reads a layer's gathered weights. The optimizer reads and writes weights
  and moments; each micro-batch adds its gradients to sums.
  """
  cfg, numbers = layout.cfg, layout.held()
  count = passes(layout)
  results = 2 * cfg.model.depth * memory.kept(layout, 'none')
  layers = results * (count.forward + count.again + 2 * count.backward)
  gathered = layout.held('layers', but=('embed',)) * layout.compute
  fetched = 2 * gathered * (count.forward + count.backward)
  update = (2 * layout.stored / max(numbers, 1) + 5 * WIDE) * numbers
  added = 3 * WIDE * numbers * (cfg.accum if cfg.accum > 1 else 0)
  chunks = cfg.accum * -(-layout.tokens // cfg.loss.chunk)
  rows = layout.vocab / memory.neighbours(layout)
  table = chunks * rows * cfg.model.width * (2 * WIDE + 3 * layout.compute)
  logits = 4 * cfg.accum * layout.tokens * layout.vocab * WIDE
  return layers + fetched + update + added + table + logits


# A purpose, a kind of collective, a mesh axis, and the bytes of the whole arrays.
Transfers = Iterator[tuple[str, str, str, float]]


def sent(layout: Layout, chip: Chip, slices: int) -> tuple[Traffic, ...]:
  """-> the traffic of a chip, by purpose and mesh axis.

  A collective on an axis that crosses slices runs inside each slice first, so only a
  chip's own part crosses the network.
  """
  crossing = mesh.crossing(layout.sizes, slices)
  sources = (_weights, _copies, _tensor, _experts, _keys, _loss, _embedding)
  traffic = []
  transfers = (t for source in sources for t in source(layout, passes(layout)))
  for purpose, kind, axis, whole in transfers:
    across = slices if axis == crossing else 1
    inside = layout.sizes[axis] // across
    opts: dict[str, Any] = dict(
      axis=axis,
      share=share(inside, layout.devices // slices, chip),
      hidden=purpose in HIDDEN,
      kind=kind,
      purpose=purpose,
    )
    for network, part, n in (
      ('links', whole, inside),
      ('network', whole / inside, across),
    ):
      size = received(kind, part, n)
      if size:
        traffic.append(Traffic(network=network, bytes=size, **opts))
  return tuple(traffic)


def _weights(layout: Layout, count: Passes) -> Transfers:
  """Layers' weights are gathered in the compute dtype, forward and backward again."""
  whole = layout.held('layers', but=('embed',), having='embed') * layout.compute
  times = count.forward + count.backward
  yield 'weights', 'all-gather', 'fsdp', times * whole
  yield 'gradients', 'reduce-scatter', 'fsdp', count.backward * whole


def _copies(layout: Layout, count: Passes) -> Transfers:
  """Gradients are summed over axes that split tokens but not the weights.

  Once for each micro-batch, in the compute dtype.
  """
  for axis, split_by in COPIES.items():
    own = layout.held('layers')
    own -= layout.held('layers', having=split_by) if split_by else 0.0
    yield 'gradients', 'all-reduce', axis, count.backward * own * layout.compute


def _tensor(layout: Layout, count: Passes) -> Transfers:
  """The contributions of heads and FFN parts are summed for each token.

  A layer does two sums forward and two backward; recomputation needs only the first.
  """
  one = layout.cfg.model.depth * layout.tokens * layout.cfg.model.width * layout.compute
  again = count.again if layout.cfg.model.remat == 'full' else 0
  times = 2 * count.forward + again + 2 * count.backward
  yield 'activations', 'all-reduce', 'tensor', times * one


def _experts(layout: Layout, count: Passes) -> Transfers:
  """Tokens are gathered along the expert axis; sums return; likewise backward."""
  m = layout.cfg.model
  if not m.moe.experts:
    return
  whole = m.depth * layout.expert * layout.tokens * m.width * layout.compute
  out = count.forward + count.again + count.backward
  yield 'tokens', 'all-gather', 'expert', out * whole
  yield 'tokens', 'reduce-scatter', 'expert', (count.forward + count.backward) * whole


def _keys(layout: Layout, count: Passes) -> Transfers:
  """Keys and values of whole rows are gathered; queries move to balance the work."""
  depth = layout.cfg.model.depth
  keys = 2 * layout.key * layout.tokens * layout.context * layout.compute * depth
  yield 'keys', 'all-gather', 'context', (count.forward + count.again) * keys
  yield 'keys', 'reduce-scatter', 'context', count.backward * keys
  queries = 2 * layout.query * layout.tokens * layout.compute * depth
  times = count.forward + count.again + count.backward
  yield 'queries', 'all-to-all', 'context', times * queries


def _loss(layout: Layout, count: Passes) -> Transfers:
  """Weights and tokens move as in `kernels.cross_entropy`."""
  D, near = layout.cfg.model.width, memory.neighbours(layout)
  numbers, times = layout.tokens * D, count.backward
  # Each chip gets rows of its own, and returns their float32 gradient.
  exchanged = times * layout.vocab * D / layout.fsdp * (layout.compute + WIDE)
  yield 'unembedding', 'all-to-all', 'fsdp', exchanged
  yield from _table(layout, 'unembedding', near, times, times)
  shared = times * (near - 1) * numbers
  yield 'states', 'all-gather', 'fsdp', _whole(shared * layout.compute, layout.fsdp)
  yield 'states', 'reduce-scatter', 'fsdp', _whole(shared * WIDE, layout.fsdp)
  yield 'states', 'all-reduce', 'tensor', times * numbers * WIDE


def _embedding(layout: Layout, count: Passes) -> Transfers:
  """Neighbours read columns of the table for each other; all gather the other columns."""
  near = memory.readers(layout)
  states = layout.tokens * layout.cfg.model.width * layout.compute
  # An exchange among neighbours: the whole, without each chip's own part.
  traded = (count.forward + count.backward) * states * (1 - 1 / near)
  yield 'embedding', 'all-to-all', 'fsdp', _whole(traded, layout.fsdp)
  yield from _table(layout, 'embedding', near, count.forward, count.backward)
  yield 'embedding', 'all-reduce', 'tensor', count.forward * states


def _table(layout: Layout, purpose: str, near: int, gathers: int, sums: int) -> Transfers:
  """The parts of a table beyond the `near` neighbours, and its gradient in float32."""
  elements = layout.vocab * layout.cfg.model.width
  far = (1 / near - 1 / layout.fsdp) * elements
  gathered, summed = gathers * far * layout.compute, sums * far * WIDE
  yield purpose, 'all-gather', 'fsdp', _whole(gathered, layout.fsdp)
  yield purpose, 'reduce-scatter', 'fsdp', _whole(summed, layout.fsdp)
  for axis in ('data', 'expert', 'context'):
    yield purpose, 'all-reduce', axis, sums * elements / layout.fsdp * WIDE


def _whole(bytes_sent: float, n: int) -> float:
  """Bytes of the gathered array if each of n chips sends `bytes_sent`."""
  return bytes_sent * n / max(n - 1, 1)
