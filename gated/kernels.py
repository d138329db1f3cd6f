"""Two contracts, attention and the vocabulary loss, each with a table of backends.

A backend that cannot do a case raises NotImplementedError saying what it lacks; with
'auto' the next one is tried, and the choice is logged once.

B batch  T tokens  S keys' tokens  H heads  G KV heads  K head width  M segments  V vocab
"""

import functools
import itertools
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
  """Causal softmax(q k / sqrt(K)) v -> y_BTHK; head h reads KV head h // (H/G) (Eq. 2).

  With segments, a token attends within its own segment only; equal segment ids must
  stand together, at most `max_segments` runs of them in a row. Raises
  NotImplementedError, listing what each backend lacks, if none can.
  """
  if backend != 'auto':
    try:
      return ATTENTION[backend](q_BTHK, k_BSGK, v_BSGK, segment_BT, max_segments)
    except NotImplementedError as error:
      knob = f'config.model.attn.backend={backend!r}'
      raise NotImplementedError(f'{knob}, but {backend} {error}') from error
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
  """The definition, scores and softmax in float32, with all T x S of them in memory."""
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
  """cuDNN's fused attention, packed segments as ragged sequences (from Hopper on)."""
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
  return cudnn.dot_product_attention(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    q_seqlen=size_BM,
    kv_seqlen=size_BM,
    q_offsets=offset_BM1,
    kv_offsets=offset_BM1,
    scale=q_BTHK.shape[-1] ** -0.5,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
  )


def segment_runs(segment_BT: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids -> the start and the size of each run of equal ids: (B, limit), or -1."""
  first_BT = segment_BT != jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
  first_BT = first_BT.at[:, 0].set(True)
  run_BT = jnp.cumsum(first_BT, 1) - 1
  size_BM = jax.vmap(lambda run: jnp.bincount(run, length=limit))(run_BT)
  start_BM = jax.vmap(lambda f: jnp.nonzero(f, size=limit, fill_value=-1)[0])(first_BT)
  size_BM = jnp.where(start_BM < 0, -1, size_BM)
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
  alone = abstract.empty or abstract.size == 1
  BT = P() if alone else mesh.spec(('batch', 'tokens'), abstract)
  V = P() if alone else mesh.spec(('vocab',), abstract)
  local = functools.partial(
    _local_loss, z=z, chunk=chunk, batch_axes=_names(BT), vocab_axes=_names(V)
  )

  def run(grad: bool, x, w):
    # Cast before the devices gather w: half the bytes.
    args = x, w.astype(x.dtype), target_BT, weight_BT
    if alone:
      return local(grad, *args)
    # The gradient in w leaves as w's own parts, summed and scattered in one go.
    dw = P(*V, mesh.spec(('embed',), abstract)[0])
    outs = (P(), BT, BT) + ((P(*BT, None), dw) if grad else ())
    return jax.shard_map(
      functools.partial(local, grad),
      mesh=abstract,
      in_specs=(P(*BT, None), P(*V, None), BT, BT),
      out_specs=outs,
      check_vma=False,
    )(*args)

  @jax.custom_vjp
  def loss(x, w):
    return run(False, x, w)

  def forward(x, w):
    total, nll_BT, lse_BT, dx, dw = run(True, x, w)
    return (total, nll_BT, lse_BT), (dx, dw.astype(w.dtype))

  def backward(gradients, cotangents):
    return tuple((cotangents[0] * g).astype(g.dtype) for g in gradients)

  loss.defvjp(forward, backward)
  total, nll_BT, lse_BT = loss(x_BTD, w_VD)
  return total, jax.lax.stop_gradient(nll_BT), jax.lax.stop_gradient(lse_BT)


def _names(spec: P) -> tuple[str, ...]:
  """All the mesh axes of a PartitionSpec."""
  parts = [(p,) if isinstance(p, str) else (p or ()) for p in spec]
  return tuple(itertools.chain(*parts))


def _local_loss(
  grad, x_BTD, w_VD, target_BT, weight_BT, *, z, chunk, batch_axes, vocab_axes
):
  """The loss on one device's tokens and vocabulary, summed over the mesh axes of each.

  -> (total, nll_BT, lse_BT), and with `grad` the gradients in x and, in float32, in w.
  """
  (B, T, D), V = x_BTD.shape, w_VD.shape[0]
  count = -(-B * T // chunk)
  size = -(-B * T // count)

  def pieces(a):
    a = a.reshape(B * T, *a.shape[2:])
    padding = [(0, count * size - B * T), *[(0, 0)] * (a.ndim - 1)]
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])

  whole = lambda a: a.reshape(-1, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])
  over = lambda reduce, a, axes: reduce(a, axes) if axes else a
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  first = V * (jax.lax.axis_index(vocab_axes) if vocab_axes else 0)

  def body(dw_VD, piece):
    x_ND, target_N, weight_N = piece
    logit_NV = product('nd,vd->nv', x_ND, w_VD)
    top_N = over(jax.lax.pmax, logit_NV.max(-1), vocab_axes)
    exp_NV = jnp.exp(logit_NV - top_N[:, None])
    sum_N = over(jax.lax.psum, exp_NV.sum(-1), vocab_axes)
    lse_N = top_N + jnp.log(sum_N)
    hit_NV = (target_N - first)[:, None] == jnp.arange(V)[None]
    own_N = over(jax.lax.psum, jnp.where(hit_NV, logit_NV, 0.0).sum(-1), vocab_axes)
    if not grad:
      return dw_VD, (lse_N - own_N, lse_N)
    dlogit_NV = exp_NV * ((1 + 2 * z * lse_N) / sum_N)[:, None] - hit_NV
    dlogit_NV = (dlogit_NV * weight_N[:, None]).astype(x_ND.dtype)
    dx_ND = over(jax.lax.psum, product('nv,vd->nd', dlogit_NV, w_VD), vocab_axes)
    dw_VD += product('nv,nd->vd', dlogit_NV, x_ND)
    return dw_VD, (lse_N - own_N, lse_N, dx_ND.astype(x_ND.dtype))

  start = jnp.zeros((V, D) if grad else (), jnp.float32)
  dw_VD, by_token = jax.lax.scan(
    body, start, (pieces(x_BTD), pieces(target_BT), pieces(weight_BT))
  )
  nll_BT, lse_BT, *dx_BTD = map(whole, by_token)
  total = jnp.sum(weight_BT * (nll_BT + z * jnp.square(lse_BT)))
  total = over(jax.lax.psum, total, batch_axes)
  if not grad:
    return total, nll_BT, lse_BT
  scattered = [axis for axis in mesh.RULES['embed'] if axis in batch_axes]
  for axis in scattered:
    dw_VD = jax.lax.psum_scatter(dw_VD, axis, scatter_dimension=1, tiled=True)
  whole_axes = tuple(axis for axis in batch_axes if axis not in scattered)
  return total, nll_BT, lse_BT, *dx_BTD, over(jax.lax.psum, dw_VD, whole_axes)
