"""QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): a limit of attention logits.

After each update, a head whose largest logit S = q k / sqrt(K) in the step's batch was
above the limit tau has its weights scaled so that S would have been tau. With as many KV
heads as heads, the query's and the key's weights are both multiplied by sqrt(tau / S).
If several heads share a KV head, the key's weights do not change and the query's are
multiplied by tau / S, as for the shared key of K2. Biases are scaled like their weights.

The logits come from the step's own forward pass, over all visible pairs, before a soft
cap. This computes the products q k a second time.

L layers  H heads
"""

from typing import Any

import jax
import jax.numpy as jnp

from gated import kernels
from gated.model import decoder, stacks


def observed(block: decoder.Block, x_BTD, angle_BTk, segment_BT, live_BT):
  """Calls a block -> its output, and (the router's report, its largest logits (H,))."""
  inputs = jax.lax.stop_gradient(x_BTD)
  q_BTHK, k_BTGK = block.attn.query_and_key(block.attn_norm(inputs), angle_BTk)
  logit_H = kernels.largest_scores(
    q_BTHK, k_BTGK, segment_BT, live_BT, window=block.attn.window
  )
  y_BTD, report = block(x_BTD, angle_BTk, segment_BT, live_BT)
  return y_BTD, (report, jax.lax.stop_gradient(logit_H))


def clip(model: Any, logit_LH: jax.Array, tau: float) -> Any:
  """A model and its heads' largest logits -> the model with its query weights clipped."""
  # A non-finite logit gives no factor; its step is skipped anyway.
  factor_LH = jnp.where(logit_LH > tau, tau / logit_LH, 1.0)
  factor_LH = jnp.where(jnp.isfinite(logit_LH), factor_LH, 1.0)
  attn = model.blocks.attn
  alone = attn.cfg.heads == attn.cfg.kv_heads
  clipped = stacks.copied(model)
  for name in ('query', 'key') if alone else ('query',):
    part, like = getattr(clipped.blocks.attn, name), getattr(attn, name)
    factor = jnp.sqrt(factor_LH) if alone else factor_LH
    for field in ('weight', 'bias'):
      value = getattr(like, field)
      if value is not None:
        at = (len(factor), *(1,) * (value.ndim - 3), factor.shape[1], 1)
        scaled = value[...] * factor.reshape(at)
        setattr(part, field, value.replace(scaled.astype(value.dtype)))
  return clipped


def metrics(logit_LH: jax.Array, tau: float) -> dict[str, jax.Array]:
  """The largest logits -> the largest of all, and the share of clipped heads."""
  return {'qk_logit': logit_LH.max(), 'qk_clipped': jnp.mean(logit_LH > tau)}


def check(tau: float, cfg: decoder.Config) -> None:
  """Raises ValueError if the logits of a model do not follow the scale of its weights."""
  if tau and cfg.attn.qk_norm:
    raise ValueError(
      f'config.optim.qk_clip={tau} with config.model.attn.qk_norm=True, but QK-norm '
      'cancels the scale of the weights: allowed is qk_norm=False'
    )
  for name, gate in cfg.attn.named.items():
    if tau and gate.position in ('query', 'key') and gate.form != 'multiply':
      raise ValueError(
        f'config.optim.qk_clip={tau} with {cfg.attn.knob(name)}.form={gate.form!r} on '
        f'the {gate.position}, whose logits do not follow the weights; allowed is '
        "form='multiply'"
      )
