"""THE PAPER: attention gates and their variants (arXiv 2505.06708).

    Y' = Y * sigmoid(X W)                                                       (Eq. 5)

X is the pre-normalised input of the attention layer at every position. Sections 2.2 and
3.2 vary the position (G1 to G5), the granularity, the sharing over heads, the form and
the activation; each is a field of `Config`. The weight is a separate parameter with a
heads axis, applied outside the attention kernel. Logits are in the compute dtype, as in
the authors' code; scores and products are in float32. The baseline has no gate module and
no gate parameter.

B batch  T tokens  D width  H heads (query or KV)  K head width, or 1 for a headwise gate
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config
from gated.model.layers import Numerics, normal_param


class Position(NamedTuple):
  """The tensor that a gate acts on."""

  paper: str  # the paper's name of the gate
  tensor: str  # for error messages
  heads: str | None  # its heads axis, heads or kv_heads; None: (B, T, D), without heads
  normed: bool  # QK-norm applies to the tensor


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
}

FORMS = {'multiply': lambda y, s: y * s, 'add': lambda y, s: y + s}

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
  init: str  # normal: N(0, std^2); zero
  std: float  # of the normal init
  lr: float  # multiplies the weight's learning rate, and with it its weight decay
  place: str  # query and key gates act before or after QK-norm, always before RoPE

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
    }
    for field, values in allowed.items():
      config.one_of(f'{_NAME}.{field}', getattr(self, field), values)
    config.at_least(f'{_NAME}.std', self.std, 0.0)
    config.at_least(f'{_NAME}.lr', self.lr, 0.0)
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

  def check_qk_norm(self) -> None:
    """Raises ValueError if QK-norm would cancel the gate."""
    early = self.at and self.at.normed and self.place == 'before'
    if self.at and early and self.form == 'multiply' and self.granularity == 'headwise':
      raise ValueError(
        f"{_NAME}.granularity='headwise' with place='before' on the {self.at.tensor}: "
        "QK-norm cancels the score; allowed are place='after', "
        "granularity='elementwise', or config.model.attn.qk_norm=False"
      )


class Gate(nnx.Module):
  """The gate of one layer: (y, x_BTD) -> gated y.

  Shape of the weight:

    source      elementwise   headwise   position 'out'
    input       (D, H, K)     (D, H)     (D, D)
    parameter   (H, K)        (H,)       (D,)
    value       (H, K, K)     (H, K)
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
    if cfg.source == 'input':
      shape, axes = (width, *shape), ('embed', *axes)
    elif cfg.source == 'value':
      shape = (shape[0], head_dim, *shape[1:])
      axes = (axes[0], 'head_dim', *(None for _ in axes[1:]))
    std = cfg.std if cfg.init == 'normal' else 0.0
    self.weight = normal_param(key, shape, axes, std=std, dtype=numerics.weights)

  def logit(self, x: jax.Array) -> jax.Array:
    """Input of the activation: (B, T, H, K), (B, T, H, 1) if headwise, or (B, T, D).

    `x` is x_BTD, or v_BTHK with source 'value'. With source 'parameter' B = T = 1.
    """
    logit = _LOGITS[self.cfg.source](x, self.weight[...].astype(self.compute))
    return logit[..., None] if self.cfg.granularity == 'headwise' else logit

  def score(self, x: jax.Array) -> jax.Array:
    """The scores in float32: shaped like `logit`, with H = 1 if the heads share one."""
    return _score(self.logit(x), self.cfg)

  def __call__(self, y: jax.Array, x_BTD: jax.Array) -> jax.Array:
    logit = self.logit(y if self.cfg.source == 'value' else x_BTD)
    return _apply(y, logit, self.cfg)


_LOGITS = {
  'input': lambda x_BTD, w: jnp.tensordot(x_BTD, w, 1),
  'parameter': lambda _, w: w[None, None],
  'value': lambda v_BTHK, w: jnp.einsum('bthk,hk...->bth...', v_BTHK, w),
}


def _score(logit: jax.Array, cfg: Config) -> jax.Array:
  logit = logit.astype(jnp.float32)
  act = ACTIVATIONS[cfg.activation]
  if cfg.heads == 'specific':
    return act(logit)
  if cfg.mean == 'before':
    return act(logit.mean(2, keepdims=True))
  return act(logit).mean(2, keepdims=True)


@functools.partial(jax.checkpoint, static_argnums=2)
def _apply(y: jax.Array, logit: jax.Array, cfg: Config) -> jax.Array:
  score = _score(logit, cfg)
  return FORMS[cfg.form](y.astype(jnp.float32), score).astype(y.dtype)
