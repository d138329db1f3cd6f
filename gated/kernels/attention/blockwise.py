"""Exact attention in plain XLA whose memory is linear in the tokens, on any platform.

The softmax goes over blocks of keys with a running maximum (arXiv 2112.05682); the
backward pass makes each block's weights again from the log-sum-exp, whose own gradient it
takes too (arXiv 2205.14135). One loop visits the pairs of a query and a key block that
the causal mask leaves, in a list made beforehand: nothing above the diagonal is computed.

B batch  T tokens  S keys' tokens  H heads  G KV heads  R = H/G  K head width
q, s a block of queries, of keys  N pairs of them
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gated.kernels.attention import context
from gated.kernels.attention.case import Case, soft_cap

# Tokens of a block, at most: 1 MiB of float32 scores for each row and head.
MOST = 512
_LOW = float(np.finfo(np.float32).min)


class Pairs(NamedTuple):
  """Which blocks of queries meet which blocks of keys, and where the queries stand."""

  query_N: np.ndarray
  key_N: np.ndarray
  live_N: np.ndarray  # False only fills the list up to another device's
  position_T: np.ndarray  # -1 fills the last block


class Sizes(NamedTuple):
  """What is known when the program is made."""

  query: int  # tokens of a block
  key: int
  cap: float


class _Where(NamedTuple):
  """Which keys a query may see: those not after it, in its segment if there are any."""

  pairs: Pairs
  segments: tuple[jax.Array, jax.Array] | None  # of queries, of keys


def attend(q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case):
  """The contract of kernels.attend and kernels.attend_lse, by softmax alone."""
  if case.normalizer != 'softmax':
    raise NotImplementedError(f'has no {case.normalizer} attention')
  length = q_BTHK.shape[1]
  sizes = Sizes(_block(context.stretch(length)), _block(length), case.cap)
  pairs = plan(length, context.ways(), sizes)

  def run(q_BTHK, k_BSGK, v_BSGK, segment_BT, segment_BS, pairs):
    where = _Where(pairs, None if segment_BT is None else (segment_BT, segment_BS))
    y_BTHK, lse_BTH = _local(q_BTHK, k_BSGK, v_BSGK, where, sizes)
    return (y_BTHK, lse_BTH) if case.lse else y_BTHK

  args = q_BTHK, k_BSGK, v_BSGK, segment_BT
  return context.attend(run, *args, split=pairs, lse=case.lse)


def _block(length: int) -> int:
  """The size of equal blocks, the last one filled up, of which none is above MOST."""
  return math.ceil(length / math.ceil(length / MOST))


def plan(length: int, ways: int, sizes: Sizes) -> Pairs:
  """The pairs of blocks of each device; every array has a leading dim of `ways`."""
  position = context.order(length, ways)
  fill = -position.shape[1] % sizes.query
  position = np.pad(position, ((0, 0), (0, fill)), constant_values=-1)
  last = position.reshape(ways, -1, sizes.query).max(-1)
  lists = [
    [(i, j) for i, p in enumerate(row) for j in range(p // sizes.key + 1)] for row in last
  ]
  most = max(map(len, lists))
  lists = [[(*pair, True) for pair in row] for row in lists]
  full = np.array([row + [(0, 0, False)] * (most - len(row)) for row in lists], np.int32)
  return Pairs(full[..., 0], full[..., 1], full[..., 2] > 0, position)


def _local(q_BTHK, k_BSGK, v_BSGK, where: _Where, sizes: Sizes):
  """One device's attention -> (y_BTHK, lse_BTH)."""
  B, T, H, K = q_BTHK.shape
  S, G = k_BSGK.shape[1:3]
  more_T, more_S = -T % sizes.query, -S % sizes.key
  q = jnp.pad(q_BTHK, ((0, 0), (0, more_T), (0, 0), (0, 0)))
  q_BGRTK = q.reshape(B, T + more_T, G, H // G, K).transpose(0, 2, 3, 1, 4)
  k_BGSK, v_BGSK = (
    jnp.pad(x, ((0, 0), (0, more_S), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (k_BSGK, v_BSGK)
  )
  if where.segments is not None:
    fill = lambda x, more: jnp.pad(x, ((0, 0), (0, more)))
    of_q, of_k = where.segments
    where = where._replace(segments=(fill(of_q, more_T), fill(of_k, more_S)))
  y_BGRTK, lse_BGRT = _attention(q_BGRTK, k_BGSK, v_BGSK, where, sizes)
  y_BTHK = y_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, -1, H, K)[:, :T]
  return y_BTHK, lse_BGRT.transpose(0, 3, 1, 2).reshape(B, -1, H)[:, :T]


def _cut(x, index, size: int, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x: jax.Array, block: jax.Array, index, axis: int) -> jax.Array:
  start = index * block.shape[axis]
  return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis)


def _scores(q_BGRqK, k_BGsK, where: _Where, sizes: Sizes, pair):
  """Of one pair of blocks: the capped scores in float32, and which of them count."""
  i, j, live = pair
  score = jnp.einsum(
    'bgrqk,bgsk->bgrqs', q_BGRqK, k_BGsK, preferred_element_type=jnp.float32
  )
  score = soft_cap(score * q_BGRqK.shape[-1] ** -0.5, sizes.cap)
  position_q = _cut(where.pairs.position_T, i, sizes.query, 0)
  position_s = j * sizes.key + jnp.arange(sizes.key, dtype=jnp.int32)
  mask = live & (position_q[:, None] >= position_s[None])[None]
  if where.segments is not None:
    segment_Bq = _cut(where.segments[0], i, sizes.query, 1)
    segment_Bs = _cut(where.segments[1], j, sizes.key, 1)
    mask = mask & (segment_Bq[:, :, None] == segment_Bs[:, None])
  return score, mask[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BGRTK, k_BGSK, v_BGSK, where: _Where, sizes: Sizes):
  return _forward(q_BGRTK, k_BGSK, v_BGSK, where, sizes)[0]


def _forward(q_BGRTK, k_BGSK, v_BGSK, where: _Where, sizes: Sizes):
  def step(carry, pair):
    y_BGRTK, total_BGRT, top_BGRT = carry
    i, j, _ = pair
    of_q = functools.partial(_cut, index=i, size=sizes.query, axis=3)
    of_k = functools.partial(_cut, index=j, size=sizes.key, axis=2)
    y, total, before = of_q(y_BGRTK), of_q(total_BGRT), of_q(top_BGRT)
    score, mask = _scores(of_q(q_BGRTK), of_k(k_BGSK), where, sizes, pair)
    top = jnp.maximum(before, jnp.where(mask, score, _LOW).max(-1))
    weight = jnp.where(mask, jnp.exp(score - top[..., None]), 0)
    fade = jnp.exp(before - top)
    added = jnp.einsum(
      'bgrqs,bgsk->bgrqk',
      weight.astype(v_BGSK.dtype),
      of_k(v_BGSK),
      preferred_element_type=jnp.float32,
    )
    y = y * fade[..., None] + added
    total = total * fade + weight.sum(-1)
    new = y, total, top
    return tuple(_put(whole, part, i, 3) for whole, part in zip(carry, new)), None

  zero = jnp.zeros(q_BGRTK.shape, jnp.float32)
  start = zero, zero[..., 0], jnp.full(zero.shape[:-1], _LOW)
  (y, total, top), _ = jax.lax.scan(step, start, where.pairs[:3])
  # What fills the last block sees nothing.
  total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
  y_BGRTK = (y / total[..., None]).astype(q_BGRTK.dtype)
  lse_BGRT = top + jnp.log(total)
  out = y_BGRTK, lse_BGRT
  return out, (q_BGRTK, k_BGSK, v_BGSK, where, *out)


def _backward(sizes: Sizes, kept, cotangents):
  """With ds = p (dp - sum(y dy) + dlse), the softmax's gradient and the lse's at once."""
  q_BGRTK, k_BGSK, v_BGSK, where, y_BGRTK, lse_BGRT = kept
  dy_BGRTK, dlse_BGRT = cotangents
  f32 = dict(preferred_element_type=jnp.float32)
  inner_BGRT = jnp.einsum('bgrtk,bgrtk->bgrt', y_BGRTK, dy_BGRTK, **f32) - dlse_BGRT

  def step(carry, pair):
    dq_BGRTK, dk_BGSK, dv_BGSK = carry
    i, j, _ = pair
    of_q = functools.partial(_cut, index=i, size=sizes.query, axis=3)
    of_k = functools.partial(_cut, index=j, size=sizes.key, axis=2)
    q, k, v, dy = of_q(q_BGRTK), of_k(k_BGSK), of_k(v_BGSK), of_q(dy_BGRTK)
    score, mask = _scores(q, k, where, sizes, pair)
    weight = jnp.where(mask, jnp.exp(score - of_q(lse_BGRT)[..., None]), 0)
    dv = jnp.einsum('bgrqs,bgrqk->bgsk', weight.astype(dy.dtype), dy, **f32)
    dweight = jnp.einsum('bgrqk,bgsk->bgrqs', dy, v, **f32)
    dscore = weight * (dweight - of_q(inner_BGRT)[..., None]) * q.shape[-1] ** -0.5
    if sizes.cap:
      dscore = dscore * (1 - jnp.square(score / sizes.cap))
    dscore = dscore.astype(q.dtype)
    dq = jnp.einsum('bgrqs,bgsk->bgrqk', dscore, k, **f32)
    dk = jnp.einsum('bgrqs,bgrqk->bgsk', dscore, q, **f32)
    dq_BGRTK = _put(dq_BGRTK, of_q(dq_BGRTK) + dq, i, 3)
    dk_BGSK = _put(dk_BGSK, of_k(dk_BGSK) + dk, j, 2)
    return (dq_BGRTK, dk_BGSK, _put(dv_BGSK, of_k(dv_BGSK) + dv, j, 2)), None

  start = [jnp.zeros(x.shape, jnp.float32) for x in (q_BGRTK, k_BGSK, v_BGSK)]
  grads, _ = jax.lax.scan(step, tuple(start), where.pairs[:3])
  return *(g.astype(x.dtype) for g, x in zip(grads, kept)), None


_attention.defvjp(_forward, _backward)
