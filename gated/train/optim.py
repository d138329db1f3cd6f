"""Schedules, AdamW and Muon, from optax.

Muon (arXiv 2502.16982, and Keller Jordan's recipe) replaces each matrix's momentum by the
nearest orthogonal one. It takes the matrices between the residual stream and the heads'
channels or the FFN's: attention's projections, FFNs, experts, and elementwise gates. All
else is AdamW's as before: embeddings and the unembedding, norms, biases and sinks;
routers and headwise gates, each of whose columns is a score by itself; and what is small
(gated norms, gates that read no stream). Layers and experts are stacked in one
parameter, and every one of them is a matrix of its own.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Matrix

from gated import config
from gated.devices import mesh, trees

_NAME = 'config.optim'


@dataclass(frozen=True, kw_only=True)
class Muon:
  """How matrices are updated where the optimizer is Muon."""

  momentum: float
  nesterov: bool
  steps: int  # of the iteration by Newton and Schulz
  rms: float  # of an update's numbers, before the learning rate

  def __post_init__(self):
    if not 0 <= self.momentum < 1:
      raise ValueError(
        f'{_NAME}.muon.momentum={self.momentum}, but it must be at least 0 and below 1'
      )
    config.within(f'{_NAME}.muon.steps', self.steps, 1, 20)
    if not self.rms > 0:
      raise ValueError(f'{_NAME}.muon.rms={self.rms}, but it must be positive')


@dataclass(frozen=True, kw_only=True)
class Config:
  """An optimizer and its schedule."""

  name: str  # of OPTIMIZERS
  lr: float  # the peak
  schedule: str  # of SCHEDULES, after a linear warm-up from 0
  warmup: int  # steps
  decay: int  # steps of the final decay of 'wsd'
  floor: float  # the learning rate at the last step
  b1: float  # AdamW's (arXiv 1711.05101), as b2 and eps
  b2: float
  eps: float
  muon: Muon
  weight_decay: float
  decay_by: str  # lr: decay lr * weight_decay; schedule: weight_decay, shaped as lr is
  clip: float  # global gradient norm; 0 for none

  def __post_init__(self):
    config.one_of(f'{_NAME}.name', self.name, OPTIMIZERS)
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


def matrix(parameter: Any) -> Matrix | None:
  """A parameter -> the dims that its matrices read and write; None if Muon has none.

  All other dims stack matrices.
  """
  axes = mesh.axes_of(parameter) if _is_parameter(parameter) else ()
  stream = [dim for dim, axis in enumerate(axes) if axis == 'embed']
  others = [dim for dim, axis in enumerate(axes) if axis in _CHANNELS]
  if 'layers' not in axes or not stream or not _WIDE & set(axes):
    return None
  return Matrix(stream, others) if stream < others else Matrix(others, stream)


# What a matrix may have opposite to the residual stream, and what it must have of it.
_CHANNELS = {'heads', 'kv_heads', 'head_dim', 'ffn', 'channels'}
_WIDE = {'head_dim', 'ffn', 'channels'}


def _is_parameter(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _each(run: Callable[[Any], Any], params: Any) -> Any:
  """A function of parameters over a tree of them; arrays that are none count as one."""
  return jax.tree.map(run, params, is_leaf=_is_parameter)


def _matrices(params: Any) -> Any:
  """Parameters that are matrices -> the same tree, with the dims of each for optax."""
  return _each(lambda p: jax.tree.map(lambda _: matrix(p), p), params)


def _adam(cfg: Config) -> optax.GradientTransformation:
  return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def _muon(cfg: Config) -> optax.GradientTransformation:
  muon = functools.partial(
    optax.contrib.scale_by_muon, eps=cfg.eps, weight_dimension_numbers=_matrices
  )
  # Without steps it is the momentum, each matrix divided by its norm.
  momentum = muon(ns_steps=0, beta=cfg.muon.momentum, nesterov=cfg.muon.nesterov)
  iterate = muon(ns_steps=cfg.muon.steps, beta=0.0, nesterov=False)

  def orthogonal(updates, params):
    del params
    stacks = _each(_whole, updates)
    found, _ = iterate.update(stacks, iterate.init(stacks))
    sized = lambda u, like: _split(_sized(u, cfg.muon.rms), like)
    return jax.tree.map(sized, found, updates, is_leaf=_is_parameter)

  label = lambda p: 'adam' if matrix(p) is None else 'muon'
  matrices = optax.chain(momentum, optax.stateless(orthogonal))
  return optax.partition(
    {'muon': matrices, 'adam': _adam(cfg)}, functools.partial(_each, label)
  )


def _hops(stack: Any) -> list[tuple[str | None, ...]]:
  """A stack of matrices -> its axes, from split matrices to a split stack of whole ones.

  Each hop moves one axis of the mesh, which is an all-to-all.
  """
  hops = [mesh.axes_of(stack)]
  for taken, freed in (('stack', {'embed'}), ('stacks', {'heads', 'kv_heads', 'ffn'})):
    left = (None if axis in freed else axis for axis in hops[-1][1:])
    hops.append((taken, *left))
  return hops


def _whole(stack: Any) -> Any:
  """A stack of matrices -> the same, each of them whole on a device.

  Products of split ones would send all of them in every step of the iteration. Zeros
  fill the stack up to what the devices divide.
  """
  on: Any = jax.sharding.get_abstract_mesh()
  extra = 0 if on.empty else -stack.shape[0] % mesh.ways('stacks', on)

  def move(x):
    x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
    for axes in _hops(stack)[1:]:
      x = mesh.constrain(x, *axes)
    return x

  return jax.tree.map(move, stack)


def _split(stack: Any, like: Any) -> Any:
  """What `_whole` has made of `like`, or something of its shape, as that lay."""

  def move(x):
    for axes in _hops(stack)[-2:0:-1]:
      x = mesh.constrain(x, *axes)
    return mesh.constrain(x[: like.shape[0]], *mesh.axes_of(stack))

  return jax.tree.map(move, stack)


def _sized(update: Any, rms: float) -> Any:
  """Orthogonal matrices, and the RMS that their numbers are to have -> scaled to it."""
  of = matrix(update)
  assert of is not None
  size = lambda dims: math.prod(update.shape[dim] for dim in dims)
  larger = max(size(of.reduction_axis), size(of.output_axis))
  return jax.tree.map(lambda u: rms * math.sqrt(larger) * u, update)


# Name -> (config -> gradients to directions, before decay and the learning rate).
OPTIMIZERS: dict[str, Callable[[Config], optax.GradientTransformation]] = {
  'adamw': _adam,
  'muon': _muon,
}


def make(
  cfg: Config, *, steps: int, multipliers: dict[str, float]
) -> optax.GradientTransformation:
  """The optimizer, with clipping and its schedule.

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
    OPTIMIZERS[cfg.name](cfg),
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
