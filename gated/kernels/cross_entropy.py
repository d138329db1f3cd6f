"""The vocabulary loss: cross-entropy with the logits of a few tokens in memory at a time.

On a mesh neither the whole unembedding nor its float32 gradient need fit on a device. The
devices that shard the width are split into inner groups. Each device of a group computes
the logits of some rows of w_VD for all tokens of the group. Small groups move more
weights, large groups more tokens; `inner_size` chooses the size.

B batch  T tokens  N tokens of a chunk  D width  V vocab
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated.devices import collectives, mesh
from gated.devices.collectives import TableGroups
from gated.kernels.attention.case import soft_cap

LIMIT = 1 << 30  # bytes of a device's float32 gradient of w, if a group size allows it
PADDING = -1e9  # a padded row's logit: its exp is 0, without overflow


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

  total = sum(weight * (nll + z * lse^2)), where lse is the log of the softmax's
  denominator (arXiv 2204.02311, section 5). A `cap` c first replaces each logit by
  c tanh(logit / c) (arXiv 2408.00118, section 2). A device holds the logits of `chunk`
  tokens at a time: the forward pass also computes the gradient. Only `total` has a
  gradient.
  """
  current = mesh.current()
  BT = P() if current is None else mesh.spec(('batch', 'tokens'), current)
  VD = P() if current is None else mesh.spec(('vocab', 'embed'), current)
  groups = TableGroups()
  if current is not None:
    groups = _groups(collectives.table_groups(current, VD, BT), x_BTD, w_VD)
  local = functools.partial(_local_loss, z=z, chunk=chunk, cap=cap, groups=groups)

  def run(grad: bool, x, w):
    # Cast before the devices gather w: half the bytes.
    args = x, w.astype(x.dtype), target_BT, weight_BT
    if current is None:
      return local(grad, *args)
    return jax.shard_map(
      functools.partial(local, grad),
      mesh=current,
      in_specs=(P(*BT, None), VD, BT, BT),
      out_specs=(P(), BT, BT) + ((P(*BT, None), VD) if grad else ()),
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


def inner_size(group: collectives.Group, rows: int, width: int, tokens: int) -> int:
  """The size of inner groups for `rows` of the vocabulary and `tokens` a device.

  In an inner group of n, a device gathers rows / n of w and (n - 1) * tokens of x, and
  sends back the gradients of both. Chooses the n that moves the fewest bytes among those
  that keep the float32 gradient of w within LIMIT, or the whole group if none does.
  """
  fits = [n for n in group.sizes() if 4 * width * rows <= n * LIMIT] or [group.size]
  return min(fits, key=lambda n: (n - 1) * tokens + rows / n)


def _groups(groups: TableGroups, x: jax.Array, w: jax.Array) -> TableGroups:
  tokens = x.shape[0] * x.shape[1] // groups.tokens.size
  rows = w.shape[0] // groups.vocab.size
  return groups.with_inner(inner_size(groups.width, rows, w.shape[1], tokens))


def _local_loss(grad, x_BTD, w_VD, target_BT, weight_BT, *, z, chunk, cap, groups):
  """One device's shards -> (total, nll_BT, lse_BT), and with `grad` two gradients.

  The gradients of x and of w (in float32) are sharded like x and w.
  """
  (B, T, _), rows = x_BTD.shape, len(w_VD)
  count = -(-B * T // chunk)
  size = -(-B * T // count)

  def pieces(a):
    a = a.reshape(B * T, *a.shape[2:])
    padding = [(0, count * size - B * T), *[(0, 0)] * (a.ndim - 1)]
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])

  whole = lambda a: a.reshape(-1, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])
  # A device holds some columns of all rows of w, and needs all columns of some rows.
  width, inner, outer = groups.width, groups.inner, groups.outer
  w_VD = jnp.pad(w_VD, ((0, -rows % width.size), (0, 0)))
  w_VD = outer.all_gather(width.all_to_all(w_VD, split=0, join=1), 0)
  body = functools.partial(
    _chunk,
    grad,
    w_VD,
    _ids(rows, groups),
    padded=rows % width.size > 0,
    z=z,
    cap=cap,
    groups=groups,
  )
  start = jnp.zeros(w_VD.shape if grad else (), jnp.float32)
  others = [inner.all_gather(pieces(a), 1) for a in (target_BT, weight_BT)]
  dw_VD, by_token = jax.lax.scan(body, start, (pieces(x_BTD), *others))
  nll_BT, lse_BT, *dx_BTD = map(whole, by_token)
  total = jnp.sum(weight_BT * (nll_BT + z * jnp.square(lse_BT)))
  total = groups.tokens.sum(total)
  if not grad:
    return total, nll_BT, lse_BT
  dw_VD = width.all_to_all(outer.reduce_scatter(dw_VD, 0), split=1, join=0)[:rows]
  return total, nll_BT, lse_BT, *dx_BTD, groups.replicas.sum(dw_VD)


def _ids(rows: int, groups: TableGroups) -> jax.Array:
  """The token of each row of a device's w; -1 for padding."""
  part = -(-rows // groups.width.size)
  first = groups.inner.index() + groups.inner.size * jnp.arange(groups.outer.size)
  row_V = (part * first[:, None] + jnp.arange(part)[None]).reshape(-1)
  return jnp.where(row_V < rows, row_V + rows * groups.vocab.index(), -1)


def _chunk(grad, w_VD, id_V, dw_VD, piece, *, padded, z, cap, groups):
  """Adds a chunk's gradient to dw_VD -> (dw_VD, each token's losses and gradient).

  Computes the tokens of the whole inner group; each device keeps its own tokens' results.
  """
  inner, vocab = groups.inner, groups.vocab
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  x_ND, target_N, weight_N = piece
  x_ND = inner.all_gather(x_ND, 0)
  logit_NV = soft_cap(product('nd,vd->nv', x_ND, w_VD), cap)
  if padded:
    logit_NV = jnp.where(id_V[None] < 0, PADDING, logit_NV)
  top_N = vocab.max(inner.max(logit_NV.max(-1)))
  exp_NV = jnp.exp(logit_NV - top_N[:, None])
  sum_N = vocab.sum(inner.sum(exp_NV.sum(-1)))
  lse_N = top_N + jnp.log(sum_N)
  hit_NV = target_N[:, None] == id_V[None]
  own_N = vocab.sum(inner.sum(jnp.where(hit_NV, logit_NV, 0.0).sum(-1)))
  losses = inner.shard(lse_N - own_N, 0), inner.shard(lse_N, 0)
  if not grad:
    return dw_VD, losses
  dlogit_NV = exp_NV * ((1 + 2 * z * lse_N) / sum_N)[:, None] - hit_NV
  dlogit_NV *= weight_N[:, None]
  if cap:
    dlogit_NV *= 1 - jnp.square(logit_NV / cap)
  dlogit_NV = dlogit_NV.astype(x_ND.dtype)
  dx_ND = vocab.sum(inner.reduce_scatter(product('nv,vd->nd', dlogit_NV, w_VD), 0))
  dw_VD += product('nv,nd->vd', dlogit_NV, x_ND)
  return dw_VD, (*losses, dx_ND.astype(x_ND.dtype))
