"""cuDNN's fused attention on GPUs (from Hopper on).

cuDNN computes each document of packed rows as a sequence of its own. The work and the
memory of its backward pass grow with the number of sequences that a call has room for,
used or not: each takes the gradients of a whole row. JAX's function has room for
`max_segments` documents in every row. Where that is much memory, ours has room for the
documents of a usual batch; a batch with more of them is computed row by row, which is
slow and exact. The choice costs time in every step: XLA's host waits in each layer for
the number of documents, so it cannot prepare the next step meanwhile.

B batch  T tokens  H heads  G KV heads  K head width  N sequences
"""

import functools
import json
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gated.devices import determinism, mesh
from gated.kernels.attention import context
from gated.kernels.attention.case import Case, with_lse_gradient

# A usual batch has at most this many standard deviations more documents than the average,
# if the documents of a row deviate by as many as it has on average.
DEVIATIONS = 4

# Below this memory, room for all documents is cheaper than the choice. Measured on one
# H200 (LOG.md, 2026-11-28): 32 rows of 1024 tokens with 0.3 GB take 24 ms a step without
# the choice and 50 to 86 ms with it; 128 rows with 3.2 GB take 186 and 161 ms.
SAVED = 2 << 30


def attend(q_BTHK, k_BTGK, v_BTGK, segment_BT, case: Case) -> Any:
  """The contract of kernels.attend and kernels.attend_lse.

  In deterministic mode segments become a mask. The mask's gradient takes memory quadratic
  in the row; ragged sequences would take memory quadratic in the batch
  (github.com/NVIDIA/cudnn-frontend/pull/398).
  """
  case.require_softmax()
  if case.cap:
    raise NotImplementedError('has no soft cap')
  if mesh.platform() != 'gpu':
    raise NotImplementedError('needs a GPU')
  if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f'computes in bfloat16, not {q_BTHK.dtype}')
  if q_BTHK.shape[-1] % 8 or q_BTHK.shape[-1] > 128:
    raise NotImplementedError(f'has no head width {q_BTHK.shape[-1]}')
  if context.ways() > 1:
    raise NotImplementedError('has no causal mask for a sharded context')
  packed = segment_BT is not None and case.max_segments > 1
  masked = packed and determinism.applies('gpu')
  if case.window and masked:
    raise NotImplementedError(
      'has no window beside the mask of deterministic packed rows'
    )
  run = functools.partial(_whole, window=case.window)
  if masked:
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    run = functools.partial(run, mask=same_BTT[:, None])
  elif packed:
    run = functools.partial(_packed, segment_BT=segment_BT, case=case)
  if not case.lse:
    return run(q_BTHK, k_BTGK, v_BTGK)
  y_BTHK, lse_BTH = run(q_BTHK, k_BTGK, v_BTGK, residual=True)
  if not case.gradient:
    return y_BTHK, lse_BTH
  return y_BTHK, with_lse_gradient(run, q_BTHK, k_BTGK, lse_BTH)


def _whole(q_BTHK, k_BTGK, v_BTGK, *, window: int, mask=None, residual=False):
  """Rows of one document, or with a mask (B, 1, T, T) -> y_BTHK, or (y_BTHK, lse_BTH)."""
  cudnn = _library()
  out = cudnn.dot_product_attention(
    q_BTHK,
    k_BTGK,
    v_BTGK,
    mask=mask,
    scale=q_BTHK.shape[-1] ** -0.5,
    mask_type=cudnn.MaskType.CAUSAL,
    sliding_window_length=window or None,
    return_residual=residual,
  )
  return (out[0], out[1].swapaxes(1, 2)) if residual else out


@functools.cache
def _library() -> types.ModuleType:
  """-> JAX's module of cuDNN's attention, whose gradients say if they are deterministic.

  In deterministic mode XLA adds this option to the first of several equal calls, and then
  does not find the kernels of the others: a second layer would end with "IndexError:
  raw_hash_map<>::at". Calls that have the option from the start stay equal.
  """
  # JAX has no public name for this module, whose function also returns a float32 lse.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  name = 'create_dot_product_attention_backend_config'
  options_of = getattr(cudnn, name)

  def create(*args, is_bwd: bool) -> str:
    options = json.loads(options_of(*args, is_bwd=is_bwd))
    if is_bwd and determinism.applies('gpu'):
      options['cudnn_fmha_backend_config']['force_deterministic'] = True
    return json.dumps(options)

  setattr(cudnn, name, create)
  return cudnn


def _packed(q_BTHK, k_BTGK, v_BTGK, *, segment_BT, case: Case, residual=False):
  """Packed rows, on each device its own -> y_BTHK, or (y_BTHK, lse_BTH)."""

  def run(q_BTHK, k_BTGK, v_BTGK, segment_BT, *_):
    B, T, H, K = q_BTHK.shape
    each = T * H * bytes_of(K, q_BTHK.dtype.itemsize)
    room = usual_room(B, case.mean_segments, case.max_segments, each)
    rooms = room, case.max_segments
    out = _ragged(q_BTHK, k_BTGK, v_BTGK, segment_BT, rooms, case.window)
    return out if residual else out[0]

  args = q_BTHK, k_BTGK, v_BTGK, segment_BT
  return context.attend(run, *args, split=[], lse=residual)


def bytes_of(width: int, itemsize: int) -> int:
  """What cuDNN's backward pass takes for a token of a head, for each document of a row.

  Float32 gradients of the query, gradients of key and value, and a log-sum-exp.
  """
  return width * (4 + 2 * itemsize) + 4


def usual_room(rows: int, mean: float, most: int, each: float) -> int:
  """Documents a row for which a call of `rows` rows has room.

  `mean` is the number of documents in an average row, 0 if that is unknown; no row has
  more than `most`. `each` is the memory in bytes for a document. The room is `most`
  unless less room saves SAVED.
  """
  usual = max(2, math.ceil(mean * (1 + DEVIATIONS / rows**0.5))) if mean else most
  return usual if (most - usual) * rows * each >= SAVED else most


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ragged(q_BTHK, k_BTGK, v_BTGK, segment_BT, rooms: tuple[int, int], window: int):
  """-> (y_BTHK, lse_BTH); only y has a gradient."""
  call = functools.partial(_forward, window=window)
  return _with_room(call, rooms, segment_BT, q_BTHK, k_BTGK, v_BTGK)


def _ragged_forward(q_BTHK, k_BTGK, v_BTGK, segment_BT, rooms, window):
  out = _ragged(q_BTHK, k_BTGK, v_BTGK, segment_BT, rooms, window)
  return out, (segment_BT, q_BTHK, k_BTGK, v_BTGK, *out)


def _ragged_backward(rooms, window, saved, cotangents):
  call = functools.partial(_backward, window=window)
  return *_with_room(call, rooms, *saved, cotangents[0]), None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _with_room(call: Callable, rooms: tuple[int, int], segment_BT, *arrays) -> Any:
  """call(room, segment_BT, *arrays) for all rows at once, or row by row if that is full.

  `rooms` are documents a row: of all rows on average, and the most of a single one.
  """
  room, most = rooms
  if room == most:
    return call(room, segment_BT, *arrays)
  alone = lambda row: call(most, *(x[None] for x in row))
  return jax.lax.cond(
    _starts(segment_BT).sum() <= len(segment_BT) * room,
    functools.partial(call, room),
    lambda *arrays: jax.tree.map(lambda x: x[:, 0], jax.lax.map(alone, arrays)),
    segment_BT,
    *arrays,
  )


def _starts(segment_BT: jax.Array) -> jax.Array:
  """Segment ids -> whether a run of equal ids starts; each row starts one."""
  before_BT = jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
  return (segment_BT != before_BT).at[:, 0].set(True)


def sequences(segment_BT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids -> the first token and the size of `count` runs of equal ids.

  Tokens are numbered through all rows. Unused runs start behind the last token.
  """
  tokens = segment_BT.size
  starts = _starts(segment_BT).reshape(-1)
  start_N = jnp.nonzero(starts, size=count, fill_value=tokens)[0].astype(jnp.int32)
  return start_N, jnp.diff(start_N, append=tokens).astype(jnp.int32)


def by_token(x_NHT: jax.Array, segment_BT: jax.Array, start_N: jax.Array) -> jax.Array:
  """Numbers by sequence and place in it -> the same by token, (B, T, H)."""
  number = jnp.cumsum(_starts(segment_BT).reshape(-1)) - 1
  place = jnp.arange(len(number)) - start_N[number]
  return x_NHT[number, :, place].reshape(*segment_BT.shape, -1)


def by_sequence(x_BTH: jax.Array, start_N: jax.Array) -> jax.Array:
  """The inverse of `by_token`; places behind the end of a sequence hold any number."""
  (B, T, H), place_T = x_BTH.shape, jnp.arange(x_BTH.shape[1])
  at_NT = jnp.minimum(start_N[:, None] + place_T[None], B * T - 1)
  return x_BTH.reshape(B * T, H)[at_NT].swapaxes(1, 2)


def _forward(room: int, segment_BT, q_BTHK, k_BTGK, v_BTGK, *, window: int):
  B, T, H, _ = q_BTHK.shape
  start_N, size_N = sequences(segment_BT, B * room)
  lse_NHT = jax.ShapeDtypeStruct((B * room, H, T), jnp.float32)
  qkv = q_BTHK, k_BTGK, v_BTGK
  y_BTHK, lse_NHT = _call(
    '__cudnn$fmhaSoftmax', qkv, [q_BTHK], [lse_NHT], qkv, start_N, size_N, window
  )
  return y_BTHK, by_token(lse_NHT, segment_BT, start_N)


def _backward(
  room: int, segment_BT, q_BTHK, k_BTGK, v_BTGK, y_BTHK, lse_BTH, dy_BTHK, *, window: int
):
  start_N, size_N = sequences(segment_BT, len(q_BTHK) * room)
  qkv = q_BTHK, k_BTGK, v_BTGK
  arrays = *qkv, by_sequence(lse_BTH, start_N), dy_BTHK, y_BTHK
  return tuple(
    _call('__cudnn$fmhaSoftmaxBackward', arrays, qkv, [], qkv, start_N, size_N, window)
  )


def _call(name: str, arrays, likes, others, qkv, start_N, size_N, window: int) -> list:
  """XLA's call of cuDNN -> arrays like `likes`, (B, T, H, K), and `others`.

  JAX's own function numbers the documents of each row by themselves, and in old versions
  (before github.com/jax-ml/jax/pull/39521) reads wrong keys if G < H.
  """
  q_BTHK, k_BTGK, _ = qkv
  B, T, H, K = q_BTHK.shape
  if q_BTHK.size > jnp.iinfo(jnp.int32).max:
    raise NotImplementedError(
      f'counts in 32 bits, but queries have {q_BTHK.size} numbers'
    )
  room = len(start_N) // B
  # XLA wants one more offset than sequences, and reads no more of the others.
  end = jnp.full(B, B * T, jnp.int32)
  offset = jnp.concatenate([start_N, end]).reshape(B, room + 1)
  size = size_N.reshape(B, room)
  by_head = lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[2], T, K), x.dtype)
  plain = lambda x: tuple(range(len(x.shape)))
  workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
  results = jax.ffi.ffi_call(
    name,
    [*map(by_head, likes), *others, workspace],
    # In memory they are (B, T, H, K), too.
    output_layouts=[*([(0, 2, 1, 3)] * len(likes)), *map(plain, others), (0,)],
    custom_call_api_version=2,
    legacy_backend_config=_config(q_BTHK, room, window, backward='Backward' in name),
  )(*arrays, size, size, offset * (H * K), offset * (k_BTGK.shape[2] * K))
  heads = [x.swapaxes(1, 2) for x in results[: len(likes)]]
  return [*heads, *results[len(likes) : -1]]


def _config(q_BTHK, room: int, window: int, *, backward: bool) -> str:
  """The options of XLA's call: CudnnfMHABackendConfig of its backend_configs.proto."""
  B, T, H, K = q_BTHK.shape
  # The dims that each product sums over, and those that it keeps, by its two factors.
  products = {
    'bmm1_dot_dimension_numbers': ('3', '3', '02', '02'),
    'bmm2_dot_dimension_numbers': ('3', '1', '01', '02'),
  }
  if backward:
    products = {
      'bmm1_grad_gemm1_dot_dimension_numbers': ('2', '1', '01', '02'),
      'bmm1_grad_gemm2_dot_dimension_numbers': ('3', '1', '01', '02'),
      'bmm2_grad_gemm1_dot_dimension_numbers': ('2', '1', '01', '02'),
      'bmm2_grad_gemm2_dot_dimension_numbers': ('3', '3', '02', '02'),
    }
  sides = (
    'lhs_contracting_dimensions',
    'rhs_contracting_dimensions',
    'lhs_batch_dimensions',
    'rhs_batch_dimensions',
  )
  scores = dict(
    element_type={'bfloat16': 'BF16', 'float16': 'F16'}[q_BTHK.dtype.name],
    dimensions=[str(n) for n in (B, H, T, T)],
    layout=dict(minor_to_major=['3', '2', '1', '0']),
    is_dynamic_dimension=[False] * 4,
  )
  algorithm = dict(
    algo_id='0',
    math_type='TENSOR_OP_MATH',
    tuning_knobs={'17': '1', '24': '0'},
    is_cudnn_frontend=True,
    workspace_size='0',
  )
  options = dict(
    algorithm=algorithm,
    fmha_scale=K**-0.5,
    intermediate_tensor_shape=scores,
    is_flash_attention=True,
    mask_type='PADDING_CAUSAL',
    dropout_rate=0.0,
    seed=42,
    sliding_window_length=window,
    max_seg_per_batch=room,
    is_paged_attention=False,
  )
  numbers = {name: dict(zip(sides, map(list, dims))) for name, dims in products.items()}
  return json.dumps(
    dict(operation_queue_id='0', cudnn_fmha_backend_config=options | numbers)
  )
