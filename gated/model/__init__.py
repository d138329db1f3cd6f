"""THE PAPER: gated attention, its layers, and the decoder that is made of them."""

from gated.model.decoder import (
  LIMITS,
  REMAT,
  Block,
  BlockTrace,
  Config,
  Transformer,
  abstract,
  count,
  flops_per_token,
  parts,
  unstack,
)

__all__ = [
  'LIMITS',
  'REMAT',
  'Block',
  'BlockTrace',
  'Config',
  'Transformer',
  'abstract',
  'count',
  'flops_per_token',
  'parts',
  'unstack',
]
