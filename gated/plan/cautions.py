"""Warnings at the start of a run, about allowed knobs with unexpected effects."""

import math
from collections.abc import Iterator

import jax.numpy as jnp

from gated.plan.recipe import Config


def of(cfg: Config) -> Iterator[str]:
  """A recipe -> its warnings, a line each."""
  for caution in (_warmup, _rounding):
    if line := caution(cfg):
      yield line


def _warmup(cfg: Config) -> str:
  """Warns of a warm-up that leaves no step for the decay, or does not end."""
  optim, steps = cfg.optim, cfg.steps
  # A constant rate needs no steps after the warm-up.
  if optim.warmup < steps + (optim.schedule == 'constant'):
    return ''
  last, floor = optim.lr * steps / optim.warmup, f'config.optim.floor={optim.floor:g}'
  ends = f'its peak and {floor}' if last < optim.lr else floor
  return (
    f'config.optim.warmup={optim.warmup} does not end before config.steps={steps}: the '
    f'learning rate ends at {last:.3g} and does not reach {ends}'
  )


def _rounding(cfg: Config) -> str:
  """Warns of bfloat16 weights whose updates may be lost in rounding."""
  numerics, optim = cfg.model.numerics, cfg.optim
  if numerics.weights == 'float32' or not numerics.init_std:
    return ''
  # The distance between two adjacent numbers of the size of init_std.
  spacing = float(jnp.finfo(numerics.weights).eps)
  spacing *= 2.0 ** math.floor(math.log2(numerics.init_std))
  lowest = optim.lr if optim.schedule == 'constant' else optim.floor
  if lowest >= spacing / 2:
    return ''
  knob = 'lr' if optim.lr < spacing / 2 or optim.schedule == 'constant' else 'floor'
  return (
    f'config.model.numerics.weights={numerics.weights}: the smallest step of a weight '
    f'of {numerics.init_std:g} (init_std) is {spacing:.2g}, and an update below half of '
    f'it is lost; config.optim.{knob}={getattr(optim, knob):g} is about the size of an '
    'update'
  )
