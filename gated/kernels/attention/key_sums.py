"""Sums of the softmax attention that each key receives: a Pallas kernel for GPUs.

A program handles one block of keys and loops over the blocks of queries that see it. The
scores stay on the chip.

B batch  T tokens  H heads  G KV heads  K head width  q, s a block of queries, of keys
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gated.devices import mesh
from gated.kernels.attention.case import soft_cap

BLOCK = 64  # Queries of a block, and keys of a block.
_MASKED = -1e30  # The logarithm of a zero weight; finite, because 0 * inf is NaN.


class KeySums(NamedTuple):
  """Sums over the queries that see a key; each array is (B, H, T) in float32."""

  weight: jax.Array
  entropy: jax.Array  # of -w ln w
  logit: jax.Array  # the largest |q k| / sqrt(K) before a cap; infinite if one is NaN


def fits(q_BTHK: jax.Array) -> bool:
  """Whether the kernel can run: one GPU, bfloat16, whole blocks, usual head widths."""
  return (
    mesh.platform() == 'gpu'
    and mesh.current() is None
    and q_BTHK.dtype == jnp.bfloat16
    and q_BTHK.shape[1] % BLOCK == 0
    and q_BTHK.shape[-1] in (32, 64, 128)
  )


def key_sums(
  q_BTHK, k_BTGK, log_sum_BTH, segment_BT, live_BT, *, cap: float, interpret=False
) -> KeySums:
  """Queries, keys, the logs of the softmax's denominators, documents -> KeySums.

  Attention is causal and within documents. Only live queries count, not padding.
  """
  B, T, H, K = q_BTHK.shape
  shared, scale = H // k_BTGK.shape[2], K**-0.5
  heads_first = lambda x: jnp.moveaxis(x, 2, 1)

  def kernel(q_ref, k_ref, log_sum_ref, query_segment_ref, segment_ref, *sum_refs):
    b, h, first = pl.program_id(2), pl.program_id(1), pl.program_id(0) * BLOCK
    keys = pl.ds(first, BLOCK)
    k_sK = plt.load(k_ref.at[b, h // shared, keys])
    segment_s = plt.load(segment_ref.at[b, keys])
    index_s = first + jnp.arange(BLOCK)

    def add(i, sums):
      weight_s, entropy_s, logit_s = sums
      queries = pl.ds(i * BLOCK, BLOCK)
      q_qK = plt.load(q_ref.at[b, h, queries])
      # A row is a key, so that sums over queries stay within a warp.
      score = plt.dot(k_sK, q_qK, trans_b=True) * scale
      index_q = i * BLOCK + jnp.arange(BLOCK)
      mask = index_q[None] >= index_s[:, None]
      mask &= plt.load(query_segment_ref.at[b, queries])[None] == segment_s[:, None]
      log_weight = soft_cap(score, cap) - plt.load(log_sum_ref.at[b, h, queries])[None]
      log_weight = jnp.where(mask, log_weight, _MASKED)
      weight = jnp.exp(log_weight)
      return (
        weight_s + weight.sum(1),
        entropy_s - (weight * log_weight).sum(1),
        jnp.maximum(logit_s, jnp.where(mask, jnp.abs(score), 0).max(1)),
      )

    zeros = jnp.zeros(BLOCK, jnp.float32)
    sums = jax.lax.fori_loop(pl.program_id(0), T // BLOCK, add, (zeros,) * 3)
    for ref, x in zip(sum_refs, sums):
      plt.store(ref.at[b, h, keys], x)

  shape = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
  sums = pl.pallas_call(
    kernel,
    out_shape=(shape,) * 3,
    grid=(T // BLOCK, H, B),
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name='key_sums',
  )(
    heads_first(q_BTHK),
    heads_first(k_BTGK),
    heads_first(log_sum_BTH),
    jnp.where(live_BT, segment_BT, -1),
    segment_BT,
  )
  # A NaN score makes the sums NaN, but a maximum may ignore it.
  weight, entropy, logit = sums
  return KeySums(weight, entropy, jnp.where(jnp.isnan(weight), jnp.inf, logit))
