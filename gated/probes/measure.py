"""All probes in one forward pass: a model and a batch -> sums and numbers of its rows.

`merge` joins the measures of several batches on the host, and `report.summarize` turns
them into the numbers of a report, which do not depend on batching or sharding.

B batch  T tokens  L layers  H heads  C token classes
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated import model
from gated.probes import activations, attention, gates, indicators, outputs


def measure(net: model.Transformer, batch: Any, class_V: jax.Array) -> dict[str, Any]:
  """A batch (B, T), and the class of each token id -> measures stacked over layers.

  'rows' has arrays (L, B, ...), 'sums' arrays (L, ...) and 'logit' is (L,). `size` is the
  number of tokens of each row, (B,). Classes are indices of gates.CLASSES.
  """
  cfg, rows = net.cfg, attention.Rows.of(batch, net.cfg)
  live_BT = rows.live
  first_BT = batch.positions == 0
  class_BT = jnp.where(first_BT, gates.CLASSES.index('first'), class_V[batch.tokens])
  class_BTC = jax.nn.one_hot(class_BT, len(gates.CLASSES), dtype=bool)
  at_sdpa = [n for n, gate in cfg.attn.named.items() if gate.position == 'sdpa']

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest, lse=True)
    of_gate: Any = lambda name: gates.of_block(block, x_BTD, name)
    by_row: dict[str, Any] = attention.measure(block.attn, trace.attn, rows)
    logit = by_row.pop('logit')
    by_row |= activations.measure(trace, live_BT)
    score = of_gate(at_sdpa[0]) if at_sdpa else None
    sums = outputs.measure(trace.attn, score, live_BT, first_BT)
    for name in block.attn.gates:
      activation, score = cfg.attn.named[name].activation, of_gate(name)
      sums[name] = gates.measure(score, live_BT, class_BTC, activation)
      by_row |= {f'{name}.{k}': sums[name].pop(k) for k in ('row_sum', 'row_square')}
    return trace.output, {'rows': by_row, 'sums': sums, 'logit': logit}

  documents = batch.segments, batch.positions
  _, measures = net.hidden(batch.tokens, *documents, through=through)
  return measures | {'size': rows.size}


def watch(net: model.Transformer, batch: Any, *, micro: int) -> dict[str, Any]:
  """A model and a step's batch -> measures of a few of its rows, for `report.scalars`.

  Omits the measures that only a whole report needs.
  """
  class_V = jnp.full(net.cfg.vocab, gates.CLASSES.index('other'), jnp.int32)
  measures = measure(net, indicators.some_rows(batch, micro), class_V)
  for name in ('gram_before', 'gram_after'):
    del measures['sums'][name]
  return measures


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Measures of several batches, on the host -> the measures of all of them.

  Rows of padding are dropped; sums are added in float64.
  """
  size = np.concatenate([part['size'] for part in parts])
  join = lambda *leaves: np.concatenate(leaves, 1)[:, size > 0]
  wide = lambda x: np.asarray(x, np.int64 if x.dtype.kind in 'iub' else np.float64)
  add = lambda *leaves: sum(map(wide, leaves))
  trees = lambda name: [part[name] for part in parts]
  return {
    'rows': jax.tree.map(join, *trees('rows')),
    'sums': jax.tree.map(add, *trees('sums')),
    'logit': np.stack(trees('logit')).max(0),
    'size': size[size > 0],
  }
