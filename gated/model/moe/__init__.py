"""Mixture of experts: a softmax router, top-k experts, and balancing losses.

`dropless.py` computes every selected expert of every token. `capacity.py` limits the
tokens of an expert in each row, and reports the number of dropped choices. Both compute
exact gradients.

B batch  T tokens  D width  F ffn of an expert  E experts  k experts of a token
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config, kernels
from gated.devices import determinism, mesh
from gated.model.layers import LARGEST, Dense, Numerics, SwiGLU, child_key, normal_param
from gated.model.moe import capacity, dropless

_NAME = 'config.model.moe'


@dataclass(frozen=True, kw_only=True)
class Config:
  """Experts instead of an FFN; with experts=0 the other fields are only checked."""

  experts: int  # E; 0 for a dense FFN
  top_k: int  # k
  norm_topk: bool  # the k weights of a token sum to 1
  shared: int  # experts that every token uses, as one FFN of this many times the width
  dispatch: str  # dropless, or capacity
  capacity: float  # tokens of a row that an expert takes, over the mean k T / E
  backend: str  # of kernels.GROUPED, or auto

  def __post_init__(self):
    config.within(f'{_NAME}.experts', self.experts, 0, LARGEST)
    config.at_least(f'{_NAME}.top_k', self.top_k, 1)
    config.within(f'{_NAME}.shared', self.shared, 0, LARGEST)
    config.one_of(f'{_NAME}.dispatch', self.dispatch, ('dropless', 'capacity'))
    kernels.check_grouped(self.backend)
    config.positive(f'{_NAME}.capacity', self.capacity)
    if self.dispatch == 'capacity' and self.backend != 'auto':
      raise ValueError(
        f"{_NAME}.backend={self.backend!r}, but {_NAME}.dispatch='capacity' has no "
        "grouped matmul: allowed is 'auto'"
      )
    if self.experts and self.top_k > self.experts:
      raise ValueError(
        f'{_NAME}.top_k={self.top_k}, but there are {_NAME}.experts={self.experts}'
      )
    if self.shared and not self.experts:
      raise ValueError(f'{_NAME}.shared={self.shared}, but {_NAME}.experts=0')


class Report(NamedTuple):
  """Statistics of a layer's router, summed over the tokens that are not padding.

  The sums of several batches add up to those of one joint batch. The probabilities and
  the squares have a gradient; the counts do not.
  """

  load_E: jax.Array  # number of tokens that chose each expert
  prob_E: jax.Array  # the probability of each expert
  square: jax.Array  # the squared log of the router's softmax denominator
  dropped: jax.Array  # choices beyond the capacity


class MoE(nnx.Module):
  """(x_BTD, live_BT: False at padding) -> (y_BTD, Report)."""

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
    dtypes = dict(weights='float32', compute='float32', matmul='compute')
    wide = dataclasses.replace(numerics, **dtypes)
    router = functools.partial(Dense, std=numerics.init_std, bias=False, numerics=wide)
    shape = (width,), (cfg.experts,)
    self.router = router(child_key(key, 'router'), *shape, axes=('embed', None))
    opts: dict[str, Any] = dict(width=width, std_out=std_out, numerics=numerics)
    self.experts = Experts(child_key(key, 'experts'), cfg.experts, hidden=hidden, **opts)
    shared = functools.partial(SwiGLU, child_key(key, 'shared'), **opts)
    self.shared = shared(hidden=cfg.shared * hidden) if cfg.shared else None

  def __call__(self, x_BTD: jax.Array, live_BT: jax.Array) -> tuple[jax.Array, Report]:
    cfg, E = self.cfg, self.cfg.experts
    with jax.default_matmul_precision('highest'):
      logit_BTE = self.router(x_BTD.astype(jnp.float32))
    weight_BTk, choice_BTk, prob_BTE = route(logit_BTE, cfg)
    live = live_BT.astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(choice_BTk, E).sum(2)
    routed = self.experts.weights(), x_BTD, weight_BTk, choice_BTk
    if cfg.dispatch == 'dropless':
      y_BTD, dropped = dropless.run(*routed, backend=cfg.backend), 0.0
    else:
      y_BTD, dropped = capacity.run(*routed, live_BT=live_BT, factor=cfg.capacity)
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
    draw = functools.partial(normal_param, dtype=numerics.weights)
    wide = functools.partial(
      draw, axes=('experts', 'embed', 'ffn'), std=numerics.init_std
    )
    narrow = functools.partial(draw, axes=('experts', 'ffn', 'embed'), std=std_out)
    self.act = wide(child_key(key, 'act'), (count, width, hidden))
    self.up = wide(child_key(key, 'up'), (count, width, hidden))
    self.down = narrow(child_key(key, 'down'), (count, hidden, width))

  def weights(self) -> list[jax.Array]:
    """act, up and down, in the compute dtype."""
    return [w[...].astype(self.compute) for w in (self.act, self.up, self.down)]


def route(logit_BTE: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Router logits -> (weight_BTk, choice_BTk, prob_BTE), in float32.

  Chooses the k most probable experts of softmax(logit); among equals, the first.
  """
  prob_BTE = jax.nn.softmax(logit_BTE, -1)
  weight_BTk, choice_BTk = jax.lax.top_k(prob_BTE, cfg.top_k)
  if determinism.applies(mesh.platform()):
    # The gradient of top_k is a scatter, which is sequential in deterministic mode. Here
    # each weight is the sum of one probability and of zeros.
    hit_BTkE = jax.nn.one_hot(choice_BTk, prob_BTE.shape[-1], dtype=bool)
    weight_BTk = jnp.where(hit_BTkE, prob_BTE[..., None, :], 0.0).sum(-1)
  if cfg.norm_topk:
    weight_BTk = weight_BTk / weight_BTk.sum(-1, keepdims=True)
  return weight_BTk, choice_BTk, prob_BTE


def losses(
  report: Report, load_LE: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Layers' reports -> their (load-balancing, router z) losses, each summed over layers.

    balance = E sum_i f_i P_i       f_i is the share of choices of expert i, and P_i its
                                    mean probability (arXiv 2501.11873, Eq. 2-4)
    z       = mean of ln(sum_i exp(logit_i))^2                   (arXiv 2202.08906, Eq. 5)

  f comes from `load_LE`, such as the choices in the global batch, and has no gradient. A
  balanced layer has balance 1. `tokens` divides both sums; with the tokens of the whole
  batch, the losses of its micro-batches add up.
  """
  total_L1 = jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  share_LE = jax.lax.stop_gradient(load_LE / total_L1)
  balance = share_LE.shape[-1] * (share_LE * report.prob_E).sum() / tokens
  return balance, report.square.sum() / tokens


def statistics(report: Report) -> dict[str, jax.Array]:
  """Layers' reports of a batch -> scalars for the log.

  load_max: the busiest expert's load over the mean load, in the worst layer (1 is even);
  load_entropy: of the load, in nats, mean over layers (ln E is even); dropped: the share
  of choices beyond the capacity.
  """
  total_L = jnp.maximum(report.load_E.sum(-1), 1)
  share_LE = report.load_E / total_L[:, None]
  entropy_L = -(share_LE * jnp.log(jnp.where(share_LE > 0, share_LE, 1))).sum(-1)
  return {
    'load_max': share_LE.max() * share_LE.shape[-1],
    'load_entropy': entropy_L.mean(),
    'dropped': report.dropped.sum() / total_L.sum(),
  }
