"""The vocabulary loss: cross-entropy over V tokens without V logits of every token.

On a mesh neither the whole unembedding nor its float32 gradient need fit on a device.
Neighbours along the axes that split the width share the vocabulary: each takes some rows
of w_VD, and sees the tokens of all. The fewer they are, the more of the weights travels;
the more, the more of the tokens. `neighbours` chooses how many.

B batch  T tokens  N tokens of a chunk  D width  V vocab
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated.devices import mesh, teams
from gated.kernels.attention.contract import soft_cap

LIMIT = 1 << 30  # bytes of a device's float32 gradient in w, where sharing can keep to it
NOWHERE = -1e9  # the logit of a row that is padding: no exp of it, and no overflow


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
  VD = P() if alone else mesh.spec(('vocab', 'embed'), abstract)
  devices = teams.Sharing() if alone else _sharing(abstract, x_BTD, w_VD)
  local = functools.partial(_local_loss, z=z, chunk=chunk, cap=cap, devices=devices)

  def run(grad: bool, x, w):
    # Cast before the devices gather w: half the bytes.
    args = x, w.astype(x.dtype), target_BT, weight_BT
    if alone:
      return local(grad, *args)
    return jax.shard_map(
      functools.partial(local, grad),
      mesh=abstract,
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


def neighbours(team: teams.Team, rows: int, width: int, tokens: int) -> int:
  """How many of a team share `rows` of the vocabulary, each having so many tokens.

  Of n neighbours a device gathers w for rows / n, and the states of (n - 1) * tokens; of
  both the gradients travel back. The n that moves the fewest bytes, among those that keep
  the float32 gradient in w within LIMIT; all, where none does.
  """
  fits = [n for n in team.sizes() if 4 * width * rows <= n * LIMIT] or [team.size]
  return min(fits, key=lambda n: (n - 1) * tokens + rows / n)


def _sharing(on: Any, x: jax.Array, w: jax.Array) -> teams.Sharing:
  spec = mesh.spec(('vocab', 'embed'), on), mesh.spec(('batch', 'tokens'), on)
  devices = teams.sharing(on, *spec)
  tokens = x.shape[0] * x.shape[1] // devices.tokens.size
  rows = w.shape[0] // devices.vocab.size
  return devices.by(neighbours(devices.width, rows, w.shape[1], tokens))


def _local_loss(grad, x_BTD, w_VD, target_BT, weight_BT, *, z, chunk, cap, devices):
  """The loss of one device's tokens, over its part of the vocabulary and others'.

  -> (total, nll_BT, lse_BT), and with `grad` the gradients in x and, in float32, in w, of
  which a device is given and returns the part that the mesh gives it.
  """
  (B, T, _), rows = x_BTD.shape, len(w_VD)
  count = -(-B * T // chunk)
  size = -(-B * T // count)

  def pieces(a):
    a = a.reshape(B * T, *a.shape[2:])
    padding = [(0, count * size - B * T), *[(0, 0)] * (a.ndim - 1)]
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])

  whole = lambda a: a.reshape(-1, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])
  # Of w a device has all rows and some columns: it is to have all columns of some rows.
  width, near, far = devices.width, devices.near, devices.far
  w_VD = jnp.pad(w_VD, ((0, -rows % width.size), (0, 0)))
  w_VD = far.gather(width.exchange(w_VD, split=0, join=1), 0)
  body = functools.partial(
    _chunk,
    grad,
    w_VD,
    _ids(rows, devices),
    padded=rows % width.size > 0,
    z=z,
    cap=cap,
    devices=devices,
  )
  start = jnp.zeros(w_VD.shape if grad else (), jnp.float32)
  others = near.gather(pieces(target_BT), 1), near.gather(pieces(weight_BT), 1)
  dw_VD, by_token = jax.lax.scan(body, start, (pieces(x_BTD), *others))
  nll_BT, lse_BT, *dx_BTD = map(whole, by_token)
  total = jnp.sum(weight_BT * (nll_BT + z * jnp.square(lse_BT)))
  total = devices.tokens.sum(total)
  if not grad:
    return total, nll_BT, lse_BT
  dw_VD = width.exchange(far.scatter(dw_VD, 0), split=1, join=0)[:rows]
  return total, nll_BT, lse_BT, *dx_BTD, devices.rest.sum(dw_VD)


def _ids(rows: int, devices: teams.Sharing) -> jax.Array:
  """The token that each row of a device's w stands for; -1 where it is padding."""
  part = -(-rows // devices.width.size)
  first = devices.near.place() + devices.near.size * jnp.arange(devices.far.size)
  row_V = (part * first[:, None] + jnp.arange(part)[None]).reshape(-1)
  return jnp.where(row_V < rows, row_V + rows * devices.vocab.place(), -1)


def _chunk(grad, w_VD, id_V, dw_VD, piece, *, padded, z, cap, devices):
  """A chunk, and dw_VD of those before it -> dw_VD with its own, and what each token has.

  All neighbours' chunks are one here, until each takes its own results.
  """
  near, vocab = devices.near, devices.vocab
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  x_ND, target_N, weight_N = piece
  x_ND = near.gather(x_ND, 0)
  logit_NV = soft_cap(product('nd,vd->nv', x_ND, w_VD), cap)
  if padded:
    logit_NV = jnp.where(id_V[None] < 0, NOWHERE, logit_NV)
  top_N = vocab.max(near.max(logit_NV.max(-1)))
  exp_NV = jnp.exp(logit_NV - top_N[:, None])
  sum_N = vocab.sum(near.sum(exp_NV.sum(-1)))
  lse_N = top_N + jnp.log(sum_N)
  hit_NV = target_N[:, None] == id_V[None]
  own_N = vocab.sum(near.sum(jnp.where(hit_NV, logit_NV, 0.0).sum(-1)))
  found = near.own(lse_N - own_N, 0), near.own(lse_N, 0)
  if not grad:
    return dw_VD, found
  dlogit_NV = exp_NV * ((1 + 2 * z * lse_N) / sum_N)[:, None] - hit_NV
  dlogit_NV *= weight_N[:, None]
  if cap:
    dlogit_NV *= 1 - jnp.square(logit_NV / cap)
  dlogit_NV = dlogit_NV.astype(x_ND.dtype)
  dx_ND = vocab.sum(near.scatter(product('nv,vd->nd', dlogit_NV, w_VD), 0))
  dw_VD += product('nv,nd->vd', dlogit_NV, x_ND)
  return dw_VD, (*found, dx_ND.astype(x_ND.dtype))
