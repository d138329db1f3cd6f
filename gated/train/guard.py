"""An optimizer that leaves everything as it was at a bad step, without asking the host.

What must not change is selected, never multiplied by zero: 0 * NaN is NaN. What is not
finite never enters the statistics: a single NaN there would call every later step bad.
W window
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from gated import config

_NAME = 'config.stability'

# What follows on a finite spike. A step that is not finite is always skipped.
ON_SPIKE = (
  'none',  # it is recorded
  'skip',  # its update is skipped
  'rollback',  # and the run goes back to a good checkpoint, past the data that did it
)

VERDICTS = ('fine', 'spike', 'not finite')

# A loss or a norm beyond this counts as this: the statistics' squares stay finite.
_LARGEST = 1e15


@dataclass(frozen=True, kw_only=True)
class Config:
  """What a bad step is, and how many of them a run bears."""

  on_spike: str  # of ON_SPIKE
  threshold: float  # standard deviations above the mean, of the loss or the gradient norm
  window: int  # accepted steps they are taken over; there is no spike before half of them
  max_bad_steps: int  # skipped steps in a row at which the run goes back, or stops
  max_rollbacks: int  # of a whole run; then it stops
  stuck_after: float  # seconds without a step after which a process leaves; 0 never
  peer_timeout: int  # seconds without a sign of life after which a process is lost

  def __post_init__(self):
    config.one_of(f'{_NAME}.on_spike', self.on_spike, ON_SPIKE)
    if not self.threshold > 0:
      raise ValueError(f'{_NAME}.threshold={self.threshold}, but it must be positive')
    config.at_least(f'{_NAME}.window', self.window, 4)
    config.at_least(f'{_NAME}.max_bad_steps', self.max_bad_steps, 1)
    config.at_least(f'{_NAME}.max_rollbacks', self.max_rollbacks, 0)
    config.at_least(f'{_NAME}.stuck_after', self.stuck_after, 0)
    if math.isinf(self.stuck_after):
      raise ValueError(f'{_NAME}.stuck_after={self.stuck_after}, but never is 0')
    config.at_least(f'{_NAME}.peer_timeout', self.peer_timeout, 1)


class Guarded(NamedTuple):
  """The optimizer's own state, and what the guard has seen."""

  inner: optax.OptState
  losses: jax.Array  # (W,) a ring of the last accepted losses, always finite
  norms: jax.Array  # (W,) likewise, of the gradient norms
  filled: jax.Array  # values ever accepted; the next one goes to filled % W
  in_row: jax.Array  # bad steps in a row, up to now
  skipped: jax.Array  # updates skipped so far
  spikes: jax.Array  # finite spikes so far, skipped or not
  verdict: jax.Array  # of VERDICTS, of the last step
  loss_zscore: jax.Array  # of the last step; 0 where there are no statistics yet
  grad_norm_zscore: jax.Array  # likewise; what is not finite is infinitely far off


def guard(
  tx: optax.GradientTransformation, cfg: Config
) -> optax.GradientTransformationExtraArgs:
  """An optimizer -> the same one, whose `update` takes `loss=` and skips bad steps.

  Bad is a step whose loss, gradient norm or update is not finite, or a spike if the
  config says so. Its updates are zeros and the inner state stays, bit for bit. Where
  nothing is bad the updates are those of `tx`.

  An update that is not finite though its gradient is (as where Adam divides by an `eps`
  of 0) comes to light too late to keep both inner states, which on a GPU takes another
  4 bytes a parameter: it is dropped, and the inner state has seen a finite gradient.
  """
  wrapped = optax.with_extra_args_support(tx)

  def init(params):
    # Each its own array, as none may be donated twice.
    zero = lambda dtype, *shape: jnp.zeros(shape, dtype)
    counts = ('filled', 'in_row', 'skipped', 'spikes', 'verdict')
    return Guarded(
      inner=tx.init(params),
      losses=zero(jnp.float32, cfg.window),
      norms=zero(jnp.float32, cfg.window),
      loss_zscore=zero(jnp.float32),
      grad_norm_zscore=zero(jnp.float32),
      **{name: zero(jnp.int32) for name in counts},
    )

  def update(grads, state, params=None, *, loss, **extra):
    loss, norm = (x.astype(jnp.float32) for x in (loss, optax.tree.norm(grads)))
    loss_zscore, loss_in = _weigh(loss, state.losses, state.filled, cfg.threshold)
    norm_zscore, norm_in = _weigh(norm, state.norms, state.filled, cfg.threshold)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = finite & (jnp.maximum(loss_zscore, norm_zscore) > cfg.threshold)
    wanted = finite if cfg.on_spike == 'none' else finite & ~spike

    updates, inner = wrapped.update(grads, state.inner, params, **extra)
    inner = jax.tree.map(lambda a, b: jnp.where(wanted, a, b), inner, state.inner)
    usable = jnp.isfinite(optax.tree.norm(updates))
    bad = ~(wanted & usable)
    # Whatever -0.0 is added to keeps its bits; 0.0 would make a 0.0 of a -0.0.
    updates = jax.tree.map(lambda u: jnp.where(bad, -0.0, u), updates)

    accepted = finite & usable
    here = accepted & (jnp.arange(cfg.window) == state.filled % cfg.window)
    spike &= accepted
    return updates, Guarded(
      inner=inner,
      losses=jnp.where(here, loss_in, state.losses),
      norms=jnp.where(here, norm_in, state.norms),
      filled=state.filled + accepted,
      in_row=jnp.where(bad, state.in_row + 1, 0),
      skipped=state.skipped + bad,
      spikes=state.spikes + spike,
      verdict=jnp.where(accepted, spike.astype(jnp.int32), VERDICTS.index('not finite')),
      loss_zscore=loss_zscore,
      grad_norm_zscore=norm_zscore,
    )

  return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def report(opt_state: Guarded) -> dict[str, jax.Array]:
  """A guarded optimizer's state -> scalars by name, as metrics of the last step."""
  return {
    'skipped': opt_state.skipped,
    'spikes': opt_state.spikes,
    'bad_in_row': opt_state.in_row,
    'verdict': opt_state.verdict,
    'loss_zscore': opt_state.loss_zscore,
    'grad_norm_zscore': opt_state.grad_norm_zscore,
  }


def _weigh(
  value: jax.Array, ring_W: jax.Array, filled: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
  """A value and those before it -> (its z-score, what of it may enter the statistics).

  It enters no further than `threshold` deviations off, so that one outlier does not blind
  the window; a lasting shift widens the window step by step and is accepted in the end.
  """
  window = len(ring_W)
  count = jnp.clip(filled, 1, window)
  mean = ring_W.sum() / count
  off_W = jnp.where(jnp.arange(window) < count, ring_W - mean, 0.0)
  # Values that hardly differ, as of a constant loss, would make a spike of a rounding.
  std = jnp.maximum(
    jnp.sqrt(jnp.square(off_W).sum() / count), 1e-3 * jnp.abs(mean) + 1e-8
  )
  ready = 2 * filled >= window
  enters = jnp.clip(value, -_LARGEST, _LARGEST)
  zscore = jnp.where(ready, (enters - mean) / std, 0.0)
  reach = jnp.where(ready, threshold * std, jnp.inf)
  enters = jnp.clip(enters, mean - reach, mean + reach)
  return jnp.where(jnp.isfinite(value), zscore, jnp.inf), enters
