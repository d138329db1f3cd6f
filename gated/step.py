"""The train step and the evaluation step: pure functions of a state and a batch.

B batch  T tokens
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gated import kernels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
  """All that a run carries from step to step."""

  step: jax.Array  # updates done
  data_step: jax.Array  # batches read: the step, and what a rollback skipped
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
  z: float,
  chunk: int,
) -> tuple[State, dict[str, Any]]:
  """One optimizer step on a batch: tokens, targets, weights, segments, positions (B, T).

  The batch is read in `accum` micro-batches; every token weighs the same whichever it is
  in. Returns the next state and scalars: losses in nats per token, norms, tokens trained.
  """
  total = jnp.maximum(batch.weights.sum(), 1.0)
  batch = batch._replace(weights=batch.weights / total)
  gradient = jax.value_and_grad(
    lambda model, micro: _loss(model, micro, z=z, chunk=chunk), has_aux=True
  )
  if accum == 1:
    (_, losses), grads = gradient(state.model, batch)
  else:
    # Micro-batch a takes rows a, a + accum, ...: each device then keeps the rows it has.
    split = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)

    def body(sums, micro):
      (_, losses), grads = gradient(state.model, micro)
      return add(sums, (grads, losses)), None

    start = jax.tree.map(jnp.zeros_like, _wide(state.model)), jnp.zeros((2,))
    (grads, losses), _ = jax.lax.scan(body, start, jax.tree.map(split, batch))
  updates, opt = tx.update(_wide(grads), state.opt, _wide(state.model))
  model = optax.apply_updates(state.model, updates)
  metrics = {
    'loss': losses[0],
    'z_loss': losses[1],
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(model),
    'update_norm': optax.tree.norm(updates),
    'lr': schedule(state.step),
    'tokens': total,
  }
  return State(state.step + 1, state.data_step + 1, model, opt), metrics


def _wide(tree: Any) -> Any:
  """Gradients, moments and updates are float32, whatever weights are kept in."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _loss(model, batch, *, z: float, chunk: int) -> tuple[jax.Array, jax.Array]:
  """-> (what is minimised, (cross-entropy, z-loss)), summed over weighted tokens."""
  x_BTD = model.hidden(batch.tokens, batch.segments, batch.positions)
  total, nll_BT, lse_BT = kernels.vocab_loss(
    x_BTD, model.unembedding(), batch.targets, batch.weights, z=z, chunk=chunk
  )
  nll = jnp.sum(batch.weights * nll_BT)
  z_loss = z * jnp.sum(batch.weights * jnp.square(lse_BT))
  return total, jax.lax.stop_gradient(jnp.stack([nll, z_loss]))


def evaluate(model: Any, batch: Any, *, chunk: int) -> tuple[jax.Array, jax.Array]:
  """A batch -> each row's weighted sum of nats, and its sum of weights: (B,), (B,)."""
  x_BTD = model.hidden(batch.tokens, batch.segments, batch.positions)
  _, nll_BT, _ = kernels.vocab_loss(
    x_BTD, model.unembedding(), batch.targets, batch.weights, z=0.0, chunk=chunk
  )
  return jnp.sum(batch.weights * nll_BT, 1), jnp.sum(batch.weights, 1)
