"""THE PAPER: where a gate stands, what it scores, how it acts (arXiv 2505.06708).

    Y' = Y * sigmoid(X W)                                                       (Eq. 5)

X is the pre-normalised input of the attention layer at every position. Sections 2.2 and
3.2 vary the position (G1 to G5), the granularity, the sharing over heads, the form and
the activation; each is a field of `Config`. The weight is a parameter of its own, with a
heads axis, applied outside the attention kernel. Logits are in the compute dtype, as in
the authors' code; scores and products are in float32. A baseline has no gate at all: no
module, no parameter.

B batch  T tokens  D width  H heads (query or KV)  K head width, or 1 for a headwise gate
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config
from gated.model.layers import Numerics, normal, recomputed

# Position -> the paper's name for it.
POSITIONS = {
  'none': 'baseline',
  'query': 'G4',
  'key': 'G3',
  'value': 'G2',
  'sdpa': 'G1',
  'out': 'G5',
}

ACTIVATIONS = {
  'sigmoid': jax.nn.sigmoid,
  'silu': jax.nn.silu,
  'identity': lambda x: x,
  'ns_sigmoid': lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),  # Eq. 9: never below one half
  '2sigmoid': lambda x: 2 * jax.nn.sigmoid(x),  # 1 where the logit is 0
}

FORMS = {'multiply': lambda y, s: y * s, 'add': lambda y, s: y + s}

_NAME = 'config.model.attn.gate'


@dataclass(frozen=True, kw_only=True)
class Config:
  """One gate. With position 'none' the other fields are checked, then ignored."""

  position: str  # none, or what is gated: query, key, value, sdpa (its output), out
  granularity: str  # headwise: a score per head and token; elementwise: per channel
  heads: str  # specific; or shared: the mean over heads of the scores, for every head
  mean: str  # a shared gate's mean is taken before or after the activation
  form: str  # multiply: y * score; add: y + score
  activation: str  # of ACTIVATIONS
  # input: logits X W; parameter: learned, and the same for every token; value: V W, from
  # what it gates (value-state gate, arXiv 2510.09017).
  source: str
  init: str  # normal: N(0, std^2); zero
  std: float  # of the normal init
  lr: float  # multiplies the learning rate of the gate's weight, and so its decay
  place: str  # a query or key gate stands before or after QK-norm (always before RoPE)

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
        f"{_NAME}.source='value' at position {self.position!r}, but a value-state gate "
        "reads what it gates: its position is 'value'"
      )
    if self.position == 'out':
      reason = 'but the output projection has mixed the heads: there are none to score'
      if self.granularity == 'headwise':
        raise ValueError(f"{_NAME}.granularity='headwise' at position 'out', {reason}")
      if self.heads == 'shared':
        raise ValueError(f"{_NAME}.heads='shared' at position 'out', {reason}")

  def check_qk_norm(self) -> None:
    """Raises ValueError for a gate that the QK-norm after it would cancel."""
    early = self.position in ('query', 'key') and self.place == 'before'
    if early and self.form == 'multiply' and self.granularity == 'headwise':
      raise ValueError(
        f"{_NAME}.granularity='headwise' with place='before' on the {self.position}: "
        "QK-norm divides the score out again; allowed are place='after', "
        "granularity='elementwise', or config.model.attn.qk_norm=False"
      )


class Gate(nnx.Module):
  """The gate of one layer: (y, x_BTD) -> y gated.

  Weight by granularity, elementwise or headwise: (D, H, K) or (D, H) with source 'input',
  (H, K) or (H,) with 'parameter', (H, K, K) or (H, K) with 'value'; at position 'out',
  where there are no heads, (D, D) or (D,).
  """

  def __init__(
    self,
    cfg: Config,
    key: jax.Array,
    *,
    width: int,
    heads: int,
    head_dim: int,
    numerics: Numerics,
  ):
    self.cfg, self.compute = cfg, numerics.compute
    if cfg.position == 'out':
      shape, axes = (width,), ('channels',)
    else:
      heads_axis = 'kv_heads' if cfg.position in ('key', 'value') else 'heads'
      shape, axes = (heads, head_dim), (heads_axis, 'head_dim')
    if cfg.granularity == 'headwise':
      shape, axes = shape[:1], axes[:1]
    if cfg.source == 'input':
      shape, axes = (width, *shape), ('embed', *axes)
    elif cfg.source == 'value':
      wide = cfg.granularity == 'elementwise'
      shape, axes = (heads, head_dim), (axes[0], 'head_dim')
      shape, axes = (shape + (head_dim,), axes + (None,)) if wide else (shape, axes)
    std = cfg.std if cfg.init == 'normal' else 0.0
    self.weight = normal(key, shape, axes, std=std, dtype=numerics.weights)

  def logit(self, x: jax.Array) -> jax.Array:
    """What the activation is applied to: (B, T, H, K), (B, T, H, 1), or (B, T, D).

    `x` is x_BTD, or v_BTHK with source 'value'. With source 'parameter' B and T are 1.
    """
    logit = _LOGITS[self.cfg.source](x, self.weight[...].astype(self.compute))
    return logit[..., None] if self.cfg.granularity == 'headwise' else logit

  def score(self, x: jax.Array) -> jax.Array:
    """The scores, in float32: as `logit`, but with one head for all if they share."""
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


@functools.partial(recomputed, static_argnums=2)
def _apply(y: jax.Array, logit: jax.Array, cfg: Config) -> jax.Array:
  score = _score(logit, cfg)
  return FORMS[cfg.form](y.astype(jnp.float32), score).astype(y.dtype)
