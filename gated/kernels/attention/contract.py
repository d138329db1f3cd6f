"""The attention contract and its backends.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gated import config
from gated.devices import mesh
from gated.kernels import choice
from gated.kernels.attention import blockwise, cudnn, rounding, splash
from gated.kernels.attention.case import Case, scores, sees, soft_cap

# Above this many tokens 'auto' does not choose the quadratic reference.
REFERENCE_LIMIT = 4096
# A constant in softpick's denominator, from the authors' code.
SOFTPICK_EPS = 1e-8


def _sigmoid(score, mask, case: Case):
  # The bias -ln n keeps the sum of weights near 1 at the start of training. n counts only
  # visible keys, so that later tokens and other documents in the row have no effect.
  count = jnp.broadcast_to(mask.sum(-1, keepdims=True), (*score.shape[:-1], 1))
  return jnp.where(mask, jax.nn.sigmoid(score - jnp.log(count)), 0)


def _softpick(score, mask, case: Case):
  top = jnp.where(mask, score, 0).max(-1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.maximum(top, 0))
  e = jnp.where(mask, jnp.exp(jnp.where(mask, score, 0) - top) - jnp.exp(-top), 0)
  return jax.nn.relu(e) / (jnp.abs(e).sum(-1, keepdims=True) + SOFTPICK_EPS)


def _softmax(score, mask, case: Case):
  return jax.nn.softmax(jnp.where(mask, score, jnp.finfo(jnp.float32).min), -1)


def _clipped(score, mask, case: Case):
  gamma, zeta = case.clip
  weight = jnp.clip((zeta - gamma) * _softmax(score, mask, case) + gamma, 0, 1)
  return jnp.where(mask, weight, 0)


def _elastic(score, mask, case: Case):
  # The scores' heads are (G, H/G).
  tau = case.offset_H.astype(jnp.float32).reshape(1, *score.shape[1:3], 1, 1)
  weight = _softmax(score, mask, case) + tau / mask.sum(-1, keepdims=True)
  return jnp.where(mask, jax.nn.relu(weight), 0)


# (scores, mask, case) -> weights, over the last dim, in float32.
NORMALIZERS = {
  'softmax': _softmax,
  'sigmoid': _sigmoid,  # sigmoid(s - ln n), each key by itself (arXiv 2409.04431)
  'softpick': _softpick,  # relu(e^s - 1) / sum |e^s - 1| (arXiv 2504.20966)
  # clip((zeta - gamma) softmax(s) + gamma, 0, 1) (arXiv 2306.12929)
  'clipped': _clipped,
  # relu(softmax(s) + tau_h / n) with n the number of visible keys (arXiv 2601.00919)
  'elastic': _elastic,
}


def attend(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  segment_BT: jax.Array | None,
  *,
  backend: str,
  **options: Any,
) -> jax.Array:
  """Causal softmax(q k / sqrt(K)) v -> y_BTHK; head h reads KV head h // (H/G) (Eq. 2).

  With segments, a token attends within its own segment only. Equal segment ids must be
  adjacent, in at most `max_segments` runs per row, or `mean_segments` on average. The
  options are the fields of Case: a `normalizer` that replaces softmax by another entry of
  NORMALIZERS, a `cap` on scores, a `window`. If no backend supports the case, raises
  NotImplementedError with the reason of each.
  """
  case = Case(lse=False, **options)
  return _run(backend, q_BTHK, k_BSGK, v_BSGK, segment_BT, case)


def attend_lse(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  segment_BT: jax.Array | None,
  *,
  backend: str,
  **options: Any,
) -> tuple[jax.Array, jax.Array]:
  """As `attend`, by softmax -> (y_BTHK, lse_BTH), both with their gradients.

  lse = ln(sum(exp(score))), in float32. With it the caller can add terms to the
  denominator after the kernel: a term exp(s) scales y by sigmoid(lse - s). With
  `gradient=False`, for inference, fused kernels skip the second call that lse's gradient
  needs.
  """
  case = Case(lse=True, **options)
  return _run(backend, q_BTHK, k_BSGK, v_BSGK, segment_BT, case)


def attend_cache(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  start_B: jax.Array,
  **options: Any,
) -> tuple[jax.Array, jax.Array]:
  """T queries from position start_B on, over the keys of positions 0 to S - 1.

  -> (y_BTHK, lse_BTH), as `attend` and `attend_lse` give them. A query reads the keys up
  to its own position; later keys may hold any finite values. Runs in plain XLA, with all
  T x S scores in memory.
  """
  case = Case(max_segments=0, lse=True, **options)
  position_BT = start_B[:, None] + jnp.arange(q_BTHK.shape[1])[None]
  key_S = jnp.arange(k_BSGK.shape[1])
  mask = sees(position_BT[:, :, None], key_S[None, None], case.window)
  return _dense(q_BTHK, k_BSGK, v_BSGK, mask, case)


def _run(backend: str, q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case) -> Any:
  table = ATTENTION
  if backend == 'auto' and q_BTHK.shape[1] > REFERENCE_LIMIT:
    table = ATTENTION | {'reference': _too_long}
  args = q_BTHK, k_BSGK, v_BSGK, segment_BT, case
  return choice.run('attention', 'config.model.attn.backend', backend, table, *args)


def _too_long(*_):
  raise NotImplementedError(
    f'is quadratic in memory: above {REFERENCE_LIMIT} tokens it runs only with '
    "config.model.attn.backend='reference'"
  )


def _reference(q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case):
  """The definition of attention in float32, with all T x S scores in memory."""
  T = q_BTHK.shape[1]
  # Each device needs the keys of its whole rows.
  k_BSGK = mesh.constrain(k_BSGK, 'batch', None, 'kv_heads', None)
  v_BSGK = mesh.constrain(v_BSGK, 'batch', None, 'kv_heads', None)
  mask = sees(jnp.arange(T)[None, :, None], jnp.arange(T)[None, None], case.window)
  if segment_BT is not None:
    mask = mask & (segment_BT[:, :, None] == segment_BT[:, None, :])
  return _dense(q_BTHK, k_BSGK, v_BSGK, mask, case)


def _dense(q_BTHK, k_BSGK, v_BSGK, mask_BTS, case: Case) -> Any:
  """Attention to the keys of a mask (B or 1, T, S) -> y_BTHK, or (y_BTHK, lse_BTH)."""
  B, T, H, K = q_BTHK.shape
  score = soft_cap(scores(q_BTHK, k_BSGK), case.cap)
  mask = mask_BTS[:, None, None]
  if case.rounding != 'backend':
    y, lse = rounding.attend(score, v_BSGK, mask, case.rounding)
    y, lse = (jnp.moveaxis(x, 3, 1).reshape(B, T, H, *x.shape[4:]) for x in (y, lse))
    return (y, lse) if case.lse else y
  weight = NORMALIZERS[case.normalizer](score, mask, case).astype(v_BSGK.dtype)
  y = jnp.einsum('bghts,bsgk->btghk', weight, v_BSGK).reshape(B, T, H, K)
  if not case.lse:
    return y
  lse = jax.nn.logsumexp(score, -1, where=mask)
  return y, lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def _splash(q_BTHK, k_BSGK, v_BSGK, segment_BT, case: Case):
  """Pallas's kernel for TPUs."""
  if mesh.platform() != 'tpu':
    raise NotImplementedError('needs a TPU')
  return splash.attend(q_BTHK, k_BSGK, v_BSGK, segment_BT, case)


# In the order in which 'auto' tries them.
ATTENTION: dict[str, Callable] = {
  'cudnn': cudnn.attend,
  'splash': _splash,
  'reference': _reference,
  'blockwise': blockwise.attend,
}


def check_backend(backend: str) -> None:
  """Raises ValueError, naming the knob, for a backend that does not exist."""
  config.one_of('config.model.attn.backend', backend, ('auto', *ATTENTION))
