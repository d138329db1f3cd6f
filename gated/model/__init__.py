"""THE PAPER: gated attention, its layers, and the decoder that is made of them."""

from gated.model.counting import attention_flops, count, flops_per_token, parts
from gated.model.decoder import (
  LIMITS,
  REMAT,
  Block,
  BlockTrace,
  Config,
  Transformer,
  abstract,
)
from gated.model.layers import exact
from gated.model.stacks import unstack

__all__ = [
  'LIMITS',
  'REMAT',
  'Block',
  'BlockTrace',
  'Config',
  'Transformer',
  'abstract',
  'attention_flops',
  'count',
  'exact',
  'flops_per_token',
  'parts',
  'unstack',
]
