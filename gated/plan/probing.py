"""The probes on a loaded model: rows of text -> one report.

R rows  B batch  T tokens  V vocabulary
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gated import data, model, probes
from gated.devices import mesh
from gated.probes import attention, force, gates
from gated.run import metrics

TOKENS = 8192  # Tokens per device in one batch, unless a single row has more.


def rows_of(ids: np.ndarray, *, length: int, limit: int) -> data.Batch:
  """Token ids -> rows of `length` tokens, the first `limit` of them (0: all).

  Each row is one document. Tokens that do not fill a last row are dropped; a text shorter
  than `length` is one row. The target of a row's last token is the next row's first; the
  last token of the text has none. ValueError for a text shorter than the probes need.
  """
  if len(ids) < attention.PREFIX:
    raise ValueError(
      f'a text of {len(ids)} tokens is too short: probes need at least {attention.PREFIX}'
    )
  length = min(length or len(ids), len(ids))
  rows = len(ids) // length
  cut = lambda x_N: x_N[: rows * length].reshape(rows, length)[: limit or None]
  tokens_RT, targets_RT = cut(ids), cut(np.append(ids[1:], ids[-1:]))
  weights_RT = cut(np.append(np.ones(len(ids) - 1, np.float32), np.float32(0)))
  index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_RT.shape)
  return data.Batch(tokens_RT, targets_RT, weights_RT, np.ones_like(tokens_RT), index)


def probe(
  loaded: Any, rows: data.Batch, *, mask_documents: bool | None
) -> dict[str, Any]:
  """A `Loaded` and rows (R, T) on the host -> the report.

  `mask_documents` replaces config.model.mask_documents; None keeps it.
  """
  net = _masked(loaded.model, mask_documents)
  class_V = jax.device_put(
    token_classes(loaded), jax.sharding.NamedSharding(loaded.mesh, jax.P())
  )
  measure = loaded.compiled(probes.measure)
  merged = probes.merge(
    [jax.device_get(measure(net, batch, class_V)) for batch in _batches(loaded, rows)]
  )
  weights = jax.device_get(loaded.compiled(probes.of_weights)(net))
  numbers = probes.summarize(net.cfg, merged, weights)
  largest = numbers['largest_key_weight']['largest']
  for place in (numbers['m_act_max'], largest or {}):
    if place:
      place['token'] = int(rows.tokens[place['row'], place['position']])
  report = {
    'step': loaded.step,
    'tokens': int(merged['size'].sum()),
    'rows': len(merged['size']),
    'row_length': rows.tokens.shape[1],
    'documents_masked': net.cfg.mask_documents,
    **numbers,
    'conventions': probes.CONVENTIONS,
  }
  return metrics.plain(report)


def loss(loaded: Any, rows: data.Batch, *, mask_documents: bool | None) -> float:
  """Rows (R, T) on the host -> their loss, in nats per target; as for `probe`."""
  net = _masked(loaded.model, mask_documents)
  sums = [loaded.row_losses(net, batch) for batch in _batches(loaded, rows)]
  nats, weight = np.sum([np.asarray(x, float).sum(1) for x in sums], 0)
  return float(nats / weight)


def mean_scores(loaded: Any, rows: data.Batch, position: str) -> np.ndarray:
  """Rows (R, T) on the host -> a gate's mean scores over tokens, (L, H, K)."""
  measure = loaded.compiled(functools.partial(gates.sums, position=position))
  sums = [
    jax.device_get(measure(loaded.model, batch)) for batch in _batches(loaded, rows)
  ]
  total, tokens = (np.sum(np.asarray(x, float), 0) for x in zip(*sums))
  return total / tokens


def forcing(loaded: Any, gates: str | float, layers: Any, mean: Any) -> Any:
  """-> a function that forces a model's gates; see `Loaded.force` and `force.arrays`."""
  replicated = jax.sharding.NamedSharding(loaded.mesh, jax.P())
  arrays = force.arrays(loaded.cfg, gates, layers, mean)
  chosen, forced = (jax.device_put(x, replicated) for x in arrays)
  own, *_ = force.check(loaded.cfg, gates, layers)
  return lambda net: force.force(net, own, chosen, forced)


def heldout_rows(corpus: data.Corpus, limit: int) -> data.Batch:
  """The first `limit` held-out rows of each domain, packed as in training."""
  parts = []
  for domain in corpus.domains:
    batches = corpus.heldout(domain, batch=limit, rows=range(limit), limit=limit)
    parts += [batch for batch, _ in batches]
  return data.Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _masked(net: model.Transformer, mask_documents: bool | None) -> model.Transformer:
  """The model with another `mask_documents`; None keeps its own."""
  if mask_documents is None or mask_documents == net.cfg.mask_documents:
    return net
  net = copy.copy(net)
  net.cfg = dataclasses.replace(net.cfg, mask_documents=mask_documents)
  return net


def _batches(loaded: Any, rows: data.Batch) -> Iterator[data.Batch]:
  """Rows (R, T) on the host -> placed batches of equal size, the last one padded."""
  count, length = rows.tokens.shape
  ways = mesh.ways('batch', loaded.mesh)
  size = ways * min(max(1, TOKENS // length), -(-count // ways))
  held = list(mesh.rows(loaded.mesh, size))
  for start in range(0, count, size):
    part = jax.tree.map(lambda x, i=start: _filled(x[i : i + size], size), rows)
    yield mesh.place(jax.tree.map(lambda x: x[held], part), loaded.mesh, size)


def _filled(x_RT: np.ndarray, rows: int) -> np.ndarray:
  """Appends rows of padding up to `rows` rows."""
  return np.pad(x_RT, ((0, rows - len(x_RT)), (0, 0)))


def token_classes(loaded: Any) -> np.ndarray:
  """The class of each token id, by its characters; 'other' without a tokenizer."""
  other = gates.CLASSES.index('other')
  class_V = np.full(loaded.cfg.vocab, other, np.int32)
  try:
    tokenizer = loaded.tokenizer
  except ValueError:
    return class_V
  tests = {'spaces': str.isspace, 'letters': str.isalpha, 'digits': str.isdigit}
  for token in range(min(tokenizer.vocab, loaded.cfg.vocab)):
    text = tokenizer.decode([token]).decode(errors='replace')
    for name, test in tests.items():
      if test(text) or test(text.strip()):
        class_V[token] = gates.CLASSES.index(name)
        break
  return class_V
