"""A loaded model on tasks of lm-eval: the table, the report, and finished requests."""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax

from gated import config, data, storage
from gated.data.tokenizer import Tokenizer, optional
from gated.devices import processes
from gated.evals import harness
from gated.evals.harness import scoring, sharing
from gated.evals.harness.cache import Answers
from gated.plan.evaluation import stored
from gated.plan.load import Loaded
from gated.run import metrics
from gated.run.checkpoint import manifest

_log = logging.getLogger('gated')

LENGTH = 2048  # Tokens that a model of unknown length reads, as in lm-eval.
BOOTSTRAP = 1000  # Samples for standard errors without a formula.


def run(loaded: Loaded, options: harness.Options) -> None:
  """Evaluates a model on tasks; prints lm-eval's table and stores its report.

  The report and the finished requests are in `folder(...)`. ValueError names the flag if
  a task or its data is missing.
  """
  catalog = harness.part('catalog').Catalog(options.task_path)
  catalog.check(options.tasks)
  for path, needed in catalog.downloads(options.tasks).items():
    more = f' and {len(needed) - 3} more' if len(needed) > 3 else ''
    _log.warning('data set of a hub: %s, for %s%s', path, ', '.join(needed[:3]), more)
  _read(catalog, options.tasks)
  subject = subject_of(loaded, options.length)
  place = folder(loaded)
  answers = Answers(place / 'requests' / identity(loaded, subject.length, subject.prefix))
  if len(answers):
    _log.warning('%d finished requests of %s are used again', len(answers), place)
  report = _evaluate(catalog, subject, answers, options)
  if jax.process_index() == 0:
    print(_table(report), flush=True)
    with stored():
      storage.write_json(place / f'{_name(loaded, options)}.json', report)


def subject_of(loaded: Loaded, length: int) -> Any:
  """A loaded model -> the subject of lm-eval's model; `length` 0 takes `length_of`."""
  loaded = loaded.dropless()
  length = length or length_of(loaded)
  return harness.part('adapter').Subject(
    read_model=lambda: loaded.model,
    measured=loaded.compiled(scoring.measure),
    shared=loaded.compiled(sharing.measure),
    on=loaded.mesh,
    tokenizer=loaded.tokenizer,
    prefix=prefix(loaded.tokenizer),
    length=length,
    info={'model': str(loaded.path), 'step': loaded.step, 'max_length': length}
    | {'numerics': dataclasses.asdict(loaded.cfg.numerics)},
  )


def folder(loaded: Loaded) -> storage.Path:
  """WORKDIR/evals, or for imported weights a folder in the cache."""
  if loaded.about:
    return loaded.path / 'evals'
  files = {
    file.name: [file.stat().st_size, file.stat().st_mtime_ns]
    for file in sorted(Path(loaded.path).resolve().iterdir())
    if file.suffix in ('.json', '.safetensors')
  }
  digest = config.digest([os.path.realpath(loaded.path), files])[:8]
  home = storage.path(loaded.cache or data.cache.default())
  return home / 'evals' / f'{Path(loaded.path).resolve().name}-{digest}'


def length_of(loaded: Loaded) -> int:
  """The most tokens that a model reads: the number that its RoPE is prepared for."""
  return loaded.prepared or LENGTH


def prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The tokens that transformers puts before a text: none, or beginning-of-text."""
  if tokenizer.path.endswith('.json'):
    tokenizers = optional('tokenizers')
    ids = tokenizers.Tokenizer.from_file(tokenizer.path).encode('').ids
    return (tokenizer.bos,) if tokenizer.bos in ids[:1] else ()
  return (tokenizer.bos,) if tokenizer.bos_token else ()


def _read(catalog: Any, names: tuple[str, ...]) -> None:
  """Loads the tasks' data, on process 0 first; all processes raise its ValueError."""
  fault = ''
  for first in (True, False):
    if first == (jax.process_index() == 0):
      try:
        catalog.read(names)
      except ValueError as error:
        fault = str(error)
    if faults := [each for each in processes.gather(fault) if each]:
      raise ValueError(fault or faults[0])


def _evaluate(
  catalog: Any, subject: Any, answers: Answers, options: harness.Options
) -> dict[str, Any]:
  """-> lm-eval's report, as JSON."""
  # lm-eval's pool would fork this process, which has threads of JAX.
  os.environ['DISABLE_MULTIPROC'] = '1'
  from lm_eval import evaluator, utils

  report = evaluator.simple_evaluate(
    model=harness.part('adapter').Gated(subject, answers, size=options.batch),
    tasks=[*options.tasks],
    num_fewshot=None if options.fewshot < 0 else options.fewshot,
    limit=options.limit or None,
    bootstrap_iters=BOOTSTRAP,
    log_samples=False,
    task_manager=catalog,
  )
  plain = json.dumps(report, default=utils.handle_non_serializable)
  return metrics.plain(json.loads(plain))


def _table(report: dict[str, Any]) -> str:
  from lm_eval import utils

  tables = [utils.make_table(report)]
  if report.get('groups'):
    tables.append(utils.make_table(report, 'groups'))
  return '\n'.join(tables)


def identity(loaded: Loaded, length: int, prefix: tuple[int, ...]) -> str:
  """A digest of everything that an answer depends on, besides its request."""
  parts = [
    jax.devices()[0].device_kind,
    dataclasses.asdict(loaded.cfg),
    loaded.tokenizer_digest,
    length,
    prefix,
  ]
  if loaded.about:
    saved = loaded.path / 'checkpoints' / str(loaded.step) / manifest.NAME
    content = storage.read(saved, manifest.LIMIT)
    parts.append(hashlib.sha256(content).hexdigest())
  step = 'imported' if loaded.step is None else loaded.step
  return f'{step}-{config.digest(parts)[:16]}'


def _name(loaded: Loaded, options: harness.Options) -> str:
  """The name of a report: its step, its tasks and its options."""
  names = '+'.join(options.tasks)
  if len(names) > 80 or not names.replace('+', '').replace('_', '').isalnum():
    names = f'{len(options.tasks)}-tasks-{config.digest([*options.tasks])[:8]}'
  limit = f'-limit{options.limit}' if options.limit else ''
  fewshot = f'-fewshot{options.fewshot}' if options.fewshot >= 0 else ''
  return f'{loaded.tag}-{names}{limit}{fewshot}'
