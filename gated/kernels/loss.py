"""The vocabulary loss: cross-entropy over V tokens without V logits of every token.

B batch  T tokens  N tokens of a chunk  D width  V vocab
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated import mesh
from gated.kernels.attention import soft_cap


def vocab_loss(
  x_BTD: jax.Array,
  w_VD: jax.Array,
  target_BT: jax.Array,
  weight_BT: jax.Array,
  *,
  z: float,
  chunk: int,
  cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Hidden states and unembedding -> (total, nll_BT, lse_BT), in nats, in float32.

  total = sum(weight * (nll + z * lse^2)), lse being the log of the softmax's denominator
  (arXiv 2204.02311, section 5). A `cap` c makes each logit c tanh(logit / c) first (arXiv
  2408.00118, section 2). Only `chunk` tokens' logits per device exist at a time:
  the gradient, which `total` alone has, is made beside the loss, not by recomputing it.
  """
  abstract = jax.sharding.get_abstract_mesh()
  alone = abstract.empty or abstract.size == 1
  BT = P() if alone else mesh.spec(('batch', 'tokens'), abstract)
  V = P() if alone else mesh.spec(('vocab',), abstract)
  local = functools.partial(
    _local_loss, z=z, chunk=chunk, cap=cap, batch_axes=_names(BT), vocab_axes=_names(V)
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
  grad, x_BTD, w_VD, target_BT, weight_BT, *, z, chunk, cap, batch_axes, vocab_axes
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
    logit_NV = soft_cap(product('nd,vd->nv', x_ND, w_VD), cap)
    top_N = over(jax.lax.pmax, logit_NV.max(-1), vocab_axes)
    exp_NV = jnp.exp(logit_NV - top_N[:, None])
    sum_N = over(jax.lax.psum, exp_NV.sum(-1), vocab_axes)
    lse_N = top_N + jnp.log(sum_N)
    hit_NV = (target_N - first)[:, None] == jnp.arange(V)[None]
    own_N = over(jax.lax.psum, jnp.where(hit_NV, logit_NV, 0.0).sum(-1), vocab_axes)
    if not grad:
      return dw_VD, (lse_N - own_N, lse_N)
    dlogit_NV = exp_NV * ((1 + 2 * z * lse_N) / sum_N)[:, None] - hit_NV
    dlogit_NV *= weight_N[:, None]
    if cap:
      dlogit_NV *= 1 - jnp.square(logit_NV / cap)
    dlogit_NV = dlogit_NV.astype(x_ND.dtype)
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
