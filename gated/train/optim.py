"""Schedules, AdamW and Muon, from optax.

Muon (arXiv 2502.16982, and Keller Jordan's recipe) replaces each matrix's momentum by the
nearest orthogonal matrix. It updates the matrices between the residual stream and the
channels of the heads or the FFN: attention projections, FFNs, experts, and elementwise
gates. AdamW updates all other parameters: embeddings, the unembedding, norms, biases and
sinks; routers and headwise gates, in which each column is a separate score; and small
parameters (gated norms, gates that do not read the stream). A parameter stacks the
matrices of layers and experts; Muon treats each matrix separately.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Matrix

from gated import config
from gated.devices import mesh, trees
from gated.train import moments, transfer

_NAME = 'config.optim'

LARGEST_RATE = 1e6  # Of a learning rate that cannot overflow an update by itself.


@dataclass(frozen=True, kw_only=True)
class Muon:
  """Options of Muon, for the matrices that it updates."""

  momentum: float
  nesterov: bool
  steps: int  # of the Newton-Schulz iteration
  rms: float  # of the entries of an update, before the learning rate

  def __post_init__(self):
    _check_decay_rate('muon.momentum', self.momentum)
    config.within(f'{_NAME}.muon.steps', self.steps, 1, 20)
    config.positive(f'{_NAME}.muon.rms', self.rms)


@dataclass(frozen=True, kw_only=True)
class Config:
  """An optimizer and its schedule."""

  name: str  # of OPTIMIZERS
  lr: float  # the peak
  schedule: str  # of SCHEDULES, after a linear warm-up from 0
  warmup: int  # steps
  decay: int  # steps of the final decay of 'wsd'
  floor: float  # the learning rate at the last step
  b1: float  # b1, b2 and eps of AdamW (arXiv 1711.05101)
  b2: float
  eps: float
  muon: Muon
  weight_decay: float
  decay_by: str  # lr: each step decays by lr * wd; schedule: by lr / peak * wd
  clip: float  # global gradient norm; 0 for none
  qk_clip: float  # limit of attention logits, kept by QK-clip; 0 for none
  gates_first: int  # number of first steps in which only the gates learn
  moments: str  # dtype of the moments: float32, or bfloat16 with stochastic rounding
  factored: bool  # AdamW's second moments by rows and columns, as in `moments.factored`
  transfer: str  # none, or mup: initial values and rates relative to base_width
  base_width: int  # the width of the model for which the learning rate was tuned
  base_head_dim: int  # its head width; 0 for the same head width

  def __post_init__(self):
    config.one_of(f'{_NAME}.name', self.name, OPTIMIZERS)
    config.one_of(f'{_NAME}.schedule', self.schedule, SCHEDULES)
    config.one_of(f'{_NAME}.decay_by', self.decay_by, ('lr', 'schedule'))
    for name in ('warmup', 'decay', 'gates_first'):  # As config.steps, an int32.
      config.within(f'{_NAME}.{name}', getattr(self, name), 0, (1 << 31) - 1)
    for name in ('floor', 'weight_decay', 'clip', 'eps', 'qk_clip'):
      config.at_least(f'{_NAME}.{name}', getattr(self, name), 0)
    for name in ('b1', 'b2'):
      _check_decay_rate(name, getattr(self, name))
    config.positive(f'{_NAME}.lr', self.lr)
    config.one_of(f'{_NAME}.moments', self.moments, moments.DTYPES)
    if self.factored:
      config.one_of(f'{_NAME}.factored=True with {_NAME}.name', self.name, ['adamw'])
    config.one_of(f'{_NAME}.transfer', self.transfer, transfer.TRANSFERS)
    config.at_least(f'{_NAME}.base_width', self.base_width, 1)
    config.at_least(f'{_NAME}.base_head_dim', self.base_head_dim, 0)
    if self.floor > self.lr:
      raise ValueError(f'{_NAME}.floor={self.floor} is above {_NAME}.lr={self.lr}')


def _check_decay_rate(name: str, value: float) -> None:
  if not 0 <= value < 1:
    raise ValueError(f'{_NAME}.{name}={value}, but it must be at least 0 and below 1')


def _wsd(cfg: Config, steps: int) -> optax.Schedule:
  """Warm-up, stable, decay (arXiv 2404.06395), from the end of the warm-up on."""
  decay = optax.linear_schedule(cfg.lr, cfg.floor, cfg.decay)
  stable = optax.constant_schedule(cfg.lr)
  return optax.join_schedules([stable, decay], [steps - cfg.decay])


# (config, steps after the warm-up) -> learning rate by steps since the warm-up.
SCHEDULES: dict[str, Callable[[Config, int], optax.Schedule]] = {
  'cosine': lambda cfg, n: optax.cosine_decay_schedule(cfg.lr, n, cfg.floor / cfg.lr),
  'wsd': _wsd,
  'linear': lambda cfg, n: optax.linear_schedule(cfg.lr, cfg.floor, n),
  'constant': lambda cfg, n: optax.constant_schedule(cfg.lr),
}


def schedule(cfg: Config, steps: int) -> optax.Schedule:
  """Total steps -> a function from the updates done so far to the learning rate.

  The first update uses lr / warmup, update `warmup` the peak, and the last one the floor.
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


# The axes of a Muon matrix besides the residual stream's; it must have one of _WIDE.
_CHANNELS = {'heads', 'kv_heads', 'head_dim', 'ffn', 'channels'}
_WIDE = {'head_dim', 'ffn', 'channels'}


def matrix(parameter: Any) -> Matrix | None:
  """A parameter -> the input and output dims of its matrices; None if Muon skips it.

  All other dims stack matrices.
  """
  axes = mesh.axes_of(parameter) if _is_parameter(parameter) else ()
  stream = [dim for dim, axis in enumerate(axes) if axis == 'embed']
  others = [dim for dim, axis in enumerate(axes) if axis in _CHANNELS]
  if 'layers' not in axes or not stream or not _WIDE & set(axes):
    return None
  return Matrix(stream, others) if stream < others else Matrix(others, stream)


def _is_parameter(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _each(run: Callable[[Any], Any], params: Any) -> Any:
  """Maps a function of one parameter over a tree of parameters or arrays."""
  return jax.tree.map(run, params, is_leaf=_is_parameter)


def _dims(params: Any) -> Any:
  """Parameters -> the same tree, with the dims of each matrix for optax."""
  return _each(lambda p: jax.tree.map(lambda _: matrix(p), p), params)


def _adam(cfg: Config) -> optax.GradientTransformation:
  if cfg.factored:
    return moments.factored(cfg.b1, cfg.b2, cfg.eps)
  return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def _muon(cfg: Config) -> optax.GradientTransformation:
  muon = functools.partial(
    optax.contrib.scale_by_muon, eps=cfg.eps, weight_dimension_numbers=_dims
  )
  # Without iterations, it divides the momentum of each matrix by its norm.
  momentum = muon(ns_steps=0, beta=cfg.muon.momentum, nesterov=cfg.muon.nesterov)
  iterate = muon(ns_steps=cfg.muon.steps, beta=0.0, nesterov=False)

  def orthogonalize(updates, params):
    del params
    stacks = _each(_gather, updates)
    results, _ = iterate.update(stacks, iterate.init(stacks))
    restore = lambda u, like: _restore(_scale(u, cfg.muon.rms), like)
    return jax.tree.map(restore, results, updates, is_leaf=_is_parameter)

  label = lambda p: 'adam' if matrix(p) is None else 'muon'
  matrices = optax.chain(momentum, optax.stateless(orthogonalize))
  return optax.partition(
    {'muon': matrices, 'adam': _adam(cfg)}, functools.partial(_each, label)
  )


def _hops(stack: Any) -> list[tuple[str | None, ...]]:
  """The axes of a stack of matrices, from sharded matrices to a sharded stack.

  Each hop moves one mesh axis, by an all-to-all.
  """
  hops = [mesh.axes_of(stack)]
  for first, freed in (('stack', {'embed'}), ('stacks', {'heads', 'kv_heads', 'ffn'})):
    rest = (None if axis in freed else axis for axis in hops[-1][1:])
    hops.append((first, *rest))
  return hops


def _gather(stack: Any) -> Any:
  """Moves each matrix of a stack to one device.

  Products of sharded matrices would send all of them in each step of the iteration. Zeros
  pad the stack to a multiple of the number of devices.
  """
  padding = -stack.shape[0] % mesh.ways('stacks')

  def move(x):
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    for axes in _hops(stack)[1:]:
      x = mesh.constrain(x, *axes)
    return x

  return jax.tree.map(move, stack)


def _restore(stack: Any, like: Any) -> Any:
  """The inverse of `_gather`: the shape and the sharding of `like`."""

  def move(x):
    for axes in _hops(stack)[-2:0:-1]:
      x = mesh.constrain(x, *axes)
    return mesh.constrain(x[: like.shape[0]], *mesh.axes_of(stack))

  return jax.tree.map(move, stack)


def _scale(update: Any, rms: float) -> Any:
  """Orthogonal matrices -> the same, with `rms` as the RMS of their entries."""
  dims = matrix(update)
  assert dims is not None
  size = lambda dims: math.prod(update.shape[dim] for dim in dims)
  larger = max(size(dims.reduction_axis), size(dims.output_axis))
  return jax.tree.map(lambda u: rms * math.sqrt(larger) * u, update)


# Name -> (config -> gradients to directions, before decay and the learning rate).
OPTIMIZERS: dict[str, Callable[[Config], optax.GradientTransformation]] = {
  'adamw': _adam,
  'muon': _muon,
}


def make(
  cfg: Config,
  *,
  steps: int,
  multipliers: dict[str, float],
  growth: transfer.Growth | None = None,
  own_decays: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
  """The optimizer, with gradient clipping, weight decay and its schedule.

  Weight decay skips norms, biases and sink logits. `multipliers` maps a part of a
  parameter's name, such as 'gate', to a factor of its learning rate and decay. `growth`,
  of `transfer.growth`, changes the learning rates but not the decay. `own_decays` maps a
  part of a name to its own weight decay.
  """
  directions = OPTIMIZERS[cfg.name](cfg)
  if cfg.moments == 'bfloat16':
    directions = moments.stored(directions)
  if growth is not None:
    muon = lambda p: cfg.name == 'muon' and matrix(p) is not None
    scale = lambda updates, _: transfer.scaled(updates, growth, muon=muon)
    directions = optax.chain(directions, optax.stateless(scale))
  own = own_decays or {}

  def decay(strength: float, part: str = '') -> optax.GradientTransformation:
    owner = lambda name: next((p for p in own if p in name.split('.')), '')
    decayed = lambda name: decays(name) and owner(name) == part
    strength /= cfg.lr if cfg.decay_by == 'schedule' else 1.0
    return optax.add_decayed_weights(strength, functools.partial(_named, decayed))

  def multiplied(updates: Any, params: Any) -> Any:
    scale = lambda path, u: u * multiplier(trees.name(path), multipliers)
    return jax.tree_util.tree_map_with_path(scale, updates)

  return optax.chain(
    optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
    directions,
    decay(cfg.weight_decay),
    *(decay(strength, part) for part, strength in own.items()),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
    optax.stateless(multiplied) if multipliers else optax.identity(),
    *([_gates_first(cfg.gates_first)] if cfg.gates_first else []),
  )


def finite_updates(cfg: Config) -> bool:
  """Whether all updates of finite gradients and parameters are finite.

  AdamW divides by eps or more, and by 1 - b^t. Clipped gradients have finite squares.
  """
  divides = cfg.eps >= 1e-30 and float(np.float32(max(cfg.b1, cfg.b2))) < 1
  plain = cfg.name == 'adamw' and not cfg.factored
  return plain and divides and cfg.clip > 0 and cfg.lr <= LARGEST_RATE


class _First(NamedTuple):
  """The state of `_gates_first`; `guard` finds the schedule's count by its name."""

  done: jax.Array  # updates


def _gates_first(steps: int) -> optax.GradientTransformation:
  """Only the gates of attention learn in the first updates."""
  gate = re.compile(r'\.attn\.gate(_\w+)?\.')

  def init(params):
    del params
    return _First(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params
    scale = lambda path, u: u if gate.search(trees.name(path)) else u * late
    late = (state.done >= steps).astype(jnp.float32)
    return jax.tree_util.tree_map_with_path(scale, updates), _First(state.done + 1)

  return optax.GradientTransformation(init, update)


def _named(matches: Callable[[str], bool], params: Any) -> Any:
  """Parameters -> the same tree, with `matches(name)` for each leaf."""
  return jax.tree_util.tree_map_with_path(lambda p, _: matches(trees.name(p)), params)


def decays(name: str) -> bool:
  """Whether weight decay applies to the parameter of this name."""
  return name.split('.')[-1] not in ('scale', 'bias', 'logit')


def multiplier(name: str, multipliers: dict[str, float]) -> float:
  """The product of the learning-rate multipliers whose keys are parts of the name."""
  return math.prod(m for part, m in multipliers.items() if part in name.split('.'))
