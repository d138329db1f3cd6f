"""Measures of a model -> the numbers of a report, and scalars for the log.

L layers  R rows  H heads
"""

from typing import Any

import numpy as np

from gated import model
from gated.probes import activations, attention, conventions, gates, outputs
from gated.probes.measure import merge

# Numbers that are logged while training.
SCALARS = (
  'first_token_attention',
  'first_token_attention_from_64',
  'first_token_attention_documents',
  'first_token_attention_documents_from_64',
  'first_token_uniform_documents',
  'sink_rate_64',
  'sink_rate',
  'largest_key_weight',
  'attention_entropy',
  'attention_logit_max',
  'sink_mass',
  'm_act',
  'm_act_max',
  'm_act_median',
  'kurtosis',
  'gate_mean',
  'gate_std',
  'gate_below_0.1',
  'output_mean',
  'output_below_1e-2',
)


def scalars(cfg: model.Config, measures: dict[str, Any]) -> dict[str, float]:
  """The result of `watch`, on the host -> those of SCALARS that the model has."""
  merged = merge([measures])
  numbers = _attention(merged, cfg) | _activations(merged) | _outputs(merged, cfg)
  numbers |= _gates(merged, cfg, next(iter(cfg.attn.named), ''))
  values = {name: numbers[name]['value'] for name in SCALARS}
  return {name: float(value) for name, value in values.items() if value is not None}


def summarize(
  cfg: model.Config, measures: dict[str, Any], weights: dict[str, Any]
) -> dict[str, Any]:
  """Merged measures and `of_weights` -> {name: {'value': of the model, 'layers': [L]}}.

  A number that the model does not have is None.
  """
  numbers = _attention(measures, cfg) | _activations(measures) | _outputs(measures, cfg)
  numbers |= _output_ranks(measures)
  each = {
    name: _gates(measures, cfg, name) | _gate_weights(weights, cfg, name)
    for name in cfg.attn.named or ('',)
  }
  first, *further = each
  numbers |= each[first]
  numbers['gates'] = {cfg.attn.named[name].position: each[name] for name in further}
  ranks = None
  if weights['value'] is not None:
    ranks = outputs.ranks_of_maps(weights['value'], weights['out'])
  for i, name in enumerate(('rank_value_output_stable', 'rank_value_output')):
    numbers[name] = _mean(None if ranks is None else ranks[i].mean(-1))
    numbers[name]['heads'] = None if ranks is None else ranks[i]
  return numbers


def _mean(of_layer_L: Any, **more: Any) -> dict[str, Any]:
  """A value for each layer -> {'value': their mean, 'layers': the values}."""
  value = None if of_layer_L is None else np.mean(of_layer_L, 0)
  return {'value': value, 'layers': of_layer_L} | more


def _largest(of_layer_L: np.ndarray, **more: Any) -> dict[str, Any]:
  return {'value': np.max(of_layer_L), 'layers': of_layer_L} | more


def _ratio(sum_: np.ndarray, count: Any) -> np.ndarray:
  """A quotient; NaN where the count is 0."""
  count = np.asarray(count, np.float64)
  return np.asarray(sum_, np.float64) / np.where(count > 0, count, np.nan)


def _attention(measures: dict[str, Any], cfg: model.Config) -> dict[str, Any]:
  rows = {
    k: np.asarray(v, np.float64)
    for k, v in measures['rows'].items()
    if k not in activations.POINTS
  }
  numbers: dict[str, Any] = {}
  for prefix, suffix in (('', ''), ('documents_', '_documents')):
    queries_L1n = rows[prefix + 'queries'].sum(1)
    by_head = _ratio(rows[prefix.strip('_') or 'first'].sum(1), queries_L1n[:, None])
    uniform = _ratio(rows[prefix + 'uniform'].sum(1), queries_L1n)
    for i, which in enumerate(conventions.QUERIES):
      name = f'first_token_attention{suffix}{which}'
      heads_LH = by_head[..., i]
      numbers[name] = _mean(heads_LH.mean(-1), heads=heads_LH)
      numbers[f'first_token_uniform{suffix}{which}'] = _mean(uniform[:, i])
  first_L = numbers['first_token_attention']['layers']
  numbers['first_token_jump'] = _jump(np.diff(first_L))
  long_R = measures['size'] >= attention.PREFIX
  for name, key, counted in (
    ('sink_rate_64', 'sink_prefix', long_R),
    ('sink_rate', 'sink_row', np.ones_like(long_R)),
  ):
    rates_Lk = rows[key][:, counted].mean((1, 2)) if counted.any() else None
    numbers[name] = _mean(None if rates_Lk is None else rates_Lk[:, 0], keys=rates_Lk)
  numbers['largest_key_weight'] = _largest_key(rows)
  queries = measures['size'].sum() * cfg.attn.heads
  for name, key in (
    ('attention_entropy', 'entropy'),
    ('attention_mass', 'mass'),
    ('sink_mass', 'sink_mass'),
  ):
    heads_LH = rows[key].sum(1) / measures['size'].sum()
    numbers[name] = _mean(rows[key].sum((1, 2)) / queries, heads=heads_LH)
  numbers['attention_logit_max'] = _largest(measures['logit'])
  return numbers


def _jump(change_l: np.ndarray) -> dict[str, Any]:
  """Changes from each layer to the next -> the largest and the layer after it."""
  layers = np.concatenate([[np.nan], change_l])
  if not len(change_l):
    return {'value': None, 'layers': layers, 'layer': None}
  largest = int(change_l.argmax()) + 1
  return {'value': layers[largest], 'layers': layers, 'layer': largest}


def _largest_key(rows: dict[str, np.ndarray]) -> dict[str, Any]:
  counted_R = rows['key_counts'][0] > 0
  if not counted_R.any():
    return _mean(None, largest=None)
  mean_LRH = np.where(counted_R[None, :, None], rows['key_mean'], -1)
  layer, row, head = np.unravel_index(mean_LRH.argmax(), mean_LRH.shape)
  largest = {
    'value': mean_LRH[layer, row, head],
    'layer': int(layer),
    'row': int(row),
    'head': int(head),
    'position': int(rows['key_index'][layer, row, head]),
  }
  return _mean(rows['key_mean'][:, counted_R].mean((1, 2)), largest=largest)


def _activations(measures: dict[str, Any]) -> dict[str, Any]:
  tokens = measures['size'].sum()
  points = {}
  for point in activations.POINTS:
    rows = measures['rows'][point]
    points[point] = {
      'max': _mean(rows['top'][:, :, 0].max(1)),
      'top3': _mean(np.asarray(rows['top'], np.float64).mean(1)),
      'median': _mean(np.asarray(rows['median'], np.float64).mean(1)),
      'kurtosis': _mean(np.asarray(rows['kurtosis'], np.float64).sum(1) / tokens),
    }
  output = measures['rows']['output']
  largest_L = output['top'][:, :, 0].max(1)
  layer = int(largest_L.argmax())
  row = int(output['top'][layer, :, 0].argmax())
  place = {'layer': layer, 'row': row, 'position': int(output['token'][layer, row])}
  place['channel'] = int(output['channel'][layer, row])
  own = points['output']
  return {
    'm_act': own['max'],
    'm_act_max': _largest(largest_L, **place),
    'm_act_top3': own['top3'],
    'm_act_median': own['median'],
    'kurtosis': own['kurtosis'],
    'm_act_jump': _jump(largest_L[1:] / largest_L[:-1]),
    'points': points,
  }


def _outputs(measures: dict[str, Any], cfg: model.Config) -> dict[str, Any]:
  sums, tokens = measures['sums'], measures['size'].sum()
  attn = cfg.attn
  count = tokens * attn.heads * attn.head_dim
  numbers = {}
  for name, suffix in (('after', ''), ('before', '_before'), ('scaled', '_scaled')):
    sizes = sums[name]
    heads_LH = sizes['sum'] / (tokens * attn.head_dim)
    if name != 'scaled':
      numbers['output_mean' + suffix] = _mean(heads_LH.mean(-1), heads=heads_LH)
    for i, limit in enumerate(outputs.SMALL):
      key = f'output_below_1e-{round(-np.log10(limit))}{suffix}'
      numbers[key] = _mean(sizes['small'][:, i] / count)
  documents = sums['documents']
  for name, tokens_L in (('first', documents), ('other', tokens - documents)):
    norm_LG = _ratio(sums[f'value_{name}'], tokens_L[:, None])
    numbers[f'value_norm_{name}'] = _mean(norm_LG.mean(-1), heads=norm_LG)
  return numbers


def _output_ranks(measures: dict[str, Any]) -> dict[str, Any]:
  numbers = {}
  for name in ('before', 'after'):
    stable_LH, effective_LH = outputs.ranks_of_grams(measures['sums'][f'gram_{name}'])
    numbers[f'output_rank_{name}'] = _mean(
      effective_LH.mean(-1), heads=effective_LH, stable=stable_LH
    )
  return numbers


def _gates(measures: dict[str, Any], cfg: model.Config, gate: str) -> dict[str, Any]:
  """The numbers of the gate with this name; all are None for ''."""
  names = [name for name in conventions.CONVENTIONS if name.startswith('gate_')]
  if not gate:
    return {name: _mean(None) for name in names}
  sums = measures['sums'][gate]
  tokens = measures['size'].sum()
  total_L = sums['histogram'].sum(-1)
  mean_L = sums['sum'].sum(-1) / total_L
  sum_LR, square_LR = (
    np.asarray(measures['rows'][f'{gate}.{k}'], np.float64)
    for k in ('row_sum', 'row_square')
  )
  count_LR = (total_L[:, None] // tokens) * measures['size'][None]
  apart_LR = count_LR * np.square(sum_LR / count_LR - mean_L[:, None])
  variance_L = (square_LR + apart_LR).sum(-1) / total_L
  by_head = sums['sum'] / (total_L / sums['sum'].shape[1])[:, None]
  per_token = total_L[:1] // tokens
  numbers = {
    'gate_mean': _mean(mean_L),
    # Over all layers together, like the mean.
    'gate_std': {
      'value': np.sqrt(np.mean(variance_L + mean_L**2) - mean_L.mean() ** 2),
      'layers': np.sqrt(variance_L),
    },
    'gate_histogram': {
      'value': sums['histogram'].sum(0),
      'layers': sums['histogram'],
      'edges': gates.edges(cfg.attn.named[gate].activation),
    },
    'gate_heads': _mean(by_head),
  }
  for i, limit in enumerate(gates.BELOW):
    numbers[f'gate_below_{limit:g}'] = _mean(sums['below'][:, i] / total_L)
  classes_LC = _ratio(sums['class_sum'], sums['class_count'] * per_token)
  other_L = (sums['sum'].sum(-1) - sums['class_sum'][:, -1]) / np.maximum(
    total_L - sums['class_count'][:, -1] * per_token, 1
  )
  numbers['gate_classes'] = {
    name: _mean(classes_LC[:, i]) for i, name in enumerate(gates.CLASSES)
  } | {'elsewhere': _mean(other_L)}
  return _spread(numbers, cfg.gated[gate], cfg.depth)


def _spread(numbers: dict[str, Any], layers: tuple[int, ...], depth: int) -> Any:
  """Numbers of the layers with a gate -> of all layers, NaN in those without it."""

  def spread(x):
    whole = np.full((depth, *np.shape(x)[1:]), np.nan)
    whole[list(layers)] = x
    return whole

  def of_number(number):
    if 'layers' not in number:
      return {name: of_number(part) for name, part in number.items()}
    by_layer = ('layers', 'heads') if np.ndim(number.get('heads')) == 2 else ('layers',)
    return number | {k: spread(number[k]) for k in by_layer}

  return numbers if len(layers) == depth else of_number(numbers)


def _gate_weights(
  weights: dict[str, Any], cfg: model.Config, gate: str
) -> dict[str, Any]:
  if not gate:
    return {name: _mean(None) for name in ('gate_weight_norm', 'gate_vocabulary')}
  norms = {'gate_weight_norm': _mean(weights['gate_norms'][gate])}
  norms, score_VH = _spread(norms, cfg.gated[gate], cfg.depth), weights['gate_vocabulary']
  if score_VH[gate] is None:
    return norms | {'gate_vocabulary': _mean(None)}
  score_VH = score_VH[gate]
  return norms | {
    'gate_vocabulary': {
      'value': score_VH.mean(),
      'layers': None,
      'heads': score_VH.mean(0),
      'below': {f'{limit:g}': np.mean(score_VH < limit) for limit in gates.BELOW},
      'open': int((score_VH >= gates.OPEN).any(1).sum()),
      'tokens': len(score_VH),
    },
  }


def of_weights(net: model.Transformer) -> dict[str, Any]:
  """The inputs of `summarize` from the weights; they include layer 0's gate scores."""
  attn, named = net.blocks.attn, net.cfg.attn.named
  switched = net.cfg.attn.switch.where != 'none'
  return {
    'value': None if switched else attn.value.weight[...],
    'out': None if switched else attn.out.weight[...],
    'gate_norms': {name: gates.weight_norms(net, name) for name in named},
    'gate_vocabulary': {name: gates.vocabulary(net, name) for name in named},
  }
