"""The training loss: cross-entropy, the z-loss, and the routers' two losses.

B batch  T tokens  L layers  E experts
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gated import config, kernels
from gated.model import moe
from gated.train import qk_clip

# Which tokens the load-balancing loss counts when a batch is split into micro-batches.
BALANCE_OVER = (
  'global',  # the whole batch, counted by a separate forward pass
  'buffer',  # the micro-batches so far (arXiv 2501.11873, section 3)
  'micro',  # each micro-batch alone
)

_NAME = 'config.loss'


@dataclass(frozen=True, kw_only=True)
class Config:
  """The weights of the auxiliary losses, and how the losses are computed."""

  z: float  # weight of the mean squared log-partition of the output softmax
  chunk: int  # tokens per device whose logits are in memory at a time
  balance: float  # weight of each layer's load-balancing loss
  balance_over: str  # of BALANCE_OVER
  router_z: float  # weight of each layer's router z-loss

  def __post_init__(self):
    config.at_least(f'{_NAME}.z', self.z, 0)
    config.at_least(f'{_NAME}.chunk', self.chunk, 1)
    config.at_least(f'{_NAME}.balance', self.balance, 0)
    config.one_of(f'{_NAME}.balance_over', self.balance_over, BALANCE_OVER)
    config.at_least(f'{_NAME}.router_z', self.router_z, 0)


def total(
  model: Any,
  batch: Any,
  balanced: Callable,
  *,
  routed: jax.Array,
  cfg: Config,
  logits: bool = False,
) -> tuple[jax.Array, tuple]:
  """A micro-batch -> (the minimized loss, (losses by name, the routers' report)).

  All losses are in nats per token.

  `batch.weights` sum to 1 over the whole batch, and `routed` is its number of tokens that
  are not padding, so that the losses of micro-batches add up. `balanced` maps the expert
  loads (L, E) of this micro-batch to those that the load-balancing loss uses. With
  `logits`, the report is in a pair with each head's largest attention logit (L, H).
  """
  opts: dict[str, Any] = dict(z=cfg.z, chunk=cfg.chunk)
  through = qk_clip.observed if logits else None
  nats, nll_BT, lse_BT, seen = _vocab_loss(model, batch, **opts, through=through)
  report = seen[0] if logits else seen
  losses = {
    'loss': jnp.sum(batch.weights * nll_BT),
    'z_loss': cfg.z * jnp.sum(batch.weights * jnp.square(lse_BT)),
  }
  if report is not None:
    balance, z = moe.losses(report, balanced(report.load_E), routed)
    nats += cfg.balance * balance + cfg.router_z * z
    depth = len(report.load_E)
    losses |= {'balance_loss': balance / depth, 'router_z_loss': z / depth}
  return nats, jax.lax.stop_gradient((losses, seen))


def per_row(model: Any, batch: Any, *, chunk: int) -> tuple[jax.Array, jax.Array]:
  """A batch -> each row's weighted sum of nats, and its sum of weights: (B,), (B,)."""
  return row_sums(per_token(model, batch, chunk=chunk), batch)


def per_token(model: Any, batch: Any, *, chunk: int) -> jax.Array:
  """A batch -> the loss of each target in nats, whatever its weight: (B, T)."""
  return _vocab_loss(model, batch, z=0.0, chunk=chunk)[1]


def row_sums(nll_BT: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
  """Losses in nats -> each row's weighted sum and its sum of weights: (B,), (B,)."""
  return jnp.sum(batch.weights * nll_BT, 1), jnp.sum(batch.weights, 1)


def expert_loads(model: Any, micros: Any) -> jax.Array | None:
  """Stacked micro-batches -> tokens per layer and expert (L, E); None without experts."""

  def body(_, micro):
    _, report = model.hidden(micro.tokens, micro.segments, micro.positions)
    return None, report and report.load_E

  _, loads = jax.lax.scan(body, None, micros)
  return loads if loads is None else loads.sum(0)


def _vocab_loss(model, batch, *, z: float, chunk: int, through: Any = None):
  """-> (weighted sum of nats, nll_BT, lse_BT, the blocks' second results)."""
  opts = {} if through is None else {'through': through}
  documents = batch.segments, batch.positions
  x_BTD, seen = model.hidden(batch.tokens, *documents, **opts)
  nats, nll_BT, lse_BT = kernels.vocab_loss(
    x_BTD,
    model.unembedding(),
    batch.targets,
    batch.weights,
    z=z,
    chunk=chunk,
    cap=model.cfg.logit_cap,
  )
  return nats, nll_BT, lse_BT, seen
