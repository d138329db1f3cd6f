"""Attention weights of first tokens, of each key and of sinks; entropy and logits.

A[i, j] is the weight that query i gives to key j, before any gate. The terms of sinks in
the softmax's denominator are not keys: their share is `sink_mass`, and the weights of the
keys sum to 1 minus this share. With other normalizers than softmax, the weights need not
sum to 1.

Weights to a few chosen keys are computed directly. Sums over all pairs of queries and
keys run over blocks of both and skip the blocks above the diagonal; memory is linear in
the tokens.

B batch  T tokens  H heads  G KV heads  R = H/G  K head width  N pairs of blocks
q, s a block of queries, of keys
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gated import kernels, model
from gated.model import attention
from gated.probes import pairs

# Sink rate (Gu et al., arXiv 2410.10781): a mean weight above EPSILON, for the keys
# 0 to KEYS - 1, over the first PREFIX tokens of a row and over the whole row.
EPSILON, KEYS, PREFIX = 0.3, 5, 64
# First-token attention is also averaged over the queries from this position on. A key
# counts in `largest_key_weight` if at least this many queries see it.
LATER = 64
LONGEST = 512  # Maximum tokens of a row for `maps`.


class Rows(NamedTuple):
  """The tokens of a batch, each array (B, T)."""

  segment: jax.Array | None  # document ids if attention is masked by them; else None
  live: jax.Array  # False at padding
  index: jax.Array  # the position in the row
  first: jax.Array  # the index of the document's first token
  window: int = 0  # of a layer: the number of keys that a query sees at most; 0 for all

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
    count = self.index - start + 1
    return jnp.minimum(count, self.window) if self.window else count

  def near(self, distance: jax.Array) -> jax.Array:
    """Whether a query sees a key at this distance, by the window alone."""
    return distance < (self.window or self.index.shape[1])


class Weights(NamedTuple):
  """Scores -> attention weights; `of_query` normalizes the weights of each query."""

  normalizer: str
  cap: float
  of_query: tuple[jax.Array, ...]  # each (B, T, H)
  clip: tuple[float, float] = (0.0, 1.0)  # gamma and zeta of the clipped softmax

  def __call__(self, score: jax.Array, of_query: tuple[jax.Array, ...]) -> jax.Array:
    """Uncapped scores and the normalizing numbers of their queries -> weights."""
    score = kernels.soft_cap(score, self.cap)
    if self.normalizer == 'sigmoid':
      [log_count] = of_query
      return jax.nn.sigmoid(score - log_count)
    if self.normalizer == 'softpick':
      top, total = of_query
      return jax.nn.relu(jnp.exp(score - top) - jnp.exp(-top)) / total
    if self.normalizer == 'elastic':
      log_sum, shift = of_query
      return jax.nn.relu(jnp.exp(score - log_sum) + shift)
    [log_sum] = of_query
    weight = jnp.exp(score - log_sum)
    if self.normalizer == 'clipped':
      gamma, zeta = self.clip
      weight = jnp.clip((zeta - gamma) * weight + gamma, 0, 1)
    return weight


def measure(
  attn: attention.Attention, trace: attention.Trace, rows: Rows
) -> dict[str, jax.Array]:
  """One layer's attention on a batch -> sums over queries, by row and head.

  first             (B, H, 3): summed weight to the row's first token, of all queries, of
                    all but query 0, and of those from LATER on
  documents         the same for each document's first token; positions in the document
  uniform, documents_uniform   (B, 3): the same under uniform attention
  queries, documents_queries   (B, 3): the number of these queries
  sink_prefix, sink_row        (B, H, KEYS): whether alpha_k > EPSILON (`_sink_rates`)
  mass, sink_mass, entropy     (B, H): summed over queries
  logit             (): the largest |q k| / sqrt(K), before a cap; infinite if one is NaN
  key_mean          (B, H): the largest mean weight that a key receives
  key_index         (B, H): that key's position in the row
  key_counts        (B,): whether any key is seen by at least LATER queries
  """
  rows = rows._replace(window=attn.window)
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
    trace = block.trace(x_BTD, *rest, lse=True)
    own = rows._replace(window=block.attn.window)
    weights = _weights(block.attn, trace.attn, own)
    [score] = kernels.scores(trace.attn.query[:1], trace.attn.key[:1])
    of_query = tuple(x[0].T.reshape(*score.shape[:3], 1) for x in weights.of_query)
    mask = mask_TT & own.near(rows.index[0][:, None] - rows.index[0][None])
    weight = jnp.where(mask[None, None], weights(score, of_query), 0)
    return trace.output, weight.reshape(-1, length, length)

  documents = batch.segments, batch.positions
  return net.hidden(batch.tokens, *documents, through=through)[1]


def _weights(attn, trace, rows: Rows) -> Weights:
  cfg = attn.cfg
  shape = trace.query.shape[:3]
  if attn.normalizer == 'sigmoid':
    log_BT1 = jnp.log(rows.visible.astype(jnp.float32))[..., None]
    return Weights('sigmoid', cfg.logit_cap, (jnp.broadcast_to(log_BT1, shape),))
  if attn.normalizer == 'softpick':
    return Weights('softpick', cfg.logit_cap, pairs.softpick(trace, rows, cfg.logit_cap))
  if attn.normalizer == 'clipped':
    clip = cfg.clip_gamma, cfg.clip_zeta
    return Weights('clipped', cfg.logit_cap, (trace.lse,), clip)
  if attn.normalizer == 'elastic':
    shift_BTH = attn.elastic.scale[...][None, None] / rows.visible[..., None]
    return Weights('elastic', cfg.logit_cap, (trace.lse, shift_BTH))
  log_sum_BTH = trace.lse
  if trace.sinks is not None:
    log_sum_BTH = jnp.logaddexp(trace.lse, trace.sinks)
  return Weights('softmax', cfg.logit_cap, (log_sum_BTH,))


def _to_keys(trace, weights: Weights, rows: Rows) -> jax.Array:
  """The weights of all queries to the row's first KEYS keys: (B, T, H, KEYS)."""
  key_BsGK = trace.key[:, :KEYS]
  score = kernels.scores(trace.query, key_BsGK)
  B, G, R, T, S = score.shape
  score_BTHS = score.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, S)
  weight = weights(score_BTHS, tuple(x[..., None] for x in weights.of_query))
  distance_BTS = rows.index[..., None] - rows.index[:, None, :S]
  mask_BTS = rows.live[..., None] & (distance_BTS >= 0) & rows.near(distance_BTS)
  if rows.segment is not None:
    mask_BTS &= rows.segment[..., None] == rows.segment[:, None, :S]
  weight = jnp.where(mask_BTS[:, :, None], weight, 0)
  return jnp.pad(weight, ((0, 0), (0, 0), (0, 0), (0, KEYS - S)))


def _first_tokens(to_first, trace, weights: Weights, rows: Rows) -> dict[str, jax.Array]:
  """Weight to the first token of the row and of each document, with the uniform case."""
  # Each query has one key, the first token of its document: one product per head.
  key_BTGK = jnp.take_along_axis(trace.key, rows.first[..., None, None], 1)
  heads = trace.query.shape[2] // key_BTGK.shape[2]
  key_BTHK = jnp.repeat(key_BTGK, heads, 2)
  score_BTH = jnp.einsum(
    'bthk,bthk->bth', trace.query, key_BTHK, preferred_element_type=jnp.float32
  )
  own_BTH = weights(score_BTH * trace.query.shape[-1] ** -0.5, weights.of_query)
  place_BT = rows.index - rows.first
  own_BTH = jnp.where(rows.near(place_BT)[..., None], own_BTH, 0)

  def summed(x_BTH, place_BT):
    """Over all queries, over all but the first, over the later ones."""
    counts_BT3 = jnp.stack([place_BT >= n for n in (0, 1, LATER)], -1)
    counts_BT3 = counts_BT3 & rows.live[..., None]
    return jnp.einsum('bth,btn->bhn', x_BTH, counts_BT3.astype(jnp.float32), **EXACT)

  uniform_BT = 1 / rows.visible.astype(jnp.float32)
  sees_BT = rows.live if rows.segment is None else rows.segment == rows.segment[:, :1]
  sees_BT, near_BT = sees_BT & rows.near(rows.index), rows.near(place_BT)
  one_BT1 = rows.live[..., None].astype(jnp.float32)
  return {
    'first': summed(to_first[..., 0], rows.index),
    'documents': summed(own_BTH, place_BT),
    'uniform': summed((sees_BT * uniform_BT)[..., None], rows.index)[:, 0],
    'documents_uniform': summed((near_BT * uniform_BT)[..., None], place_BT)[:, 0],
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


# Exact products for sums in float32: no device may round the inputs to fewer bits.
EXACT: Any = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _all_pairs(trace, weights: Weights, rows: Rows) -> dict[str, jax.Array]:
  """Entropy, mass, the largest logit and the largest mean weight of a key."""
  plain = weights.normalizer == 'softmax' and not rows.window
  if plain and kernels.key_sums_fit(trace.query):
    segment = jnp.ones_like(rows.index) if rows.segment is None else rows.segment
    [log_sum_BTH] = weights.of_query
    documents = segment, rows.live
    sums = kernels.key_sums(
      trace.query, trace.key, log_sum_BTH, *documents, cap=weights.cap
    )
  else:
    sums = pairs.key_sums(trace, weights, rows)
  seen_BT = _seen(rows)
  enough_BT = seen_BT >= LATER
  mean_BHT = sums.weight / jnp.maximum(seen_BT, 1)[:, None]
  mean_BHT = jnp.where(enough_BT[:, None], mean_BHT, -1)
  mass_BH = sums.weight.sum(-1)
  queries_B1 = rows.size[:, None].astype(jnp.float32)
  taken = queries_B1 - mass_BH if trace.sinks is not None else jnp.zeros_like(mass_BH)
  return {
    'entropy': sums.entropy.sum(-1),
    'mass': mass_BH,
    'sink_mass': taken,
    'logit': sums.logit.max(),
    'key_mean': mean_BHT.max(-1),
    'key_index': mean_BHT.argmax(-1),
    'key_counts': enough_BT.any(1),
  }


def _seen(rows: Rows) -> jax.Array:
  """The number of queries, without padding, that see each key: (B, T)."""
  left_BT = jnp.cumsum(rows.live[:, ::-1], 1)[:, ::-1]
  beyond_BT = jnp.zeros_like(left_BT)
  if 0 < rows.window < left_BT.shape[1]:
    beyond_BT = jnp.pad(left_BT[:, rows.window :], ((0, 0), (0, rows.window)))
  if rows.segment is None:
    return left_BT - beyond_BT
  # The queries after a document: the number left after its last token, which a running
  # maximum from the right carries to its other tokens.
  after_BT = jnp.pad(left_BT[:, 1:], ((0, 0), (0, 1)))
  next_BT = jnp.pad(rows.segment[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  after_BT = jnp.where(rows.segment != next_BT, after_BT, 0)
  after_BT = jax.lax.cummax(after_BT, axis=1, reverse=True)
  return left_BT - jnp.maximum(after_BT, beyond_BT)
