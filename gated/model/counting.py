"""FLOPs of attention: the keys that a query sees, by layer."""

from typing import Any


def attention_flops(cfg: Any, length: int) -> float:
  """A decoder.Config -> FLOPs of a token's products with keys and values, forward.

  Rows are one document. The values of a differential head are twice as wide.
  """

  def keys(window: int) -> float:
    """The mean number of keys per query."""
    seen = min(window or length, length)
    return seen - seen * (seen - 1) / (2 * length) + cfg.attn.sink_tokens

  windowed = len(cfg.windowed)
  pairs = (cfg.depth - windowed) * keys(0) + windowed * keys(cfg.attn.window)
  products = 6 if cfg.attn.differential else 4
  return float(products * cfg.attn.heads * cfg.attn.head_dim * pairs)
