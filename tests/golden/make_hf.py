"""Makes tests/golden/hf_*: tiny models written by transformers, and their logits.

  python -m venv hf-env && hf-env/bin/pip install torch transformers safetensors
  hf-env/bin/python tests/golden/make_hf.py

Made with torch 2.13.0 (CPU) and transformers 5.23.0. Only the
authors' gates are added to its models; all run in float32. Weights come from numpy, with
a seed from the tensor's name. Tests need neither package.
"""

import itertools
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent
TINY = dict(
  vocab_size=40,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  intermediate_size=24,
)
SPARSE = TINY | dict(moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
YARN = dict(
  rope_type='yarn',
  rope_theta=100.0,
  factor=4.0,
  original_max_position_embeddings=16,
  beta_fast=4.0,
  beta_slow=0.5,
)
# Changes of it, whose logits are in hf_yarn.npz.
FORMS = (
  {},
  dict(attention_factor=1.3),
  dict(truncate=False),
  dict(mscale=1.5, mscale_all_dim=0.5),
)
LAST = 8  # Tokens of those logits.
NEXT = dict(num_experts=0, layer_types=['full_attention'] * 2, partial_rotary_factor=1.0)

ELEMENTWISE = dict(elementwise_attn_output_gate=True, headwise_attn_output_gate=False)
HEADWISE = dict(elementwise_attn_output_gate=False, headwise_attn_output_gate=True)
# Flags in the config.json of the authors.
AUTHORS = dict(qkv_bias=False, use_qk_norm=True)


class Widened(torch.nn.Linear):
  """q_proj with the rows of a gate: for each KV head, its queries, then their gates."""

  def forward(self, x):
    blocks = super().forward(x).unflatten(-1, (TINY['num_key_value_heads'], -1))
    queries = (
      TINY['num_attention_heads'] // TINY['num_key_value_heads'] * TINY['head_dim']
    )
    q, gate = blocks.split([queries, blocks.shape[-1] - queries], -1)
    self.score = torch.sigmoid(gate.flatten(-2))
    return q.flatten(-2)


class Gated(torch.nn.Linear):
  """o_proj after the gate."""

  def forward(self, y):
    heads = y.unflatten(-1, (TINY['num_attention_heads'], -1))
    score = self.widened[0].score.unflatten(-1, (TINY['num_attention_heads'], -1))
    return super().forward((heads * score).flatten(-2))


class Authors(hf.Qwen3ForCausalLM):
  """Qwen3 with the gate of arXiv 2505.06708, G1, in the layout of its authors."""

  def __init__(self, config):
    super().__init__(config)
    each = 1 if config.headwise_attn_output_gate else config.head_dim
    rows = config.num_attention_heads * (config.head_dim + each)
    for layer in self.model.layers:
      attn = layer.self_attn
      attn.q_proj = Widened(config.hidden_size, rows, bias=False)
      attn.o_proj = Gated(attn.o_proj.in_features, config.hidden_size, bias=False)
      attn.o_proj.widened = [attn.q_proj]  # In a list, so that it is no submodule.


# Name: (class, its config, dtype of the files, options of save_pretrained).
MODELS = {
  'qwen3': (hf.Qwen3ForCausalLM, hf.Qwen3Config(**TINY), torch.float32, {}),
  'qwen3_yarn': (
    hf.Qwen3ForCausalLM,
    hf.Qwen3Config(
      **TINY | dict(head_dim=16),
      tie_word_embeddings=True,
      attention_bias=True,
      max_position_embeddings=64,
      rope_parameters=YARN,
    ),
    torch.bfloat16,
    {},
  ),
  'qwen3_moe': (
    hf.Qwen3MoeForCausalLM,
    hf.Qwen3MoeConfig(**SPARSE, norm_topk_prob=True),
    torch.float32,
    dict(max_shard_size='16KB'),
  ),
  'qwen3_moe_fused': (
    hf.Qwen3MoeForCausalLM,
    hf.Qwen3MoeConfig(**SPARSE, norm_topk_prob=False),
    torch.float32,
    dict(save_original_format=False),
  ),
  'qwen3_next': (
    hf.Qwen3NextForCausalLM,
    hf.Qwen3NextConfig(**TINY, **NEXT),
    torch.float32,
    {},
  ),
  'authors_elementwise': (
    Authors,
    hf.Qwen3Config(**TINY, **AUTHORS, **ELEMENTWISE),
    torch.float32,
    {},
  ),
  'authors_headwise': (
    Authors,
    hf.Qwen3Config(**TINY, **AUTHORS, **HEADWISE),
    torch.float32,
    {},
  ),
}


def fill(model, dtype: torch.dtype) -> None:
  """Draws every weight, to what `dtype` can hold."""
  for name, weight in model.named_parameters():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = torch.from_numpy(0.3 * rng.normal(size=weight.shape))
    norm = name.endswith('norm.weight') and model.config.model_type != 'qwen3_next'
    weight.data.copy_((value + norm).to(dtype))


def main() -> None:
  tokens = np.random.default_rng(0).integers(0, TINY['vocab_size'], (1, 48))
  found = {'tokens': tokens.astype(np.int32)}
  for name, (cls, config, dtype, options) in MODELS.items():
    config._attn_implementation = 'eager'
    model = cls(config).eval()
    fill(model, dtype)
    with torch.no_grad():
      found[name] = model(torch.from_numpy(tokens)).logits.numpy()
    shutil.rmtree(HERE / f'hf_{name}', ignore_errors=True)
    model.to(dtype).save_pretrained(HERE / f'hf_{name}', **options)
  np.savez_compressed(HERE / 'hf_logits.npz', **found)
  yarn(torch.from_numpy(tokens))


def yarn(tokens: torch.Tensor) -> None:
  """The logits of qwen3_yarn with each factor and form of YaRN, by their changes."""
  cls, config, dtype, _ = MODELS['qwen3_yarn']
  changes = [
    dict(factor=f) | form for f, form in itertools.product((2.0, 4.0, 8.0), FORMS)
  ]
  found = {}
  for change in [*changes, dict(factor=1.0, attention_factor=1.3)]:
    config.rope_parameters = YARN | change
    model = cls(config).eval()
    fill(model, dtype)
    with torch.no_grad():
      found[json.dumps(change)] = model(tokens).logits[0, -LAST:].numpy()
  np.savez_compressed(HERE / 'hf_yarn.npz', **found)


if __name__ == '__main__':
  main()
