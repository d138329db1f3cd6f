"""What one chip does in a train step: FLOPs, bytes of memory moved, bytes sent.

All of it is per step, over all micro-batches. A pass is a micro-batch going forward,
forward again (where the backward pass makes results anew, or routers are counted), or
backward.
"""

from typing import Any, NamedTuple

from gated.devices.chips import Chip
from gated.pods.estimate import memory
from gated.pods.estimate.layout import WIDE, Layout, flops_per_token
from gated.pods.estimate.roofline import Traffic, traffic


class Passes(NamedTuple):
  """How often each happens in a step, counting micro-batches."""

  forward: int  # the routers' own included
  again: float  # of what remat makes anew
  backward: int


def passes(layout: Layout) -> Passes:
  accum = layout.cfg.accum
  again = 0 if layout.cfg.model.remat == 'none' else 1
  return Passes((1 + layout.counting) * accum, again * accum, accum)


def flops(layout: Layout) -> dict[str, float]:
  """-> executed FLOPs by kind: dense products, attention, grouped products."""
  cfg, m = layout.cfg, layout.cfg.model
  tokens = cfg.batch * cfg.data.length / layout.devices
  pairs = (cfg.data.length + 1) / 2
  attention = 4.0 * m.depth * m.attn.heads * m.attn.head_dim * pairs
  grouped = 6.0 * m.depth * m.moe.top_k * m.width * m.ffn if m.moe.experts else 0.0
  vocab = 2.0 * m.vocab * m.width
  forward = flops_per_token(m, cfg.data.length) / 3
  dense = forward - attention - grouped - vocab
  again = {'none': (0, 0, 0), 'dots': (0, 1, 1), 'full': (1, 1, 1)}[m.remat]
  times = [3 + layout.counting + extra for extra in again]
  # No gradient needs the result of a layer's last product, so it is not made again: but
  # where a device has all experts, whose results are weighted after it.
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

  Each result of a layer is written and read once forward, and twice as much backward; a
  layer's gathered weights are written and read in each pass. The optimizer reads and
  writes weights and moments; each micro-batch adds its gradients to sums.
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


def sent(layout: Layout, chip: Chip, slices: int) -> tuple[Traffic, ...]:
  """-> what a chip sends, by purpose and mesh axis."""
  found: list[Traffic] = []

  def send(what: str, kind: str, axis: str, whole: float, hidden: bool = False):
    if layout.sizes[axis] > 1 and whole:
      opts: dict[str, Any] = dict(sizes=layout.sizes, chip=chip, slices=slices)
      found.append(traffic(what, kind, axis, whole, hidden=hidden, **opts))

  for group in (_weights, _copies, _tensor, _experts, _keys, _loss, _embedding):
    group(layout, passes(layout), send)
  return tuple(found)


def _weights(layout: Layout, count: Passes, send) -> None:
  """Layers' weights are gathered in the compute dtype, forward and backward again."""
  whole = layout.held('layers', but=('embed',), having='embed') * layout.compute
  times = count.forward + count.backward
  send('weights', 'all-gather', 'fsdp', times * whole, hidden=True)
  send('gradients', 'reduce-scatter', 'fsdp', count.backward * whole, hidden=True)


def _copies(layout: Layout, count: Passes, send) -> None:
  """Gradients are added up over the axes that split tokens and not the weights.

  Each micro-batch's are, in the compute dtype.
  """
  for axis, split_by in COPIES.items():
    own = layout.held('layers')
    own -= layout.held('layers', having=split_by) if split_by else 0.0
    whole = count.backward * own * layout.compute
    send('gradients', 'all-reduce', axis, whole, hidden=True)


# The mesh's axes that split the tokens -> the logical axis of the weights they split too.
COPIES = {'data': '', 'fsdp': 'embed', 'expert': 'experts', 'context': ''}


def _tensor(layout: Layout, count: Passes, send) -> None:
  """What heads and the halves of the FFN add to each token is summed, and so backward.

  Forward that is two sums a layer, of which a pass made again needs but the first.
  """
  one = layout.cfg.model.depth * layout.tokens * layout.cfg.model.width * layout.compute
  again = count.again if layout.cfg.model.remat == 'full' else 0
  times = 2 * count.forward + again + 2 * count.backward
  send('activations', 'all-reduce', 'tensor', times * one)


def _experts(layout: Layout, count: Passes, send) -> None:
  """All tokens go to all who share the experts, and sums come back; likewise backward."""
  m = layout.cfg.model
  if not m.moe.experts:
    return
  whole = m.depth * layout.expert * layout.tokens * m.width * layout.compute
  out = count.forward + count.again + count.backward
  send('tokens', 'all-gather', 'expert', out * whole)
  send('tokens', 'reduce-scatter', 'expert', (count.forward + count.backward) * whole)


def _keys(layout: Layout, count: Passes, send) -> None:
  """Keys and values of whole rows are gathered; queries trade places, to balance work."""
  depth = layout.cfg.model.depth
  keys = 2 * layout.key * layout.tokens * layout.context * layout.compute * depth
  send('keys', 'all-gather', 'context', (count.forward + count.again) * keys)
  send('keys', 'reduce-scatter', 'context', count.backward * keys)
  queries = 2 * layout.query * layout.tokens * layout.compute * depth
  times = count.forward + count.again + count.backward
  send('queries', 'all-to-all', 'context', times * queries)


def _loss(layout: Layout, count: Passes, send) -> None:
  """Weights and tokens travel as `kernels.loss` decides."""
  D, near = layout.cfg.model.width, memory.neighbours(layout)
  rows, numbers = layout.vocab, layout.tokens * D
  times, tensor = count.backward, layout.tensor
  # Weights to rows of their own, and their float32 gradient back.
  exchanged = times * rows * D / layout.fsdp * (layout.compute + WIDE)
  send('unembedding', 'all-to-all', 'fsdp', exchanged)
  far = times * (1 / near - 1 / layout.fsdp) * rows * D
  send('unembedding', 'all-gather', 'fsdp', _whole(far * layout.compute, layout.fsdp))
  send('unembedding', 'reduce-scatter', 'fsdp', _whole(far * WIDE, layout.fsdp))
  shared = times * (near - 1) * numbers
  send('states', 'all-gather', 'fsdp', _whole(shared * layout.compute, layout.fsdp))
  send('states', 'reduce-scatter', 'fsdp', _whole(shared * WIDE, layout.fsdp))
  if tensor > 1:
    send('states', 'all-reduce', 'tensor', times * numbers * WIDE)
  own = times * rows * D / layout.fsdp * WIDE
  for axis in ('data', 'expert', 'context'):
    send('unembedding', 'all-reduce', axis, own)


def _whole(bytes_sent: float, n: int) -> float:
  """What n chips gather when each sends so many bytes in all."""
  return bytes_sent * n / max(n - 1, 1)


def _embedding(layout: Layout, count: Passes, send) -> None:
  """Neighbours read columns of the table for each other; the rest of it is gathered."""
  D, near = layout.cfg.model.width, memory.readers(layout)
  states = layout.tokens * D * layout.compute
  passes_of = count.forward + count.backward
  # An exchange among neighbours: as if all had it, less what stays.
  traded = passes_of * states * (1 - 1 / near)
  send('embedding', 'all-to-all', 'fsdp', _whole(traded, layout.fsdp))
  far = (1 / near - 1 / layout.fsdp) * layout.vocab * D
  gathered, added = (far * layout.compute * count.forward, far * WIDE * count.backward)
  send('embedding', 'all-gather', 'fsdp', _whole(gathered, layout.fsdp))
  send('embedding', 'reduce-scatter', 'fsdp', _whole(added, layout.fsdp))
  send('embedding', 'all-reduce', 'tensor', count.forward * states)
  own = layout.vocab * D / layout.fsdp * count.backward * WIDE
  for axis in ('data', 'expert', 'context'):
    send('embedding', 'all-reduce', axis, own)
