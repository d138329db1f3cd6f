"""Two contracts, attention and the vocabulary loss, each with a table of backends.

A backend that cannot do a case raises NotImplementedError saying what it lacks; with
'auto' the next one is tried, and the choice is logged once.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width  M segments  V vocab
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated import config, mesh

# Above this many tokens the quadratic reference runs only where it is named.
REFERENCE_LIMIT = 4096


def attend(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  segment_BT: jax.Array | None,
  *,
  backend: str,
  max_segments: int,
) -> jax.Array:
  """Causal softmax(q k / sqrt(K)) v -> y_BTHK, heads h sharing KV head h // (H/G) (Eq. 2).

  With segments, a token attends within its own segment only; equal segment ids must
  stand together, at most `max_segments` runs of them in a row. Raises
  NotImplementedError, listing what each backend lacks, if none can.
  """
  if backend != 'auto':
    return ATTENTION[backend](q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments)
  lacks = []
  for name, run in ATTENTION.items():
    try:
      if name == 'reference' and q_BTHK.shape[1] > REFERENCE_LIMIT:
        raise NotImplementedError(
          f'is quadratic in memory and not taken above {REFERENCE_LIMIT} tokens unless '
          "named: config.model.attn.backend='reference'"
        )
      y_BTHK = run(q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments)
      _log_choice(name, '; '.join(lacks))
      return y_BTHK
    except NotImplementedError as error:
      lacks.append(f'{name} {error}')
  raise NotImplementedError('no attention backend can do this: ' + '; '.join(lacks))


@functools.cache
def _log_choice(name: str, lacks: str) -> None:
  reason = f' ({lacks})' if lacks else ''
  logging.getLogger('gated').info('attention runs on the %s backend%s', name, reason)


def _reference(q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments):
  """The definition, in float32, with all T x S scores in memory."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  score = jnp.einsum('btghk,bsgk->bghts', q, k_BSGK, preferred_element_type=jnp.float32)
  score *= K**-0.5
  mask = jnp.tril(jnp.ones((1, T, T), bool))
  if segment_BT is not None:
    mask = mask & (segment_BT[:, :, None] == segment_BT[:, None, :])
  score = jnp.where(mask[:, None, None], score, jnp.finfo(jnp.float32).min)
  weight = jax.nn.softmax(score, -1).astype(v_BSGK.dtype)
  y = jnp.einsum('bghts,bsgk->btghk', weight, v_BSGK)
  return y.reshape(B, T, H, K)


def _cudnn(q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments):
  """cuDNN's fused attention, with packed segments as ragged sequences (Hopper or later)."""
  if jax.default_backend() != 'gpu':
    raise NotImplementedError('needs a GPU')
  if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f'computes in bfloat16, not {q_BTHK.dtype}')
  if q_BTHK.shape[-1] % 8 or q_BTHK.shape[-1] > 128:
    raise NotImplementedError(f'has no head width {q_BTHK.shape[-1]}')
  abstract = jax.sharding.get_abstract_mesh()
  if not abstract.empty and abstract.shape['context'] > 1:
    raise NotImplementedError('has no causal mask for a sharded context')
  if segment_BT is None:
    return jax.nn.dot_product_attention(
      q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation='cudnn'
    )
  return _cudnn_packed(q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments)


def _cudnn_packed(q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments):
  # JAX has no public name for cuDNN's ragged sequences yet.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  start_BM, size_BM = segment_runs(segment_BT, max_segments)
  # One more offset than segments; -1 where there is none, in the last column always.
  offset_BM1 = jnp.pad(start_BM, ((0, 0), (0, 1)), constant_values=-1)
  opts = dict(scale=q_BTHK.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL)
  lengths = (size_BM, size_BM, offset_BM1, offset_BM1)
  return cudnn.dot_product_attention(
    q_BTHK, k_BSGK, v_BSGK, None, None, *lengths, **opts
  )


def segment_runs(segment_BT: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids -> where each run of equal ids starts and its size, (B, limit), else -1."""
  T = segment_BT.shape[1]
  first_BT = segment_BT != jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
  first_BT = first_BT.at[:, 0].set(True)
  run_BT = jnp.cumsum(first_BT, 1) - 1
  size_BM = jax.vmap(lambda run: jnp.bincount(run, length=limit))(run_BT)
  start_BM = jax.vmap(lambda f: jnp.nonzero(f, size=limit, fill_value=-1)[0])(first_BT)
  size_BM = jnp.where(start_BM < 0, -1, size_BM)
  assert T > 0
  return start_BM.astype(jnp.int32), size_BM.astype(jnp.int32)


# In the order in which 'auto' tries them.
ATTENTION: dict[str, Callable] = {'cudnn': _cudnn, 'reference': _reference}


def check_backend(backend: str) -> None:
  """Raises ValueError, naming the knob, for a backend that does not exist."""
  config.one_of('config.model.attn.backend', backend, ('auto', *ATTENTION))


def vocab_loss(
  x_BTD: jax.Array,
  w_VD: jax.Array,
  target_BT: jax.Array,
  weight_BT: jax.Array,
  *,
  z: float,
  chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Hidden states and unembedding -> (total, nll_BT, lse_BT), in nats, in float32.

  total = sum(weight * (nll + z * lse^2)), lse being the log of the softmax's denominator
  (arXiv 2204.02311, section 5). Only `chunk` tokens' logits per device exist at a time:
  the gradient, which `total` alone has, is made beside the loss, not by recomputing it.
  """
  abstract = jax.sharding.get_abstract_mesh()
  local = functools.partial(_local_loss, z=z, chunk=chunk)
  if abstract.empty or abstract.size == 1:
    return _with_gradient(functools.partial(local, axes=None), x_BTD, w_VD, target_BT, weight_BT)
  BT = mesh.spec(('batch', 'tokens'), abstract)
  vocab = mesh.spec(('vocab',), abstract)
  run = functools.partial(local, axes=(tuple(a for p in BT for a in _names(p)), _names(vocab[0])))

  def sharded(grad):
    outs = (P(), BT, BT) + ((P(*BT, None), P(*vocab, None)) if grad else ())
    ins = (P(*BT, None), P(*vocab, None), BT, BT)
    return jax.shard_map(
      functools.partial(run, grad), mesh=abstract, in_specs=ins, out_specs=outs, check_vma=False
    )

  return _with_gradient(lambda grad, *a: sharded(grad)(*a), x_BTD, w_VD, target_BT, weight_BT)


def _names(part) -> tuple[str, ...]:
  return (part,) if isinstance(part, str) else tuple(part or ())


def _with_gradient(run, x_BTD, w_VD, target_BT, weight_BT):
  """run(grad, ...) -> (total, nll, lse[, dx, dw]) becomes differentiable in x and w."""

  @jax.custom_vjp
  def loss(x, w):
    return run(False, x, w, target_BT, weight_BT)

  def forward(x, w):
    total, nll, lse, dx, dw = run(True, x, w, target_BT, weight_BT)
    return (total, nll, lse), (dx, dw)

  def backward(grads, cotangents):
    g = cotangents[0]
    return tuple((g * d).astype(d.dtype) for d in grads)

  loss.defvjp(forward, backward)
  return loss(x_BTD, w_VD)


def _local_loss(grad, x_BTD, w_VD, target_BT, weight_BT, *, axes, z, chunk):
  """The loss on one device's tokens and vocabulary; `axes` names the mesh axes of each."""
  batch_axes, vocab_axes = axes if axes else ((), ())
  B, T, D = x_BTD.shape
  V = w_VD.shape[0]
  N = B * T
  chunk = next(c for c in range(min(chunk, N), 0, -1) if N % c == 0)
  chunks = lambda a: a.reshape(N // chunk, chunk, *a.shape[2:])
  first = V * (jax.lax.axis_index(vocab_axes) if vocab_axes else 0)
  reduce = lambda f, a: f(a, vocab_axes) if vocab_axes else a
  w = w_VD.astype(x_BTD.dtype)
  f32 = dict(preferred_element_type=jnp.float32)

  def body(dw_VD, piece):
    x_ND, target_N, weight_N = piece
    logit_NV = jnp.einsum('nd,vd->nv', x_ND, w, **f32)
    top_N = reduce(jax.lax.pmax, logit_NV.max(-1))
    exp_NV = jnp.exp(logit_NV - top_N[:, None])
    sum_N = reduce(jax.lax.psum, exp_NV.sum(-1))
    lse_N = top_N + jnp.log(sum_N)
    hit_NV = (target_N - first)[:, None] == jnp.arange(V)[None]
    nll_N = lse_N - reduce(jax.lax.psum, jnp.where(hit_NV, logit_NV, 0.0).sum(-1))
    if not grad:
      return dw_VD, (nll_N, lse_N, jnp.zeros((), x_ND.dtype))
    softmax_NV = exp_NV / sum_N[:, None]
    dlogit_NV = softmax_NV * (1 + 2 * z * lse_N)[:, None] - hit_NV
    dlogit_NV = (dlogit_NV * weight_N[:, None]).astype(x_ND.dtype)
    dx_ND = reduce(jax.lax.psum, jnp.einsum('nv,vd->nd', dlogit_NV, w, **f32))
    dw_VD += jnp.einsum('nv,nd->vd', dlogit_NV, x_ND, **f32)
    return dw_VD, (nll_N, lse_N, dx_ND.astype(x_ND.dtype))

  start = jnp.zeros(w_VD.shape if grad else (), jnp.float32)
  pieces = chunks(x_BTD), chunks(target_BT), chunks(weight_BT)
  dw_VD, (nll, lse, dx) = jax.lax.scan(body, start, pieces)
  nll_BT, lse_BT = nll.reshape(B, T), lse.reshape(B, T)
  total = jnp.sum(weight_BT * (nll_BT + z * jnp.square(lse_BT)))
  total = jax.lax.psum(total, batch_axes) if batch_axes else total
  if not grad:
    return total, nll_BT, lse_BT
  dw_VD = jax.lax.psum(dw_VD, batch_axes) if batch_axes else dw_VD
  return total, nll_BT, lse_BT, dx.reshape(B, T, D), dw_VD.astype(w_VD.dtype)
