"""config.json -> model.Config.

Unknown keys raise ValueError, because they may change what the model computes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util

from gated import config, model
from gated.hf.knobs import FIXED, FIXED_BY_EXPERTS, FIXED_BY_GATE, HARMLESS, SAME

# model_type -> the defaults of transformers for keys missing in config.json.
_COMMON = {
  'attention_bias': False,
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'max_position_embeddings': 32768,
  'max_window_layers': 28,
  'partial_rotary_factor': 1.0,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'tie_word_embeddings': False,
  'use_qk_norm': True,
  'use_sliding_window': False,
}
_SPARSE = _COMMON | {'decoder_sparse_step': 1, 'mlp_only_layers': []}
ASSUMED = {
  'qwen3': _COMMON | {'head_dim': 128},
  'qwen3_moe': _SPARSE | {'norm_topk_prob': False},
  'qwen3_next': _SPARSE
  | {'head_dim': 256, 'norm_topk_prob': True, 'partial_rotary_factor': 0.25},
}

# Knobs without a key in config.json and with no effect on logits but rounding: execution,
# initialization, and details of features that are off in FIXED.
WITHOUT_KEY = FIXED_BY_GATE | {
  'mask_documents': True,
  'layers': 'scan',
  'remat': 'none',
  'norm_rank': 16,
  'numerics.residual_init': 'plain',
  'numerics.matmul': 'compute',
  'attn.sink_values': 'learned',
  'attn.switch.experts': 1,
  'attn.switch.top_k': 1,
  'attn.backend': 'auto',
  'attn.max_segments': 16,
  'attn.mean_segments': 0.0,
  'attn.yarn.original': 4096,
  'attn.yarn.beta_fast': 32.0,
  'attn.yarn.beta_slow': 1.0,
  'attn.yarn.truncate': True,
  'attn.yarn.attention': 0.0,
  'attn.yarn.mscale': 0.0,
  'attn.yarn.mscale_all_dim': 0.0,
  'attn.gate.granularity': 'elementwise',
  'attn.gate.mean': 'after',
  'attn.gate.init': 'normal',
  'attn.gate.std': 0.02,
  'attn.gate.lr': 1.0,
  'attn.gate.place': 'before',
  'moe.top_k': 1,
  'moe.norm_topk': True,
  'moe.shared': 0,
  'moe.dispatch': 'dropless',
  'moe.capacity': 1.25,
  'moe.backend': 'auto',
}

MAX_WHOLE = 2**62  # Array dims are smaller.


class Meaning(NamedTuple):
  """A parsed config.json; `groups` and `centred` as in names.table."""

  cfg: model.Config
  groups: int
  centred: bool


class _Keys:
  """The keys of a config.json; `end` raises ValueError for unread ones."""

  def __init__(self, content: Mapping[str, Any]):
    self.left = dict(content)
    self.kind = self.left.pop('model_type', None)
    config.one_of('model_type', self.kind, list(ASSUMED))

  def take(self, key: str, of: type) -> Any:
    """A key's value or default; ValueError if it has neither."""
    value = self.maybe(key, of)
    if value is None and key not in ASSUMED[self.kind]:
      raise ValueError(f'{key} is missing')
    return ASSUMED[self.kind][key] if value is None else value

  def maybe(self, key: str, of: type) -> Any:
    """A key's value; None if it is missing or null."""
    value = self.left.pop(key, None)
    return None if value is None else _typed(key, value, of)

  def require(self, key: str, allowed: Any) -> None:
    """Raises ValueError unless the key's value or default is `allowed`."""
    value = self.take(key, type(allowed))
    if value != allowed:
      raise ValueError(f'{key}={value!r}, but only {allowed!r} is implemented')

  def drop(self, *keys: str) -> None:
    """Ignores keys that have no effect in this config."""
    for key in keys:
      self.left.pop(key, None)

  def end(self) -> None:
    """Raises ValueError for unread keys.

    HARMLESS keys pass; unknown keys pass if their value is null, false, [] or {}. Unknown
    keys with a number never pass: 0 may be a scale.
    """
    off = lambda v: v is None or v is False or v == [] or v == {}
    left = {k: v for k, v in self.left.items() if k not in HARMLESS and not off(v)}
    if left:
      keys = ', '.join(f'{k}={v!r}' for k, v in sorted(left.items()))
      raise ValueError(f'{keys}: not known, so it may change what the model computes')


def _typed(key: str, value: Any, of: type) -> Any:
  if isinstance(value, int) and abs(value) > MAX_WHOLE:
    raise ValueError(f'{key} is a number of {len(str(value))} digits')
  return config.coerce(of, value, key)


def read(content: Mapping[str, Any], base: Mapping[str, Any]) -> Meaning:
  """A config.json, and defaults for knobs without a key -> Meaning.

  `base` is nested, and holds at least numerics.weights and numerics.compute. ValueError
  names the unsupported key.
  """
  keys = _Keys(content)
  knobs = {knob: keys.take(key, of) for key, (knob, of) in SAME.items()}
  knobs |= FIXED | _head(keys, knobs) | _rope(keys) | _ffn(keys)
  packing, gate = _gate(keys)
  keys.require('hidden_act', 'silu')
  _check_full_attention(keys, knobs['depth'])
  keys.end()
  flat = {k.removeprefix('model.'): v for k, v in config.flatten(base, 'model').items()}
  nested = traverse_util.unflatten_dict(WITHOUT_KEY | flat | knobs | gate, sep='.')
  cfg = config.build(model.Config, nested, 'config.model')
  groups = {'none': 0, 'grouped': cfg.attn.kv_heads, 'per_head': cfg.attn.heads}
  return Meaning(cfg, groups[packing], keys.kind == 'qwen3_next')


def _head(keys: _Keys, knobs: Mapping[str, Any]) -> dict[str, Any]:
  width, heads = knobs['width'], knobs['attn.heads']
  if keys.kind == 'qwen3_moe':
    head_dim = keys.maybe('head_dim', int) or width // max(heads, 1)
  else:
    head_dim = keys.take('head_dim', int)
  # In the authors' code, qkv_bias overrides attention_bias.
  bias = keys.take('attention_bias', bool)
  override = keys.maybe('qkv_bias', bool)
  bias = bias if override is None else override
  qk_norm = keys.take('use_qk_norm', bool)
  return {
    'attn.head_dim': head_dim,
    'attn.bias': bias,
    'attn.out_bias': bias,
    'attn.qk_norm': qk_norm,
  }


def _rope(keys: _Keys) -> dict[str, Any]:
  """RoPE from rope_scaling (transformers 4) or rope_parameters (5, with the base)."""
  scaling = keys.maybe('rope_scaling', dict)
  parameters = keys.maybe('rope_parameters', dict)
  left = dict(scaling or parameters or {})
  base = keys.take('rope_theta', float)
  part = keys.take('partial_rotary_factor', float)
  length = keys.maybe('original_max_position_embeddings', int)
  if length is None:
    length = keys.take('max_position_embeddings', int)

  def take(key, of, default):
    value = left.pop(key, None)
    return default if value is None else _typed(f'rope_parameters.{key}', value, of)

  kind = take('rope_type', str, left.pop('type', None) or 'default')
  base, part = take('rope_theta', float, base), take('partial_rotary_factor', float, part)
  if part != 1:
    raise ValueError(f'partial_rotary_factor={part}, but only 1.0 is implemented')
  knobs = {'attn.rope_base': base, 'attn.yarn.factor': 1.0}
  config.one_of('rope_parameters.rope_type', kind, ('default', 'yarn'))
  if kind == 'yarn':
    knobs |= _yarn(take, length)
  unknown = [f'rope_parameters.{k}={v!r}' for k, v in left.items() if v is not None]
  if unknown:
    raise ValueError(f'{", ".join(sorted(unknown))}: unknown for rope_type={kind!r}')
  return knobs


def _yarn(take, length: int) -> dict[str, Any]:
  """The knobs of YaRN; `length` is the default of the original context, in tokens."""
  original = take('original_max_position_embeddings', int, length)
  for tokens in (original, length):
    if tokens < 1:
      raise ValueError(
        f'original_max_position_embeddings={tokens} (default: max_position_embeddings) '
        'must be at least 1'
      )
  factor = take('factor', float, length / original)
  if factor < 1:
    raise ValueError(f'rope_parameters.factor={factor}, but at least 1 is expected')
  attention = take('attention_factor', float, None)
  if attention is not None and attention <= 0:
    raise ValueError(f'rope_parameters.attention_factor={attention} must be positive')
  return {
    'attn.yarn.factor': factor,
    'attn.yarn.original': original,
    'attn.yarn.beta_fast': take('beta_fast', float, 0.0) or 32.0,
    'attn.yarn.beta_slow': take('beta_slow', float, 0.0) or 1.0,
    'attn.yarn.truncate': take('truncate', bool, True),
    'attn.yarn.attention': attention or 0.0,
    'attn.yarn.mscale': take('mscale', float, 0.0),
    'attn.yarn.mscale_all_dim': take('mscale_all_dim', float, 0.0),
  }


def _ffn(keys: _Keys) -> dict[str, Any]:
  """A dense FFN, or experts, in every layer."""
  sparse = ('decoder_sparse_step', 'mlp_only_layers', 'moe_intermediate_size')
  sparse += ('norm_topk_prob', 'num_experts_per_tok')
  if keys.kind == 'qwen3_next':  # Keys of linear attention, which no layer has.
    dims = ('conv_kernel_dim', 'key_head_dim', 'value_head_dim')
    keys.drop(*(f'linear_{d}' for d in (*dims, 'num_key_heads', 'num_value_heads')))
  experts = 0
  if keys.kind != 'qwen3':
    old, new = keys.maybe('num_local_experts', int), keys.maybe('num_experts', int)
    experts = old if new is None else new
    if experts is None:
      raise ValueError('num_experts is missing')
    if old not in (None, experts):
      raise ValueError(f'num_local_experts={old}, but num_experts={new}')
  if not experts:
    keys.drop(*sparse, 'shared_expert_intermediate_size')
    return {'ffn': keys.take('intermediate_size', int), 'moe.experts': 0, 'moe.shared': 0}
  if keys.kind == 'qwen3_next':
    raise ValueError(
      f'num_experts={experts} with model_type={keys.kind!r}: the gate of its shared '
      'expert, shared_expert_gate, is not implemented'
    )
  keys.require('decoder_sparse_step', 1)
  keys.require('mlp_only_layers', [])
  keys.drop('intermediate_size')  # For dense layers only.
  return {
    'ffn': keys.take('moe_intermediate_size', int),
    'moe.experts': experts,
    'moe.top_k': keys.take('num_experts_per_tok', int),
    'moe.norm_topk': keys.take('norm_topk_prob', bool),
  } | FIXED_BY_EXPERTS


# Keys that switch a gate on -> (its granularity, its packing in q_proj).
_GATES = {
  'headwise_attn_output_gate': ('headwise', 'grouped'),
  'elementwise_attn_output_gate': ('elementwise', 'grouped'),
  'attn_output_gate': ('elementwise', 'per_head'),
}


def _gate(keys: _Keys) -> tuple[str, dict[str, Any]]:
  """-> (packing of the gate in q_proj, its knobs)."""
  on = {flag: keys.maybe(flag, bool) for flag in _GATES}
  if keys.kind == 'qwen3_next':
    if on['attn_output_gate'] is False:
      raise ValueError("attn_output_gate=False, but model_type='qwen3_next' has a gate")
    on['attn_output_gate'] = True
  chosen = [flag for flag in _GATES if on[flag]]
  if len(chosen) > 1:
    raise ValueError(f'{chosen[0]} and {chosen[1]} are both on, but only one is allowed')
  if not chosen:
    return 'none', {'attn.gate.position': 'none'}
  granularity, packing = _GATES[chosen[0]]
  return packing, FIXED_BY_GATE | {'attn.gate.granularity': granularity}


def _check_full_attention(keys: _Keys, depth: int) -> None:
  """Raises ValueError for layers with linear attention or a sliding window."""
  types = keys.maybe('layer_types', list)
  interval = keys.maybe('full_attention_interval', int)
  sliding = keys.take('use_sliding_window', bool)
  window = keys.left.pop('sliding_window', None)
  below = keys.take('max_window_layers', int)
  if types is not None:
    if len(types) != depth or any(kind != 'full_attention' for kind in types):
      raise ValueError(
        f"layer_types={types!r}, but each of {depth} layers must be 'full_attention'"
      )
  elif keys.kind == 'qwen3_next' and interval != 1:
    raise ValueError(
      'layer_types is missing: by default, Qwen3-Next has layers of linear attention'
    )
  slides = keys.kind != 'qwen3' or (types is None and below < depth)
  if sliding and window is not None and slides:
    raise ValueError(
      f'use_sliding_window=True, sliding_window={window!r}: not implemented'
    )
