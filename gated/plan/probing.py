"""The probes on a loaded model: rows of text -> one report.

R rows  B batch  T tokens  V vocabulary
"""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np

from gated import data, probes, storage
from gated.devices import mesh
from gated.probes import attention, force, gates, page
from gated.run import metrics

TOKENS = 8192  # Tokens per device in one batch, unless a single row has more.


def rows_of(ids: np.ndarray, *, length: int, limit: int) -> data.Batch:
  """Token ids -> rows of `length` tokens, the first `limit` of them (0: all).

  Each row is one document. Tokens that do not fill a last row are dropped; a text shorter
  than `length` is one row. ValueError for a text shorter than the probes need.
  """
  if len(ids) < attention.PREFIX:
    raise ValueError(
      f'a text of {len(ids)} tokens is too short: probes need at least {attention.PREFIX}'
    )
  length = min(length or len(ids), len(ids))
  rows = len(ids) // length
  tokens_RT = ids[: rows * length].reshape(rows, length)[: limit or None]
  whole = np.ones_like(tokens_RT)
  index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_RT.shape)
  return data.Batch(tokens_RT, tokens_RT, whole.astype(np.float32), whole, index)


def probe(
  loaded: Any, rows: data.Batch, *, mask_documents: bool | None
) -> dict[str, Any]:
  """A `Loaded` and rows (R, T) on the host -> the report.

  `mask_documents` replaces config.model.mask_documents; None keeps it.
  """
  net = loaded.model
  if mask_documents is not None and mask_documents != net.cfg.mask_documents:
    net = copy.copy(net)
    net.cfg = dataclasses.replace(net.cfg, mask_documents=mask_documents)
  class_V = jax.device_put(
    token_classes(loaded), jax.sharding.NamedSharding(loaded.mesh, jax.P())
  )
  count, length = rows.tokens.shape
  ways = mesh.ways('batch', loaded.mesh)
  size = ways * min(max(1, TOKENS // length), -(-count // ways))
  measure = loaded.compiled(probes.measure)
  parts = []
  for start in range(0, count, size):
    part = jax.tree.map(lambda x, i=start: _filled(x[i : i + size], size), rows)
    held = list(mesh.rows(loaded.mesh, size))
    local = jax.tree.map(lambda x, held=held: x[held], part)
    batch = mesh.place(local, loaded.mesh, size)
    parts.append(jax.device_get(measure(net, batch, class_V)))
  merged = probes.merge(parts)
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
    'row_length': length,
    'documents_masked': net.cfg.mask_documents,
    **numbers,
    'conventions': probes.CONVENTIONS,
  }
  return metrics.plain(report)


def forcing(loaded: Any, gates: str | float, layers: Any, score: Any) -> Any:
  """-> a function that forces a model's gates; see `Loaded.force` and `force.arrays`."""
  replicated = jax.sharding.NamedSharding(loaded.mesh, jax.P())
  arrays = force.arrays(loaded.cfg, gates, layers, score)
  chosen, forced = (jax.device_put(x, replicated) for x in arrays)
  return lambda net: force.force(net, chosen, forced)


def heldout_rows(corpus: data.Corpus, limit: int) -> data.Batch:
  """The first `limit` held-out rows of each domain, packed as in training."""
  parts = []
  for domain in corpus.domains:
    batches = corpus.heldout(domain, batch=limit, rows=range(limit), limit=limit)
    parts += [batch for batch, _ in batches]
  return data.Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))


def drawing(loaded: Any) -> Any:
  """-> the modules figures and style; ValueError without matplotlib or a workdir."""
  if not loaded.about:
    raise ValueError(f'figures are drawn into a workdir, but {loaded.path} is not one')
  try:
    from gated.probes import figures, style
  except ImportError as error:
    raise ValueError(f"figures need {error.name}: pip install 'gated[report]'") from error
  return figures, style


def draw(loaded: Any, report: dict[str, Any], ids: np.ndarray) -> None:
  """Draws a report, and maps and gates of a text -> WORKDIR/probes/STEP-*.

  Attention maps show the authors' prompt, and the first ids: at most a row of the report,
  and at most `attention.LONGEST`.
  """
  figures, style = drawing(loaded)
  label = loaded.path.name
  reports, ids = {label: report}, ids[: min(report['row_length'], attention.LONGEST)]
  pictures = {'sinks': figures.sinks(reports), 'sparsity': figures.sparsity(reports)}
  tokens = texts_of(loaded, ids)
  pictures['attention-long'] = figures.attention({label: loaded.attention(ids)}, tokens)
  try:
    prompt = loaded.tokenizer.encode(figures.PROMPT)[0]
  except ValueError:
    prompt = ids[:16]  # There is no tokenizer.
  weight, words = loaded.attention(prompt), texts_of(loaded, prompt)
  pictures['attention'] = figures.attention({label: weight}, words)
  pictures['attention-heads'] = figures.attention_heads(weight, words)
  gate = loaded.cfg.attn.gate
  html = ''
  if gate.position != 'none':
    pictures['gates'] = figures.gates(reports)
    pictures['gates-by-layer'] = figures.gates_by_layer(reports)
    title = f'{label}, step {loaded.step}: gate scores'
    limits = gates.score_range(gate.activation)
    html = page.page(loaded.gates(ids), tokens, title=title, limits=limits)
  if jax.process_index() == 0:
    folder = loaded.path / 'probes'
    for name, figure in pictures.items():
      style.save(figure, folder, f'{loaded.step}-{name}', ('svg', 'png'))
    if html:
      storage.write(folder / f'{loaded.step}-gates.html', html.encode())


def longest_document(rows: data.Batch) -> np.ndarray:
  """The longest document of the first packed row -> its token ids."""
  segment_T = rows.segments[0]
  counts = np.bincount(segment_T)
  counts[0] = 0  # Padding.
  return rows.tokens[0][segment_T == counts.argmax()]


def texts_of(loaded: Any, ids: np.ndarray) -> list[str]:
  """The text of each token; its id without a tokenizer."""
  try:
    decode = loaded.tokenizer.decode
  except ValueError:
    return [f'[{i}]' for i in ids]
  return [decode([i]).decode(errors='replace') for i in ids]


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
