"""THE PAPER: attention gates and their variants (arXiv 2505.06708).

    Y' = Y * sigmoid(X W)                                                       (Eq. 5)

X is the normalized input of the attention layer, whichever tensor is gated. Sections 2.2
and 3.2 vary the position (G1 to G5), granularity, sharing over heads, form and
activation; each is a field of `Config`. The weight is a separate parameter with a
heads axis, applied outside the attention kernel. Logits are in the compute dtype, as in
the authors' code; scores and products are in float32. The baseline has no gate module and
no gate parameter. A layer may have several gates, each at a position of its own.

B batch  T tokens  D width  H heads (query or KV)  K head width, or 1 for a headwise gate
"""

import ast
import contextlib
import functools
import re
from dataclasses import dataclass, replace
from typing import NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config
from gated.model.layers import Numerics, child_key, normal_param


class Position(NamedTuple):
  """The tensor that a gate acts on."""

  paper: str  # the paper's name of the gate
  tensor: str  # for error messages
  heads: str | None  # its heads axis, heads or kv_heads; None: (B, T, D), without heads
  normed: bool  # whether QK-norm applies to it


# The only definition of the positions. A new position needs a row here and one call of
# `Attention._gated` in attention.py.
POSITIONS: dict[str, Position | None] = {
  'none': None,  # the paper's baseline
  'query': Position('G4', 'query', 'heads', normed=True),
  'key': Position('G3', 'key', 'kv_heads', normed=True),
  'value': Position('G2', 'value', 'kv_heads', normed=False),
  'sdpa': Position('G1', 'SDPA output', 'heads', normed=False),
  'out': Position('G5', 'output projection', None, normed=False),
}

ACTIVATIONS = {
  'sigmoid': jax.nn.sigmoid,
  'silu': jax.nn.silu,
  'identity': lambda x: x,
  'ns_sigmoid': lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),  # Eq. 9: in (0.5, 1)
  '2sigmoid': lambda x: 2 * jax.nn.sigmoid(x),  # 1 where the logit is 0
  'hard_sigmoid': jax.nn.hard_sigmoid,  # relu6(x + 3) / 6
  'tanh': jnp.tanh,
  'softplus': jax.nn.softplus,
  'exp': jnp.exp,  # 1 where the logit is 0
}

FORMS = {'multiply': lambda y, s: y * s, 'add': lambda y, s: y + s}
IDENTITY = {'multiply': 1.0, 'add': 0.0}  # The score that does not change y.

# The part of X that the logits are computed from.
INPUTS = re.compile(r'all|(first|rank):([1-9][0-9]{0,8})', re.ASCII)

_NAME = 'config.model.attn.gate'


@dataclass(frozen=True, kw_only=True)
class Config:
  """One gate. With position 'none' the other fields are validated but unused."""

  position: str  # a key of POSITIONS
  granularity: str  # headwise: one score per head and token; elementwise: per channel
  heads: str  # specific: one score per head; shared: all heads use the mean score
  mean: str  # shared gates average before or after the activation
  form: str  # a key of FORMS
  activation: str  # a key of ACTIVATIONS
  # input: logits X W; parameter: learned logits, equal for all tokens; value: logits V W
  # of the gated value (value-state gate, arXiv 2510.09017).
  source: str
  # all; first:N, the first N dims of X; rank:R, logits (X A) W with R features X A. The
  # entries of A are from N(0, 1 / D), so that the features have unit variance.
  inputs: str
  init: str  # normal: N(0, std^2); zero
  std: float  # of the normal init
  bias: bool  # a learned bias of the logits, without weight decay
  bias_init: float  # its initial value
  lr: float  # multiplies the learning rate of all its parameters, and the weight decay
  weight_decay: float  # of its weights; -1 for config.optim.weight_decay
  place: str  # query and key gates act before or after QK-norm, always before RoPE
  score: str  # dtype of scores and products: float32, or compute, the compute dtype
  # (a, b): no gating in the first a steps, full gating from step b on; between them the
  # score moves linearly from IDENTITY to the gate's. Decay acts from the first step.
  opens: tuple[int, ...]
  layers: str  # its layers, as for `config.layers`; other layers have no parameters

  def __post_init__(self):
    allowed = {
      'position': POSITIONS,
      'granularity': ('headwise', 'elementwise'),
      'heads': ('specific', 'shared'),
      'mean': ('before', 'after'),
      'form': FORMS,
      'activation': ACTIVATIONS,
      'source': ('input', 'parameter', 'value'),
      'init': ('normal', 'zero'),
      'place': ('before', 'after'),
      'score': ('float32', 'compute'),
    }
    for position, place in POSITIONS.items():
      if place and place.paper == self.position.upper():
        raise ValueError(
          f'{_NAME}.position={self.position!r} of the paper is {position!r} here'
        )
    for field, values in allowed.items():
      config.one_of(f'{_NAME}.{field}', getattr(self, field), values)
    config.at_least(f'{_NAME}.std', self.std, 0.0)
    config.at_least(f'{_NAME}.lr', self.lr, 0.0)
    if self.weight_decay != -1:
      config.at_least(f'{_NAME}.weight_decay', self.weight_decay, 0.0)
    if len(self.opens) != 2 or not 0 <= self.opens[0] <= self.opens[1]:
      raise ValueError(
        f'{_NAME}.opens={self.opens}, but two steps are expected: the first and the last '
        'of the opening'
      )
    if not INPUTS.fullmatch(self.inputs):
      raise ValueError(
        f"{_NAME}.inputs={self.inputs!r}, but allowed are 'all', 'first:N' and 'rank:R'"
      )
    if self.inputs != 'all' and self.source != 'input':
      raise ValueError(
        f'{_NAME}.inputs={self.inputs!r} with source={self.source!r}, but only a gate '
        "with source='input' reads X: allowed is inputs='all'"
      )
    if self.source == 'value' and self.position not in ('none', 'value'):
      raise ValueError(
        f"{_NAME}.source='value' with position={self.position!r}, but a value-state gate "
        "computes its score from the tensor that it gates: allowed is position='value'"
      )
    if self.at and not self.at.heads:
      wrong = [f'granularity={self.granularity!r}'] * (self.granularity == 'headwise')
      wrong += [f'heads={self.heads!r}'] * (self.heads == 'shared')
      if wrong:
        raise ValueError(
          f'{_NAME}.{wrong[0]} with position={self.position!r}, but the '
          f"{self.at.tensor} has no heads: allowed are granularity='elementwise' and "
          "heads='specific'"
        )

  @property
  def at(self) -> Position | None:
    """The gated tensor; None without a gate."""
    return POSITIONS[self.position]

  @property
  def part(self) -> tuple[str, int]:
    """`inputs` as ('all', 0), ('first', N) or ('rank', R)."""
    kind, _, number = self.inputs.partition(':')
    return kind, int(number or 0)

  def check_qk_norm(self) -> None:
    """Raises ValueError if QK-norm would cancel the gate."""
    early = self.at and self.at.normed and self.place == 'before'
    if self.at and early and self.form == 'multiply' and self.granularity == 'headwise':
      raise ValueError(
        f"{_NAME}.granularity='headwise' with place='before' on the {self.at.tensor}: "
        "QK-norm cancels the score; allowed are place='after', "
        "granularity='elementwise', or config.model.attn.qk_norm=False"
      )


def further(text: str, first: Config) -> list[Config]:
  """config.model.attn.gates -> the configs of its gates; other fields are as in `first`.

  For example 'value granularity=headwise layers=last:2; query opens=100,200'. ValueError
  names the gate.
  """
  gates, hints = [], get_type_hints(Config)
  for i, part in enumerate(filter(None, map(str.strip, text.split(';')))):
    name, fields = f'{_NAME}s[{i}]', {}
    for field in ('position=' + part).split():
      key, _, value = field.partition('=')
      if key not in hints or key in fields:
        repeated = 'is repeated' if key in fields else 'is not a field of a gate'
        raise ValueError(f'{name}={part!r}: {key!r} {repeated}: {", ".join(hints)}')
      with contextlib.suppress(ValueError, SyntaxError):  # `coerce` names the type.
        value = value if hints[key] is str else ast.literal_eval(value)
      fields[key] = config.coerce(hints[key], value, f'{name}.{key}')
    try:
      gates.append(replace(first, **fields))
    except ValueError as error:
      raise ValueError(str(error).replace(f'{_NAME}.', f'{name}.')) from error
    config.one_of(f'{name}.position', fields['position'], [*POSITIONS][1:])
  return gates


class Gate(nnx.Module):
  """The gate of one layer: (y, x_BTD) -> gated y.

  Shape of the weight; a bias has the shape of source 'parameter':

    source      elementwise   headwise   position 'out'
    input       (D, H, K)     (D, H)     (D, D)
    parameter   (H, K)        (H,)       (D,)
    value       (H, K, K)     (H, K)

  With `inputs` first:N or rank:R, the D of the input is N or R. `open`, in [0, 1], is how
  far the gate has opened (`Transformer.at_step` sets it); None for a fully open gate.
  """

  def __init__(
    self,
    cfg: Config,
    key: jax.Array,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    numerics: Numerics,
  ):
    assert cfg.at
    self.cfg, self.compute = cfg, numerics.compute
    H = {'heads': heads, 'kv_heads': kv_heads}.get(cfg.at.heads or '')
    shape, axes = (width,), ('channels',)
    if H:
      shape, axes = (H, head_dim), (cfg.at.heads, 'head_dim')
    if cfg.granularity == 'headwise':
      shape, axes = shape[:1], axes[:1]
    bias = jnp.full(shape, cfg.bias_init, jnp.float32)
    self.bias = nnx.Param(bias, axes=axes) if cfg.bias else None
    self.open: nnx.Variable | None = nnx.data(None)
    kind, size = cfg.part
    into = child_key(key, 'reduce'), (width, size), ('embed', None)
    reduce = lambda: normal_param(*into, std=width**-0.5, dtype=numerics.weights)
    self.reduce = reduce() if kind == 'rank' else None
    if cfg.source == 'input':
      shape = (size or width, *shape)
      axes = (None if size else 'embed', *axes)
    elif cfg.source == 'value':
      shape = (shape[0], head_dim, *shape[1:])
      axes = (axes[0], 'head_dim', *(None for _ in axes[1:]))
    std = cfg.std if cfg.init == 'normal' else 0.0
    self.weight = normal_param(key, shape, axes, std=std, dtype=numerics.weights)

  def logit(self, x: jax.Array) -> jax.Array:
    """Input of the activation: (B, T, H, K), (B, T, H, 1) if headwise, or (B, T, D).

    `x` is x_BTD, or v_BTHK with source 'value'. With source 'parameter', B = T = 1 in the
    result.
    """
    kind, size = self.cfg.part
    if kind == 'first':
      x = x[..., :size]
    elif self.reduce is not None:
      x = jnp.tensordot(x, self.reduce[...].astype(self.compute), 1)
    logit = _LOGITS[self.cfg.source](x, self.weight[...].astype(self.compute))
    if self.bias is not None:
      logit += self.bias[...].astype(self.compute)[None, None]
    return logit[..., None] if self.cfg.granularity == 'headwise' else logit

  def score(self, x: jax.Array) -> jax.Array:
    """The scores: shaped like `logit`, with H = 1 if the heads share one.

    Their dtype is that of `Config.score`.
    """
    return _score(self.logit(x), self._open(), self.cfg)

  def __call__(self, y: jax.Array, x_BTD: jax.Array) -> jax.Array:
    logit = self.logit(y if self.cfg.source == 'value' else x_BTD)
    return _apply(y, logit, self._open(), self.cfg)

  def _open(self) -> jax.Array | None:
    return None if self.open is None else self.open[...]


_LOGITS = {
  'input': lambda x_BTD, w: jnp.tensordot(x_BTD, w, 1),
  'parameter': lambda _, w: w[None, None],
  'value': lambda v_BTHK, w: jnp.einsum('bthk,hk...->bth...', v_BTHK, w),
}


def _score(logit: jax.Array, open_: jax.Array | None, cfg: Config) -> jax.Array:
  logit = logit.astype(jnp.float32) if cfg.score == 'float32' else logit
  act = ACTIVATIONS[cfg.activation]
  if cfg.heads == 'specific':
    score = act(logit)
  elif cfg.mean == 'before':
    score = act(logit.mean(2, keepdims=True))
  else:
    score = act(logit).mean(2, keepdims=True)
  if open_ is None:
    return score
  # Exactly the identity at 0, and exactly the gate at 1.
  open_ = open_.astype(score.dtype)
  return (1 - open_) * IDENTITY[cfg.form] + open_ * score


@functools.partial(jax.checkpoint, static_argnums=3)
def _apply(y: jax.Array, logit: jax.Array, open_, cfg: Config) -> jax.Array:
  score = _score(logit, open_, cfg)
  return FORMS[cfg.form](y.astype(score.dtype), score).astype(y.dtype)
