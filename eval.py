"""The story of an evaluation: load, measure, report.

  python eval.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=best
  python eval.py --workdir=Qwen3-0.6B --data=DIR --length=4096
  python eval.py --workdir=runs/demo --probe --figures
  python eval.py --workdir=runs/demo --prompt="def fib(" --max_tokens=64

Prints a table of held-out loss by domain, beside two yardsticks on the same text, and as
its last line the report as JSON, which it also writes to WORKDIR/eval/STEP.json. Nothing
is written to a Hugging Face folder. Exit code 2: refused.

With --probe it prints measurements of each layer instead, and writes them to
WORKDIR/probes/STEP.json; --figures adds figures there. With --prompt it prints the
prompt and the model's continuation.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

import gated
from configs import base
from gated import config, data, evals, probes, storage
from gated.devices import mesh, processes
from gated.plan import probing
from gated.plan.load import Loaded
from gated.run import events, exit_codes, metrics

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'The workdir of a run of train.py, or a Hugging Face folder.'
)
_STEP = flags.DEFINE_string('step', 'latest', 'latest, best (held-out), or a number.')
_DATA = flags.DEFINE_string(
  'data', '', "Another mixture; default: the run's own; stdlib for a Hugging Face folder."
)
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens in a row, for a Hugging Face folder.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'For stdlib and a Hugging Face folder.')
_CACHE = flags.DEFINE_string('cache', '', 'Folder of the embedded corpus.')
_ROWS = flags.DEFINE_integer(
  'rows', 0, 'Held-out rows read per domain, or rows of --text; 0 for all (--probe: 16).'
)
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows per device at a time.')
_BIGRAM_ROWS = flags.DEFINE_integer('bigram_rows', 65536, 'Rows of the bigram model.')
_XZ_BYTES = flags.DEFINE_integer('xz_bytes', 1 << 26, 'Bytes a domain for xz; 0 for all.')
_PROBE = flags.DEFINE_boolean('probe', False, 'Look inside the model (docs/probes.md).')
_FIGURES = flags.DEFINE_boolean('figures', False, 'With --probe: draw figures of it.')
_TEXT = flags.DEFINE_string('text', '', 'A file to probe on; default: held-out rows.')
_MASK = flags.DEFINE_boolean(
  'mask_documents', None, "Probe with documents masked or not; default: the model's own."
)
_MEASURES = ('data', 'length', 'tokenizer', 'rows', 'batch', 'bigram_rows', 'xz_bytes')
_GENERATION = evals.define(flags, excludes=_MEASURES)
_PROCESSES = processes.define(flags)

LOWEST = dict(rows=0, xz_bytes=0, batch=1, bigram_rows=1, length=0)


def run(workdir: str) -> dict[str, Any]:
  """A workdir or a Hugging Face folder -> the report; ValueError if it is refused."""
  for name, low in LOWEST.items():
    config.at_least(f'--{name}', flags.FLAGS[name].value or 0, low)
  loaded = _load(workdir)
  corpus = _corpus(loaded)
  loaded = loaded.fit(corpus.max_segments)
  report: dict[str, Any] = {'step': loaded.step} | evals.perplexity(
    lambda _, batch: loaded.evaluate(batch),
    None,
    corpus,
    on=loaded.mesh,
    batch=_BATCH.value * mesh.ways('batch', loaded.mesh),
    limit=_ROWS.value,
  )
  if not report['domains']:
    raise ValueError(f'--data={_DATA.value!r} has no held-out rows')
  if jax.process_index() == 0:
    _add_yardsticks(report, loaded, corpus)
    report |= {'data': corpus.fingerprint['sha256'], 'rows_limit': _ROWS.value}
    report['stability'] = loaded.about['stability'] if loaded.about else None
    if loaded.about:
      storage.write_json(_path(loaded, corpus), metrics.plain(report))
  return report


def probe(workdir: str) -> dict[str, Any]:
  """A workdir or a Hugging Face folder -> the report of the probes."""
  config.at_least('--rows', _ROWS.value, 0)
  loaded, mask = _load(workdir), _MASK.value
  if _FIGURES.value:
    probing.drawing(loaded)  # Reports a missing package before the probes run.
  if _TEXT.value:
    try:
      rows, length = Path(_TEXT.value).read_text(), _LENGTH.value
      report = loaded.probe(rows, length=length, rows=_ROWS.value, mask_documents=mask)
    except (OSError, ValueError) as error:
      raise ValueError(f'--text={_TEXT.value}: {error}') from error
  else:
    corpus = _corpus(loaded)
    rows = probing.heldout_rows(corpus, _ROWS.value or 16)
    loaded = loaded.fit(corpus.max_segments)
    report = loaded.probe(rows, mask_documents=mask)
  report = {'text': _TEXT.value or _DATA.value or 'held-out rows'} | report
  if loaded.about and jax.process_index() == 0:
    storage.write_json(loaded.path / 'probes' / f'{loaded.step}.json', report)
  if _FIGURES.value:
    loaded.draw(report, rows)
  return report


def _load(workdir: str) -> Loaded:
  """The model; flags that do not apply to it are refused."""
  is_run = bool(storage.names(storage.path(workdir) / 'checkpoints'))
  if not is_run and _STEP.value != 'latest':
    raise ValueError(f'--step={_STEP.value!r}, but {workdir} has no steps')
  for flag in (_LENGTH, _TOKENIZER):
    if is_run and flag.value:
      raise ValueError(f'--{flag.name}={flag.value}, but {workdir} is a run')
  try:
    return gated.load(workdir, step=_STEP.value if is_run else '', cache=_CACHE.value)
  except ValueError as error:
    raise ValueError(f'--workdir={workdir} --step={_STEP.value!r}: {error}') from error


def _corpus(loaded: Loaded) -> data.Corpus:
  """The corpus of --data, or the run's own; base.py's for a Hugging Face folder."""
  c = base.get_config().to_dict()
  flagged = dict(length=_LENGTH.value, tokenizer=_TOKENIZER.value)
  knobs = c['data'] | {k: v for k, v in flagged.items() if v}
  return loaded.corpus(_DATA.value, knobs=knobs, seed=c['seed'])


def _add_yardsticks(report: dict, loaded: Loaded, corpus: data.Corpus) -> None:
  """Adds the yardsticks, fitted to the rows that the run was trained on."""
  trained, rows = corpus, corpus.rows
  if loaded.about and loaded.step is not None:
    rows = loaded.step * loaded.config['batch']
    trained = loaded.corpus() if _DATA.value else corpus
  yardsticks = evals.measure_yardsticks(
    corpus,
    trained,
    rows=min(rows, _BIGRAM_ROWS.value),
    limit=_ROWS.value,
    xz_bytes=_XZ_BYTES.value,
  )
  for domain, summary in report['domains'].items():
    summary |= yardsticks[domain]


def _path(loaded: Loaded, corpus: data.Corpus) -> storage.Path:
  """WORKDIR/eval/STEP.json, with the data's digest in the name if it is not the run's."""
  digest = corpus.fingerprint['sha256']
  own = loaded.about and digest == loaded.about['data']['sha256']
  name = f'{loaded.step}.json' if own else f'{loaded.step}-{digest[:8]}.json'
  return loaded.path / 'eval' / name


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; an error is reported in one line that names the flag."""
  try:
    rest = flags.FLAGS(argv)
    if rest[1:] or not _WORKDIR.value:
      raise ValueError(f'unknown argument {rest[1]!r}' if rest[1:] else 'no --workdir')
    return rest
  except (flags.Error, ValueError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    sys.exit(exit_codes.REFUSED)


def main(argv: list[str]) -> int:
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  try:
    prompts, options = _GENERATION()
    peer_timeout = base.get_config().stability.peer_timeout
    processes.start(**_PROCESSES(), peer_timeout=peer_timeout)
    if prompts:
      texts = _load(_WORKDIR.value).generate(prompts, **options)
      if jax.process_index() == 0:
        print(*map(''.join, zip(prompts, texts)), sep='\n\n')
      return exit_codes.FINISHED
    if _FIGURES.value and not _PROBE.value:
      raise ValueError('--figures draws what --probe measures: add --probe')
    report = (probe if _PROBE.value else run)(_WORKDIR.value)
  except (ValueError, NotImplementedError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    return exit_codes.REFUSED
  if jax.process_index() == 0 and _PROBE.value:
    print(probes.table(report))
  elif jax.process_index() == 0:
    print(evals.table(report))
    if report['stability'] and (summary := events.summary(report['stability'])):
      print(f'unstable steps up to this one: {summary}')
    print(metrics.dumps(report, indent=None))
  return exit_codes.FINISHED


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
