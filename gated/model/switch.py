"""SwitchHead: experts for values, or for keys and values (arXiv 2312.07987; Table 6).

B batch  T tokens  D width  G KV heads  K head width  E experts
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gated import config
from gated.model.layers import LARGEST, Dense, Numerics, child_key


@dataclass(frozen=True, kw_only=True)
class Config:
  """Experts for values, or for keys and values."""

  where: str  # none, value, key_value
  experts: int  # E projections of each KV head
  top_k: int  # projections per token, weighted by their sigmoid scores

  def __post_init__(self):
    name = 'config.model.attn.switch'
    config.one_of(f'{name}.where', self.where, ('none', 'value', 'key_value'))
    config.within(f'{name}.experts', self.experts, 1, LARGEST)
    config.at_least(f'{name}.top_k', self.top_k, 1)
    if self.top_k > self.experts:
      raise ValueError(
        f'{name}.top_k={self.top_k}, but there are {name}.experts={self.experts}'
      )


class Switched(nnx.Module):
  """E projections of each KV head; each token mixes its top k: x_BTD -> BTGK.

    sum over the top k of sigmoid(x r_e) * (x W_e)

  All projections are computed, because they are few and small; the others have weight 0.
  With one expert this equals a headwise sigmoid gate after the projection, G2 or G3.
  """

  def __init__(
    self,
    cfg: Config,
    key: jax.Array,
    *,
    width: int,
    kv_heads: int,
    head_dim: int,
    bias: bool,
    numerics: Numerics,
  ):
    self.top_k = cfg.top_k
    E, G, K = cfg.experts, kv_heads, head_dim
    dense = functools.partial(Dense, std=numerics.init_std, numerics=numerics)
    axes = ('embed', 'kv_heads', None, 'head_dim')
    project, router = child_key(key, 'project'), child_key(key, 'router')
    self.project = dense(project, (width,), (G, E, K), axes=axes, bias=bias)
    shape = dict(axes=axes[:3], bias=False, numerics=numerics.plain())
    self.router = dense(router, (width,), (G, E), **shape)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    score_BTGE = jax.nn.sigmoid(self.router(x_BTD).astype(jnp.float32))
    choice_BTGk = jax.lax.top_k(score_BTGE, self.top_k)[1]
    weight_BTGE = score_BTGE * jax.nn.one_hot(choice_BTGk, score_BTGE.shape[-1]).sum(-2)
    y_BTGEK = self.project(x_BTD)
    mixed = jnp.einsum('btgek,btge->btgk', y_BTGEK, weight_BTGE.astype(y_BTGEK.dtype))
    return mixed.astype(x_BTD.dtype)
