"""Exact attention in plain XLA, with memory linear in the tokens, on any platform.

The softmax runs over blocks of keys with a running maximum (arXiv 2112.05682). The
backward pass recomputes the weights of each block from the log-sum-exp, and includes the
gradient of the log-sum-exp itself (arXiv 2205.14135). One loop visits a precomputed list
of pairs of a query block and a key block; blocks above the diagonal are not in the list.

B batch  T tokens  S keys' tokens  H heads  G KV heads  R = H/G  K head width
q, s tokens of a query block and of a key block  N pairs of blocks
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gated.kernels.attention import context
from gated.kernels.attention.case import Case, sees, soft_cap

# Maximum tokens of a block: 1 MiB of float32 scores for each row and head.
MOST = 512
_LOW = float(np.finfo(np.float32).min)


class Pairs(NamedTuple):
  """The pairs of query and key blocks to compute, and the positions of the queries."""

  query_N: np.ndarray
  key_N: np.ndarray
  live_N: np.ndarray  # False for padding to the longest list of a device
  position_T: np.ndarray  # -1 for padding


class Sizes(NamedTuple):
  """Constants of the compiled program."""

  query: int  # tokens of a query block
  key: int  # tokens of a key block
  cap: float
  window: int = 0


class _Mask(NamedTuple):
  """Hides the keys after a query, and the keys of other segments."""

  pairs: Pairs
  segments: tuple[jax.Array, jax.Array] | None  # of queries, of keys


def attend(q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case):
  """The contract of kernels.attend and kernels.attend_lse, for softmax only."""
  case.require_softmax()
  length = q_BTHK.shape[1]
  sizes = Sizes(_block(context.stretch(length)), _block(length), case.cap, case.window)
  pairs = plan(length, context.ways(), sizes)

  def run(q_BTHK, k_BSGK, v_BSGK, segment_BT, segment_BS, pairs):
    segments = None if segment_BT is None else (segment_BT, segment_BS)
    y_BTHK, lse_BTH = _local(q_BTHK, k_BSGK, v_BSGK, _Mask(pairs, segments), sizes)
    return (y_BTHK, lse_BTH) if case.lse else y_BTHK

  args = q_BTHK, k_BSGK, v_BSGK, segment_BT
  return context.attend(run, *args, split=pairs, lse=case.lse)


def _block(length: int) -> int:
  """The tokens of equal blocks of at most MOST tokens; the last block is padded."""
  return math.ceil(length / math.ceil(length / MOST))


def plan(length: int, ways: int, sizes: Sizes) -> Pairs:
  """The pairs of blocks of each device; every array has a leading dim of `ways`."""
  position = context.order(length, ways)
  fill = -position.shape[1] % sizes.query
  position = np.pad(position, ((0, 0), (0, fill)), constant_values=-1)
  blocks = position.reshape(ways, -1, sizes.query)
  last = blocks.max(-1)
  first = np.where(blocks < 0, length, blocks).min(-1) - (sizes.window or length) + 1
  first = np.maximum(first, 0) // sizes.key
  lists = [
    [(i, j, True) for i, (a, p) in enumerate(row) for j in range(a, p // sizes.key + 1)]
    for row in np.stack([first, last], -1)
  ]
  columns = itertools.zip_longest(*lists, fillvalue=(0, 0, False))
  query, key, live = np.array(list(columns), np.int32).transpose(2, 1, 0)
  return Pairs(query, key, live > 0, position)


def _local(q_BTHK, k_BSGK, v_BSGK, visible: _Mask, sizes: Sizes):
  """One device's attention -> (y_BTHK, lse_BTH)."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]

  def pad(x, size):
    """Pads the tokens to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))

  q_BGRTK = pad(q_BTHK, sizes.query).reshape(B, -1, G, H // G, K).transpose(0, 2, 3, 1, 4)
  k_BGSK, v_BGSK = (pad(x, sizes.key).swapaxes(1, 2) for x in (k_BSGK, v_BSGK))
  if visible.segments is not None:
    segments = map(pad, visible.segments, (sizes.query, sizes.key))
    visible = visible._replace(segments=tuple(segments))
  y_BGRTK, lse_BGRT = _attention(q_BGRTK, k_BGSK, v_BGSK, visible, sizes)
  y_BTHK = y_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, -1, H, K)[:, :T]
  return y_BTHK, lse_BGRT.transpose(0, 3, 1, 2).reshape(B, -1, H)[:, :T]


def _cut(x, index, size: int, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x: jax.Array, block: jax.Array, index, axis: int) -> jax.Array:
  start = index * block.shape[axis]
  return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis)


def _scores(q_BGRqK, k_BGsK, visible: _Mask, sizes: Sizes, pair):
  """One pair of blocks -> (capped scores in float32, the mask of visible keys)."""
  i, j, live = pair
  score = jnp.einsum(
    'bgrqk,bgsk->bgrqs', q_BGRqK, k_BGsK, preferred_element_type=jnp.float32
  )
  score = soft_cap(score * q_BGRqK.shape[-1] ** -0.5, sizes.cap)
  position_q = _cut(visible.pairs.position_T, i, sizes.query, 0)
  position_s = j * sizes.key + jnp.arange(sizes.key, dtype=jnp.int32)
  mask = live & sees(position_q[:, None], position_s[None], sizes.window)[None]
  if visible.segments is not None:
    segment_Bq = _cut(visible.segments[0], i, sizes.query, 1)
    segment_Bs = _cut(visible.segments[1], j, sizes.key, 1)
    mask = mask & (segment_Bq[:, :, None] == segment_Bs[:, None])
  return score, mask[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BGRTK, k_BGSK, v_BGSK, visible: _Mask, sizes: Sizes):
  return _forward(q_BGRTK, k_BGSK, v_BGSK, visible, sizes)[0]


def _forward(q_BGRTK, k_BGSK, v_BGSK, visible: _Mask, sizes: Sizes):
  def step(carry, pair):
    y_BGRTK, total_BGRT, top_BGRT = carry
    i, j, _ = pair
    query = functools.partial(_cut, index=i, size=sizes.query, axis=3)
    key = functools.partial(_cut, index=j, size=sizes.key, axis=2)
    y, total, before = query(y_BGRTK), query(total_BGRT), query(top_BGRT)
    score, mask = _scores(query(q_BGRTK), key(k_BGSK), visible, sizes, pair)
    top = jnp.maximum(before, jnp.where(mask, score, _LOW).max(-1))
    weight = jnp.where(mask, jnp.exp(score - top[..., None]), 0)
    fade = jnp.exp(before - top)
    added = jnp.einsum(
      'bgrqs,bgsk->bgrqk',
      weight.astype(v_BGSK.dtype),
      key(v_BGSK),
      preferred_element_type=jnp.float32,
    )
    y = y * fade[..., None] + added
    total = total * fade + weight.sum(-1)
    new = y, total, top
    return tuple(_put(whole, part, i, 3) for whole, part in zip(carry, new)), None

  zero = jnp.zeros(q_BGRTK.shape, jnp.float32)
  start = zero, zero[..., 0], jnp.full(zero.shape[:-1], _LOW)
  (y, total, top), _ = jax.lax.scan(step, start, visible.pairs[:3])
  # Padding queries see no key.
  total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
  y_BGRTK = (y / total[..., None]).astype(q_BGRTK.dtype)
  lse_BGRT = top + jnp.log(total)
  out = y_BGRTK, lse_BGRT
  return out, (q_BGRTK, k_BGSK, v_BGSK, visible, *out)


def _backward(sizes: Sizes, kept, cotangents):
  """ds = p (dp - sum(y dy) + dlse): the gradients of the softmax and of the lse."""
  q_BGRTK, k_BGSK, v_BGSK, visible, y_BGRTK, lse_BGRT = kept
  dy_BGRTK, dlse_BGRT = cotangents
  f32 = dict(preferred_element_type=jnp.float32)
  inner_BGRT = jnp.einsum('bgrtk,bgrtk->bgrt', y_BGRTK, dy_BGRTK, **f32) - dlse_BGRT

  def step(carry, pair):
    dq_BGRTK, dk_BGSK, dv_BGSK = carry
    i, j, _ = pair
    query = functools.partial(_cut, index=i, size=sizes.query, axis=3)
    key = functools.partial(_cut, index=j, size=sizes.key, axis=2)
    q, k, v, dy = query(q_BGRTK), key(k_BGSK), key(v_BGSK), query(dy_BGRTK)
    score, mask = _scores(q, k, visible, sizes, pair)
    weight = jnp.where(mask, jnp.exp(score - query(lse_BGRT)[..., None]), 0)
    dv = jnp.einsum('bgrqs,bgrqk->bgsk', weight.astype(dy.dtype), dy, **f32)
    dweight = jnp.einsum('bgrqk,bgsk->bgrqs', dy, v, **f32)
    dscore = weight * (dweight - query(inner_BGRT)[..., None]) * q.shape[-1] ** -0.5
    if sizes.cap:
      dscore = dscore * (1 - jnp.square(score / sizes.cap))
    dscore = dscore.astype(q.dtype)
    dq = jnp.einsum('bgrqs,bgsk->bgrqk', dscore, k, **f32)
    dk = jnp.einsum('bgrqs,bgrqk->bgsk', dscore, q, **f32)
    dq_BGRTK = _put(dq_BGRTK, query(dq_BGRTK) + dq, i, 3)
    dk_BGSK = _put(dk_BGSK, key(dk_BGSK) + dk, j, 2)
    return (dq_BGRTK, dk_BGSK, _put(dv_BGSK, key(dv_BGSK) + dv, j, 2)), None

  start = [jnp.zeros(x.shape, jnp.float32) for x in (q_BGRTK, k_BGSK, v_BGSK)]
  grads, _ = jax.lax.scan(step, tuple(start), visible.pairs[:3])
  return *(g.astype(x.dtype) for g, x in zip(grads, kept)), None


_attention.defvjp(_forward, _backward)
