"""Attention: projections, QK-norm, RoPE, the kernel, and five places for a gate.

B batch  T tokens  D width  H heads  G KV heads  K head width
"""

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from gated import config, gate, kernels, mesh
from gated.layers import Dense, Numerics, RMSNorm, named, rope

_NAME = 'config.model.attn'


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
  backend: str  # of kernels.ATTENTION, or auto
  max_segments: int  # the most documents that a packed row may hold, for fused kernels
  gate: gate.Config

  def __post_init__(self):
    config.at_least(f'{_NAME}.kv_heads', self.kv_heads, 1)
    config.at_least(f'{_NAME}.heads', self.heads, 1)
    config.divides(f'{_NAME}.heads', self.heads, f'{_NAME}.kv_heads', self.kv_heads)
    config.at_least(f'{_NAME}.head_dim', self.head_dim, 2)
    config.divides(f'{_NAME}.head_dim', self.head_dim, 'the pairs of RoPE', 2)
    config.at_least(f'{_NAME}.rope_base', self.rope_base, 1.0)
    config.at_least(f'{_NAME}.max_segments', self.max_segments, 2)
    kernels.check_backend(self.backend)
    if self.qk_norm:
      self.gate.check_qk_norm()


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
    self.key = inward(named(key, 'key'), (width,), (G, K), axes=keys)
    self.value = inward(named(key, 'value'), (width,), (G, K), axes=keys)
    axes = ('heads', 'head_dim', 'embed')
    outward = functools.partial(dense, std=std_out, bias=cfg.out_bias)
    self.out = outward(named(key, 'out'), (H, K), (width,), axes=axes)
    norm = lambda: RMSNorm(K, axes=('head_dim',), numerics=numerics)
    self.query_norm = norm() if cfg.qk_norm else None
    self.key_norm = norm() if cfg.qk_norm else None
    heads = G if cfg.gate.position in ('key', 'value') else H
    make = functools.partial(gate.Gate, width=width, heads=heads, head_dim=K)
    gated = cfg.gate.position != 'none'
    key_gate = named(key, 'gate')
    self.gate = make(cfg.gate, key_gate, numerics=numerics) if gated else None

  def __call__(
    self, x_BTD: jax.Array, angle_BTk: jax.Array, segment_BT: jax.Array | None
  ) -> jax.Array:
    q_BTHK = self._normed('query', self.query(x_BTD), x_BTD, self.query_norm)
    k_BTGK = self._normed('key', self.key(x_BTD), x_BTD, self.key_norm)
    v_BTGK = self._gated('value', self.value(x_BTD), x_BTD)
    q_BTHK, k_BTGK = rope(q_BTHK, angle_BTk), rope(k_BTGK, angle_BTk)
    # Each device's queries meet the keys of the whole row.
    k_BTGK = mesh.constrain(k_BTGK, 'batch', None, 'kv_heads', None)
    v_BTGK = mesh.constrain(v_BTGK, 'batch', None, 'kv_heads', None)
    y_BTHK = kernels.attend(
      q_BTHK,
      k_BTGK,
      v_BTGK,
      segment_BT,
      backend=self.cfg.backend,
      max_segments=self.cfg.max_segments,
    )
    y_BTHK = self._gated('sdpa', y_BTHK, x_BTD)
    return self._gated('out', self.out(y_BTHK), x_BTD)

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
