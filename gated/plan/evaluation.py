"""Loaded models measured on the same text, side by side: held-out losses and probes.

The first model is the one under evaluation; its report holds those of the others under
'beside', by label.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gated import data, evals, storage
from gated.data.progress import Progress
from gated.devices import mesh
from gated.plan import probing
from gated.plan.load import Loaded, take
from gated.probes import force
from gated.run import metrics
from gated.run import workdir as workdirs

_log = logging.getLogger('gated')

Runs = Mapping[str, Loaded]
Reports = Mapping[str, dict[str, Any]]

ROWS = 16  # Held-out rows per domain for probes and for the mean gate scores.


def opened(
  workdir: str, *, step: str, cache: str, length: int, tokenizer: str, yarn: str
) -> Loaded:
  """WORKDIR, WORKDIR:STEP or a Hugging Face folder -> the model.

  `length` and `tokenizer` (0 and '' if not given) are only for a Hugging Face folder;
  `yarn` is as for `Loaded.stretched`. ValueError names a flag that is wrong or does not
  apply.
  """
  try:
    place, step = workdirs.split_step(workdir, step)
  except ValueError as error:
    raise ValueError(f'--workdir={error}') from error
  is_run = bool(storage.names(storage.path(place) / 'checkpoints'))
  if not is_run and step:
    raise ValueError(f'--step={step!r}, but {place} has no steps')
  for flag, value in (('length', length), ('tokenizer', tokenizer)):
    if is_run and value:
      raise ValueError(f'--{flag}={value}, but {place} is a run')
  try:
    with shown(f'reading {place}'):
      loaded = take(place, step=step, cache=cache)
  except ValueError as error:
    named = f' --step={step!r}' if step else ''
    raise ValueError(f'--workdir={place}{named}: {error}') from error
  try:
    return loaded.stretched(yarn)
  except ValueError as error:
    raise ValueError(f'--yarn={yarn}: {error}') from error


def continue_texts(loaded: Loaded, prompts: Sequence[str], options: Any) -> None:
  """Prints prompts and their continuations; the options are those of `evals.Sampling`."""
  with shown('continuing the prompts'):
    texts = loaded.generate(prompts, **options)
  if jax.process_index() == 0:
    print(*map(''.join, zip(prompts, texts)), sep='\n\n')


def runs(
  loaded: Loaded,
  rows: Callable[[], data.Batch],
  *,
  segments: int,
  forced: str,
  others: Sequence[str],
) -> dict[str, Loaded]:
  """A model, the same with forced gates, and models of other paths -> all, by label.

  All read rows of up to `segments` documents, with the YaRN of the first model.
  `forced` is as for `force.parse`, '' for none; its 'mean' is over `rows`. ValueError
  names --force_gates or --beside if it does not fit the model.
  """
  loaded = loaded.fit(segments)
  runs = {loaded.path.name: loaded}
  if forced:
    try:
      gates, layers = force.parse(forced, loaded.cfg.depth)
      *_, constant = force.check(loaded.cfg, gates, layers)
    except ValueError as error:
      raise ValueError(f'--force_gates={forced!r}: {error}') from error
    text = rows() if constant is None else None
    runs[f'gates {forced}'] = loaded.force(gates, layers=layers, text=text)
  for path in others:
    try:
      other = take(path, cache=loaded.cache).fit(segments).stretched(loaded.yarn)
      label = other.path.name
      label = f'{other.path}:{other.step}' if label in runs else label
      if label in runs:
        raise ValueError('it is measured already')
      if other.tokenizer_digest != loaded.tokenizer_digest:
        raise ValueError(f'it has another tokenizer than {loaded.path}')
    except ValueError as error:
      raise ValueError(f'--beside={path}: {error}') from error
    runs[label] = other
  return runs


def rows_of_file(loaded: Loaded, path: str, *, length: int, limit: int) -> data.Batch:
  """A text file -> its rows, as `Loaded.rows`; ValueError names --text."""
  try:
    return loaded.rows(Path(path).read_bytes().decode(), length=length, limit=limit)
  except (OSError, ValueError) as error:
    raise ValueError(f'--text={path}: {error}') from error


def heldout(
  runs: Runs, corpus: data.Corpus, *, batch: int, limit: int, by_position: bool
) -> dict[str, dict[str, Any]]:
  """The held-out loss of each model, by label.

  The first `limit` rows of each domain are read (0: all), `batch` per device at a time.
  With `by_position`, a report also has the loss by position over all domains.
  """
  reports: dict[str, dict[str, Any]] = {}
  counts = [corpus.heldout_rows(domain, limit) for domain in corpus.domains]
  for label, run in runs.items():
    curve = evals.Curve()

    def evaluate(_, batch, run=run, curve=curve):
      if not by_position:
        return run.evaluate(batch)
      sums, by_token = run.token_losses(run.model, batch)
      curve.add(*jax.device_get(by_token))
      return sums

    # At most the number of rows, because each batch is padded to this size.
    ways = mesh.ways('batch', run.mesh)
    size = ways * max(1, min(batch, -(-max(counts, default=0) // ways)))
    total = sum(-(-count // size) for count in counts)
    with shown(f'held-out loss of {label}', total=total, unit='batches') as progress:
      # `add` returns None, and False lets the evaluation go on.
      options: dict[str, Any] = dict(on=run.mesh, batch=size, limit=limit)
      options |= dict(after=lambda _, progress=progress: bool(progress.add()))
      report = evals.perplexity(evaluate, None, corpus, **options)
    assert report is not None
    reports[label] = {'step': run.step, 'yarn': run.yarn, 'rows_limit': limit} | report
    if by_position:
      reports[label]['positions'] = curve.report(run.cfg)
  return reports


def probes(
  runs: Runs, rows: data.Batch, *, mask_documents: bool | None
) -> dict[str, dict[str, Any]]:
  """The probes of each model on packed rows, and its loss on them, by label."""
  options: dict[str, Any] = dict(mask_documents=mask_documents)
  reports = {}
  for label, run in runs.items():
    with shown(f'probes of {label}'):
      loss = {'value': probing.loss(run, rows, **options), 'layers': None}
      reports[label] = run.probe(rows, **options) | {'loss': loss, 'yarn': run.yarn}
  return reports


def shown(label: str, **options: Any) -> Progress:
  """The progress of long work of an evaluation, as process 0 prints it."""
  return Progress(label, enabled=jax.process_index() == 0, **options)


def joined(reports: Reports) -> dict[str, Any]:
  """Reports by label -> the first one, the others in its entry 'beside'."""
  [first, *others] = reports
  beside = {label: reports[label] for label in others}
  return reports[first] | ({'beside': beside} if beside else {})


def complete(
  report: dict[str, Any],
  loaded: Loaded,
  corpus: data.Corpus,
  *,
  chosen: Collection[str],
  rows: int,
  xz_bytes: int,
) -> None:
  """Adds the yardsticks, the data and the run's bad steps to a held-out report.

  The chosen yardsticks (`evals.measure_yardsticks`) are fitted to at most `rows` of the
  rows that the run was trained on; for imported weights, to rows of the corpus. If the
  run's own data is missing, the report has the reason instead of a bigram model.
  """
  digest, about = corpus.fingerprint['sha256'], loaded.about
  own = about and digest == about['data']['sha256']
  trained, seen = corpus, corpus.rows
  if about:
    if not own and 'bigram' in chosen:
      try:
        trained = loaded.corpus()
      except (OSError, ValueError) as error:
        chosen = [name for name in chosen if name != 'bigram']
        report['without'] = {'bigram': str(error)}
    assert loaded.step is not None
    seen = loaded.step * about['config']['batch']
  options: dict[str, Any] = dict(limit=report['rows_limit'], xz_bytes=xz_bytes)
  options |= dict(chosen=chosen, rows=min(seen, rows))
  yardsticks = evals.measure_yardsticks(corpus, trained, **options)
  for domain, summary in report['domains'].items():
    summary |= yardsticks[domain]
  report |= {'data': digest, 'stability': about['stability'] if about else None}


def store(report: Mapping[str, Any], loaded: Loaded, folder: str) -> None:
  """Writes a report to WORKDIR/FOLDER/STEP.json; for imported weights, does nothing.

  The name includes --yarn, and the digest of data other than the run's own. See `stored`
  for errors.
  """
  if not loaded.about:
    return
  own = loaded.about['data']['sha256']
  digest = report.get('data') or own
  name = loaded.tag if digest == own else f'{loaded.tag}-{digest[:8]}'
  with stored():
    storage.write_json(loaded.path / folder / f'{name}.json', metrics.plain(report))


@contextlib.contextmanager
def stored() -> Generator[None]:
  """Inside, an OSError is only logged: the result itself was printed."""
  try:
    yield
  except OSError as error:
    _log.warning('the result was printed, but could not be stored: %s', error)
