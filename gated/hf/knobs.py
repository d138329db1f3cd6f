"""model.Config -> config.json, and the tables that both directions go by.

A knob of ours that their architectures lack is refused by its name.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from gated import config, model

ARCHITECTURES = {
  'qwen3': 'Qwen3ForCausalLM',
  'qwen3_moe': 'Qwen3MoeForCausalLM',
  'qwen3_next': 'Qwen3NextForCausalLM',
}

# Keys that mean the same as one knob.
SAME = {
  'hidden_size': ('width', int),
  'initializer_range': ('numerics.init_std', float),
  'num_attention_heads': ('attn.heads', int),
  'num_hidden_layers': ('depth', int),
  'num_key_value_heads': ('attn.kv_heads', int),
  'rms_norm_eps': ('numerics.norm_eps', float),
  'tie_word_embeddings': ('tied', bool),
  'vocab_size': ('vocab', int),
}

# What all their architectures compute. Read, the knobs get these values; written, they
# must have them.
MEANT = {
  'norm': 'rms',
  'branch_norm': 'none',
  'branch_clip': 0.0,
  'logit_cap': 0.0,
  'attn.normalizer': 'softmax',
  'attn.sink_tokens': 0,
  'attn.logit_cap': 0.0,
  'attn.output': 'none',
  'attn.switch.where': 'none',
}
MEANT_BY_GATE = {
  'attn.gate.position': 'sdpa',
  'attn.gate.heads': 'specific',
  'attn.gate.form': 'multiply',
  'attn.gate.activation': 'sigmoid',
  'attn.gate.source': 'input',
}
MEANT_BY_EXPERTS = {'moe.shared': 0, 'moe.dispatch': 'dropless'}

# Keys without an effect on logits.
HARMLESS = (
  '_name_or_path',
  'architectures',
  'attention_dropout',
  'auto_map',
  'bos_token_id',
  'dtype',
  'eos_token_id',
  'id2label',
  'label2id',
  'max_position_embeddings',
  'output_router_logits',
  'pad_token_id',
  'pretraining_tp',
  'router_aux_loss_coef',
  'tokenizer_class',
  'torch_dtype',
  'transformers_version',
  'unsloth_version',
  'use_cache',
)


def write(
  cfg: model.Config, packing: str, dtype: str, also: Mapping[str, Any]
) -> tuple[dict[str, Any], int, bool]:
  """Our config -> (config.json, groups and centred of names.Layout).

  `also` are further keys. Raises ValueError that names each knob that they cannot say.
  """
  config.one_of('packing', packing, ('grouped', 'per_head'))
  gate, attn, experts = cfg.attn.gate, cfg.attn, cfg.moe.experts
  gated, next_ = gate.position != 'none', packing == 'per_head'
  meant = MEANT | (MEANT_BY_GATE if gated else {}) | (MEANT_BY_EXPERTS if experts else {})
  meant |= {'attn.out_bias': attn.bias}
  if next_:
    meant |= {'attn.gate.position': 'sdpa', 'attn.gate.granularity': 'elementwise'}
    meant |= {'moe.experts': 0}
  if next_ or not gated:
    meant |= {'attn.qk_norm': True}
  flat = config.flatten(dataclasses.asdict(cfg), 'config.model')
  told = [
    f'config.model.{knob}={flat[f"config.model.{knob}"]!r}, but there it is {value!r}'
    for knob, value in meant.items()
    if flat[f'config.model.{knob}'] != value
  ]
  if told:
    raise ValueError('Hugging Face has no such model: ' + '; '.join(told))
  kind = 'qwen3_next' if next_ else 'qwen3_moe' if experts else 'qwen3'
  out = {key: flat[f'config.model.{knob}'] for key, (knob, _) in SAME.items()}
  out |= _positions(cfg) | {
    'model_type': kind,
    'architectures': [ARCHITECTURES[kind]],
    'torch_dtype': dtype,
    'head_dim': attn.head_dim,
    'hidden_act': 'silu',
    'attention_bias': attn.bias,
    'attention_dropout': 0.0,
    'use_cache': True,
  }
  out |= _write_ffn(cfg, kind)
  if next_:
    out |= {'layer_types': ['full_attention'] * cfg.depth, 'partial_rotary_factor': 1.0}
  else:
    out |= {'use_sliding_window': False, 'sliding_window': None}
  if gated and not next_:
    out |= {'qkv_bias': attn.bias, 'use_qk_norm': attn.qk_norm}
    for granularity in ('headwise', 'elementwise'):
      out[f'{granularity}_attn_output_gate'] = gate.granularity == granularity
  _check_harmless(also)
  groups = (attn.heads if next_ else attn.kv_heads) if gated else 0
  return out | dict(also), groups, next_


def _check_harmless(keys: Collection[str]) -> None:
  for key in keys:
    config.one_of('a further key of config.json', key, HARMLESS)


def _positions(cfg: model.Config) -> dict[str, Any]:
  """RoPE as transformers 4 spells it, which 5 reads too."""
  yarn = cfg.attn.yarn
  base = {'rope_theta': cfg.attn.rope_base}
  if yarn.factor == 1:
    return base | {'rope_scaling': None, 'max_position_embeddings': 32768}
  scaling = {
    'rope_type': 'yarn',
    'factor': yarn.factor,
    'original_max_position_embeddings': yarn.original,
    'beta_fast': yarn.beta_fast,
    'beta_slow': yarn.beta_slow,
  }
  scaling |= {'attention_factor': yarn.attention} if yarn.attention else {}
  # Some of transformers 4 take the quotient of the two lengths for the factor.
  length = math.ceil(yarn.original * yarn.factor)
  return base | {'rope_scaling': scaling, 'max_position_embeddings': length}


def _write_ffn(cfg: model.Config, kind: str) -> dict[str, Any]:
  dense = {'intermediate_size': cfg.ffn}
  if kind == 'qwen3':
    return dense
  every = {
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'num_experts': cfg.moe.experts,
  }
  if not cfg.moe.experts:
    return dense | every
  return (
    dense
    | every
    | {
      'moe_intermediate_size': cfg.ffn,
      'num_experts_per_tok': cfg.moe.top_k,
      'norm_topk_prob': cfg.moe.norm_topk,
    }
  )
