"""Sums over all pairs of queries and keys, block by block: memory is linear in tokens.

B batch  T tokens  H heads  G KV heads  R = H/G  K head width
q, s a block of queries, of keys
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gated import kernels
from gated.devices import mesh

# Scores of a pair of blocks, over all rows and heads: 128 MiB.
PAIRS = 1 << 25


class _Blocks(NamedTuple):
  """A batch in blocks of tokens, and the pairs of blocks that causal attention visits."""

  query: jax.Array  # (B, T, G, R, K), T a multiple of `size`
  key: jax.Array  # (B, T, G, K)
  segment: jax.Array  # (B, T); all ones if documents are not masked
  live: jax.Array  # (B, T)
  size: int
  window: int
  pairs: tuple[np.ndarray, np.ndarray]  # indices of query blocks and of key blocks

  def pad(self, x: jax.Array) -> jax.Array:
    """(B, T, ...) -> the same, padded to a multiple of the block's size."""
    padding = self.live.shape[1] - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))

  def cut(self, x: jax.Array, i) -> jax.Array:
    """Block i of (B, T, ...)."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, 1)

  def scores(self, i, j) -> tuple[jax.Array, jax.Array]:
    """Blocks of queries and keys -> (uncapped scores BGRqs, their mask B11qs)."""
    query_BqHK = self.cut(self.query, i)
    score = kernels.scores(query_BqHK, self.cut(self.key, j))
    place = jnp.arange(self.size)
    here = (i * self.size + place)[:, None], (j * self.size + place)[None]
    causal = kernels.sees(*here, self.window)
    same = self.cut(self.segment, i)[..., None] == self.cut(self.segment, j)[:, None]
    mask = causal[None] & same & self.cut(self.live, i)[..., None]
    return score, mask[:, None, None]


def _blocks(trace, rows: Any) -> _Blocks:
  batch, length = rows.live.shape
  count = -(-length // max(1, math.isqrt(PAIRS // (batch * trace.query.shape[2]))))
  size = -(-length // count)
  padding = count * size - length
  # Each device holds the whole rows of its heads.
  whole = lambda x, axis: mesh.constrain(x, 'batch', None, axis, None)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
  flat = lambda x: pad(mesh.constrain(x, 'batch', None))
  pairs = np.tril_indices(count)
  segment = jnp.ones_like(rows.index) if rows.segment is None else rows.segment
  return _Blocks(
    pad(whole(trace.query, 'heads')),
    pad(whole(trace.key, 'kv_heads')),
    flat(segment),
    flat(rows.live),
    size,
    rows.window,
    (pairs[0].astype(np.int32), pairs[1].astype(np.int32)),
  )


def softpick(trace, rows: Any, cap: float) -> tuple[jax.Array, jax.Array]:
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


def key_sums(trace, weights: Any, rows: Any) -> kernels.KeySums:
  """As `kernels.key_sums`, in plain XLA, for any normalizer, dtype and mesh."""
  blocks = _blocks(trace, rows)
  B, T, H, _ = blocks.query.shape
  G = blocks.key.shape[2]
  of_query = tuple(map(blocks.pad, weights.of_query))

  def step(sums, pair):
    i, j = pair
    score, mask = blocks.scores(i, j)
    spread = lambda x: (
      blocks.cut(x, i).swapaxes(1, 2).reshape(B, G, H // G, blocks.size, 1)
    )
    weight = jnp.where(mask, weights(score, tuple(map(spread, of_query))), 0)
    log_weight = jnp.log(jnp.where(weight > 0, weight, 1))
    size = jnp.where(jnp.isnan(score), jnp.inf, jnp.abs(score))
    size = jnp.where(mask, size, 0)
    by_head = lambda x: x.reshape(B, H, -1)
    at = j * blocks.size
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, blocks.size, 2)
    put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, at, 2)
    return kernels.KeySums(
      put(sums.weight, cut(sums.weight) + by_head(weight.sum(-2))),
      put(sums.entropy, cut(sums.entropy) - by_head((weight * log_weight).sum(-2))),
      put(sums.logit, jnp.maximum(cut(sums.logit), by_head(size.max(-2)))),
    ), None

  zeros = jnp.zeros((B, H, T), jnp.float32)
  sums, _ = jax.lax.scan(step, kernels.KeySums(zeros, zeros, zeros), blocks.pairs)
  return kernels.KeySums(*(x[..., : rows.live.shape[1]] for x in sums))
