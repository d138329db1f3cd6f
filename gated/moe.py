"""Mixture of experts: a softmax router, top-k dropless experts, and what balances them.

Dropless: each device sorts its tokens by expert, multiplies them in groups, and adds the
k results of each token up; no token is left out and no expert computes padding for long.
Capacity: an expert takes so many tokens of each row, first choices first, and what it
drops is reported. The gradient is exact in both.

B batch  T tokens  D width  F ffn of an expert  E experts  k experts of a token
N = B * T  M = N * k selections  C capacity
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gated import config, kernels, mesh
from gated.layers import Dense, Numerics, SwiGLU, named, normal, recomputed, swiglu

_NAME = 'config.model.moe'
MOST = 1 << 16  # Of experts; see model.LIMITS.


@dataclass(frozen=True, kw_only=True)
class Config:
  """Experts in the place of an FFN; with none, the other fields are checked, no more."""

  experts: int  # E; 0 for a dense FFN
  top_k: int  # k
  norm_topk: bool  # the k weights of a token sum to 1
  shared: int  # experts that every token goes to, as one FFN so many times as wide
  dispatch: str  # dropless, or capacity
  capacity: float  # tokens of a row that an expert takes, times the mean, k T / E
  backend: str  # of kernels.GROUPED, or auto

  def __post_init__(self):
    config.within(f'{_NAME}.experts', self.experts, 0, MOST)
    config.at_least(f'{_NAME}.top_k', self.top_k, 1)
    config.within(f'{_NAME}.shared', self.shared, 0, MOST)
    config.one_of(f'{_NAME}.dispatch', self.dispatch, ('dropless', 'capacity'))
    kernels.check_grouped(self.backend)
    if not self.capacity > 0:
      raise ValueError(f'{_NAME}.capacity={self.capacity}, but it must be positive')
    if self.dispatch == 'capacity' and self.backend != 'auto':
      raise ValueError(
        f"{_NAME}.backend={self.backend!r} with {_NAME}.dispatch='capacity', which "
        "multiplies no groups: allowed is 'auto'"
      )
    if self.experts and self.top_k > self.experts:
      raise ValueError(
        f'{_NAME}.top_k={self.top_k}, but there are {_NAME}.experts={self.experts}'
      )
    if self.shared and not self.experts:
      raise ValueError(f'{_NAME}.shared={self.shared}, but {_NAME}.experts=0')


class Report(NamedTuple):
  """What a layer's router did, summed over the tokens that are not padding.

  Sums of several batches add up to the sums of one batch of them all. The probabilities
  and the squares have a gradient, the counts have none.
  """

  load_E: jax.Array  # how many tokens chose each expert
  prob_E: jax.Array  # the probability of each expert
  square: jax.Array  # the squared log of the router's softmax denominator
  dropped: jax.Array  # choices without a place


class MoE(nnx.Module):
  """x_BTD, and which tokens are not padding -> (y_BTD, Report)."""

  def __init__(
    self,
    cfg: Config,
    key: jax.Array,
    *,
    width: int,
    hidden: int,
    std_out: float,
    numerics: Numerics,
  ):
    self.cfg = cfg
    # Router weights and logits are float32 throughout.
    wide = dataclasses.replace(numerics, weights='float32', compute='float32')
    self.router = Dense(
      named(key, 'router'),
      (width,),
      (cfg.experts,),
      axes=('embed', None),
      std=numerics.init_std,
      bias=False,
      numerics=wide,
    )
    opts: dict[str, Any] = dict(width=width, std_out=std_out, numerics=numerics)
    self.experts = Experts(named(key, 'experts'), cfg.experts, hidden=hidden, **opts)
    shared = functools.partial(SwiGLU, named(key, 'shared'), **opts)
    self.shared = shared(hidden=cfg.shared * hidden) if cfg.shared else None

  def __call__(self, x_BTD: jax.Array, live_BT: jax.Array) -> tuple[jax.Array, Report]:
    cfg, E = self.cfg, self.cfg.experts
    with jax.default_matmul_precision('highest'):
      logit_BTE = self.router(x_BTD.astype(jnp.float32))
    weight_BTk, choice_BTk, prob_BTE = route(logit_BTE, cfg)
    live = live_BT.astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(choice_BTk, E).sum(2)
    routed = x_BTD, weight_BTk, choice_BTk
    if cfg.dispatch == 'dropless':
      y_BTD, dropped = _dropless(self.experts, *routed, backend=cfg.backend), 0.0
    else:
      y_BTD, dropped = _capacity(self.experts, *routed, live_BT=live_BT, cfg=cfg)
    if self.shared is not None:
      y_BTD = y_BTD + self.shared(x_BTD)
    lse_BT = jax.nn.logsumexp(logit_BTE, -1)
    return y_BTD, Report(
      load_E=jax.lax.stop_gradient(jnp.einsum('bt,bte->e', live, chosen_BTE)),
      prob_E=jnp.einsum('bt,bte->e', live, prob_BTE),
      square=jnp.sum(live * jnp.square(lse_BT)),
      dropped=jnp.float32(dropped),
    )


class Experts(nnx.Module):
  """E times SwiGLU: weights act and up (E, D, F), down (E, F, D)."""

  def __init__(
    self, key, count: int, *, width: int, hidden: int, std_out: float, numerics: Numerics
  ):
    self.compute = numerics.compute
    draw = functools.partial(normal, dtype=numerics.weights)
    wide = functools.partial(
      draw, axes=('experts', 'embed', 'ffn'), std=numerics.init_std
    )
    narrow = functools.partial(draw, axes=('experts', 'ffn', 'embed'), std=std_out)
    self.act = wide(named(key, 'act'), (count, width, hidden))
    self.up = wide(named(key, 'up'), (count, width, hidden))
    self.down = narrow(named(key, 'down'), (count, hidden, width))

  def weights(self) -> list[jax.Array]:
    return [w[...].astype(self.compute) for w in (self.act, self.up, self.down)]


def route(logit_BTE: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Router logits -> (weight_BTk, choice_BTk, prob_BTE), in float32.

  The k most probable experts of softmax(logit), the first of equals first.
  """
  prob_BTE = jax.nn.softmax(logit_BTE, -1)
  weight_BTk, choice_BTk = jax.lax.top_k(prob_BTE, cfg.top_k)
  if cfg.norm_topk:
    weight_BTk = weight_BTk / weight_BTk.sum(-1, keepdims=True)
  return weight_BTk, choice_BTk, prob_BTE


def _dropless(experts: Experts, x_BTD, weight_BTk, choice_BTk, *, backend: str):
  abstract = jax.sharding.get_abstract_mesh()
  local = functools.partial(_local_experts, backend=backend)
  args = x_BTD, weight_BTk, choice_BTk, *experts.weights()
  if abstract.empty or abstract.size == 1:
    return local(*args)[0]
  BT = mesh.spec(('batch', 'tokens'), abstract)
  F = mesh.spec(('ffn',), abstract)[0]
  rows = P(*BT, None)
  # Devices that split F each add a part of y: the parts stand in a dim of their own.
  parts = jax.shard_map(
    local,
    mesh=abstract,
    in_specs=(rows, rows, rows, P(None, None, F), P(None, None, F), P(None, F, None)),
    out_specs=P(F, *BT, None),
    check_vma=False,
  )(*args)
  return parts.sum(0) if F else parts[0]


def _local_experts(x_BTD, weight_BTk, choice_BTk, act_EDF, up_EDF, down_EFD, *, backend):
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
  return _combined(y_MD.reshape(1, B, T, k, D), weight_BTk[None])


@recomputed
def _combined(y_kD: jax.Array, weight_k: jax.Array) -> jax.Array:
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


def _capacity(
  experts: Experts, x_BTD, weight_BTk, choice_BTk, *, live_BT, cfg: Config
) -> tuple[jax.Array, jax.Array]:
  """An expert takes up to C tokens of each row, those that chose it first at first."""
  (B, T, D), k, E = x_BTD.shape, cfg.top_k, cfg.experts
  C = min(T, math.ceil(cfg.capacity * k * T / E))
  # Choices in the order in which they are served: the first ones of all tokens, then on.
  choice_Bj = choice_BTk.swapaxes(1, 2).reshape(B, k * T)
  live_Bj = jnp.tile(live_BT, (1, k))
  taken_BjE = jax.nn.one_hot(choice_Bj, E, dtype=jnp.int32) * live_Bj[..., None]
  place_Bj = (jnp.cumsum(taken_BjE, 1) * taken_BjE).sum(-1) - 1
  fits_Bj = live_Bj & (place_Bj < C)
  slot_Bj = jnp.where(fits_Bj, choice_Bj * C + place_Bj, E * C)
  token_Bj = jnp.tile(jnp.arange(T)[None], (B, k))
  row_B1 = jnp.arange(B)[:, None]
  empty = jnp.full((B, E * C), T)
  source_BS = empty.at[row_B1, slot_Bj].set(token_Bj, mode='drop')
  x_BSD = x_BTD.at[row_B1, source_BS].get(mode='fill', fill_value=0)
  x_BECD = x_BSD.reshape(B, E, C, D)
  act, up, down = experts.weights()
  hidden = swiglu(
    jnp.einsum('becd,edf->becf', x_BECD, act), jnp.einsum('becd,edf->becf', x_BECD, up)
  )
  y_BSD = jnp.einsum('becf,efd->becd', hidden, down).reshape(B, E * C, D)
  y_BjD = y_BSD.at[row_B1, slot_Bj].get(mode='fill', fill_value=0)
  y_BTkD = y_BjD.reshape(B, k, T, D).swapaxes(1, 2)
  dropped = (live_Bj & ~fits_Bj).sum().astype(jnp.float32)
  return _combined(y_BTkD, weight_BTk), dropped


def losses(
  report: Report, load_LE: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Layers' reports -> their (load-balancing, router z) losses, each summed over layers.

    balance = E sum_i f_i P_i       f_i the share of choices that went to expert i, and
                                    P_i its mean probability (arXiv 2501.11873, Eq. 2-4)
    z       = mean of ln(sum_i exp(logit_i))^2                   (arXiv 2202.08906, Eq. 5)

  f is of `load_LE`, the choices that the balance is asked of: those of the global batch,
  say; it has no gradient. A balanced layer has balance 1. `tokens` is how many tokens the
  mean goes over, so that reports of micro-batches, each given the tokens of all, make
  losses that add up.
  """
  share_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  share_LE = jax.lax.stop_gradient(share_LE)
  balance = share_LE.shape[-1] * (share_LE * report.prob_E).sum() / tokens
  return balance, report.square.sum() / tokens


def statistics(report: Report) -> dict[str, jax.Array]:
  """Layers' reports of a batch -> scalars for the log.

  load_max: the busiest expert's load over the mean load, in the worst layer (1 is even);
  load_entropy: of the load, in nats, mean over layers (ln E is even); dropped: the share
  of choices that found no place.
  """
  total_L = jnp.maximum(report.load_E.sum(-1), 1)
  share_LE = report.load_E / total_L[:, None]
  entropy_L = -(share_LE * jnp.log(jnp.where(share_LE > 0, share_LE, 1))).sum(-1)
  return {
    'load_max': share_LE.max() * share_LE.shape[-1],
    'load_entropy': entropy_L.mean(),
    'dropped': report.dropped.sum() / total_L.sum(),
  }
