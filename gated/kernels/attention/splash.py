"""Splash attention: JAX's Pallas kernel for TPUs, within the attention contract.

Keys and values are not repeated for the query heads. The backward pass uses two kernels:
a fused kernel would store a dq for each block of keys, T / 1024 times the size of q.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info,
)

from gated.kernels.attention import context
from gated.kernels.attention.case import Case, sees, with_lse_gradient

splash = splash_attention.splash_attention_kernel
masks = splash_attention.splash_attention_mask

# The largest block that divides the tokens is used; a TPU's vector has 128 lanes.
BLOCKS = (1024, 512, 256, 128)
# Maximum bytes of a block: vector memory also holds scores and gradients.
BLOCK_BYTES = 1 << 19
# Maximum bytes of lse at a time; further rows run in later batches.
LSE_BYTES = 1 << 28


@functools.cache
def _mask_function(window: int):
  return functools.partial(sees, window=window)


def attend(
  q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case, *, blocks=BLOCKS, interpret=False
):
  """The contract of kernels.attend and kernels.attend_lse, on TPUs or interpreted."""
  case.require_softmax()
  if case.cap and case.lse:
    raise NotImplementedError('has no log-sum-exp of capped scores')
  if q_BTHK.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'computes in bfloat16 or float32, not {q_BTHK.dtype}')
  length, stretch = q_BTHK.shape[1], context.stretch(q_BTHK.shape[1])
  width = q_BTHK.shape[-1] * q_BTHK.dtype.itemsize
  blocks = [b for b in blocks if b * width <= BLOCK_BYTES]
  if not blocks:
    raise NotImplementedError(f'has no blocks for a head width of {q_BTHK.shape[-1]}')
  sizes = tuple(next((b for b in blocks if n % b == 0), 0) for n in (stretch, length))
  if not all(sizes):
    least = blocks[-1] * length // stretch
    raise NotImplementedError(f'has blocks for multiples of {least} tokens, not {length}')
  opts: dict[str, Any] = dict(cap=case.cap, window=case.window, interpret=interpret)
  kernel = functools.partial(_kernel, sizes=sizes, **opts)

  def run(q_BTHK, k_BSGK, v_BSGK, segment_BT, segment_BS, infos):
    def call(q_BTHK, k_BSGK, v_BSGK, residual=False):
      """y_BTHK, or (y_BTHK, lse_BTH) without a gradient."""
      q_BHTK = (q_BTHK * q_BTHK.shape[-1] ** -0.5).swapaxes(1, 2)
      run_row = kernel(infos, residual=residual)
      segments = segment_BT is not None
      ids = splash.SegmentIds(segment_BT, segment_BS) if segments else None
      rows = q_BHTK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), ids
      out = _each(lambda q, k, v, ids: run_row(q, k, v, segment_ids=ids), rows)
      return jax.tree.map(lambda x: x.swapaxes(1, 2), out)

    y_BTHK = call(q_BTHK, k_BSGK, v_BSGK)
    if not case.lse:
      return y_BTHK
    # The kernel that returns the log-sum-exp has no gradient, so it runs separately.
    stopped = map(jax.lax.stop_gradient, (q_BTHK, k_BSGK, v_BSGK))
    _, (lse_BTH,) = call(*stopped, residual=True)
    if not case.gradient:
      return y_BTHK, lse_BTH
    return y_BTHK, with_lse_gradient(call, q_BTHK, k_BSGK, lse_BTH)

  args = q_BTHK, k_BSGK, v_BSGK, segment_BT
  infos = plan(length, context.ways(), *sizes, case.window)
  return context.attend(run, *args, split=infos, lse=case.lse)


def _each(call, rows):
  """Calls call(*row) for all rows, as many at a time as LSE_BYTES allows."""
  count, H, T, _ = rows[0].shape
  # The kernel writes each lse 128 times.
  most = max(1, LSE_BYTES // (H * T * 128 * 4))
  if count <= most:
    return jax.vmap(call)(*rows)
  return jax.lax.map(lambda row: call(*row), rows, batch_size=most)


@functools.cache
def plan(length: int, ways: int, block_q: int, block_kv: int, window: int = 0) -> list:
  """The masks of the three kernels: forward, dq, and dk with dv.

  Every array has a leading dim of `ways`, one part for each device.
  """
  query = context.order(length, ways).reshape(-1)
  # The mask has two rows and two columns for each block: all four are set if the block is
  # full, one if it is partial, none if it is empty. The kernel itself computes the mask
  # of a partial block, from the positions of its queries. The distances of a block's
  # queries and keys have no gaps.
  first = lambda at, block: at.reshape(-1, block)[:, 0]
  start = first(query, block_q)[:, None] - first(np.arange(length), block_kv)[None]
  least, most = start - block_kv + 1, start + block_q - 1
  beyond = window or length
  some, full = (most >= 0) & (least < beyond), (least >= 0) & (most < beyond)
  kind = np.stack([some, full, full, full], -1).reshape(*some.shape, 2, 2)
  kind = kind.swapaxes(1, 2).reshape(2 * len(some), -1)
  mask = masks.MultiHeadMask([masks.NumpyMask(kind)])

  def part(array):
    if array.ndim == 1:  # the queries' positions
      return array.reshape(ways, -1)
    # One head's blocks: (1, blocks of queries, blocks of keys).
    return array.reshape(1, ways, -1, array.shape[2]).swapaxes(0, 1)

  def masked(process):
    info, _ = process(mask, (2, 2), head_shards=1, q_seq_shards=ways)
    info = info._replace(mask_next=None, partial_mask_blocks=None, q_sequence=query)
    return jax.tree.map(part, info)

  forward, backward = masked(mask_info.process_mask), masked(mask_info.process_mask_dkv)
  return [forward, forward, backward]


def _kernel(infos, sizes, cap: float, window: int, residual: bool, interpret: bool):
  queries: dict[str, Any] = dict.fromkeys(
    ('block_q', 'block_q_dkv', 'block_q_dq'), sizes[0]
  )
  keys: dict[str, Any] = dict.fromkeys(
    ('block_kv', 'block_kv_dkv', 'block_kv_dq'), sizes[1]
  )
  return splash.SplashAttentionKernel(
    *infos,
    block_sizes=splash.BlockSizes(**queries, **keys),
    is_mqa=False,
    save_residuals=residual,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=cap or None,
    residual_checkpoint_name=None,
    mask_function=_mask_function(window),
    interpret=interpret,
  )
