"""Loaded models on RULER: answers, the loss and rank of the references, a report."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gated import config, storage
from gated.devices import mesh
from gated.evals import Sampling, generate, ruler
from gated.evals.harness import cache, scoring
from gated.plan import drawing, evaluation, tasks
from gated.plan.load import Loaded, load
from gated.run import metrics

SEED = 42  # For the items.

define = ruler.define
UNUSED = {'fewshot', 'task_path', 'length'}  # Flags that only lm-eval's tasks use.


def run(loaded: Loaded, options: ruler.Options) -> None:
  """Measures a model, and those of --beside, on RULER; prints and stores the report.

  The report is WORKDIR/evals/STEP-ruler-*.json, beside the finished requests. ValueError
  names --ruler if a length is too short for a task, or too long for the model, before
  anything runs. With --yarn each model is measured without and with it. A model of
  --beside that is not prepared for a length has no results for it.
  """
  if options.figures:
    drawing.check(loaded)  # Reports a missing package before anything is measured.
  if not _is_prepared(loaded, longest := max(options.ruler)):
    raise ValueError(
      f'--ruler={longest}, but RoPE is prepared for {loaded.prepared} tokens: '
      '--yarn=FACTOR stretches it, and --yarn=1 measures beyond them as it is'
    )
  runs = _runs(loaded, options.beside)
  with evaluation.shown('preparing the texts'):
    prefix = tasks.prefix(loaded.tokenizer)
    maker = ruler.Maker(
      tokenizer=loaded.tokenizer, prefix=prefix, texts=ruler.local(), seed=SEED
    )
    for length in options.ruler:
      for name in options.tasks:
        maker.check(name, length, options.limit)
  folder = tasks.folder(loaded)
  finished = {}
  for label, each in runs.items():
    place = folder / 'requests' / tasks.identity(each, 0, prefix)
    finished[label] = cache.Answers(place)
  reports: dict[str, dict[str, Any]] = {
    label: {'step': each.step, 'lengths': {}} for label, each in runs.items()
  }
  for length in options.ruler:
    summaries = _at_length(maker, length, runs, finished, options)
    for label, by_task in summaries.items():
      by_task = by_task and by_task | {'mean': ruler.means(by_task.values())}
      reports[label]['lengths'][str(length)] = by_task
  if jax.process_index() == 0:
    print(ruler.table(reports, loss_only=options.loss_only), flush=True)
    texts = f'documentation of Python {platform.python_version()}'
    about = {'texts': texts, 'seed': SEED, 'yarn': loaded.yarn}
    report = about | evaluation.joined(reports)
    print(metrics.dumps(report, indent=None), flush=True)
    name = _name(loaded, options)
    with evaluation.stored():
      storage.write_json(folder / f'{name}.json', metrics.plain(report))
    if options.figures:
      with evaluation.stored(), evaluation.shown('figures'):
        drawing.ruler(loaded, reports, name=name, loss_only=options.loss_only)


def _runs(loaded: Loaded, others: Sequence[str]) -> dict[str, Loaded]:
  """A model and those beside it, by label; with YaRN, each also as it was before."""
  given: dict[str, Any] = dict(rows=_no_rows, segments=0, forced='', others=others)
  runs = {}
  for label, each in evaluation.runs(loaded, **given).items():
    if each.yarn:
      step = '' if each.step is None else each.step
      runs[label] = load(each.path, step=step, cache=each.cache).fit(0).dropless()
      label = f'{label} yarn={each.yarn}'
    runs[label] = each.dropless()
  return runs


def _no_rows() -> Any:
  raise AssertionError('gates are not forced')


def _is_prepared(run: Loaded, length: int) -> bool:
  """Whether RoPE is prepared for a length, or used as it is (--yarn=1)."""
  as_it_is = bool(run.yarn) and run.cfg.attn.yarn.factor == 1
  return as_it_is or not run.prepared or length <= run.prepared


def _at_length(
  maker: ruler.Maker,
  length: int,
  runs: Mapping[str, Loaded],
  finished: Mapping[str, cache.Answers],
  options: ruler.Options,
) -> dict[str, dict[str, Any] | None]:
  """-> the summaries by task of each model, None if it is not prepared for the length."""
  summaries: dict[str, dict[str, Any] | None] = {
    label: {} if _is_prepared(each, length) else None for label, each in runs.items()
  }
  for name in options.tasks:
    with evaluation.shown(f'making {name} of {length} tokens'):
      items = [*maker.items(name, length, options.limit)]
    for label, by_task in summaries.items():
      if by_task is not None:
        whole = dict(total=len(items) * (2 - options.loss_only), unit='answers')
        title = f'{name} of {length} tokens, {label}'
        with evaluation.shown(title, **whole) as progress:
          examiner = Examiner(runs[label], finished[label], options.batch, progress)
          results = examiner.results(name, items, loss_only=options.loss_only)
        by_task[name] = ruler.summarize(results)
  return summaries


class Examiner:
  """A model that answers items; finished requests are not repeated."""

  def __init__(self, run: Loaded, answers: cache.Answers, batch: int, progress: Any):
    self._run, self._answers = run, answers
    self._batch, self._progress = batch, progress

  def results(
    self, name: str, items: Sequence[ruler.Item], *, loss_only: bool
  ) -> list[dict[str, Any]]:
    """Items of a task -> their results, as for `ruler.summarize`."""
    try:
      means = self._losses(items)
      texts = [None] * len(items) if loss_only else self._texts(items)
    finally:
      self._answers.flush()
    any_of = ruler.TASKS[name].any_of
    scores = (
      None if text is None else ruler.score(text, item.answers, any_of=any_of)
      for text, item in zip(texts, items)
    )
    return [
      {'score': score, 'loss': loss, 'rank': rank, 'depth': item.depth}
      | {'tokens': len(item.prompt)}
      for item, score, (loss, rank) in zip(items, scores, means)
    ]

  def _losses(self, items: Sequence[ruler.Item]) -> list[Any]:
    """-> the mean loss and rank of each reference, in nats and from 1."""
    asked = [
      scoring.Request(tuple(item.context.tolist()), tuple(item.reference.tolist()))
      for item in items
    ]
    keys = {each: cache.key('ruler loss', *each) for each in asked}
    missing = [each for each in keys if keys[each] not in self._answers]
    self._progress.add(len(items) - len(missing))
    run = self._run
    options: dict[str, Any] = dict(on=run.mesh, size=self._batch, answer=_means)
    measured = run.compiled(scoring.measure)
    for part in scoring.score(missing, measured, run.model, **options):
      self._answers.add({keys[each]: answer for each, answer in part.items()})
      self._progress.add(len(part))
    return [self._answers[keys[each]] for each in asked]

  def _texts(self, items: Sequence[ruler.Item]) -> list[Any]:
    """-> the greedy continuation of each prompt."""
    new = max(item.new for item in items)
    keys = [cache.key('ruler text', item.prompt, f'{new}') for item in items]
    missing = {
      key: item.prompt for key, item in zip(keys, items) if key not in self._answers
    }
    self._progress.add(len(items) - len(missing))
    longest = max(len(item.prompt) for item in items) + new
    size = self._batch or max(1, scoring.TOKENS // longest)
    size = min(size * mesh.ways('batch', self._run.mesh), len(items))
    order = sorted(missing, key=lambda key: -len(missing[key]))
    for start in range(0, len(order), size):
      part = order[start : start + size]
      texts = self._continue([missing[key] for key in part], size, new)
      self._answers.add(dict(zip(part, texts)))
      self._progress.add(len(part))
    return [self._answers[key] for key in keys]

  def _continue(self, prompts: list[np.ndarray], size: int, new: int) -> list[str]:
    """Prompts of a batch, which is filled up to `size` rows -> their continuations."""
    run, token = self._run, self._run.tokenizer
    whole = prompts + prompts[-1:] * (size - len(prompts))
    options = Sampling(max_tokens=new, temperature=0.0)
    ids = generate.run(
      run.model, whole, options, on=run.mesh, tokenizer=token, context=run.length
    )
    return [token.decode(each).decode(errors='replace') for each in ids[: len(prompts)]]


def _means(nats_S: np.ndarray, rank_S: np.ndarray) -> list[float]:
  return [-float(nats_S.mean(dtype=float)), float(rank_S.mean(dtype=float)) + 1]


def _name(loaded: Loaded, options: ruler.Options) -> str:
  """The name of a report: its step, lengths, tasks and options."""
  step = 'imported' if loaded.step is None else str(loaded.step)
  parts = [step, 'ruler', '+'.join(map(str, options.ruler))]
  if options.tasks != ruler.Options(ruler=options.ruler).tasks:
    parts.append('+'.join(options.tasks))
  parts += ['yarn' + config.digest(loaded.yarn)[:8]] * bool(loaded.yarn)
  parts += [f'limit{options.limit}'] + ['loss'] * options.loss_only
  return '-'.join(parts)
