"""Schedules and AdamW, from optax."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from gated import config, trees

_NAME = 'config.optim'


@dataclass(frozen=True, kw_only=True)
class Config:
  """AdamW (arXiv 1711.05101) and its schedule."""

  lr: float  # the peak
  schedule: str  # of SCHEDULES, after a linear warm-up from 0
  warmup: int  # steps
  decay: int  # steps of the final decay of 'wsd'
  floor: float  # the learning rate at the last step
  b1: float
  b2: float
  eps: float
  weight_decay: float
  decay_by: str  # lr: decay lr * weight_decay; schedule: weight_decay, shaped as lr is
  clip: float  # global gradient norm; 0 for none

  def __post_init__(self):
    config.one_of(f'{_NAME}.schedule', self.schedule, SCHEDULES)
    config.one_of(f'{_NAME}.decay_by', self.decay_by, ('lr', 'schedule'))
    for name in ('warmup', 'decay', 'floor', 'weight_decay', 'clip', 'eps'):
      config.at_least(f'{_NAME}.{name}', getattr(self, name), 0)
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        value = getattr(self, name)
        raise ValueError(f'{_NAME}.{name}={value}, but it must be at least 0 and below 1')
    if not self.lr > 0:
      raise ValueError(f'{_NAME}.lr={self.lr}, but it must be positive')
    if self.floor > self.lr:
      raise ValueError(f'{_NAME}.floor={self.floor} is above {_NAME}.lr={self.lr}')


def _cosine(cfg: Config, steps: int) -> optax.Schedule:
  return optax.cosine_decay_schedule(cfg.lr, steps, cfg.floor / cfg.lr)


def _linear(cfg: Config, steps: int) -> optax.Schedule:
  return optax.linear_schedule(cfg.lr, cfg.floor, steps)


def _wsd(cfg: Config, steps: int) -> optax.Schedule:
  stable = optax.constant_schedule(cfg.lr)
  return optax.join_schedules([stable, _linear(cfg, cfg.decay)], [steps - cfg.decay])


def _constant(cfg: Config, steps: int) -> optax.Schedule:
  return optax.constant_schedule(cfg.lr)


# (config, steps after the warm-up) -> learning rate by steps since the warm-up.
SCHEDULES: dict[str, Callable[[Config, int], optax.Schedule]] = {
  'cosine': _cosine,
  'wsd': _wsd,  # warm-up, stable, decay (arXiv 2404.06395)
  'linear': _linear,
  'constant': _constant,
}


def schedule(cfg: Config, steps: int) -> optax.Schedule:
  """Total steps -> a function from the updates done so far to the learning rate.

  The first update has lr / warmup, update `warmup` the peak, the last one the floor.
  """
  after = max(steps - cfg.warmup, 1)  # A run may end within its warm-up.
  if cfg.schedule == 'wsd' and not 1 <= cfg.decay <= after:
    raise ValueError(
      f'{_NAME}.decay={cfg.decay}, but it must be at least 1 and end within '
      f'config.steps={steps}, after {_NAME}.warmup={cfg.warmup}'
    )
  warmup = optax.linear_schedule(0.0, cfg.lr, max(cfg.warmup, 1))
  after_warmup = SCHEDULES[cfg.schedule](cfg, after)
  joined = optax.join_schedules([warmup, after_warmup], [cfg.warmup])
  return lambda count: joined(count + 1)


def make(
  cfg: Config, *, steps: int, multipliers: dict[str, float]
) -> optax.GradientTransformation:
  """AdamW with clipping and its schedule.

  Weight decay spares norms, biases and sink logits. `multipliers` maps a part of a
  parameter's name, such as 'gate', to what multiplies its learning rate.
  """
  decay = cfg.weight_decay / (cfg.lr if cfg.decay_by == 'schedule' else 1.0)

  def decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda p, _: decays(trees.name(p)), params)

  def multiplied(updates: Any, params: Any) -> Any:
    scale = lambda path, u: u * multiplier(trees.name(path), multipliers)
    return jax.tree_util.tree_map_with_path(scale, updates)

  return optax.chain(
    optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    optax.add_decayed_weights(decay, decayed),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
    optax.stateless(multiplied) if multipliers else optax.identity(),
  )


def decays(name: str) -> bool:
  """Whether weight decay applies to the parameter of this name."""
  return name.split('.')[-1] not in ('scale', 'bias', 'logit')


def multiplier(name: str, multipliers: dict[str, float]) -> float:
  """The product of the learning-rate multipliers whose key is a part of the name."""
  return math.prod(m for part, m in multipliers.items() if part in name.split('.'))
