"""Loaded models on documents and long rows: domains, StreamingLLM, copying; a report."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gated import config, data, evals, storage
from gated.evals import copying, domains
from gated.evals.long_text import Options, define, plain
from gated.plan import drawing, evaluation, tasks
from gated.plan.load import Loaded
from gated.run import metrics

SEED = 42  # For the spans of the copying task.

__all__ = ['define', 'run']


def run(
  loaded: Loaded,
  options: Options,
  corpus: Callable[[Loaded], data.Corpus],
  *,
  forced: str,
  others: Sequence[str],
) -> None:
  """Measures a model, and those of --beside; prints and stores the report.

  Copying takes the text between its spans from the domains, or from the held-out rows of
  the corpus. The report is WORKDIR/evals/STEP-long-DIGEST.json. ValueError names the flag
  that does not fit a model or has no documents, before anything is measured.
  """
  if options.figures:
    drawing.check(loaded)  # Reports a missing package before anything is measured.
  read = _documents(loaded, options)
  text = lambda: _text(loaded, read, corpus, options.rows)
  size = options.length or loaded.prepared
  rows = lambda: loaded.rows(text(), length=size, limit=evaluation.ROWS)
  runs = evaluation.runs(loaded, rows, segments=0, forced=forced, others=others)
  length, stride = options.window(loaded.prepared, loaded.yarn)
  for each in [*runs.values()][1:]:
    try:
      dataclasses.replace(options, length=length).window(each.prepared, loaded.yarn)
    except ValueError as error:
      raise ValueError(f'{error} (--beside={each.path})') from error
  named = _streaming({k: each.dropless() for k, each in runs.items()}, options)
  reports: dict[str, dict[str, Any]] = {
    label: {'label': label, 'step': each.step, 'prepared': each.prepared}
    for label, each in named.items()
  }
  if read:
    for label, each in named.items():
      spans: dict[str, Any] = dict(length=length, stride=stride)
      measured = _domains(label, each, read, options.batch, spans)
      if not options.by_position:
        measured.pop('positions')
      reports[label] |= measured
  if options.copying:
    text_N = text()
    for label, each in named.items():
      reports[label]['copying'] = _copying(label, each, text_N, options)
  about = {'options': plain(options) | {'yarn': loaded.yarn}}
  name = f'{loaded.tag}-long-{config.digest(about)[:8]}'
  if jax.process_index() == 0:
    for line in _tables(reports, options):
      print(line)
    report = about | evaluation.joined(reports)
    print(metrics.dumps(report, indent=None), flush=True)
    with evaluation.stored():
      storage.write_json(tasks.folder(loaded) / f'{name}.json', metrics.plain(report))
  if options.figures:
    with evaluation.stored(), evaluation.shown('figures'):
      drawing.losses(named, reports, folder='evals', name=name)


def _documents(loaded: Loaded, options: Options) -> list[domains.Domain]:
  """The domains; documents begin with the same token as in training."""
  token = loaded.tokenizer
  prefix = tasks.prefix(token)
  if loaded.about:
    begins = loaded.about['data'].get('ends', {}).get('begins', False)
    prefix = (token.bos,) if begins else ()
  given: dict[str, Any] = dict(suffixes=options.suffixes, limit=options.rows)
  read = []
  for spec in options.domain:
    with evaluation.shown(f'reading --domain={spec}'):
      read.append(domains.read(spec, tokenizer=token, prefix=prefix, **given))
  return read


def _streaming(runs: dict[str, Loaded], options: Options) -> dict[str, Loaded]:
  """The models; with --streaming, each model with each cache instead."""
  if not options.streaming:
    return runs
  named = {}
  for label, each in runs.items():
    for spec, cache in options.caches.items():
      try:
        named[f'{label} {spec}'] = each.streaming(*cache)
      except ValueError as error:
        raise ValueError(f'--streaming={spec}: {error}') from error
  return named


def _domains(
  label: str, run: Loaded, read: list[domains.Domain], batch: int, spans: dict[str, Any]
) -> dict[str, Any]:
  total = sum(
    len([*domains.windows(len(ids_N) - 1, **spans)])
    for each in read
    for ids_N in each.ids
  )
  evaluate = lambda batch: run.token_losses(run.model, batch)[1]
  with evaluation.shown(f'domains of {label}', total=total, unit='windows') as progress:
    options: dict[str, Any] = dict(cfg=run.cfg, on=run.mesh, batch=batch)
    return domains.measure(evaluate, read, **spans, **options, after=progress.add)


def _copying(
  label: str, run: Loaded, text_N: np.ndarray, options: Options
) -> dict[str, Any]:
  given: dict[str, Any] = dict(distances=options.copying, batch=options.batch)
  given |= dict(on=run.mesh, seed=SEED, count=options.rows)
  total = 2 * len(options.copying) * (options.rows or copying.ROWS)
  with evaluation.shown(f'copying of {label}', total=total, unit='rows') as progress:
    return copying.measure(run.evaluate, text_N, **given, after=progress.add)


def _text(
  loaded: Loaded,
  read: list[domains.Domain],
  corpus: Callable[[Loaded], data.Corpus],
  limit: int,
) -> np.ndarray:
  """The tokens between spans: those of the domains, or of the held-out rows."""
  if read:
    return np.concatenate([ids_N for domain in read for ids_N in domain.ids])
  opened = corpus(loaded)
  texts = [opened.heldout_text(domain, limit) for domain in opened.domains]
  return loaded.tokens(b'\n'.join(texts).decode(errors='replace'))


def _tables(reports: dict[str, Any], options: Options) -> Iterator[str]:
  """Reports by label -> the tables of the chosen measures."""
  if options.domain:
    yield evals.table(evaluation.joined(reports))
    yield domains.table([*reports.values()])
  if options.copying:
    yield copying.table([*reports.values()])
