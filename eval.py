"""The story of an evaluation: load, measure, report.

  python eval.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=best
  python eval.py --workdir=Qwen3-0.6B --data=DIR --length=4096
  python eval.py --workdir=runs/demo --probe --figures --beside=runs/demo-baseline
  python eval.py --workdir=runs/demo --force_gates=mean@0
  python eval.py --workdir=runs/demo --prompt="def fib(" --max_tokens=64
  python eval.py --workdir=runs/demo --tasks=stdlib,hellaswag --limit=500
  python eval.py --workdir=runs/demo --domain=law=law.jsonl --length=8192 --yarn=4
  python eval.py --workdir=runs/demo --ruler=4096,8192 --beside=runs/demo-baseline

Prints a table of held-out loss by domain, beside two yardsticks on the same text
(--yardsticks=none leaves them out), and as its last line the report as JSON, which it
then writes to WORKDIR/eval/STEP.json; for a Hugging Face folder nothing is written.
Progress is on standard error. Exit code 2: refused; 9: a fault that may pass.

With --probe it prints measurements of each layer instead, and writes them to
WORKDIR/probes/STEP.json; --figures adds figures there. With --prompt it prints the
prompt and the model's continuation. --tasks (lm-eval), --ruler, --domain and --copying
have tables of their own; their reports are written into WORKDIR/evals/.
"""

import sys
from typing import Any

import jax
from absl import app, flags

from configs import base
from gated import data, evals, probes, storage
from gated.devices import processes, programs
from gated.evals import harness
from gated.plan import command, drawing, evaluation, long_text, probing, ruler, tasks
from gated.plan.load import Loaded
from gated.run import events, exit_codes, metrics, shutdown, terminal

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'WORKDIR or WORKDIR:STEP of train.py, or a Hugging Face folder.'
)
_STEP = flags.DEFINE_string('step', '', 'A number, best (held-out) or latest (default).')
_DATA = flags.DEFINE_string(
  'data', '', "Another mixture; default: the run's own; stdlib for a Hugging Face folder."
)
_LENGTH = flags.DEFINE_integer('length', 0, 'Row length for a Hugging Face folder.', 0)
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'For stdlib and a Hugging Face folder.')
_CACHE = flags.DEFINE_string('cache', '', 'Folder of the embedded corpus.')
_ROWS = flags.DEFINE_integer(
  'rows', 0, 'Rows read per domain, or of --text; 0 for all (--probe: 16).', 0
)
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows per device at a time.', 1)
_YARN = flags.DEFINE_string('yarn', '', 'YaRN, such as 4 (docs/evaluation.md).')
_YARDSTICKS = evals.define_yardsticks(flags)
_BY_POSITION = flags.DEFINE_boolean('by_position', False, 'Adds the loss by position.')
_PROBE = flags.DEFINE_boolean('probe', False, 'Look inside the model (docs/probes.md).')
_FIGURES = flags.DEFINE_boolean('figures', False, 'Also draws what is measured.')
_TEXT = flags.DEFINE_string('text', '', 'A file to probe on; default: held-out rows.')
_MASK = flags.DEFINE_boolean('mask_documents', None, "--probe: not the model's own.")
_FORCE = flags.DEFINE_string(
  'force_gates', '', 'Also measure with gates open, closed, mean or a number, @LAYERS.'
)
_BESIDE = flags.DEFINE_list(
  'beside', [], 'Also measure these runs: WORKDIR or WORKDIR:STEP, of one tokenizer.'
)
LOSSES_ONLY = 'by_position', 'batch', 'yardsticks', 'bigram_rows', 'xz_bytes'
PROBES_ONLY = 'text', 'mask_documents'
SHORT_ONLY = *PROBES_ONLY, *LOSSES_ONLY[2:], 'probe'
_BOTH = 'data', 'length', 'tokenizer', 'rows', 'probe', 'figures', 'force_gates', 'beside'
_GENERATION = evals.define(flags, excludes=(*LOSSES_ONLY, *PROBES_ONLY, *_BOTH))
_OTHERS = {*LOSSES_ONLY, *PROBES_ONLY, *_BOTH, 'prompt'} - {'batch', 'length'}
_TASKS = harness.define(flags, excludes=sorted(_OTHERS))
_RULER = ruler.define(flags, excludes=sorted((_OTHERS - {'figures'}) | ruler.UNUSED))
_LONG = long_text.define(flags, excludes=(*SHORT_ONLY, 'prompt', 'tasks', 'ruler'))
_PROCESSES = processes.define(flags)


def heldout(loaded: Loaded) -> None:
  """Prints a model's held-out loss and that of the models beside it, then stores it."""
  corpus = _corpus(loaded)
  rows = lambda: probing.heldout_rows(corpus, _ROWS.value or evaluation.ROWS)
  others: dict[str, Any] = dict(forced=_FORCE.value, others=_BESIDE.value)
  runs = evaluation.runs(loaded, rows, segments=corpus.max_segments, **others)
  options: dict[str, Any] = dict(batch=_BATCH.value, by_position=_BY_POSITION.value)
  reports = evaluation.heldout(runs, corpus, limit=_ROWS.value, **options)
  report = evaluation.joined(reports)
  if not report['domains']:
    raise ValueError(f'--data={_DATA.value!r} has no held-out rows')
  if jax.process_index() == 0:
    evaluation.complete(report, loaded, corpus, **_YARDSTICKS())
    print(evals.table(report))
    if report['stability'] and (summary := events.summary(report['stability'])):
      print(f'unstable steps up to this one: {summary}')
    print(metrics.dumps(report, indent=None), flush=True)
    evaluation.store(report, loaded, 'eval')
  if _FIGURES.value:
    with evaluation.stored(), evaluation.shown('figures'):
      drawing.losses(runs, reports, folder='eval', name=loaded.tag)


def probe(loaded: Loaded) -> None:
  """Prints the probes of a model and of the models beside it, then stores them."""
  if _TEXT.value:
    options = dict(length=_LENGTH.value, limit=_ROWS.value)
    rows, segments = evaluation.rows_of_file(loaded, _TEXT.value, **options), 1
  else:
    corpus = _corpus(loaded)
    segments = corpus.max_segments
    rows = probing.heldout_rows(corpus, _ROWS.value or evaluation.ROWS)
  others: dict[str, Any] = dict(forced=_FORCE.value, others=_BESIDE.value)
  runs = evaluation.runs(loaded, lambda: rows, segments=segments, **others)
  reports = evaluation.probes(runs, rows, mask_documents=_MASK.value)
  report = evaluation.joined(reports)
  report = {'text': _TEXT.value or _DATA.value or 'held-out rows'} | report
  if jax.process_index() == 0:
    print(probes.table(report), flush=True)
    evaluation.store(report, loaded, 'probes')
  if _FIGURES.value:
    with evaluation.stored(), evaluation.shown('figures'):
      drawing.probes(runs, reports, evals.longest_document(rows))


def _load(length: int = 0) -> Loaded:
  """The model; flags that do not apply to it are refused."""
  flagged: dict[str, Any] = dict(length=length, tokenizer=_TOKENIZER.value)
  flagged |= dict(step=_STEP.value, cache=_CACHE.value, yarn=_YARN.value)
  return evaluation.opened(_WORKDIR.value, **flagged)


def _corpus(loaded: Loaded) -> data.Corpus:
  """The corpus of --data, or the run's own; base.py's for a Hugging Face folder."""
  c = base.get_config().to_dict()
  flagged = dict(length=_LENGTH.value, tokenizer=_TOKENIZER.value)
  knobs = c['data'] | {k: v for k, v in flagged.items() if v}
  with evaluation.shown('opening the data'), shutdown.leaving():
    return loaded.corpus(_DATA.value, knobs=knobs, seed=c['seed'])


def _check_flags() -> None:
  """ValueError names a flag that would be ignored."""
  _YARDSTICKS()
  for name in LOSSES_ONLY if _PROBE.value else PROBES_ONLY:
    if flags.FLAGS[name].present:
      side = 'with --probe' if _PROBE.value else 'without --probe'
      raise ValueError(f'--{name}={flags.FLAGS[name].value} is not allowed {side}')


def refuse(error: Exception) -> int:
  """Prints an error in one line that names the flag -> the exit code."""
  print(f'eval.py: {error}', file=sys.stderr)
  return exit_codes.FAULT if storage.is_passing(error) else exit_codes.REFUSED


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; exits if it is refused."""
  try:
    command.parse(argv, flags.FLAGS, None, __doc__, folder='workdir')
    if not _WORKDIR.value:
      raise ValueError('--workdir=WORKDIR is missing')
    return argv[:1]
  except ValueError as error:
    sys.exit(refuse(error))


def main(argv: list[str]) -> int:
  terminal.steady()
  try:
    lengths = _RULER()
    chosen = None if lengths else _TASKS()
    long, (prompts, options) = _LONG(), _GENERATION()
    timeout = base.get_config().stability.peer_timeout
    processes.start(**_PROCESSES(), peer_timeout=timeout)
    programs.keep(data.cache.default())
    if prompts:
      evaluation.continue_texts(_load(), prompts, options)
    elif lengths:
      ruler.run(_load(), lengths)
    elif chosen:
      tasks.run(_load(), chosen)
    elif long:
      long_text.run(_load(), long, _corpus, forced=_FORCE.value, others=_BESIDE.value)
    else:
      _check_flags()
      loaded = _load(_LENGTH.value)
      if _FIGURES.value:
        drawing.check(loaded)  # Reports a missing package before anything is measured.
      (probe if _PROBE.value else heldout)(loaded)
  except (ValueError, NotImplementedError, OSError) as error:
    return refuse(error)
  except jax.errors.JaxRuntimeError as error:
    line = str(error).partition('\n')[0]
    if 'RESOURCE_EXHAUSTED' not in line:
      raise
    return refuse(ValueError(f'--batch={_BATCH.value} needs too much memory: {line}'))
  return exit_codes.FINISHED


if __name__ == '__main__':
  app.run(lambda argv: processes.leave(main(argv)), flags_parser=parse)
