"""gated: pretraining language models with gated attention (arXiv 2505.06708).

Arrays end in their logical dimensions, in capitals; every file uses this key.

  B batch      T tokens     S keys' tokens   D width      H query heads   G KV heads
  K head width F ffn width  E experts        V vocabulary L layers        N = B * T
"""
