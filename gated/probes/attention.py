"""Where attention goes: to first tokens, to any one key, to sinks; entropy and logits.

A[i, j] is the weight that query i gives to key j, before any gate. Terms of sinks in the
softmax's denominator are no keys: what they take is `sink_mass`, and the weights of the
keys sum to 1 minus that. The weights of sigmoid and softpick attention need not sum to 1.

Weights to a few chosen keys are read directly. What needs all pairs of queries and keys
goes over blocks of both, of which those above the diagonal are left out, so memory is
linear in the tokens.

B batch  T tokens  H heads  G KV heads  R = H/G  K head width  N pairs of blocks
q, s a block of queries, of keys
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gated import kernels, model
from gated.devices import mesh
from gated.model import attention

# Sink rate (Gu et al., arXiv 2410.10781): a mean weight above EPSILON, for the keys
# 0 to KEYS - 1, over the first PREFIX tokens of a row and over the whole row.
EPSILON, KEYS, PREFIX = 0.3, 5, 64
# First-token attention is also given over the queries from this position on, and a key
# counts in `largest_key` if at least so many queries see it.
LATER = 64
# Scores of a pair of blocks, over all rows and heads: 128 MiB.
PAIRS = 1 << 25
LONGEST = 512  # Tokens of a row whose whole map is given.


class Rows(NamedTuple):
  """The tokens of a batch, each array (B, T)."""

  segment: jax.Array | None  # documents that attend within themselves; None: whole rows
  live: jax.Array  # False at padding
  index: jax.Array  # the position in the row
  first: jax.Array  # the index of the document's first token

  @classmethod
  def of(cls, batch: Any, cfg: model.Config) -> 'Rows':
    """The rows of a batch, as a model of this config reads them."""
    live_BT = batch.segments > 0
    index = jnp.broadcast_to(jnp.arange(live_BT.shape[1])[None], live_BT.shape)
    segment = batch.segments if cfg.mask_documents else None
    return cls(segment, live_BT, index, index - batch.positions)

  @property
  def size(self) -> jax.Array:
    """The number of tokens of each row, without padding: (B,)."""
    return self.live.sum(1)

  @property
  def visible(self) -> jax.Array:
    """The number of keys that each query sees: (B, T)."""
    start = 0 if self.segment is None else self.first
    return self.index - start + 1


class Weights(NamedTuple):
  """Scores -> attention weights, with the numbers of each query that this takes."""

  normalizer: str
  cap: float
  of_query: tuple[jax.Array, ...]  # each (B, T, H)

  def __call__(self, score: jax.Array, of_query: tuple[jax.Array, ...]) -> jax.Array:
    """Uncapped scores and the numbers of their queries -> weights."""
    score = kernels.soft_cap(score, self.cap)
    if self.normalizer == 'sigmoid':
      [log_count] = of_query
      return jax.nn.sigmoid(score - log_count)
    if self.normalizer == 'softpick':
      top, total = of_query
      return jax.nn.relu(jnp.exp(score - top) - jnp.exp(-top)) / total
    [log_sum] = of_query
    return jnp.exp(score - log_sum)


def measure(
  attn: attention.Attention, trace: attention.Trace, rows: Rows
) -> dict[str, jax.Array]:
  """One layer's attention on a batch -> sums over queries, by row and head.

  first_*           (B, H, 3): summed weight to the row's first token, of all queries, of
                    all but query 0, and of those from LATER on
  documents_*       the same for each document's first token, positions counted in it
  uniform, documents_uniform   (B, 3): the same under uniform attention
  queries, documents_queries   (B, 3): the number of these queries
  sink_prefix, sink_row        (B, H, KEYS): whether alpha_k > EPSILON
  mass, sink_mass, entropy     (B, H): summed over queries
  logit             (): the largest |q k| / sqrt(K), before a cap; NaN if any is
  key_mean          (B, H): the largest mean weight that a key receives
  key_index         (B, H): that key's position in the row
  key_counts        (B,): whether any key is seen by at least LATER queries
  """
  weights = _weights(attn, trace, rows)
  to_first = _to_keys(trace, weights, rows)
  sums = _first_tokens(to_first, trace, weights, rows) | _sink_rates(to_first, rows)
  return sums | _all_pairs(trace, weights, rows)


def maps(net: model.Transformer, batch: Any) -> jax.Array:
  """A model and a batch (B, T) -> the attention weights of its first row, (L, H, T, T).

  [l, h, i, j] is the weight that query i gives to key j, in float32; it is 0 for keys
  that the query does not see, and for padding. ValueError for rows above LONGEST tokens.
  """
  length = batch.tokens.shape[1]
  if length > LONGEST:
    raise ValueError(
      f'rows of {length} tokens, padding included, are too long for attention maps: at '
      f'most {LONGEST} are allowed'
    )
  rows = Rows.of(batch, net.cfg)
  mask_TT = jnp.tri(length, dtype=bool) & rows.live[0][:, None]
  if rows.segment is not None:
    mask_TT &= rows.segment[0][:, None] == rows.segment[0][None]

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest)
    weights = _weights(block.attn, trace.attn, rows)
    [score] = kernels.scores(trace.attn.query[:1], trace.attn.key[:1])
    of_query = tuple(x[0].T.reshape(*score.shape[:3], 1) for x in weights.of_query)
    weight = jnp.where(mask_TT[None, None], weights(score, of_query), 0)
    return trace.output, weight.reshape(-1, length, length)

  documents = batch.segments, batch.positions
  return net.hidden(batch.tokens, *documents, through=through)[1]


def _weights(attn, trace, rows: Rows) -> Weights:
  cfg = attn.cfg
  shape = trace.query.shape[:3]
  if cfg.normalizer == 'sigmoid':
    log_BT1 = jnp.log(rows.visible.astype(jnp.float32))[..., None]
    return Weights('sigmoid', cfg.logit_cap, (jnp.broadcast_to(log_BT1, shape),))
  if cfg.normalizer == 'softpick':
    return Weights('softpick', cfg.logit_cap, _softpick(trace, rows, cfg.logit_cap))
  opts = dict(backend=cfg.backend, cap=cfg.logit_cap, max_segments=cfg.max_segments)
  qkvs = trace.query, trace.key, trace.value, rows.segment
  _, log_sum_BTH = kernels.attend_lse(*qkvs, **opts)
  if trace.sinks is not None:
    log_sum_BTH = jnp.logaddexp(log_sum_BTH, trace.sinks)
  return Weights('softmax', cfg.logit_cap, (log_sum_BTH,))


def _to_keys(trace, weights: Weights, rows: Rows) -> jax.Array:
  """The weights of all queries to the row's first KEYS keys: (B, T, H, KEYS)."""
  key_BsGK = trace.key[:, :KEYS]
  score = kernels.scores(trace.query, key_BsGK)
  B, G, R, T, S = score.shape
  score_BTHS = score.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, S)
  weight = weights(score_BTHS, tuple(x[..., None] for x in weights.of_query))
  mask_BTS = rows.live[..., None] & (rows.index[..., None] >= rows.index[:, None, :S])
  if rows.segment is not None:
    mask_BTS &= rows.segment[..., None] == rows.segment[:, None, :S]
  weight = jnp.where(mask_BTS[:, :, None], weight, 0)
  return jnp.pad(weight, ((0, 0), (0, 0), (0, 0), (0, KEYS - S)))


def _first_tokens(to_first, trace, weights: Weights, rows: Rows) -> dict[str, jax.Array]:
  """Weight to the first token of the row and of each document, beside uniform."""
  # Documents: each query's own key, one product per head.
  key_BTGK = jnp.take_along_axis(trace.key, rows.first[..., None, None], 1)
  heads = trace.query.shape[2] // key_BTGK.shape[2]
  key_BTHK = jnp.repeat(key_BTGK, heads, 2)
  score_BTH = jnp.einsum(
    'bthk,bthk->bth', trace.query, key_BTHK, preferred_element_type=jnp.float32
  )
  own_BTH = weights(score_BTH * trace.query.shape[-1] ** -0.5, weights.of_query)
  place_BT = rows.index - rows.first

  def summed(x_BTH, place_BT):
    """Over all queries, over all but the first, over the later ones."""
    counts_BT3 = jnp.stack([place_BT >= n for n in (0, 1, LATER)], -1)
    counts_BT3 = counts_BT3 & rows.live[..., None]
    return jnp.einsum('bth,btn->bhn', x_BTH, counts_BT3.astype(jnp.float32), **EXACT)

  uniform_BT = 1 / rows.visible.astype(jnp.float32)
  sees_BT = rows.live if rows.segment is None else rows.segment == rows.segment[:, :1]
  one_BT1 = rows.live[..., None].astype(jnp.float32)
  return {
    'first': summed(to_first[..., 0], rows.index),
    'documents': summed(own_BTH, place_BT),
    'uniform': summed((sees_BT * uniform_BT)[..., None], rows.index)[:, 0],
    'documents_uniform': summed(uniform_BT[..., None], place_BT)[:, 0],
    'queries': summed(one_BT1, rows.index)[:, 0],
    'documents_queries': summed(one_BT1, place_BT)[:, 0],
  }


def _sink_rates(to_first, rows: Rows) -> dict[str, jax.Array]:
  """alpha_k = sum over i >= k of A[i, k] / (T - k), compared with EPSILON."""

  def above(length_B):
    within_BT = rows.index < length_B[:, None]
    sum_BHk = jnp.einsum('bthk,bt->bhk', to_first, within_BT.astype(jnp.float32), **EXACT)
    queries_Bk = jnp.maximum(length_B[:, None] - jnp.arange(KEYS)[None], 1)
    return sum_BHk / queries_Bk[:, None] > EPSILON

  size_B = rows.size
  prefix_B = jnp.minimum(size_B, PREFIX)
  return {'sink_prefix': above(prefix_B), 'sink_row': above(size_B)}


# Sums of float32 numbers: no device may round them to fewer bits.
EXACT: Any = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class _Blocks(NamedTuple):
  """A batch in blocks of tokens, and the pairs of blocks that causal attention visits."""

  query: jax.Array  # (B, T, G, R, K), T a multiple of `size`
  key: jax.Array  # (B, T, G, K)
  segment: jax.Array  # (B, T); one document per row if whole rows attend
  live: jax.Array  # (B, T)
  size: int
  pairs: tuple[np.ndarray, np.ndarray]  # indices of query blocks and of key blocks

  def pad(self, x: jax.Array) -> jax.Array:
    """(B, T, ...) -> the same up to a multiple of the block's size."""
    more = self.live.shape[1] - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))

  def cut(self, x: jax.Array, i) -> jax.Array:
    """Block i of (B, T, ...)."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, 1)

  def scores(self, i, j) -> tuple[jax.Array, jax.Array]:
    """Blocks of queries and keys -> (uncapped scores BGRqs, which count: B11qs)."""
    query_BqHK = self.cut(self.query, i)
    score = kernels.scores(query_BqHK, self.cut(self.key, j))
    place = jnp.arange(self.size)
    causal = (i * self.size + place)[:, None] >= (j * self.size + place)[None]
    same = self.cut(self.segment, i)[..., None] == self.cut(self.segment, j)[:, None]
    mask = causal[None] & same & self.cut(self.live, i)[..., None]
    return score, mask[:, None, None]


def _blocks(trace, rows: Rows) -> _Blocks:
  batch, length = rows.live.shape
  count = -(-length // max(1, math.isqrt(PAIRS // (batch * trace.query.shape[2]))))
  size = -(-length // count)
  more = count * size - length
  # Each device holds the whole rows of its heads.
  whole = lambda x, axis: mesh.constrain(x, 'batch', None, axis, None)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
  flat = lambda x: pad(mesh.constrain(x, 'batch', None))
  pairs = np.tril_indices(count)
  segment = jnp.ones_like(rows.index) if rows.segment is None else rows.segment
  return _Blocks(
    pad(whole(trace.query, 'heads')),
    pad(whole(trace.key, 'kv_heads')),
    flat(segment),
    flat(rows.live),
    size,
    (pairs[0].astype(np.int32), pairs[1].astype(np.int32)),
  )


def _softpick(trace, rows: Rows, cap: float) -> tuple[jax.Array, jax.Array]:
  """-> each query's largest positive score, and the sum of |exp(s - top) - exp(-top)|."""
  blocks = _blocks(trace, rows)
  B, T, H, _ = blocks.query.shape

  def heads_last(x_BGRq):
    return x_BGRq.reshape(B, H, -1).swapaxes(1, 2)

  def step(carry, pair):
    top_BTH, total_BTH = carry
    i, j = pair
    score, mask = blocks.scores(i, j)
    score = kernels.soft_cap(score, cap)
    before = blocks.cut(top_BTH, i)
    top = jnp.maximum(before, heads_last(jnp.where(mask, score, 0).max(-1)))
    wide = top.swapaxes(1, 2).reshape(*score.shape[:-1], 1)
    e = jnp.where(mask, jnp.abs(jnp.exp(score - wide) - jnp.exp(-wide)), 0)
    total = blocks.cut(total_BTH, i) * jnp.exp(before - top) + heads_last(e.sum(-1))
    put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, i * blocks.size, 1)
    return (put(top_BTH, top), put(total_BTH, total)), None

  zero = jnp.zeros((B, T, H), jnp.float32)
  (top, total), _ = jax.lax.scan(step, (zero, zero), blocks.pairs)
  length = rows.live.shape[1]
  return top[:, :length], total[:, :length] + kernels.SOFTPICK_EPS


def _all_pairs(trace, weights: Weights, rows: Rows) -> dict[str, jax.Array]:
  """Entropy, mass, the largest logit and the largest mean weight of a key."""
  blocks = _blocks(trace, rows)
  B, T, H, _ = blocks.query.shape
  G = blocks.key.shape[2]
  of_query = tuple(map(blocks.pad, weights.of_query))

  def step(carry, pair):
    entropy_BH, mass_BH, logit, bad, column_BTH, seen_BT = carry
    i, j = pair
    score, mask = blocks.scores(i, j)
    spread = lambda x: (
      blocks.cut(x, i).swapaxes(1, 2).reshape(B, G, H // G, blocks.size, 1)
    )
    weight = jnp.where(mask, weights(score, tuple(map(spread, of_query))), 0)
    log_weight = jnp.log(jnp.where(weight > 0, weight, 1))
    size = jnp.where(mask, jnp.abs(score), 0)
    by_head = lambda x: x.reshape(B, H, *x.shape[3:])
    add = lambda x, part: jax.lax.dynamic_update_slice_in_dim(
      x, blocks.cut(x, j) + part, j * blocks.size, 1
    )
    return (
      entropy_BH - by_head((weight * log_weight).sum((-1, -2))),
      mass_BH + by_head(weight.sum((-1, -2))),
      jnp.maximum(logit, size.max()),
      bad | jnp.isnan(size).any(),
      add(column_BTH, by_head(weight.sum(-2)).swapaxes(1, 2)),
      add(seen_BT, mask[:, 0, 0].sum(-2)),
    ), None

  zero = jnp.float32(0)
  heads = jnp.zeros((B, H), jnp.float32)
  columns = jnp.zeros((B, T, H), jnp.float32)
  start = heads, heads, zero, False, columns, jnp.zeros((B, T), jnp.int32)
  sums, _ = jax.lax.scan(step, start, blocks.pairs)
  entropy_BH, mass_BH, logit, bad, column_BTH, seen_BT = sums
  enough_BT = seen_BT >= LATER
  mean_BTH = column_BTH / jnp.maximum(seen_BT, 1)[..., None]
  mean_BTH = jnp.where(enough_BT[..., None], mean_BTH, -1)
  queries_B1 = rows.size[:, None].astype(jnp.float32)
  taken = queries_B1 - mass_BH if trace.sinks is not None else jnp.zeros_like(mass_BH)
  return {
    'entropy': entropy_BH,
    'mass': mass_BH,
    'sink_mass': taken,
    'logit': jnp.where(bad, jnp.nan, logit),
    'key_mean': mean_BTH.max(1),
    'key_index': mean_BTH.argmax(1),
    'key_counts': enough_BT.any(1),
  }
