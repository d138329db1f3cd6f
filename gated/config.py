"""Plain mappings -> the frozen dataclasses that each module defines, with checks.

A knob has one full name everywhere: `config.` and its path through the mapping, such as
`config.model.attn.gate.position`.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

C = TypeVar('C')

# Knobs that were added later -> their values in recipes that were written before. Saved
# runs without these knobs open with these values, and keep their default workdir.
SINCE: dict[str, Any] = {
  'config.model_from': '',
  'config.model.norm_alpha': [1.0, 1.0],
  'config.model.numerics.matmul': 'compute',
  'config.model.attn.clip_gamma': -0.03,
  'config.model.attn.clip_zeta': 1.0,
  'config.model.attn.elastic_tau': -1.0,
  'config.model.attn.differential': False,
  'config.model.attn.window': 0,
  'config.model.attn.global_layers': '',
  'config.model.attn.normalizer_layers': '',
  'config.model.attn.value_scale': 'none',
  'config.model.attn.rounding': 'backend',
  'config.model.attn.mean_segments': 0.0,
  'config.model.attn.yarn.truncate': True,
  'config.model.attn.yarn.mscale': 0.0,
  'config.model.attn.yarn.mscale_all_dim': 0.0,
  'config.optim.qk_clip': 0.0,
  'config.optim.moments': 'float32',
  'config.optim.factored': False,
  'config.optim.transfer': 'none',
  'config.optim.base_width': 256,
  'config.optim.base_head_dim': 0,
  'config.model.attn.gates': '',
  'config.model.attn.gate.inputs': 'all',
  'config.model.attn.gate.bias': False,
  'config.model.attn.gate.bias_init': 0.0,
  'config.model.attn.gate.weight_decay': -1.0,
  'config.model.attn.gate.score': 'float32',
  'config.model.attn.gate.opens': [0, 0],
  'config.model.attn.gate.layers': 'all',
  'config.optim.gates_first': 0,
}


def build(cls: type[C], mapping: Mapping, name: str) -> C:
  """A mapping -> the frozen dataclass `cls`, nested ones included.

  `name` is the mapping's full name, such as 'config.model'. ValueError names a knob that
  is unknown, missing or of the wrong type.
  """
  hints = _hints(cls)
  for key in mapping:
    if key not in hints:
      raise ValueError(
        f'{name}.{key} is not a knob{nearest(f"{name}.{key}", hints, name)}'
      )
  mapping = _since(name, hints) | dict(mapping)
  missing = [key for key in hints if key not in mapping]
  if missing:
    raise ValueError(f'{name}.{missing[0]} is missing')
  fields = {key: coerce(hints[key], mapping[key], f'{name}.{key}') for key in hints}
  return cls(**fields)


def _since(name: str, keys: Iterable[str]) -> dict[str, Any]:
  """A group and its knobs -> the values in SINCE of those that were added later."""
  return {key: SINCE[f'{name}.{key}'] for key in keys if f'{name}.{key}' in SINCE}


def earlier(mapping: Mapping, name: str = 'config') -> dict[str, Any]:
  """A nested mapping -> the same without the later knobs that are as they were before."""
  kept = {}
  for key, value in mapping.items():
    knob = f'{name}.{key}'
    if isinstance(value, Mapping):
      value = earlier(value, knob)
    plain = list(value) if isinstance(value, tuple) else value
    if knob not in SINCE or SINCE[knob] != plain:
      kept[key] = value
  return kept


_hints = functools.cache(typing.get_type_hints)


# The usual names of our knobs elsewhere, for suggestions.
USUAL = {
  'seed': 'random_seed rng_seed',
  'steps': 'max_steps num_steps total_steps train_steps num_train_steps max_iters',
  'batch': 'batch_size global_batch_size train_batch_size',
  'accum': 'grad_accum accum_steps grad_accum_steps gradient_accumulation_steps',
  'init_from': 'resume_from pretrained checkpoint_path load_from init_checkpoint',
  'model.vocab': 'vocab_size n_vocab padded_vocab_size',
  'model.width': 'hidden_size d_model n_embd embed_dim hidden_dim model_dim emb_dim dim',
  'model.depth': 'num_layers n_layers n_layer num_hidden_layers',
  'model.ffn': 'intermediate_size d_ff ffn_dim mlp_dim ffn_hidden_size',
  'model.tied': 'tie_embeddings tie_word_embeddings',
  'model.remat': 'gradient_checkpointing activation_checkpointing remat_policy',
  'model.numerics.compute': 'dtype compute_dtype precision',
  'model.numerics.matmul': 'fp8 use_fp8 quantization matmul_precision',
  'model.numerics.weights': 'param_dtype weight_dtype',
  'model.numerics.init_std': 'initializer_range std_init',
  'model.numerics.norm_eps': 'rms_norm_eps layer_norm_eps',
  'model.attn.heads': 'n_heads n_head num_heads num_attention_heads',
  'model.attn.kv_heads': 'n_kv_heads num_kv_heads num_key_value_heads num_query_groups',
  'model.attn.head_dim': 'd_head head_size kv_channels',
  'model.attn.rope_base': 'rope_theta rotary_base',
  'model.attn.gate.position': 'gate_position gate_type use_gate',
  'model.moe.experts': 'num_experts n_experts n_routed_experts',
  'model.moe.top_k': 'num_experts_per_tok experts_per_token moe_top_k',
  'model.moe.shared': 'n_shared_experts num_shared_experts',
  'loss.z': 'z_loss z_loss_weight',
  'loss.balance': 'aux_loss_coef router_aux_loss_coef load_balance_loss_weight',
  'optim.name': 'optimizer',
  'optim.lr': 'learning_rate base_lr max_lr peak_lr',
  'optim.floor': 'min_lr lr_min end_lr final_lr min_learning_rate',
  'optim.schedule': 'scheduler lr_scheduler lr_schedule lr_scheduler_type',
  'optim.warmup': 'warmup_steps warmup_iters num_warmup_steps lr_warmup_steps',
  'optim.b1': 'beta1 adam_beta1 adam_b1',
  'optim.b2': 'beta2 adam_beta2 adam_b2',
  'optim.eps': 'epsilon adam_eps adam_epsilon',
  'optim.weight_decay': 'wd weightdecay',
  'optim.clip': 'grad_clip gradient_clip clip_grad max_grad_norm gradient_clip_val',
  'data.mixture': 'dataset dataset_name dataset_path data_path data_dir train_data',
  'data.length': 'seq_len seq_length sequence_length max_seq_len block_size',
  'data.workers': 'num_workers dataloader_num_workers',
  'mesh.data': 'dp data_parallel data_parallel_size',
  'mesh.tensor': 'tp tensor_parallel tensor_parallel_size tensor_model_parallel_size',
  'mesh.context': 'cp context_parallel context_parallel_size',
  'mesh.expert': 'ep expert_parallel expert_parallel_size expert_model_parallel_size',
  'eval.every': 'eval_every eval_interval eval_steps',
  'checkpoint.every': 'save_every save_interval save_steps checkpoint_every',
  'log.every': 'log_every log_interval logging_steps',
  'log.wandb': 'wandb_project use_wandb',
}
ALIASES = {a: f'config.{knob}' for knob, names in USUAL.items() for a in names.split()}


def nearest(knob: str, known: Iterable[str], prefix: str = '') -> str:
  """A mistyped knob, the known ones -> '; did you mean ...?', or those of its group."""
  names = [f'{prefix}.{key}' if prefix else key for key in known]
  if match := namesake(knob, names):
    return f'; did you mean {match}?'
  group, _, last = knob.rpartition('.')
  # Prefer a close match in the same group to one with a similar long path.
  siblings = members(group, names)
  close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
  if close:
    return f'; did you mean {siblings[close[0]]}?'
  close = [] if prefix else difflib.get_close_matches(knob, names, n=1, cutoff=0.8)
  if close:
    return f'; did you mean {close[0]}?'
  while group and not siblings:
    group = group.rpartition('.')[0]
    siblings = members(group, names)
  return f'; known are {", ".join(siblings.values())}'


def namesake(knob: str, known: Iterable[str]) -> str:
  """A knob in the wrong group, or by its usual name -> the known one; '' without one."""
  names = list(known)
  last = knob.rpartition('.')[2].replace('-', '_').lower()
  usual = ALIASES.get(last, '')
  if usual and (usual in names or knob.startswith('config.')):
    return usual
  groups = {name[: dot.start()] for name in names for dot in re.finditer(r'\.', name)}
  same = [name for name in (*names, *sorted(groups)) if name.endswith(f'.{last}')]
  likeness = lambda name: difflib.SequenceMatcher(None, knob, name).ratio()
  return max(same, key=likeness, default='')


def members(group: str, known: Iterable[str]) -> dict[str, str]:
  """A group and full names -> its members: {'gate': 'config.model.attn.gate'}."""
  prefix = f'{group}.' if group else ''
  inside = (name.removeprefix(prefix) for name in known if name.startswith(prefix))
  return {rest.partition('.')[0]: prefix + rest.partition('.')[0] for rest in inside}


def plain(error: Exception) -> str:
  """An error's message in one line, without the traceback that ml_collections adds."""
  message = str(error)
  if 'Traceback' in message:
    message = message.split('Error: ')[-1]
  return ' '.join(message.split())


def coerce(hint: Any, value: Any, name: str) -> Any:
  """A value -> the same, of the type `hint`; ValueError with the knob's name.

  An integer becomes a float; a float must be finite; a mapping becomes a dataclass.
  """
  if type(value) is hint and hint is not float:
    return value  # A fast path, for files with many entries.
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ValueError(f'{name}={value!r}, but a group of knobs is expected')
    return build(typing.cast(type, hint), value, name)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if typing.get_origin(hint) is dict:
    if not isinstance(value, Mapping):
      raise ValueError(f'{name}={value!r}, but a group of knobs is expected')
    element = typing.get_args(hint)[1]
    return {k: coerce(element, v, f'{name}.{k}') for k, v in value.items()}
  if isinstance(hint, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ValueError(f'{name}={value!r}, but a tuple is expected')
    element = typing.get_args(hint)[0]
    return tuple(coerce(element, v, f'{name}[{i}]') for i, v in enumerate(value))
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ValueError(f'{name}={value!r}, but a {hint.__name__} is expected')
  if hint is float and not math.isfinite(value):
    raise ValueError(f'{name}={value!r}, but a finite number is expected')
  return value


def one_of(name: str, value: Any, allowed: Iterable) -> None:
  """Raises ValueError, naming the knob, unless `value` is one of `allowed`."""
  if value not in allowed:
    raise ValueError(f'{name}={value!r}, but allowed are {", ".join(map(repr, allowed))}')


def at_least(name: str, value: float, low: float) -> None:
  """Raises ValueError, naming the knob, unless `value >= low`."""
  if not value >= low:
    raise ValueError(f'{name}={value!r}, but it must be at least {low}')


def positive(name: str, value: float) -> None:
  """Raises ValueError, naming the knob, unless `value > 0`."""
  if not value > 0:
    raise ValueError(f'{name}={value!r}, but it must be positive')


def within(name: str, value: float, low: float, high: float) -> None:
  """Raises ValueError, naming the knob, unless `low <= value <= high`."""
  at_least(name, value, low)
  if value > high:
    raise ValueError(f'{name}={value!r}, but {high} is the most')


_PATTERNS = {
  'every': lambda n, depth: range(n - 1, depth, n),
  'first': lambda n, depth: range(n),
  'last': lambda n, depth: range(depth - n, depth),
}
_SPAN = r'\d{1,9}(-\d{1,9})?'
_LAYERS = re.compile(
  rf'all|(?P<word>every|first|last):(?P<n>\d{{1,9}})|{_SPAN}(,{_SPAN})*', re.ASCII
)


def layers(name: str, text: str, depth: int) -> tuple[int, ...]:
  """A pattern over the layers of a model -> their numbers, from 0.

  'all'; 'every:4', each 4th layer (3, 7, ...); 'first:2'; 'last:2'; or a list such as
  '0,5-7'. ValueError names the knob if it is none of these or does not fit the depth.
  """
  match = _LAYERS.fullmatch(text)
  if not match:
    raise ValueError(
      f"{name}={text!r}, but layers are expected: 'all', 'every:K', 'first:K', 'last:K' "
      "or a list such as '0,5-7'"
    )
  if text == 'all':
    return tuple(range(depth))
  if match['word']:
    within(f'{name}={text!r}: the number', int(match['n']), 1, depth)
    return tuple(_PATTERNS[match['word']](int(match['n']), depth))
  spans = [[int(end) for end in part.split('-')] for part in text.split(',')]
  if any(span[0] > span[-1] or span[-1] >= depth for span in spans):
    raise ValueError(
      f'{name}={text!r}, but the model has the layers 0 to {depth - 1}, and a range '
      'ascends'
    )
  return tuple(sorted({i for span in spans for i in range(span[0], span[-1] + 1)}))


def nests(value: Any, levels: int) -> bool:
  """Whether lists and mappings are nested deeper than `levels`."""
  if not isinstance(value, (list, dict)):
    return False
  inner = value.values() if isinstance(value, dict) else value
  return levels == 0 or any(nests(item, levels - 1) for item in inner)


def divides(name: str, value: int, by: str, divisor: int) -> None:
  """Raises ValueError, naming both knobs, unless `divisor` divides `value`."""
  if divisor < 1 or value % divisor:
    raise ValueError(f'{name}={value} must be a multiple of {by}={divisor}')


def flatten(mapping: Mapping, name: str = 'config') -> dict[str, Any]:
  """A nested mapping -> {full knob name: value}."""
  flat = {}
  for key, value in mapping.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{name}.{key}')
    else:
      flat[f'{name}.{key}'] = list(value) if isinstance(value, tuple) else value
  return flat


def dig(mapping: Mapping, knob: str) -> Any:
  """A recipe and a knob without 'config.' -> the value; ValueError if it is missing.

  A knob that was added later has its value in SINCE.
  """
  value: Any = mapping
  for key in knob.split('.'):
    if not isinstance(value, Mapping) or key not in value:
      if f'config.{knob}' in SINCE:
        return SINCE[f'config.{knob}']
      raise ValueError(f'{knob} is missing')
    value = value[key]
  return value


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
  """Two nested mappings -> {full knob name: (old value, new value)} where they differ.

  A knob that one of them lacks because it was added later has its value in SINCE.
  """
  a, b = flatten(old), flatten(new)
  since = {knob: SINCE[knob] for knob in (a.keys() ^ b.keys()) & SINCE.keys()}
  a, b = since | a, since | b
  return {
    knob: (a.get(knob), b.get(knob))
    for knob in sorted(a.keys() | b.keys())
    if knob not in a or knob not in b or a[knob] != b[knob]
  }


def digest(obj: Any) -> str:
  """A JSON-serializable value -> the SHA-256 of its canonical form, in hexadecimal."""
  text = json.dumps(obj, sort_keys=True, separators=(',', ':'), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()
