"""Attention: projections, QK-norm, RoPE, the kernel, and five places for a gate.

The remedies that others have found for attention sinks stand here beside the gates: what
shares the softmax's denominator (off-by-one, sink logits, sink tokens), what takes the
softmax's place, what is done to each head's output.

B batch  T tokens  D width  H heads  G KV heads  K head width  N sink tokens
E SwitchHead's experts
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config, gate, kernels, mesh
from gated.layers import Dense, Numerics, RMSNorm, Yarn, named, normal, recomputed, rope

_NAME = 'config.model.attn'
MOST = 1 << 16  # Of heads, channels, sinks or experts; see model.LIMITS.

# Those of softmax differ in what their denominators hold beside the keys.
OVER_SOFTMAX = ('softmax', 'off_by_one', 'sink_logit')
NORMALIZERS = (*OVER_SOFTMAX, *(n for n in kernels.NORMALIZERS if n != 'softmax'))

# What is done to each head's output, before its gate (Table 3).
OUTPUTS = ('none', 'rms_norm', 'silu')


@dataclass(frozen=True, kw_only=True)
class Switch:
  """Experts for values, or for keys too (SwitchHead, arXiv 2312.07987; Table 6)."""

  where: str  # none, value, key_value
  experts: int  # E projections of each KV head
  top_k: int  # of which a token uses so many, weighted by their sigmoid scores

  def __post_init__(self):
    name = f'{_NAME}.switch'
    config.one_of(f'{name}.where', self.where, ('none', 'value', 'key_value'))
    config.within(f'{name}.experts', self.experts, 1, MOST)
    config.at_least(f'{name}.top_k', self.top_k, 1)
    if self.top_k > self.experts:
      raise ValueError(
        f'{name}.top_k={self.top_k}, but there are {name}.experts={self.experts}'
      )


@dataclass(frozen=True, kw_only=True)
class Config:
  """Grouped-query attention (arXiv 2305.13245); the head width is its own."""

  heads: int  # H query heads
  kv_heads: int  # G heads of keys and values, each shared by H / G query heads
  head_dim: int  # K
  qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
  bias: bool  # on the query, key and value projections
  out_bias: bool  # on the output projection
  rope_base: float
  yarn: Yarn
  # softmax; off_by_one: 1 joins its denominator (Miller 2023); sink_logit: exp(s) of a
  # learned s per head does (gpt-oss); sigmoid, softpick: as in kernels.NORMALIZERS
  normalizer: str
  sink_tokens: int  # N learned keys per KV head, without a position, that all tokens see
  sink_values: str  # theirs: learned, or zero
  logit_cap: float  # c tanh(score / c); 0 for none
  output: str  # of OUTPUTS
  switch: Switch
  backend: str  # of kernels.ATTENTION, or auto
  max_segments: int  # the most documents that a packed row may hold, for fused kernels
  gate: gate.Config

  def __post_init__(self):
    config.within(f'{_NAME}.kv_heads', self.kv_heads, 1, MOST)
    config.within(f'{_NAME}.heads', self.heads, 1, MOST)
    config.divides(f'{_NAME}.heads', self.heads, f'{_NAME}.kv_heads', self.kv_heads)
    config.within(f'{_NAME}.head_dim', self.head_dim, 2, MOST)
    config.divides(f'{_NAME}.head_dim', self.head_dim, 'the pairs of RoPE', 2)
    # YaRN divides by the logarithm of the base.
    if not self.rope_base >= 1 or (self.rope_base == 1 and self.yarn.factor != 1):
      raise ValueError(f'{_NAME}.rope_base={self.rope_base}, but it must be at least 1.0')
    config.within(f'{_NAME}.max_segments', self.max_segments, 2, 1 << 24)
    config.one_of(f'{_NAME}.normalizer', self.normalizer, NORMALIZERS)
    config.within(f'{_NAME}.sink_tokens', self.sink_tokens, 0, MOST)
    config.one_of(f'{_NAME}.sink_values', self.sink_values, ('learned', 'zero'))
    config.at_least(f'{_NAME}.logit_cap', self.logit_cap, 0.0)
    config.one_of(f'{_NAME}.output', self.output, OUTPUTS)
    kernels.check_backend(self.backend)
    if self.sink_tokens and self.normalizer not in OVER_SOFTMAX:
      raise ValueError(
        f'{_NAME}.sink_tokens={self.sink_tokens} with {_NAME}.normalizer='
        f'{self.normalizer!r}, but they share a softmax: allowed are '
        f'{", ".join(map(repr, OVER_SOFTMAX))}'
      )
    valued = self.sink_tokens and self.sink_values == 'learned'
    if self.has_sinks and not valued and self.output == 'rms_norm':
      raise ValueError(
        f"{_NAME}.output='rms_norm' with sinks that add nothing ({_NAME}.normalizer="
        f'{self.normalizer!r}, {_NAME}.sink_tokens={self.sink_tokens}): they only scale '
        'the output, and the norm divides that out again'
      )
    if self.qk_norm:
      self.gate.check_qk_norm()
      if self.switch.where == 'key_value' and self.switch.top_k == 1:
        raise ValueError(
          f"{_NAME}.switch.top_k=1 with where='key_value': QK-norm divides the score of "
          f'a single key out again, and its router learns nothing: take top_k >= 2, '
          f"where='value', or {_NAME}.qk_norm=False"
        )

  @property
  def has_sinks(self) -> bool:
    """Whether something shares the softmax's denominator with the keys."""
    return bool(self.sink_tokens) or self.normalizer in ('off_by_one', 'sink_logit')


class Attention(nnx.Module):
  """One layer's attention: x_BTD, normalised -> what it adds to the residual."""

  def __init__(
    self, cfg: Config, key: jax.Array, *, width: int, std_out: float, numerics: Numerics
  ):
    self.cfg = cfg
    H, G, K = cfg.heads, cfg.kv_heads, cfg.head_dim
    dense = functools.partial(Dense, numerics=numerics)
    inward = functools.partial(dense, std=numerics.init_std, bias=cfg.bias)
    query = ('embed', 'heads', 'head_dim')
    keys = ('embed', 'kv_heads', 'head_dim')
    self.query = inward(named(key, 'query'), (width,), (H, K), axes=query)
    switched = {'none': '', 'value': 'value', 'key_value': 'key value'}[cfg.switch.where]

    def project(name):
      if name not in switched.split():
        return inward(named(key, name), (width,), (G, K), axes=keys)
      return Switched(cfg, named(key, name), width=width, numerics=numerics)

    self.key, self.value = project('key'), project('value')
    outward = dict(axes=('heads', 'head_dim', 'embed'), std=std_out, bias=cfg.out_bias)
    self.out = dense(named(key, 'out'), (H, K), (width,), **outward)
    norm = lambda: RMSNorm(K, axes=('head_dim',), numerics=numerics)
    self.query_norm = norm() if cfg.qk_norm else None
    self.key_norm = norm() if cfg.qk_norm else None
    # A softmax over the keys alone, or one of its replacements, has no sinks.
    make_sinks = functools.partial(Sinks, cfg, named(key, 'sinks'), numerics=numerics)
    self.sinks = make_sinks() if cfg.has_sinks else None
    # The paper calls it GroupNorm, of "almost no additional parameters": H K of them.
    by_head = functools.partial(RMSNorm, (H, K), axes=('heads', 'head_dim'))
    normed = cfg.output == 'rms_norm'
    self.output_norm = by_head(numerics=numerics) if normed else None
    heads = G if cfg.gate.position in ('key', 'value') else H
    make = functools.partial(gate.Gate, width=width, heads=heads, head_dim=K)
    gated = cfg.gate.position != 'none'
    key_gate = named(key, 'gate')
    self.gate = make(cfg.gate, key_gate, numerics=numerics) if gated else None

  def __call__(
    self, x_BTD: jax.Array, angle_BTk: jax.Array, segment_BT: jax.Array | None
  ) -> jax.Array:
    still_BTHK, k_BTGK = self._query_and_key(x_BTD, angle_BTk)
    v_BTGK = self._gated('value', self.value(x_BTD), x_BTD)
    # As the activations are; a backend gathers its rows' keys itself.
    k_BTGK = mesh.constrain(k_BTGK, 'batch', 'tokens', 'kv_heads', None)
    v_BTGK = mesh.constrain(v_BTGK, 'batch', 'tokens', 'kv_heads', None)
    q_BTHK = self._turned(still_BTHK, angle_BTk)
    y_BTHK = self._attend(still_BTHK, q_BTHK, k_BTGK, v_BTGK, segment_BT)
    if self.output_norm is not None:
      y_BTHK = self.output_norm(y_BTHK)
    elif self.cfg.output == 'silu':
      y_BTHK = jax.nn.silu(y_BTHK)
    y_BTHK = self._gated('sdpa', y_BTHK, x_BTD)
    return self._gated('out', self.out(y_BTHK), x_BTD)

  def query_and_key(self, x_BTD, angle_BTk) -> tuple[jax.Array, jax.Array]:
    """-> (q_BTHK, k_BTGK) as the kernel gets them: normed, gated, turned and scaled."""
    still_BTHK, k_BTGK = self._query_and_key(x_BTD, angle_BTk)
    return self._turned(still_BTHK, angle_BTk), k_BTGK

  def _query_and_key(self, x_BTD, angle_BTk) -> tuple[jax.Array, jax.Array]:
    """Queries before RoPE, as sinks meet them, and keys after it."""
    q_BTHK = self._normed('query', self.query(x_BTD), x_BTD, self.query_norm)
    k_BTGK = self._normed('key', self.key(x_BTD), x_BTD, self.key_norm)
    return q_BTHK, self._turned(k_BTGK, angle_BTk)

  def _turned(self, x_BTHK, angle_BTk) -> jax.Array:
    return rope(x_BTHK, angle_BTk, self.cfg.yarn.scale)

  def _attend(self, still_BTHK, q_BTHK, k_BTGK, v_BTGK, segment_BT) -> jax.Array:
    """Attention, with sinks if there are any: they meet queries before RoPE."""
    cfg, qkvs = self.cfg, (q_BTHK, k_BTGK, v_BTGK, segment_BT)
    opts: dict[str, Any] = dict(backend=cfg.backend, max_segments=cfg.max_segments)
    opts |= dict(cap=cfg.logit_cap)
    if self.sinks is None:
      return kernels.attend(*qkvs, normalizer=cfg.normalizer, **opts)
    return self.sinks(*kernels.attend_lse(*qkvs, **opts), still_BTHK)

  def _gated(self, position: str, y: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """y, gated if the gate stands at this position."""
    if self.gate is None or self.cfg.gate.position != position:
      return y
    return self.gate(y, x_BTD)

  def _normed(self, position: str, y, x_BTD: jax.Array, norm: RMSNorm | None):
    """QK-norm of a query or a key, with a gate before or after it, or none."""
    late = self.cfg.gate.place == 'after'
    y = y if late else self._gated(position, y, x_BTD)
    y = y if norm is None else norm(y)
    return self._gated(position, y, x_BTD) if late else y


class Sinks(nnx.Module):
  """What shares the denominator of a softmax: (y_BTHK, lse_BTH, q_BTHK) -> y_BTHK.

  Logits e_n with values u_n join the softmax over the keys: e = 0 for a 1 in the
  denominator and e = s_h for a learned sink logit, both with u = 0, e = q k_n / sqrt(K)
  for a sink token:

    y' = y * p + u * (1 - p),    p = exp(lse) / (exp(lse) + sum(exp(e)))

  outside of the kernel, which has only to tell its log-sum-exp. q is the query before
  RoPE, so that a sink token stands at no position.
  """

  def __init__(self, cfg: Config, key: jax.Array, *, numerics: Numerics):
    self.cfg = cfg
    shape, axes = (cfg.sink_tokens, cfg.kv_heads, cfg.head_dim), (None, 'kv_heads', None)
    draw = lambda name: normal(
      named(key, name), shape, axes, std=numerics.init_std, dtype=numerics.weights
    )
    self.key = draw('key') if cfg.sink_tokens else None
    with_values = cfg.sink_tokens and cfg.sink_values == 'learned'
    self.value = draw('value') if with_values else None
    zeros = jnp.zeros(cfg.heads, numerics.weights)
    learned = cfg.normalizer == 'sink_logit'
    self.logit = nnx.Param(zeros, axes=('heads',)) if learned else None

  def __call__(self, y_BTHK, lse_BTH, q_BTHK) -> jax.Array:
    logit_BTHN = jnp.concatenate([*self._tokens(q_BTHK), *self._constants(q_BTHK)], -1)
    extra_BTH = jax.nn.logsumexp(logit_BTHN, -1)
    u_BTHK = None
    if self.value is not None:
      v_NHK = self._by_head(self.value)
      share_BTHN = jnp.exp(logit_BTHN - extra_BTH[..., None])[..., : len(v_NHK)]
      u_BTHK = jnp.einsum('bthn,nhk->bthk', share_BTHN, v_NHK)
    return _merged(y_BTHK, lse_BTH, extra_BTH, u_BTHK)

  def _by_head(self, parameter) -> jax.Array:
    """(N, G, K) -> (N, H, K), in float32."""
    repeat = self.cfg.heads // self.cfg.kv_heads
    return jnp.repeat(parameter[...].astype(jnp.float32), repeat, 1)

  def _tokens(self, q_BTHK) -> list[jax.Array]:
    if self.key is None:
      return []
    q, k_NHK = q_BTHK.astype(jnp.float32), self._by_head(self.key)
    # YaRN scales the queries and the keys of all others.
    scale = q.shape[-1] ** -0.5 * self.cfg.yarn.scale**2
    score_BTHN = scale * jnp.einsum('bthk,nhk->bthn', q, k_NHK)
    return [kernels.soft_cap(score_BTHN, self.cfg.logit_cap)]

  def _constants(self, q_BTHK) -> list[jax.Array]:
    if self.cfg.normalizer == 'softmax':
      return []
    H, zero = self.cfg.heads, jnp.float32(0)
    s_H = jnp.full(H, zero) if self.logit is None else self.logit[...]
    s_BTH1 = s_H.astype(jnp.float32)[None, None, :, None]
    return [jnp.broadcast_to(s_BTH1, (*q_BTHK.shape[:-1], 1))]


@recomputed
def _merged(y_BTHK, lse_BTH, extra_BTH, u_BTHK) -> jax.Array:
  p_BTH1 = jax.nn.sigmoid(lse_BTH - extra_BTH)[..., None]
  merged = y_BTHK.astype(jnp.float32) * p_BTH1
  if u_BTHK is not None:
    merged = merged + u_BTHK * (1 - p_BTH1)
  return merged.astype(y_BTHK.dtype)


class Switched(nnx.Module):
  """E projections of each KV head, of which each token mixes its top k: x_BTD -> BTGK.

    sum over the top k of sigmoid(x r_e) * (x W_e)

  Every projection is computed, and those not chosen weigh nothing: they are few and
  small. With one expert it is a headwise sigmoid gate after the projection, G2 or G3.
  """

  def __init__(self, cfg: Config, key: jax.Array, *, width: int, numerics: Numerics):
    self.top_k = cfg.switch.top_k
    E, G, K = cfg.switch.experts, cfg.kv_heads, cfg.head_dim
    dense = functools.partial(Dense, std=numerics.init_std, numerics=numerics)
    axes = ('embed', 'kv_heads', None, 'head_dim')
    project, router = named(key, 'project'), named(key, 'router')
    self.project = dense(project, (width,), (G, E, K), axes=axes, bias=cfg.bias)
    self.router = dense(router, (width,), (G, E), axes=axes[:3], bias=False)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    score_BTGE = jax.nn.sigmoid(self.router(x_BTD).astype(jnp.float32))
    choice_BTGk = jax.lax.top_k(score_BTGE, self.top_k)[1]
    weight_BTGE = score_BTGE * jax.nn.one_hot(choice_BTGk, score_BTGE.shape[-1]).sum(-2)
    y_BTGEK = self.project(x_BTD)
    mixed = jnp.einsum('btgek,btge->btgk', y_BTGEK, weight_BTGE.astype(y_BTGEK.dtype))
    return mixed.astype(x_BTD.dtype)
