"""model.Config -> config.json, and the tables shared by both directions.

A model that no architecture of Hugging Face can express raises ValueError with the knob's
name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gated import config, model

ARCHITECTURES = {
  'qwen3': 'Qwen3ForCausalLM',
  'qwen3_moe': 'Qwen3MoeForCausalLM',
  'qwen3_next': 'Qwen3NextForCausalLM',
}

# The code beside a model with a gate, and the class of transformers that opens it.
CODE, OPENER = 'modeling_gated', 'AutoModelForCausalLM'

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

# Knobs fixed in all these architectures. Reading sets the knobs to these values; writing
# requires them.
FIXED = {
  'norm': 'rms',
  'branch_norm': 'none',
  'branch_clip': 0.0,
  'logit_cap': 0.0,
  'attn.normalizer': 'softmax',
  'attn.sink_tokens': 0,
  'attn.logit_cap': 0.0,
  'attn.gates': '',
  'attn.differential': False,
  'attn.window': 0,
  'attn.output': 'none',
  'attn.value_scale': 'none',
  'attn.switch.where': 'none',
}
FIXED_BY_GATE = {
  'attn.gate.position': 'sdpa',
  'attn.gate.heads': 'specific',
  'attn.gate.form': 'multiply',
  'attn.gate.activation': 'sigmoid',
  'attn.gate.source': 'input',
  'attn.gate.inputs': 'all',
  'attn.gate.layers': 'all',
  'attn.gate.bias': False,
}
# Gates without a counterpart: activation -> (theirs, a factor of the output projection).
FOLDS = {'2sigmoid': ('sigmoid', 2)}
FIXED_BY_EXPERTS = {'moe.shared': 0, 'moe.dispatch': 'dropless'}
FIXED_BY_NEXT = {
  'attn.gate.position': 'sdpa',
  'attn.gate.granularity': 'elementwise',
  'moe.experts': 0,
  'attn.qk_norm': True,
}

# What Qwen3, or Qwen3-Next, has instead of a knob's other values, for messages.
LACKS = {
  'norm': 'has RMSNorm only',
  'branch_norm': 'has no norm on the output of a branch',
  'branch_clip': 'does not clip the output of a branch',
  'logit_cap': 'does not cap logits',
  'attn.normalizer': 'has a plain softmax',
  'attn.sink_tokens': 'has no learned keys and values',
  'attn.logit_cap': 'does not cap attention scores',
  'attn.gates': 'has one gate, on the SDPA output',
  'attn.differential': 'has no differential heads',
  'attn.window': 'is written without windows',
  'attn.output': "has no function of the heads' outputs",
  'attn.value_scale': 'does not scale its values',
  'attn.switch.where': 'has no experts in attention',
  'attn.qk_norm': 'has QK-norm unless it has a gate',
  'attn.gate.position': 'has its gate on the SDPA output',
  'attn.gate.heads': 'has a gate for each head',
  'attn.gate.form': 'multiplies by its gate',
  'attn.gate.activation': 'has a sigmoid gate (2sigmoid is written too)',
  'attn.gate.source': 'computes its gate from the input of the layer',
  'attn.gate.inputs': 'computes its gate from the whole input',
  'attn.gate.layers': 'has a gate in every layer',
  'attn.gate.bias': 'is written without a bias of the gate',
  'moe.shared': 'has no shared expert',
  'moe.dispatch': 'has experts that drop no token',
}
LACKS_OF_NEXT = {
  'attn.gate.position': 'has a gate in every layer, on the SDPA output',
  'attn.gate.granularity': 'has a gate for each channel',
  'moe.experts': 'has a shared expert with a gate of its own',
  'attn.qk_norm': 'has QK-norm',
}
# Knobs that training can leave out: the weights fit without them.
DROPPED = 'branch_clip', 'logit_cap', 'attn.logit_cap', 'attn.window', 'moe.dispatch'

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
  """Our config -> (config.json, `groups` and `centred` of names.table).

  `also` holds further keys. ValueError names each knob that config.json cannot express.
  """
  config.one_of('packing', packing, ('grouped', 'per_head'))
  for key in also:
    config.one_of('a further key of config.json', key, HARMLESS)
  gate, attn, experts = cfg.attn.gate, cfg.attn, cfg.moe.experts
  gated, next_ = gate.position != 'none', packing == 'per_head'
  required = FIXED | (FIXED_BY_GATE if gated else {})
  required |= (FIXED_BY_EXPERTS if experts else {}) | (FIXED_BY_NEXT if next_ else {})
  if gate.activation in FOLDS:
    required.pop('attn.gate.activation', None)
  if not gated:
    required |= {'attn.qk_norm': True}
  flat = config.flatten(dataclasses.asdict(cfg), 'config.model')
  _refuse(
    {k: v for k, v in required.items() if flat[f'config.model.{k}'] != v}, flat, next_
  )
  kind = 'qwen3_next' if next_ else 'qwen3_moe' if experts else 'qwen3'
  out = {key: flat[f'config.model.{knob}'] for key, (knob, _) in SAME.items()}
  out |= _positions(cfg) | {
    'model_type': kind,
    'architectures': [ARCHITECTURES[kind]],
    'torch_dtype': dtype,
    'head_dim': attn.head_dim,
    'hidden_act': 'silu',
    'attention_bias': attn.bias or attn.out_bias,
    'attention_dropout': 0.0,
    # The cache of Qwen3-Next in transformers 4 needs a layer of linear attention.
    'use_cache': not next_,
  }
  out |= _write_ffn(cfg, kind)
  if next_:
    out |= {'layer_types': ['full_attention'] * cfg.depth, 'partial_rotary_factor': 1.0}
  else:
    out |= {'use_sliding_window': False, 'sliding_window': None}
  if gated and not next_:
    out |= {'qkv_bias': out['attention_bias'], 'use_qk_norm': attn.qk_norm}
    for granularity in ('headwise', 'elementwise'):
      out[f'{granularity}_attn_output_gate'] = gate.granularity == granularity
    name = f'Gated{ARCHITECTURES[kind]}'
    out |= {'architectures': [name], 'auto_map': {OPENER: f'{CODE}.{name}'}}
  groups = (attn.heads if next_ else attn.kv_heads) if gated else 0
  return out | dict(also), groups, next_


def _refuse(lacking: Mapping[str, Any], flat: Mapping[str, Any], next_: bool) -> None:
  """ValueError says for each knob what the format lacks, and what can be done.

  `lacking` has the value that the format allows of each knob, `flat` ours of all.
  """
  if not lacking:
    return
  name, faults = 'Qwen3-Next' if next_ else 'Qwen3', []
  for short, value in lacking.items():
    knob = f'config.model.{short}'
    lack = LACKS_OF_NEXT.get(short) if next_ else None
    text = f'{knob}={flat[knob]!r}, but {name} {lack or LACKS[short]}'
    if lack:
      text += '; --packing=grouped may write it'
    elif short in DROPPED:
      text += (
        f'; train without it from these weights (--config.init_from=RUN --{knob}={value} '
        f'--allow_change={knob})'
      )
    faults.append(text)
  raise ValueError(
    f'Hugging Face format: {". ".join(faults)}. gated.load and eval.py open it as it is'
  )


def folded(cfg: model.Config, leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Our leaves by name -> those of a model that they can write.

  A factor of the gate goes to the output projection; it is a power of two, so the logits
  do not change in any bit. Biases that only some projections have are zero in the others.
  """
  attn, leaves = cfg.attn, dict(leaves)
  if attn.gate.position != 'none' and attn.gate.activation in FOLDS:
    name, factor = 'blocks.attn.out.weight', FOLDS[attn.gate.activation][1]
    leaves[name] = leaves[name] * factor
  if attn.bias != attn.out_bias:
    keys, width = (cfg.depth, attn.kv_heads, attn.head_dim), (cfg.depth, cfg.width)
    shapes = {'query': (cfg.depth, attn.heads, attn.head_dim), 'key': keys, 'value': keys}
    for part, shape in ({'out': width} if attn.bias else shapes).items():
      leaves[f'blocks.attn.{part}.bias'] = np.zeros(shape, np.float32)
  return leaves


def code(content: Mapping[str, Any]) -> str:
  """config.json -> the name of the file of code that opens the model; '' for none."""
  return f'{CODE}.py' if OPENER in content.get('auto_map', {}) else ''


def _positions(cfg: model.Config) -> dict[str, Any]:
  """RoPE in the format of transformers 4, which 5 reads too."""
  yarn = cfg.attn.yarn
  base = {'rope_theta': cfg.attn.rope_base}
  if yarn.factor == 1 and yarn.scale == 1:
    return base | {'rope_scaling': None, 'max_position_embeddings': 32768}
  scaling = {
    'rope_type': 'yarn',
    'factor': yarn.factor,
    'original_max_position_embeddings': yarn.original,
    'beta_fast': yarn.beta_fast,
    'beta_slow': yarn.beta_slow,
  }
  named = {
    'attention_factor': yarn.attention,
    'mscale': yarn.mscale,
    'mscale_all_dim': yarn.mscale_all_dim,
  }
  scaling |= {key: value for key, value in named.items() if value}
  scaling |= {} if yarn.truncate else {'truncate': False}
  # Some versions of transformers 4 compute the factor from these two lengths.
  length = math.ceil(yarn.original * yarn.factor)
  return base | {'rope_scaling': scaling, 'max_position_embeddings': length}


def _write_ffn(cfg: model.Config, kind: str) -> dict[str, Any]:
  keys: dict[str, Any] = {'intermediate_size': cfg.ffn}
  if kind != 'qwen3':
    experts = cfg.moe.experts
    keys |= {'decoder_sparse_step': 1, 'mlp_only_layers': [], 'num_experts': experts}
  if cfg.moe.experts:
    keys |= {
      'moe_intermediate_size': cfg.ffn,
      'num_experts_per_tok': cfg.moe.top_k,
      'norm_topk_prob': cfg.moe.norm_topk,
    }
  return keys
