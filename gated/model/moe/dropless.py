"""Dropless experts: sorts all tokens by expert and multiplies them in groups.

A device that holds every expert sorts its own tokens. If the mesh splits the experts over
S devices, each holds E / S of them. Each of the S devices then gathers the tokens of all
S, and computes its own experts' part of each result. A reduce-scatter returns the sums to
the devices that own the tokens.

The alternative is an all-to-all, which sends each of a token's selections to its expert.
A device of N tokens would send and receive k (S-1)/S N D numbers each way; the gather
moves (S-1) N D. Both are equal at S = k, and the gather moves less for S < k: with S = 4
and k = 8, 3 N D instead of 6 N D. The all-to-all also needs buffers for the worst load,
since shapes are static: S N k rows, unless it drops selections. See
bench/expert_parallel.py.

The number of selections of a device's experts varies. A device computes them in passes of
C rows, SLACK times the mean N k. The first pass nearly always holds all of them; a loop
over further passes stops when no selection is left.

B batch  T tokens  D width  F ffn of an expert  E experts  k experts of a token
N = B * T  M = N * k selections  S devices that share the experts  e = E / S of a device
C rows of a pass  G = e * S, selections by expert and by device
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gated import kernels
from gated.devices import determinism, mesh
from gated.model.layers import swiglu

# Rows of a pass, over the mean number of a device's selections. A balanced router stays
# below this ratio. A higher load costs a second pass; more rows would always cost memory.
SLACK = 1.5

# The rows of a pass are a multiple of this, which suits accelerators' kernels; those of a
# small pass are a multiple of 8.
TILE = 512


def run(
  weights: list[jax.Array], x_BTD, weight_BTk, choice_BTk, *, backend: str
) -> jax.Array:
  """Tokens, and the router's weights and choices -> y_BTD.

  The weights are (E, D, F), (E, D, F) and (E, F, D), split as the mesh splits parameters.
  """
  current = mesh.current()
  routed = x_BTD, weight_BTk, choice_BTk
  if current is None:
    return _alone(*routed, *weights, backend=backend)[0]
  rows = P(*mesh.spec(('batch', 'tokens'), current), None)
  wide = mesh.spec(('experts', 'embed', 'ffn'), current)
  narrow = mesh.spec(('experts', 'ffn', 'embed'), current)
  experts, embed, ffn = wide

  def local(x_BTD, weight_BTk, choice_BTk, act, up, down):
    # Gathered here, so that the sum of the gradients is a reduce-scatter.
    whole = lambda w, axis: (
      jax.lax.all_gather(w, embed, axis=axis, tiled=True) if embed else w
    )
    args = x_BTD, weight_BTk, choice_BTk, whole(act, 1), whole(up, 1), whole(down, 2)
    if experts is None:
      return _alone(*args, backend=backend)
    return _shared(*args, over=experts, backend=backend)

  # Each device that splits F computes a summand of y: a leading dim holds the summands.
  parts = jax.shard_map(
    local,
    mesh=current,
    in_specs=(rows, rows, rows, wide, wide, narrow),
    out_specs=P(ffn, *rows),
    check_vma=False,
  )(*routed, *weights)
  return parts.sum(0) if ffn else parts[0]


def _alone(x_BTD, weight_BTk, choice_BTk, act_EDF, up_EDF, down_EFD, *, backend):
  """One device's tokens through all experts -> y in a leading dim of 1."""
  (B, T, D), k, E = x_BTD.shape, choice_BTk.shape[-1], len(act_EDF)
  choice_M = choice_BTk.reshape(-1)
  order_M = jnp.argsort(choice_M, stable=True)
  back_M = jnp.argsort(order_M)
  size_E = jnp.bincount(choice_M, length=E).astype(jnp.int32)
  multiply = functools.partial(kernels.grouped_matmul, backend=backend)
  x_MD = _spread(x_BTD.reshape(B * T, D), order_M, back_M)
  hidden_MF = swiglu(multiply(x_MD, act_EDF, size_E), multiply(x_MD, up_EDF, size_E))
  y_MD = _permuted(multiply(hidden_MF, down_EFD, size_E), back_M, order_M)
  return combined(y_MD.reshape(1, B, T, k, D), weight_BTk[None])


@jax.checkpoint
def combined(y_kD: jax.Array, weight_k: jax.Array) -> jax.Array:
  """A token's results (..., k, D) and their weights (..., k) -> their sum (..., D)."""
  y = y_kD.astype(jnp.float32) * weight_k[..., None]
  return y.sum(-2).astype(y_kD.dtype)


# A permutation's gradient is its inverse: a gather again, where JAX would scatter.
@jax.custom_vjp
def _permuted(y_MD, order_M, back_M):
  return y_MD[order_M]


_permuted.defvjp(
  lambda y_MD, order_M, back_M: (y_MD[order_M], back_M),
  lambda back_M, g_MD: (g_MD[back_M], None, None),
)


@jax.custom_vjp
def _spread(x_ND, order_M, back_M):
  """Each token k times, sorted by expert."""
  return x_ND[order_M // (len(order_M) // len(x_ND))]


def _spread_backward(kept, g_MD):
  back_M, shape = kept
  g = g_MD[back_M].reshape(shape[0], -1, shape[1])
  return g.sum(1, dtype=jnp.float32).astype(g_MD.dtype), None, None


_spread.defvjp(
  lambda x_ND, order_M, back_M: (_spread(x_ND, order_M, back_M), (back_M, x_ND.shape)),
  _spread_backward,
)


def _shared(x_BTD, weight_BTk, choice_BTk, act_eDF, up_eDF, down_eFD, *, over, backend):
  """One device's tokens through the experts of all S -> y in a leading dim of 1.

  `over` is the mesh axis of the S devices. From here on, N counts the tokens of all S.
  """
  (B, T, D), k, e = x_BTD.shape, choice_BTk.shape[-1], len(act_eDF)
  gather = functools.partial(jax.lax.all_gather, axis_name=over, tiled=True)
  table = _table(choice_BTk.reshape(-1), e, over)
  x_ND, weight_M = gather(x_BTD.reshape(-1, D)), gather(weight_BTk.reshape(-1))
  rows = pass_rows(B * T * k, worst=len(x_ND) * min(k, e))
  part = functools.partial(_part, rows=rows, k=k, backend=backend)
  y_ND = _passes(part, rows, (x_ND, weight_M, act_eDF, up_eDF, down_eFD), table)
  return jax.lax.psum_scatter(y_ND, over, tiled=True).reshape(1, B, T, D)


def pass_rows(mean: int, *, worst: int) -> int:
  """The mean and the largest number of a device's selections -> rows of a pass."""
  wanted = math.ceil(SLACK * mean)
  tile = TILE if wanted >= 4 * TILE else 8
  return -(-min(wanted, worst) // tile) * tile


class _Table(NamedTuple):
  """The positions of the selections of this device's experts."""

  order_M: jax.Array  # selections, device after device; each device's sorted by expert
  first_eS: jax.Array  # index in order_M of one device's first selection of one expert
  size_eS: jax.Array  # number of these selections


def _table(choice_M, e: int, over: str) -> _Table:
  """Each device sorts its own choices, then gathers the order and counts of all."""
  M, S = len(choice_M), jax.lax.axis_size(over)
  order_M = jnp.argsort(choice_M, stable=True).astype(jnp.int32)
  size_E = jnp.bincount(choice_M, length=S * e).astype(jnp.int32)
  order_SM, size_SE = (jax.lax.all_gather(a, over) for a in (order_M, size_E))
  first_S1 = M * jnp.arange(S, dtype=jnp.int32)[:, None]
  first_SE = first_S1 + jnp.cumsum(size_SE, 1) - size_SE
  here = e * jax.lax.axis_index(over)
  mine = lambda a_SE: jax.lax.dynamic_slice_in_dim(a_SE, here, e, 1).T
  return _Table((first_S1 + order_SM).reshape(-1), mine(first_SE), mine(size_SE))


class _Rows(NamedTuple):
  """The rows of a pass, sorted by expert; the last ones may be unassigned."""

  token_C: jax.Array  # N for unassigned rows
  selection_C: jax.Array  # M or more for unassigned rows
  order_C: jax.Array  # the rows sorted by token
  size_e: jax.Array  # number of rows of each expert


def _rows(table: _Table, start, rows: int, k: int) -> _Rows:
  """`rows` selections of this device's experts, from the `start`-th on."""
  M = len(table.order_M)
  size_G = table.size_eS.reshape(-1)
  end_G = jnp.cumsum(size_G)
  inside = lambda place_G: jnp.clip(place_G, start, start + rows)
  taken_G = inside(end_G) - inside(end_G - size_G)
  move_G = table.first_eS.reshape(-1) - (end_G - size_G)
  place_C = jnp.arange(rows, dtype=jnp.int32)
  at_C = start + place_C + jnp.repeat(move_G, taken_G, total_repeat_length=rows)
  real_C = place_C < taken_G.sum()
  picked_C = table.order_M.at[at_C].get(mode='clip')
  selection_C = jnp.where(real_C, picked_C, M + place_C)
  token_C = jnp.where(real_C, selection_C // k, M // k)
  size_e = taken_G.reshape(table.size_eS.shape).sum(1)
  return _Rows(token_C, selection_C, jnp.argsort(token_C), size_e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _passes(part: Callable, rows: int, inputs, table: _Table):
  """The sum of all passes -> y_ND, in the dtype of x."""
  return _passes_forward(part, rows, inputs, table)[0]


def _passes_forward(part, rows, inputs, table):
  x_ND, *_ = inputs
  empty = jnp.zeros(x_ND.shape, jnp.float32)
  # Only the first pass keeps residuals for its gradient; the others are rare.
  y_ND, back = jax.vjp(lambda inputs: part(inputs, table, 0, empty), inputs)
  add = lambda turn, y_ND: part(inputs, table, turn, y_ND)
  y_ND = jax.lax.fori_loop(1, _turns(table, rows), add, y_ND)
  # Devices that split the experts sum their parts in the dtype of x, like those that
  # split F.
  return y_ND.astype(x_ND.dtype), (back, inputs, table)


def _passes_backward(part, rows, saved, g_ND):
  back, inputs, table = saved

  def add(turn, grads):
    empty = jnp.zeros(g_ND.shape, jnp.float32)
    _, back = jax.vjp(lambda inputs: part(inputs, table, turn, empty), inputs)
    return jax.tree.map(jnp.add, grads, back(g_ND.astype(jnp.float32))[0])

  first = back(g_ND.astype(jnp.float32))[0]
  return jax.lax.fori_loop(1, _turns(table, rows), add, first), None


_passes.defvjp(_passes_forward, _passes_backward)


def _turns(table: _Table, rows: int):
  """The number of passes, usually one."""
  return -(-table.size_eS.sum() // rows)


def _part(inputs, table: _Table, turn, y_ND, *, rows: int, k: int, backend: str):
  """Adds the selections of one pass to y_ND."""
  x_ND, weight_M, act_eDF, up_eDF, down_eFD = inputs
  at = _rows(table, turn * rows, rows, k)
  multiply = functools.partial(kernels.grouped_matmul, backend=backend)
  x_CD = _taken(x_ND, at)
  weight_C = weight_M.at[at.selection_C].get(
    mode='fill', fill_value=0, unique_indices=True
  )
  hidden_CF = _weighted(
    multiply(x_CD, act_eDF, at.size_e), multiply(x_CD, up_eDF, at.size_e), weight_C
  )
  return _added(y_ND, multiply(hidden_CF, down_eFD, at.size_e), at)


@jax.checkpoint
def _weighted(act_CF: jax.Array, up_CF: jax.Array, weight_C: jax.Array) -> jax.Array:
  """SwiGLU times the router's weights, which cost less here than on the wider output."""
  act_CF, up_CF, dtype = (
    act_CF.astype(jnp.float32),
    up_CF.astype(jnp.float32),
    up_CF.dtype,
  )
  return (jax.nn.silu(act_CF) * up_CF * weight_C[:, None]).astype(dtype)


# Unassigned rows may hold garbage or NaN. The sums over a token's rows omit them, and so
# do the gradients.
def _scattered(y_ND, row_CD, at: _Rows):
  """y_ND plus, for each token, its rows of the pass, in float32."""
  # Sorting by token before the cast to float32 saves a TPU its own sort after the cast.
  row_CD = row_CD[at.order_C].astype(jnp.float32)
  token_C = at.token_C[at.order_C]
  if determinism.applies(mesh.platform()):
    return determinism.add_rows(y_ND, token_C, row_CD)
  return y_ND.at[token_C].add(row_CD, mode='drop', indices_are_sorted=True)


@jax.custom_vjp
def _taken(x_ND, at: _Rows):
  """The tokens of a pass's rows -> x_CD; unassigned rows hold any token."""
  return x_ND.at[at.token_C].get(mode='clip')


def _taken_backward(kept, g_CD):
  at, shape = kept
  g_ND = _scattered(jnp.zeros(shape, jnp.float32), g_CD, at)
  return g_ND.astype(g_CD.dtype), None


_taken.defvjp(lambda x_ND, at: (_taken(x_ND, at), (at, x_ND.shape)), _taken_backward)


@jax.custom_vjp
def _added(y_ND, y_CD, at: _Rows):
  """y_ND plus, for each token, its rows of the pass."""
  return _scattered(y_ND, y_CD, at)


_added.defvjp(
  lambda y_ND, y_CD, at: (_added(y_ND, y_CD, at), (at, y_CD[:0])),
  lambda kept, g_ND: (g_ND, _taken(g_ND.astype(kept[1].dtype), kept[0]), None),
)
