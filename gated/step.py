"""The train step and the evaluation step: pure functions of a state and a batch.

B batch  T tokens  L layers  E experts
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gated import config, kernels, moe, stability

# Whose choices a router is asked to balance, where a batch is read in micro-batches.
BALANCE_OVER = (
  'global',  # all of the batch's; they are counted by a forward pass of their own
  'buffer',  # those of the micro-batches so far (arXiv 2501.11873, section 3)
  'micro',  # the micro-batch's own
)


@dataclass(frozen=True, kw_only=True)
class Loss:
  """What is minimised: cross-entropy and, with their weights, what keeps it in bounds."""

  z: float  # of ln(Z)^2, Z the softmax's denominator
  chunk: int  # tokens per device whose logits exist at a time
  balance: float  # of each layer's load-balancing loss
  balance_over: str  # of BALANCE_OVER
  router_z: float  # of each layer's router z-loss

  def __post_init__(self):
    config.at_least('config.loss.z', self.z, 0)
    config.at_least('config.loss.chunk', self.chunk, 1)
    config.at_least('config.loss.balance', self.balance, 0)
    config.one_of('config.loss.balance_over', self.balance_over, BALANCE_OVER)
    config.at_least('config.loss.router_z', self.router_z, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
  """All that a run carries from step to step."""

  step: jax.Array  # steps done, those whose update was skipped included
  data_step: jax.Array  # batches read: the step, and what a rollback passed over
  model: Any
  opt: optax.OptState


def init(build: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int):
  """A model builder, an optimizer and a seed -> the first State."""
  model = build(jax.random.key(seed))
  zero = jnp.zeros((), jnp.int32)
  return State(zero, zero, model, tx.init(_wide(model)))


def train(
  state: State,
  batch: Any,
  *,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  accum: int,
  loss: Loss,
) -> tuple[State, dict[str, Any]]:
  """One optimizer step on a batch: tokens, targets, weights, segments, positions (B, T).

  The batch is read in `accum` micro-batches; every token weighs the same whichever it is
  in. Returns the next state and scalars: losses in nats per token (those of routers: per
  layer too), norms, tokens trained.
  """
  total = jnp.maximum(batch.weights.sum(), 1.0)
  batch = batch._replace(weights=batch.weights / total)
  routed = jnp.maximum((batch.segments > 0).sum(), 1).astype(jnp.float32)

  def gradient(micro, asked):
    run = lambda model: _loss(model, micro, asked, routed=routed, cfg=loss)
    (_, sums), grads = jax.value_and_grad(run, has_aux=True)(state.model)
    return grads, sums

  if accum == 1:
    grads, (losses, report) = gradient(batch, lambda own: own)
  else:
    # Micro-batch a takes rows a, a + accum, ...: each device then keeps the rows it has.
    split = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)
    micros = jax.tree.map(split, batch)
    every = _choices(state.model, micros) if loss.balance_over == 'global' else None

    def body(sums, micro):
      _, (_, so_far) = sums
      asked = {
        'global': lambda own: every,
        'buffer': lambda own: so_far.load_E + own,
        'micro': lambda own: own,
      }
      return _add(sums, gradient(micro, asked[loss.balance_over])), None

    first = jax.tree.map(lambda x: x[0], micros)
    like = jax.eval_shape(lambda: gradient(first, lambda own: own)[1])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (state.model, like))
    (grads, (losses, report)), _ = jax.lax.scan(body, start, micros)
  guarded = optax.with_extra_args_support(tx)
  given = _wide(grads), state.opt, _wide(state.model)
  updates, opt = guarded.update(*given, loss=losses['loss'])
  model = optax.apply_updates(state.model, updates)
  metrics = losses | {
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(model),
    'update_norm': optax.tree.norm(updates),
    'lr': schedule(state.step),
    'tokens': total,
  }
  if isinstance(state.opt, stability.Guarded) and isinstance(opt, stability.Guarded):
    # A skipped update leaves the schedule where it was, as all of the optimizer.
    metrics['lr'] = schedule(state.step - state.opt.skipped)
    metrics |= stability.report(opt)
  if report is not None:
    metrics |= moe.statistics(report)
  return State(state.step + 1, state.data_step + 1, model, opt), metrics


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _choices(model, micros) -> jax.Array | None:
  """How many tokens of all micro-batches chose each expert: (L, E), or None."""

  def body(_, micro):
    _, report = model.hidden(micro.tokens, micro.segments, micro.positions)
    return None, report and report.load_E

  _, every = jax.lax.scan(body, None, micros)
  return every if every is None else every.sum(0)


def _wide(tree: Any) -> Any:
  """Gradients, moments and updates are float32, whatever weights are kept in."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _loss(
  model, batch, asked: Callable, *, routed: jax.Array, cfg: Loss
) -> tuple[jax.Array, tuple]:
  """-> (what is minimised, (losses by name, the routers' report)), for a part of a batch.

  Weights and `routed`, the tokens that routers see, are of the whole batch, so that its
  parts add up. `asked` maps the routers' own loads to those that they are to balance.
  """
  x_BTD, report = model.hidden(batch.tokens, batch.segments, batch.positions)
  total, nll_BT, lse_BT = kernels.vocab_loss(
    x_BTD,
    model.unembedding(),
    batch.targets,
    batch.weights,
    z=cfg.z,
    chunk=cfg.chunk,
    cap=model.cfg.logit_cap,
  )
  losses = {
    'loss': jnp.sum(batch.weights * nll_BT),
    'z_loss': cfg.z * jnp.sum(batch.weights * jnp.square(lse_BT)),
  }
  if report is not None:
    balance, z = moe.losses(report, asked(report.load_E), routed)
    total += cfg.balance * balance + cfg.router_z * z
    depth = len(report.load_E)
    losses |= {'balance_loss': balance / depth, 'router_z_loss': z / depth}
  return total, jax.lax.stop_gradient((losses, report))


def evaluate(model: Any, batch: Any, *, chunk: int) -> tuple[jax.Array, jax.Array]:
  """A batch -> each row's weighted sum of nats, and its sum of weights: (B,), (B,)."""
  x_BTD, _ = model.hidden(batch.tokens, batch.segments, batch.positions)
  _, nll_BT, _ = kernels.vocab_loss(
    x_BTD,
    model.unembedding(),
    batch.targets,
    batch.weights,
    z=0.0,
    chunk=chunk,
    cap=model.cfg.logit_cap,
  )
  return jnp.sum(batch.weights * nll_BT, 1), jnp.sum(batch.weights, 1)
