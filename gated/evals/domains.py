"""Perplexity by domain: documents of named files, read by sliding windows.

A window reads up to `length` tokens of one document; the next one starts `stride` tokens
later. A target counts in the first window that predicts it, so each counts once, and all
but those of a first window follow at least length - stride tokens. The targets are the
text's tokens; the first one has no loss unless a beginning-of-text token precedes it, and
the end of text is not predicted.

D documents  B windows of a batch  T tokens of a window
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gated import data, model
from gated.data import pieces, sources
from gated.data.tokenizer import Tokenizer
from gated.devices import mesh
from gated.evals.heldout import summarize
from gated.evals.positions import Curve

SHORTEST = 16  # Tokens of a row.
# Loss of the 500th token of a context minus that of the 50th (arXiv 2209.11895).
EARLY, LATE = 50, 500


class Domain(NamedTuple):
  """The documents of a domain that have a target."""

  name: str
  ids: list[np.ndarray]
  bytes: list[int]  # of the text of each document's targets


class Window(NamedTuple):
  """The tokens [start, stop) of a document predict the next ones, from `first` + 1 on."""

  domain: int
  document: int
  start: int
  stop: int
  first: int


def windows(targets: int, *, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
  """A document of targets + 1 tokens -> (start, stop, first) of each window."""
  first = start = 0
  while first < targets:
    stop = min(start + length, targets)
    yield start, stop, first
    first, start = stop, start + stride


def read(
  spec: str,
  *,
  tokenizer: Tokenizer,
  prefix: Sequence[int],
  suffixes: Sequence[str],
  limit: int,
) -> Domain:
  """'NAME=PATH' -> the first `limit` documents of a file or folder (0: all).

  What is read is as for scripts/prepare_data.py; a file of another suffix is one document
  of text. ValueError names the flag for a wrong path and a domain without documents.
  """
  name, equals, place = spec.partition('=')
  flag, path = f'--domain={spec}', Path(place).expanduser()
  if not equals or not name or not place:
    raise ValueError(f'{flag}, but NAME=PATH is expected')
  if path.is_file() and path.suffix:
    suffixes = (*suffixes, *({path.suffix} - {*sources.PLAIN}))
  domain = Domain(name, [], [])
  reading = pieces.Reading('text')
  try:
    for unit in sources.survey([str(path)], reading, suffixes=suffixes):
      for _, document in sources.documents(unit):
        if limit and len(domain.ids) == limit:
          return domain
        parts = [*zip(*document.encode(tokenizer, lambda _: None))]
        ids_N, bytes_N = (np.concatenate(part) for part in parts)
        if len(prefix) + len(ids_N) < 2:
          continue
        domain.ids.append(np.array([*prefix, *ids_N], np.int32))
        domain.bytes.append(int(bytes_N[0 if prefix else 1 :].sum()))
  except (ValueError, OSError) as error:
    raise ValueError(f'{flag}: {error}') from error
  if not domain.ids:
    raise ValueError(f'{flag}: no document has at least two tokens')
  return domain


def measure(
  evaluate: Callable,
  domains: Sequence[Domain],
  *,
  cfg: model.Config,
  on: Mesh,
  length: int,
  stride: int,
  batch: int,
  after: Callable[[int], Any],
) -> dict[str, Any]:
  """A model on domains -> {'domains': {name: summary}, 'positions': ...} and `means`.

  `evaluate(batch)` gives the arguments of `Curve.add`. At most `batch` windows of
  `length` tokens a device are in memory at a time, or as many tokens. `after` is called
  with the number of windows that were read.
  """
  whole = [
    Window(i, j, *window)
    for i, domain in enumerate(domains)
    for j, ids_N in enumerate(domain.ids)
    for window in windows(len(ids_N) - 1, length=length, stride=stride)
  ]
  whole.sort(key=lambda each: each.start - each.stop)  # Longest first.
  nats = [np.zeros(len(domain.ids)) for domain in domains]
  rises: list[list[float]] = [[] for _ in domains]
  curve, ways, start = Curve(), mesh.ways('batch', on), 0
  while start < len(whole):
    most = whole[start].stop - whole[start].start
    size = min(length, max(SHORTEST, 1 << (most - 1).bit_length()))
    rows = min(max(1, batch * length // size), -(-(len(whole) - start) // ways)) * ways
    part = whole[start : start + rows]
    local = _rows(part, domains, rows, size)
    held = list(mesh.rows(on, rows))
    placed = mesh.place(jax.tree.map(lambda x, held=held: x[held], local), on, rows)
    by_token = [np.asarray(x) for x in jax.device_get(evaluate(placed))]
    curve.add(*by_token)
    nats_BT, weight_BT, _ = by_token
    for each, nats_T, weight_T in zip(part, nats_BT, weight_BT):
      nats[each.domain][each.document] += nats_T @ weight_T.astype(float)
      if each.start == 0 and each.stop >= LATE - 1:
        rises[each.domain].append(float(nats_T[LATE - 2] - nats_T[EARLY - 2]))
    start += len(part)
    after(len(part))
  summaries = {
    domain.name: _summary(domain, nats_D, rise)
    for domain, nats_D, rise in zip(domains, nats, rises)
  }
  measured = {'length': length, 'stride': stride, 'domains': summaries}
  return measured | means(summaries) | {'positions': curve.report(cfg)}


def _rows(
  part: Sequence[Window], domains: Sequence[Domain], rows: int, size: int
) -> data.Batch:
  """Windows -> a batch on the host, one document a row, padded in both dims."""
  token_BT, target_BT, segment_BT = np.zeros((3, rows, size), np.int32)
  weight_BT = np.zeros((rows, size), np.float32)
  for i, each in enumerate(part):
    ids_N, count = domains[each.domain].ids[each.document], each.stop - each.start
    token_BT[i, :count] = ids_N[each.start : each.stop]
    target_BT[i, :count] = ids_N[each.start + 1 : each.stop + 1]
    weight_BT[i, each.first - each.start : count] = segment_BT[i, :count] = 1
  index_BT = np.broadcast_to(np.arange(size, dtype=np.int32), token_BT.shape)
  return data.Batch(token_BT, target_BT, weight_BT, segment_BT, index_BT)


def _summary(domain: Domain, nats_D: np.ndarray, rises: list[float]) -> dict[str, Any]:
  """The sums of each document -> `heldout.summarize`, with documents as the clusters."""
  targets_D = np.array([len(ids_N) - 1 for ids_N in domain.ids])
  summary = summarize(nats_D, targets_D, np.array(domain.bytes))
  summary['documents'] = summary.pop('rows')
  if rises:
    error = np.std(rises, ddof=1) / math.sqrt(len(rises)) if len(rises) > 1 else None
    late = {'nats': float(np.mean(rises)), 'stderr': error, 'documents': len(rises)}
    summary[f'loss_{LATE}_minus_{EARLY}'] = late
  return summary


def means(summaries: dict[str, dict[str, Any]]) -> dict[str, float | None]:
  """Summaries of domains -> two averages in which each domain weighs the same.

  mean_of_perplexities = mean(exp(loss)), and exp_of_mean_loss = exp(mean(loss)), which is
  at most as large. Their errors are to first order, from the domains' errors.
  """
  losses = np.array([each['nats_per_token'] for each in summaries.values()])
  errors = [each['nats_per_token_stderr'] for each in summaries.values()]
  above, below = float(np.exp(losses).mean()), float(np.exp(losses.mean()))
  known = None not in errors
  root = lambda x: float(np.sqrt(np.square(x).sum()) / len(losses)) if known else None
  return {
    'mean_of_perplexities': above,
    'mean_of_perplexities_stderr': root(np.exp(losses) * errors) if known else None,
    'exp_of_mean_loss': below,
    'exp_of_mean_loss_stderr': root(below * np.array(errors)) if known else None,
  }


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Reports -> their averages, a line each."""
  lines = []
  for each in reports:
    for name in ('mean_of_perplexities', 'exp_of_mean_loss'):
      error = each[f'{name}_stderr']
      error = '' if error is None else f' ± {error:.3f}'
      lines.append(f'{name} of {each["label"]}: {each[name]:.3f}{error}')
  return '\n'.join(lines)
