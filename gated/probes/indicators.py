"""Early warnings: what grows in a model before its loss shows it, told in scalars.

  attention_logit     the largest |q k| / sqrt(K), over layers, heads and the pairs that
                      attend: as the kernel gets them (after QK-norm, gates, RoPE and
                      YaRN's scale), before a soft cap, and sinks' logits left out
  attention_layer     the layer it was seen in, from 0
  output_logit        root mean square of the logits, over tokens and the vocabulary,
                      before a soft cap
  residual_rms_first  root mean square of the residual stream, after the embedding
  residual_rms_last   the same after the last layer, before the final norm
  residual_growth     last / first

At large learning rates attention logits grow and output logits drift, and both are seen
before the loss diverges (arXiv 2309.14322, section 3); that the residual stream outgrows
what layers add to it is hidden by their norms. Padding counts nowhere. A number that is
not finite is told as it is: it is a warning too.

They are read in a program of its own, forward only, from a few rows of a step's batch, by
the model's own layers; the train step knows nothing of it.

B batch  T tokens  D width  H heads  G KV heads  K head width  V vocabulary
q queries of a block  N blocks
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gated import kernels, model
from gated.devices import mesh

# Rows of a batch that are read, at least, and at least one on each device: so up to eight
# devices read the same rows.
ROWS = 8
# A query and a key, of each row and head, whose scores a device has at a time: 2 MiB.
PAIRS = 1 << 19


class _Seen(NamedTuple):
  """What a layer reports."""

  score: jax.Array  # the largest |score|, or one that is NaN
  before: jax.Array  # the root mean square of the residual that it reads
  after: jax.Array  # and of the one that it leaves


def measure(net: model.Transformer, batch: Any, *, micro: int) -> dict[str, jax.Array]:
  """A model and a step's batch (B, T), of micro-batches of `micro` rows -> scalars."""
  batch = some_rows(batch, micro)
  live_BT = batch.segments > 0
  documents = batch.segments, batch.positions
  x_BTD, seen = net.hidden(batch.tokens, *documents, through=_layer)
  first, last = seen.before[0], seen.after[-1]
  layer = jnp.where(jnp.isnan(seen.score), jnp.inf, seen.score).argmax()
  return {
    'attention_logit': seen.score[layer],
    'attention_layer': layer,
    'output_logit': _logit_rms(x_BTD, net.unembedding(), live_BT),
    'residual_rms_first': first,
    'residual_rms_last': last,
    'residual_growth': last / first,
  }


def scalars(values: dict[str, Any]) -> dict[str, float]:
  """What `measure` returned, on the host -> Python scalars."""
  return {name: value.item() for name, value in values.items()}


def some_rows(batch: Any, micro: int) -> Any:
  """A batch (B, T) -> ROWS of its rows, evenly apart.

  Row i of R is row i * B / R, so each device reads rows that it already has.
  """
  rows, length = _rows(micro, _ways('batch')), batch.tokens.shape[1]
  some = lambda x: mesh.constrain(x.reshape(rows, -1, length)[:, 0], 'batch', 'tokens')
  return type(batch)(*map(some, batch))


def _rows(micro: int, ways: int) -> int:
  """How many rows are read, as many on each device, and evenly apart in a batch."""
  fits = (n for n in range(ways, micro + 1, ways) if micro % n == 0)
  return next(n for n in fits if n >= min(ROWS, micro))


def _ways(axis: str) -> int:
  on: Any = jax.sharding.get_abstract_mesh()
  return 1 if on.empty else mesh.ways(axis, on)


def _layer(block: model.Block, x_BTD, angle_BTk, segment_BT, live_BT):
  """A call of a block -> what it makes of x, and what was seen of it."""
  # The block computes the same queries and keys: the compiler makes them once.
  q_BTHK, k_BTGK = block.attn.query_and_key(block.attn_norm(x_BTD), angle_BTk)
  score = _largest_score(q_BTHK, k_BTGK, segment_BT, live_BT)
  y_BTD, _ = block(x_BTD, angle_BTk, segment_BT, live_BT)
  return y_BTD, _Seen(score, _rms(x_BTD, live_BT), _rms(y_BTD, live_BT))


def _largest_score(q_BTHK, k_BTGK, segment_BT, live_BT) -> jax.Array:
  """The largest |score| of a query that is not padding and a key that it may see.

  Or NaN, where there is one: a maximum may lose it, on a device or between them, but a
  sum does not.
  """
  length = q_BTHK.shape[1]
  count = _blocks(length, _ways('tokens'))
  k_BTGK = mesh.constrain(k_BTGK, 'batch', None, 'kv_heads', None)
  seen_BT = segment_BT
  if segment_BT is not None:
    seen_BT = mesh.constrain(segment_BT, 'batch', None)
  key_T = jnp.arange(length)

  def cut(x_BT):
    # Block i has queries i, i + count, ...: of each device's as many.
    x = x_BT.reshape(len(x_BT), -1, count, *x_BT.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  def largest(block):
    q_BqHK, position_q, segment_Bq, live_Bq = block
    mask = (position_q[:, None] >= key_T[None])[None] & live_Bq[:, :, None]
    if seen_BT is not None:
      mask = mask & (segment_Bq[:, :, None] == seen_BT[:, None])
    score = jnp.abs(kernels.scores(q_BqHK, k_BTGK))
    score = jnp.where(mask[:, None, None], score, 0)
    return score.max(), score.sum()

  positions = cut(key_T[None])[:, 0]
  of_q = segment_BT if segment_BT is None else cut(segment_BT)
  blocks = cut(q_BTHK), positions, of_q, cut(live_BT)
  largest_N, sum_N = jax.lax.map(largest, blocks)
  return jnp.where(jnp.isnan(sum_N.sum()), jnp.nan, largest_N.max())


def _blocks(length: int, ways: int) -> int:
  """Into how many blocks each device's queries are cut: the fewest whose scores fit."""
  own = length // ways
  fits = (n for n in range(1, own) if own % n == 0 and own // n * length <= PAIRS)
  return next(fits, own)


def _logit_rms(x_BTD, w_VD, live_BT) -> jax.Array:
  """Root mean square of x w, without a logit: sum over V of (x w)^2 = x (w^T w) x^T."""
  vocab, width = w_VD.shape
  # Of w a device has columns; it takes whole rows instead, as many: no one holds all.
  ways = _ways('embed')
  more = -vocab % (ways * _ways('vocab'))
  w_VD = jnp.pad(w_VD.astype(x_BTD.dtype), ((0, more), (0, 0)))
  w_VsD = mesh.constrain(w_VD.reshape(-1, ways, width), 'vocab', 'embed', None)
  f32 = dict(preferred_element_type=jnp.float32)
  gram_DD = jnp.einsum('vsd,vse->de', w_VsD, w_VsD, **f32)
  x_BTD = x_BTD.astype(jnp.float32)
  with jax.default_matmul_precision('highest'):
    y_BTD = jnp.einsum('btd,de->bte', x_BTD, gram_DD)
  return _root_mean((x_BTD * y_BTD).sum(-1) / vocab, live_BT)


def _rms(x_BTD, live_BT) -> jax.Array:
  return _root_mean(jnp.square(x_BTD.astype(jnp.float32)).mean(-1), live_BT)


def _root_mean(square_BT, live_BT) -> jax.Array:
  """The root of the mean over tokens that are not padding."""
  mean = jnp.where(live_BT, square_BT, 0).sum() / jnp.maximum(live_BT.sum(), 1)
  # Rounding may leave it just below zero.
  return jnp.sqrt(jnp.where(mean < 0, 0, mean))
