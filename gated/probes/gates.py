"""Gate scores: what each gate multiplies (or adds), by layer, head and token.

B batch  T tokens  L layers  H heads  K head width
"""

from typing import Any

import jax
import jax.numpy as jnp

from gated import model


def scores(net: model.Transformer, batch: Any) -> jax.Array:
  """A model and a batch (B, T) -> its gates' scores in float32.

  The shape is (L, B, T, H) for a headwise gate and (L, B, T, H, K) for an elementwise
  one. H is 1 if the heads share their score, and (H, K) is (1, D) at position 'out'.
  ValueError for a model without a gate.
  """
  gate = net.cfg.attn.gate
  if gate.position == 'none':
    raise ValueError("the model has no gate: config.model.attn.gate.position='none'")
  _, score = net.hidden(batch.tokens, batch.segments, batch.positions, through=_layer)
  if score.ndim == 4:  # Position 'out': no heads.
    score = score[..., None, :]
  return score[..., 0] if gate.granularity == 'headwise' else score


def _layer(block: model.Block, x_BTD, *rest) -> tuple[jax.Array, jax.Array]:
  """A call of a block -> (what it returns, its gate's score)."""
  attn, h_BTD = block.attn, block.attn_norm(x_BTD)
  assert attn.gate is not None
  from_value = attn.gate.cfg.source == 'value'
  score = attn.gate.score(attn.value(h_BTD) if from_value else h_BTD)
  # A score that is a parameter has no batch and no tokens of its own.
  score = jnp.broadcast_to(score, (*x_BTD.shape[:2], *score.shape[2:]))
  return block(x_BTD, *rest)[0], score
