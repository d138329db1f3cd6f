"""An optimizer that skips bad steps on the devices, without a transfer to the host.

Skipped values are selected by `where`, never multiplied by zero: 0 * NaN is NaN. Values
that are not finite never enter the statistics, where one NaN would make every later step
bad.

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

# The response to a finite spike. Updates that are not finite are always skipped.
ON_SPIKE = (
  'none',  # records it
  'skip',  # skips its update
  # Skips its update, restores the last good checkpoint and skips the batches up to it.
  'rollback',
)

VERDICTS = ('fine', 'spike', 'not finite')

# Losses and norms are clipped to this, which keeps their squares finite.
_LARGEST = 1e15


@dataclass(frozen=True, kw_only=True)
class Config:
  """The definition of a bad step, the response to it, and timeouts."""

  on_spike: str  # of ON_SPIKE
  threshold: float  # a spike has a loss or gradient norm this many deviations above mean
  window: int  # accepted steps in the mean; detection starts after half of them
  max_bad_steps: int  # skipped steps in a row before the run rolls back, or stops
  max_rollbacks: int  # rollbacks in a run before it stops
  stuck_after: float  # seconds without a step after which a process exits; 0 for never
  peer_timeout: int  # seconds without a heartbeat after which a process is lost

  def __post_init__(self):
    config.one_of(f'{_NAME}.on_spike', self.on_spike, ON_SPIKE)
    config.positive(f'{_NAME}.threshold', self.threshold)
    config.within(f'{_NAME}.window', self.window, 4, 1 << 20)
    config.within(f'{_NAME}.peer_timeout', self.peer_timeout, 1, 1 << 20)
    lows = dict(max_bad_steps=1, max_rollbacks=0, stuck_after=0)
    for name, low in lows.items():
      config.at_least(f'{_NAME}.{name}', getattr(self, name), low)
    if math.isinf(self.stuck_after):
      raise ValueError(f'{_NAME}.stuck_after={self.stuck_after}, but 0 means never')


class Guarded(NamedTuple):
  """The state of the optimizer and of its guard."""

  inner: optax.OptState
  losses: jax.Array  # (W,) a ring of the last accepted losses, always finite
  norms: jax.Array  # (W,) a ring of their gradient norms
  filled: jax.Array  # number of accepted steps; the next one is written at filled % W
  in_row: jax.Array  # consecutive bad steps, up to the last step
  skipped: jax.Array  # updates skipped so far
  spikes: jax.Array  # finite spikes so far, skipped or not
  verdict: jax.Array  # index in VERDICTS, of the last step
  loss_zscore: jax.Array  # of the last step; 0 without statistics, inf if not finite
  grad_norm_zscore: jax.Array


def guard(
  tx: optax.GradientTransformation, cfg: Config, *, finite_updates: bool = False
) -> optax.GradientTransformationExtraArgs:
  """An optimizer -> the same one, whose `update` takes `loss=` and skips bad steps.

  A step is bad if its loss, gradient norm or update is not finite, or if it is a spike
  and `on_spike` is not 'none'. Then the updates are zeros, and the inner state keeps all
  its bits. In all other steps the updates are those of `tx`.

  An exception is a non-finite update from a finite gradient (for example if Adam divides
  by an `eps` of 0): it is skipped, but the inner state includes the finite gradient.
  Keeping the former inner state as well would need 4 more bytes per parameter.

  `finite_updates` promises that finite gradients have finite updates. Updates are then
  applied without a check, which saves a pass over the optimizer's state.
  """
  wrapped = optax.with_extra_args_support(tx)

  def init(params):
    # Separate arrays, because no array may be donated twice.
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
    score = lambda value, ring_W: _score(value, ring_W, state.filled, cfg.threshold)
    loss_zscore, clipped_loss = score(loss, state.losses)
    norm_zscore, clipped_norm = score(norm, state.norms)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = finite & (jnp.maximum(loss_zscore, norm_zscore) > cfg.threshold)
    wanted = finite if cfg.on_spike == 'none' else finite & ~spike

    updates, inner = wrapped.update(grads, state.inner, params, **extra)
    inner = jax.tree.map(lambda a, b: jnp.where(wanted, a, b), inner, state.inner)
    usable = finite_updates or jnp.isfinite(optax.tree.norm(updates))
    bad = ~(wanted & usable)
    # Adding -0.0 keeps all bits; adding 0.0 would turn -0.0 into 0.0.
    updates = jax.tree.map(lambda u: jnp.where(bad, -0.0, u), updates)

    accepted = finite & usable
    here = accepted & (jnp.arange(cfg.window) == state.filled % cfg.window)
    spike &= accepted
    return updates, Guarded(
      inner=inner,
      losses=jnp.where(here, clipped_loss, state.losses),
      norms=jnp.where(here, clipped_norm, state.norms),
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
  same = ('skipped', 'spikes', 'verdict', 'loss_zscore', 'grad_norm_zscore')
  scalars = {name: getattr(opt_state, name) for name in same}
  return scalars | {'bad_in_row': opt_state.in_row}


def scheduled(opt_state: Guarded) -> jax.Array:
  """A guarded optimizer's state -> the count of its schedule, for the next update's rate.

  Skipped updates do not advance it, except those described in `guard`. Without a
  schedule, the number of accepted steps.
  """
  own = lambda path, _: getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'
  return optax.tree.get(opt_state.inner, 'count', opt_state.filled, filtering=own)


def _score(
  value: jax.Array, ring_W: jax.Array, filled: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
  """A value and the ring of earlier ones -> (its z-score, the value for the ring).

  The value for the ring is clipped to `threshold` standard deviations from the mean, so
  that one outlier does not hide later spikes. A lasting shift moves the mean and widens
  the deviation step by step, until it no longer counts as a spike.
  """
  window = len(ring_W)
  count = jnp.clip(filled, 1, window)
  mean = ring_W.sum() / count
  off_W = jnp.where(jnp.arange(window) < count, ring_W - mean, 0.0)
  # Without a lower bound, rounding of a nearly constant loss would count as a spike.
  bound = 1e-3 * jnp.abs(mean) + 1e-8
  std = jnp.maximum(jnp.sqrt(jnp.square(off_W).sum() / count), bound)
  ready = 2 * filled >= window
  clipped = jnp.clip(value, -_LARGEST, _LARGEST)
  zscore = jnp.where(ready, (clipped - mean) / std, 0.0)
  reach = jnp.where(ready, threshold * std, jnp.inf)
  clipped = jnp.clip(clipped, mean - reach, mean + reach)
  return jnp.where(jnp.isfinite(value), zscore, jnp.inf), clipped
