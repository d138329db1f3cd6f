"""A guarded optimizer of two small parameters, run over planted losses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gated.train import guard

NAN, INF = math.nan, math.inf
KNOBS = dict(
  on_spike='skip',
  threshold=6.0,
  window=8,
  max_bad_steps=5,
  max_rollbacks=2,
  stuck_after=0.0,
  peer_timeout=60,
)

rng = np.random.default_rng(0)
# A zero with a sign: what is added to it must be one too.
PARAMS = {
  'embed': {'table': rng.normal(size=(8, 4))},
  'norm': {'scale': np.array([1.0, -0.0, 0.0])},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
TX = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.scale_by_adam(0.9, 0.95, 1e-8),
  optax.add_decayed_weights(0.1),
  optax.scale_by_learning_rate(optax.linear_schedule(0.0, 1e-2, 20)),
)


def knobs(**changes):
  return guard.Config(**KNOBS | changes)


def gradient(params):
  return jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, params)


def one_step(tx, params, state, loss, times):
  """A step whose gradient is multiplied by `times` in the first row of the table."""
  grads = gradient(params)
  grads['embed']['table'] = grads['embed']['table'].at[0].multiply(times)
  updates, state = tx.update(grads, state, params, loss=loss)
  return optax.apply_updates(params, updates), state, updates


@functools.cache
def stepper(**changes):
  """(params, state, loss, times) -> (params, state, updates), guarded and compiled."""
  tx = guard.guard(TX, knobs(**changes))
  return tx, jax.jit(functools.partial(one_step, tx))


def run(losses, times=None, **changes):
  """Losses, and what multiplies the gradient -> (params, state, updates) of each."""
  tx, step = stepper(**changes)
  params, state, after = PARAMS, tx.init(PARAMS), []
  for loss, time_ in zip(losses, times or [1.0] * len(losses)):
    params, state, updates = step(params, state, jnp.float32(loss), jnp.float32(time_))
    after.append((params, state, updates))
  assert step._cache_size() == 1, 'a step was compiled again'
  return after


def steady(count, level=3.0):
  """Losses that waver about a level."""
  return [level + 0.02 * math.sin(5 * i) for i in range(count)]


def verdicts(after):
  return [int(state.verdict) for _, state, _ in after]


def reported(state):
  return {name: float(value) for name, value in guard.report(state).items()}
