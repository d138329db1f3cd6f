"""Qwen3 and Qwen3-MoE with gated attention (arXiv 2505.06708), for transformers.

scripts/convert_hf.py copies this file beside the weights; it needs nothing else of gated:

  AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The SDPA output of each query head is multiplied by the sigmoid of its gate, one for the
head or one for each channel. The gates are rows of q_proj, which has a block of rows for
each KV head: its queries, then their gates.
"""

import torch
import transformers
from torch import nn


class Queries(nn.Linear):
  """q_proj: hidden states -> queries; keeps the scores of the gates for `Output`."""

  def __init__(self, config):
    each = config.head_dim if config.elementwise_attn_output_gate else 1
    heads = config.num_attention_heads // config.num_key_value_heads
    self.block = [heads * config.head_dim, heads * each]
    rows = config.num_key_value_heads * sum(self.block)
    super().__init__(config.hidden_size, rows, bias=config.attention_bias)
    self.score = None

  def forward(self, x):
    blocks = super().forward(x).unflatten(-1, (-1, sum(self.block)))
    query, gate = blocks.split(self.block, -1)
    self.score = torch.sigmoid(gate.float()).flatten(-2)
    return query.flatten(-2)


class Output(nn.Linear):
  """o_proj: SDPA output -> gated, and projected."""

  def __init__(self, config, queries):
    width = config.num_attention_heads * config.head_dim
    super().__init__(width, config.hidden_size, bias=config.attention_bias)
    self.head_dim = config.head_dim
    self.queries = (queries,)  # In a tuple, so that it is no submodule.

  def forward(self, y):
    [queries] = self.queries
    heads = y.unflatten(-1, (-1, self.head_dim))
    score = queries.score.unflatten(-1, (heads.shape[-2], -1))
    queries.score = None
    return super().forward((heads.float() * score).flatten(-2).to(y.dtype))


def add_gates(model):
  """Replaces the projections of all layers, before the weights are read."""
  config = model.config
  for layer in model.model.layers:
    attn = layer.self_attn
    attn.q_proj = Queries(config)
    attn.o_proj = Output(config, attn.q_proj)
    if not config.use_qk_norm:
      attn.q_norm, attn.k_norm = nn.Identity(), nn.Identity()
  model.post_init()


class GatedQwen3ForCausalLM(transformers.Qwen3ForCausalLM):
  def __init__(self, config):
    super().__init__(config)
    add_gates(self)


class GatedQwen3MoeForCausalLM(transformers.Qwen3MoeForCausalLM):
  def __init__(self, config):
    super().__init__(config)
    add_gates(self)
