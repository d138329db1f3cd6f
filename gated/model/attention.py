"""Attention: projections, QK-norm, RoPE, the kernel, and five positions for a gate.

The other remedies for attention sinks are extra terms in the softmax denominator
(off-by-one, sink logits, sink tokens), replacements of the softmax, and normalization or
activation of each head's output.

B batch  T tokens  D width  H heads  G KV heads  K head width  N sink tokens
E SwitchHead's experts
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from gated import config, kernels
from gated.devices import mesh
from gated.model import differential, gate, norms, remedies, sinks, streaming, switch
from gated.model.layers import (
  LARGEST,
  Dense,
  Numerics,
  RMSNorm,
  Yarn,
  child_key,
  fan_out,
  rope,
)
from gated.model.remedies import OVER_SOFTMAX

_NAME = 'config.model.attn'


@dataclass(frozen=True, kw_only=True)
class Config:
  """Grouped-query attention (arXiv 2305.13245)."""

  heads: int  # H query heads
  kv_heads: int  # G KV heads, each shared by H / G query heads
  head_dim: int  # K, independent of width / heads
  qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
  bias: bool  # on the query, key and value projections
  out_bias: bool  # on the output projection
  rope_base: float
  yarn: Yarn
  # softmax; off_by_one: adds 1 to its denominator (Miller 2023); sink_logit: adds exp(s)
  # with a learned s per head (gpt-oss); the others: see kernels.NORMALIZERS
  normalizer: str
  normalizer_layers: str  # layers with it: others have the softmax; '' for all
  clip_gamma: float  # of the clipped softmax, clip((zeta - gamma) w + gamma, 0, 1)
  clip_zeta: float
  elastic_tau: float  # initial tau of the elastic softmax, relu(w + tau_h / keys)
  differential: bool  # two heads are the maps of one differential head
  window: int  # a query sees this many tokens, its own included; 0 for all
  global_layers: str  # layers without the window, as for config.layers; '' for none
  rounding: str  # backend: that of the backend; or one of kernels.ROUNDINGS
  sink_tokens: int  # N learned keys per KV head; all tokens see them; no RoPE
  sink_values: str  # values of the sink tokens: learned, or zero
  logit_cap: float  # c tanh(score / c); 0 turns it off
  output: str  # one of remedies.OUTPUTS
  value_scale: str  # one of remedies.VALUE_SCALES
  switch: switch.Config
  backend: str  # a key of kernels.ATTENTION, or auto
  # The most documents in a packed row, and those in an average row (0: unknown), which
  # fused kernels are made for. A run on a GPU takes both from its data.
  max_segments: int
  mean_segments: float
  gate: gate.Config
  gates: str  # further gates, as for `gate.further`

  def __post_init__(self):
    config.within(f'{_NAME}.kv_heads', self.kv_heads, 1, LARGEST)
    config.within(f'{_NAME}.heads', self.heads, 1, LARGEST)
    config.divides(f'{_NAME}.heads', self.heads, f'{_NAME}.kv_heads', self.kv_heads)
    config.within(f'{_NAME}.head_dim', self.head_dim, 2, LARGEST)
    config.divides(f'{_NAME}.head_dim', self.head_dim, 'the pairs of RoPE', 2)
    # YaRN divides by the logarithm of the base.
    if not self.rope_base >= 1 or (self.rope_base == 1 and self.yarn.factor != 1):
      raise ValueError(f'{_NAME}.rope_base={self.rope_base}, but it must be at least 1.0')
    config.within(f'{_NAME}.max_segments', self.max_segments, 1, 1 << 24)
    config.at_least(f'{_NAME}.mean_segments', self.mean_segments, 0.0)
    kernels.check_backend(self.backend)
    remedies.check(self)
    gates = self.named.values()  # ValueError for two gates at one position.
    if self.qk_norm:
      for own in gates:
        own.check_qk_norm()
      if self.switch.where == 'key_value' and self.switch.top_k == 1:
        raise ValueError(
          f"{_NAME}.switch.top_k=1 with where='key_value': QK-norm cancels the score of "
          'a single key, so its router would learn nothing; allowed are top_k >= 2, '
          f"where='value', or {_NAME}.qk_norm=False"
        )

  @functools.cached_property
  def named(self) -> dict[str, gate.Config]:
    """All gates by the name of their module: gate, and gate_POSITION for the further."""
    named = {'gate': self.gate} if self.gate.at else {}
    for own in gate.further(self.gates, self.gate):
      if own.position in (other.position for other in named.values()):
        raise ValueError(
          f'{_NAME}.gates={self.gates[:100]!r} with {_NAME}.gate.position='
          f'{self.gate.position!r}: two gates have position={own.position!r}, but only '
          'one is allowed'
        )
      named[f'gate_{own.position}'] = own
    return named

  def knob(self, name: str) -> str:
    """The name of a gate in `named` -> the name of its knobs, for messages."""
    further = [other for other in self.named if other != 'gate']
    return f'{_NAME}.gate' + ('' if name == 'gate' else f's[{further.index(name)}]')

  @property
  def has_sinks(self) -> bool:
    """Whether the softmax denominator has extra terms."""
    return bool(self.sink_tokens) or self.normalizer in ('off_by_one', 'sink_logit')

  @property
  def has_sink_values(self) -> bool:
    """Whether these terms add values to the output."""
    return bool(self.sink_tokens) and self.sink_values == 'learned'


class Trace(NamedTuple):
  """Tensors inside one layer's attention; under jit, unused fields cost nothing.

  `query`, `key` and `value` are the inputs of the kernel.
  """

  query: jax.Array  # (B, T, H, K), normed, gated, rotated and scaled
  key: jax.Array  # (B, T, G, K), likewise
  value: jax.Array  # (B, T, G, K), scaled and gated
  lse: jax.Array | None  # log-sum-exp of the scores (B, T, H), if requested
  sinks: jax.Array | None  # log-sum-exp of the sinks' terms in the denominator (B, T, H)
  sdpa: jax.Array  # the SDPA output before its gate, after `Config.output` (B, T, H, K)
  gated: jax.Array  # the input of the output projection (B, T, H, K)
  update: jax.Array  # the update of the residual stream (B, T, D)


class Cache(NamedTuple):
  """The earlier tokens of one layer: slot s holds the key and value of position s."""

  key: jax.Array  # (B, S, G, K), as in Trace
  value: jax.Array  # (B, S, G, K)
  start_B: jax.Array  # the position of the first of the T tokens that follow


def put(cache_BSGK: jax.Array, x_BTGK: jax.Array, start_B: jax.Array) -> jax.Array:
  """Writes keys or values of T tokens into slots start_B to start_B + T - 1."""
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  return jax.vmap(write)(cache_BSGK, x_BTGK, start_B)


class Attention(nnx.Module):
  """One layer's attention: pre-normalized x_BTD -> the update of the residual stream."""

  def __init__(
    self, cfg: Config, key: jax.Array, *, width: int, std_out: float, numerics: Numerics
  ):
    self.cfg = cfg
    self.window = cfg.window  # 0 in a global layer
    self.normalizer = cfg.normalizer  # softmax in a layer without it
    self.kept = 0  # first tokens that every query also sees; see `streaming.keep`
    H, G, K = cfg.heads, cfg.kv_heads, cfg.head_dim
    dense = functools.partial(Dense, numerics=numerics)
    inward = functools.partial(dense, std=numerics.init_std, bias=cfg.bias)
    query = ('embed', 'heads', 'head_dim')
    keys = ('embed', 'kv_heads', 'head_dim')
    self.query = inward(child_key(key, 'query'), (width,), (H, K), axes=query)
    switched = {'none': '', 'value': 'value', 'key_value': 'key value'}[cfg.switch.where]

    def project(name):
      if name not in switched.split():
        return inward(child_key(key, name), (width,), (G, K), axes=keys)
      return switch.Switched(
        cfg.switch,
        child_key(key, name),
        width=width,
        kv_heads=G,
        head_dim=K,
        bias=cfg.bias,
        numerics=numerics,
      )

    self.key, self.value = project('key'), project('value')
    outward = dict(axes=('heads', 'head_dim', 'embed'), std=std_out, bias=cfg.out_bias)
    self.out = dense(child_key(key, 'out'), (H, K), (width,), **outward)
    norm = lambda: RMSNorm(K, axes=('head_dim',), numerics=numerics, rotated=True)
    self.query_norm = norm() if cfg.qk_norm else None
    self.key_norm = norm() if cfg.qk_norm else None
    make_sinks = functools.partial(
      sinks.Sinks,
      child_key(key, 'sinks'),
      tokens=cfg.sink_tokens,
      values=cfg.sink_values,
      normalizer=cfg.normalizer,
      heads=H,
      kv_heads=G,
      head_dim=K,
      cap=cfg.logit_cap,
      scale=cfg.yarn.scale,
      numerics=numerics,
    )
    self.sinks = make_sinks() if cfg.has_sinks else None
    sizes = dict(width=width, kv_heads=G, head_dim=K)
    scaled = functools.partial(norms.ValueScale, cfg.value_scale, std=numerics.init_std)
    self.value_scale = scaled(**sizes) if cfg.value_scale != 'none' else None
    elastic = cfg.normalizer == 'elastic'
    self.elastic = norms.Scale((H,), cfg.elastic_tau) if elastic else None
    subtract = functools.partial(differential.Differential, head_dim=K, numerics=numerics)
    own = child_key(key, 'differential')
    self.differential = subtract(own) if cfg.differential else None
    # The paper's GroupNorm with "almost no additional parameters": it has H K.
    by_head = functools.partial(RMSNorm, (H, K), axes=('heads', 'head_dim'))
    normed = cfg.output == 'rms_norm'
    self.output_norm = by_head(numerics=numerics) if normed else None
    sizes |= dict(heads=H)
    self.gate: gate.Gate | None = nnx.data(None)
    for name, own in cfg.named.items():
      made = gate.Gate(own, child_key(key, name), **sizes, numerics=numerics)
      setattr(self, name, made)

  @property
  def gates(self) -> dict[str, gate.Gate]:
    """The gates of this layer by name, as in `Config.named`."""
    every = {name: getattr(self, name) for name in self.cfg.named}
    return {name: own for name, own in every.items() if own is not None}

  def __call__(
    self, x_BTD: jax.Array, angle_BTk: jax.Array, segment_BT: jax.Array | None
  ) -> jax.Array:
    return self.trace(x_BTD, angle_BTk, segment_BT).update

  def trace(
    self,
    x_BTD: jax.Array,
    angle_BTk: jax.Array,
    segment_BT: jax.Array | None,
    cache: Cache | None = None,
    *,
    lse: bool = False,
  ) -> Trace:
    """The same computation -> all its tensors.

    With `lse`, for inference, a softmax also returns its log-sum-exp, without sinks. With
    a cache, each token attends to the slots up to its own position, itself included, and
    segments are ignored; the caller stores the new keys and values.
    """
    query_BTD, key_BTD, value_BTD, gate_BTD = fan_out(x_BTD, 4)
    inputs = query_BTD, key_BTD, gate_BTD
    unrotated_BTHK, k_BTGK = self._query_and_key(*inputs, angle_BTk)
    v_BTGK = self.value(value_BTD)
    if self.value_scale is not None:
      v_BTGK = self.value_scale(v_BTGK)
    v_BTGK = self._gated('value', v_BTGK, gate_BTD)
    # Split like the activations; the backend gathers the keys of its rows.
    k_BTGK = mesh.constrain(k_BTGK, 'batch', 'tokens', 'kv_heads', None)
    v_BTGK = mesh.constrain(v_BTGK, 'batch', 'tokens', 'kv_heads', None)
    q_BTHK = self._rotated(unrotated_BTHK, angle_BTk)
    qkv = q_BTHK, k_BTGK, v_BTGK

    def attend(values):
      if cache is not None and self.kept:
        raise NotImplementedError('StreamingLLM has losses and logits, but no generation')
      if cache is not None:
        return self._attend_cache(q_BTHK, k_BTGK, values, cache)
      if not self.kept:
        return self._attend(q_BTHK, k_BTGK, values, segment_BT, lse)
      place: dict[str, Any] = dict(window=self.window, kept=self.kept)
      windowed = self._attend(q_BTHK, k_BTGK, values, segment_BT, True)
      capped_BTHK = self._rotated(unrotated_BTHK, streaming.capped(angle_BTk, **place))
      cap = self.cfg.logit_cap
      return streaming.joined(windowed, capped_BTHK, k_BTGK, values, **place, cap=cap)

    values = v_BTGK if cache is None else put(cache.value, v_BTGK, cache.start_B)
    if self.differential is None:
      y_BTHK, lse_BTH = attend(values)
    else:
      y_BTHK, lse_BTH = self.differential(attend, values)
    extra_BTH = None
    if self.sinks is not None:
      y_BTHK, extra_BTH = self.sinks(y_BTHK, lse_BTH, unrotated_BTHK)
    if self.output_norm is not None:
      y_BTHK = self.output_norm(y_BTHK)
    elif self.cfg.output == 'silu':
      y_BTHK = jax.nn.silu(y_BTHK)
    z_BTHK = self._gated('sdpa', y_BTHK, gate_BTD)
    update_BTD = self._gated('out', self.out(z_BTHK), gate_BTD)
    return Trace(*qkv, lse_BTH, extra_BTH, y_BTHK, z_BTHK, update_BTD)

  def query_and_key(self, x_BTD, angle_BTk) -> tuple[jax.Array, jax.Array]:
    """-> (q_BTHK, k_BTGK), the kernel inputs: normed, gated, rotated and scaled."""
    unrotated_BTHK, k_BTGK = self._query_and_key(x_BTD, x_BTD, x_BTD, angle_BTk)
    return self._rotated(unrotated_BTHK, angle_BTk), k_BTGK

  def _query_and_key(self, query_BTD, key_BTD, gate_BTD, angle_BTk):
    """Inputs of both products and the gates -> queries before RoPE, keys after it."""
    q_BTHK = self._normed('query', self.query(query_BTD), gate_BTD, self.query_norm)
    k_BTGK = self._normed('key', self.key(key_BTD), gate_BTD, self.key_norm)
    return q_BTHK, self._rotated(k_BTGK, angle_BTk)

  def _rotated(self, x_BTHK, angle_BTk) -> jax.Array:
    return rope(x_BTHK, angle_BTk, self.cfg.yarn.scale)

  def _attend(self, q_BTHK, k_BTGK, v_BTGK, segment_BT, lse: bool):
    """-> (y_BTHK, the log-sum-exp of the scores or None)."""
    cfg, qkvs = self.cfg, (q_BTHK, k_BTGK, v_BTGK, segment_BT)
    opts = self._options()
    opts |= dict(backend=cfg.backend, max_segments=cfg.max_segments)
    opts['mean_segments'] = cfg.mean_segments
    summed = self.normalizer in (*OVER_SOFTMAX, 'clipped', 'elastic')
    if self.sinks is not None or (lse and summed):
      return kernels.attend_lse(*qkvs, **self._weights(), **opts, gradient=not lse)
    return kernels.attend(*qkvs, **self._weights(), **opts), None

  def _attend_cache(self, q_BTHK, k_BTGK, v_BSGK, cache: Cache):
    """As `_attend`, with the keys of the cache; the values are those of all slots."""
    k_BSGK = put(cache.key, k_BTGK, cache.start_B)
    opts = self._options() | self._weights()
    return kernels.attend_cache(q_BTHK, k_BSGK, v_BSGK, cache.start_B, **opts)

  def _options(self) -> dict[str, Any]:
    """Options of the kernel that every softmax has."""
    cfg = self.cfg
    return dict(cap=cfg.logit_cap, window=self.window, rounding=cfg.rounding)

  def _weights(self) -> dict[str, Any]:
    """Options of the kernel that replace the softmax."""
    cfg = self.cfg
    normalizer = 'softmax' if self.normalizer in OVER_SOFTMAX else self.normalizer
    offset_H = None if self.elastic is None else self.elastic.scale[...]
    clip = cfg.clip_gamma, cfg.clip_zeta
    return dict(normalizer=normalizer, clip=clip, offset_H=offset_H)

  def _gated(self, position: str, y: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Applies the gate to y if one is configured for this position."""
    for own in self.gates.values():
      y = own(y, x_BTD) if own.cfg.position == position else y
    return y

  def _normed(self, position: str, y, x_BTD: jax.Array, norm: RMSNorm | None):
    """Applies QK-norm to a query or key, and its gate before or after it."""
    gates = [g for g in self.gates.values() if g.cfg.position == position]
    late = any(own.cfg.place == 'after' for own in gates)
    y = y if late else self._gated(position, y, x_BTD)
    y = y if norm is None else norm(y)
    return self._gated(position, y, x_BTD) if late else y
