"""The train step: a pure function of a state and a batch, in two halves.

    gradients(model, batch)        -> Gradients
    update(state, gradients)       -> the next state and the step's metrics

B batch  T tokens  L layers  E experts
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from gated.model import moe
from gated.train import guard, losses, qk_clip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
  """The state that a run carries from step to step."""

  step: jax.Array  # optimizer steps done, skipped updates included
  data_step: jax.Array  # batches read: the steps, and the batches that rollbacks skipped
  model: Any
  opt: guard.Guarded  # the optimizer's state and the guard's

  @property
  def current(self) -> Any:
    """The model at its step, in which some gates may still be opening."""
    return self.model.at_step(self.step)


class Gradients(NamedTuple):
  """The result of `gradients`, on the devices."""

  grads: Any  # of the model's structure
  losses: dict[str, jax.Array]  # nats per token, by name
  report: moe.Report | None  # the routers', stacked over layers
  tokens: jax.Array  # sum of the batch's weights
  logit_LH: jax.Array | None = None  # each head's largest attention logit, for QK-clip


def init(build: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int):
  """A model builder, a guarded optimizer and a seed -> the initial State."""
  model = build(jax.random.key(seed))
  zero = jnp.zeros((), jnp.int32)
  return State(zero, zero, model, cast(guard.Guarded, tx.init(_float32(model))))


def train(
  state: State,
  batch: Any,
  *,
  tx: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  accum: int,
  loss: losses.Config,
  tau: float = 0.0,
) -> tuple[State, dict[str, Any]]:
  """One optimizer step -> (the next state, metrics as scalars on the devices).

  `batch` has tokens, targets, weights, segments and positions (B, T); `tx` comes from
  `guard.guard`. Losses are in nats per token. `tau` is the limit of QK-clip; 0 for none.
  """
  options: dict[str, Any] = dict(step=state.step, accum=accum, loss=loss, tau=tau)
  computed = gradients(state.model, batch, **options)
  return update(state, computed, tx=tx, schedule=schedule, tau=tau)


def gradients(
  model: Any,
  batch: Any,
  *,
  accum: int,
  loss: losses.Config,
  step: jax.Array | None = None,
  tau: float = 0.0,
) -> Gradients:
  """The gradient of the loss over a batch, computed in `accum` micro-batches.

  Every token has the same weight, whichever micro-batch it is in. Without `step`, gates
  that open during training are fully open.
  """
  now = lambda model: model if step is None else model.at_step(step)
  tokens = jnp.maximum(batch.weights.sum(), 1.0)
  batch = batch._replace(weights=batch.weights / tokens)
  routed = jnp.maximum((batch.segments > 0).sum(), 1).astype(jnp.float32)

  def gradient(micro, balanced):
    opts: dict[str, Any] = dict(routed=routed, cfg=loss, logits=tau > 0)
    run = lambda model: losses.total(now(model), micro, balanced, **opts)
    (_, (terms, seen)), grads = jax.value_and_grad(run, has_aux=True)(model)
    report, logit_LH = seen if tau else (seen, None)
    return grads, (terms, report), logit_LH

  if accum == 1:
    grads, (terms, report), logit_LH = gradient(batch, lambda own: own)
    return Gradients(grads, terms, report, tokens, logit_LH)
  # Micro-batch a takes rows a, a + accum, ..., so no row moves to another device.
  split = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)
  micros = jax.tree.map(split, batch)
  counts = loss.balance_over == 'global'
  loads = losses.expert_loads(now(model), micros) if counts else None

  def body(sums, micro):
    _, (_, so_far) = sums
    balanced = {
      'global': lambda own: loads,
      'buffer': lambda own: so_far.load_E + own,
      'micro': lambda own: own,
    }
    *added, logit_LH = gradient(micro, balanced[loss.balance_over])
    return jax.tree.map(jnp.add, sums, tuple(added)), logit_LH

  first = jax.tree.map(lambda x: x[0], micros)
  like = jax.eval_shape(lambda: gradient(first, lambda own: own)[1])
  start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (model, like))
  (grads, (terms, report)), logits = jax.lax.scan(body, start, micros)
  logit_LH = None if logits is None else logits.max(0)
  return Gradients(grads, terms, report, tokens, logit_LH)


def update(
  state: State,
  gradients: Gradients,
  *,
  tx: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  tau: float = 0.0,
) -> tuple[State, dict[str, Any]]:
  """Gradients -> (next state, metrics); a bad step changes no parameter."""
  grads, terms, report, tokens, logit_LH = gradients
  grads = _float32(grads)
  updates, new = tx.update(grads, state.opt, _float32(state.model), loss=terms['loss'])
  opt = cast(guard.Guarded, new)
  model = optax.apply_updates(state.model, updates)
  if logit_LH is not None:
    clipped = qk_clip.clip(model, logit_LH, tau)
    fine = opt.in_row == 0
    model = jax.tree.map(lambda a, b: jnp.where(fine, a, b), clipped, model)
  metrics = terms | {
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(_float32(model)),
    'update_norm': optax.tree.norm(updates),
    # A skipped update may or may not have advanced the schedule (see `guard`).
    'lr': schedule(guard.scheduled(state.opt)),
    'tokens': tokens,
  }
  metrics |= guard.report(opt)
  if logit_LH is not None:
    metrics |= qk_clip.metrics(logit_LH, tau)
  if report is not None:
    metrics |= moe.statistics(report)
  return State(state.step + 1, state.data_step + 1, model, opt), metrics


def _float32(tree: Any) -> Any:
  """Casts a tree to float32, the dtype of gradients, moments and updates."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
