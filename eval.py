"""The story of an evaluation: load, measure, report.

  python eval.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=best
  python eval.py --workdir=Qwen3-0.6B --data=DIR --length=4096
  python eval.py --workdir=runs/demo --prompt="def fib(" --max_tokens=64

Prints a table of held-out loss by domain, beside two yardsticks on the same text, and as
its last line the report as JSON, which it also writes to WORKDIR/eval/STEP.json. Nothing
is written to a Hugging Face folder. With --prompt it prints the prompt and how the model
continues it instead. Exit code 2: refused.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

import gated
from configs import base
from gated import config, data, evals, storage
from gated.devices import mesh, processes
from gated.plan.load import Loaded
from gated.run import events, exit_codes, metrics

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'The workdir of a run of train.py, or a Hugging Face folder.'
)
_STEP = flags.DEFINE_string('step', 'latest', 'latest, best (held-out), or a number.')
_DATA = flags.DEFINE_string(
  'data', '', "Another mixture; default: the run's own; stdlib for a Hugging Face folder."
)
_LENGTH = flags.DEFINE_integer(
  'length', 0, 'Tokens in a row, for a Hugging Face folder; default: that of base.py.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'Tokenizer of stdlib, for a Hugging Face folder; default: base.py.'
)
_CACHE = flags.DEFINE_string('cache', '', 'Folder of the embedded corpus.')
_ROWS = flags.DEFINE_integer('rows', 0, 'Held-out rows read per domain; 0 for all.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows per device at a time.')
_BIGRAM_ROWS = flags.DEFINE_integer(
  'bigram_rows', 65536, 'The most training rows that the bigram model is fitted to.'
)
_XZ_BYTES = flags.DEFINE_integer(
  'xz_bytes', 1 << 26, 'Bytes of each domain that xz compresses; 0 for all.'
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


def _load(workdir: str) -> Loaded:
  """The model; flags that do not apply to it are refused."""
  is_run = bool(storage.names(storage.path(workdir) / 'checkpoints'))
  if not is_run and _STEP.value != 'latest':
    raise ValueError(f'--step={_STEP.value!r}, but {workdir} has no steps')
  for flag in (_LENGTH, _TOKENIZER):
    if is_run and flag.value:
      raise ValueError(f'--{flag.name}={flag.value}, but {workdir} is a run with its own')
  try:
    step = _STEP.value if is_run else ''
    return gated.load(workdir, step=step, cache=_CACHE.value)
  except ValueError as error:
    flagged = f'--workdir={workdir} --step={_STEP.value!r}'
    raise ValueError(f'{flagged}: {error}') from error


def _corpus(loaded: Loaded) -> data.Corpus:
  """The held-out text: of --data, or the run's own."""
  if loaded.about:
    return _corpus_of_run(loaded, _DATA.value)
  c = base.get_config().to_dict()
  flagged = dict(mixture=_DATA.value, length=_LENGTH.value, tokenizer=_TOKENIZER.value)
  knobs = {k: v for k, v in (flagged | dict(cache=_CACHE.value)).items() if v}
  cfg = config.build(data.Config, c['data'] | knobs, 'config.data')
  corpus = data.open(cfg, vocab=loaded.cfg.vocab, batch=1, seed=c['seed'], max_segments=0)
  file = Path(loaded.path) / 'tokenizer.json'
  if file.is_file():
    corpus.check_tokenizer(file)
  else:
    print(f'eval.py: no {file}: the tokenizer of --data is not checked', file=sys.stderr)
  return corpus


def _corpus_of_run(loaded: Loaded, mixture: str) -> data.Corpus:
  """The data that a run was trained on, verified to be the same, or another mixture."""
  c, fingerprint = loaded.config, (loaded.about or {})['data']
  # The cache is a matter of this machine, not of the checkpoint.
  knobs = c['data'] | {'cache': _CACHE.value} | ({'mixture': mixture} if mixture else {})
  cfg = config.build(data.Config, knobs, 'config.data')
  # With a batch of one row, row i is the run's i-th row.
  corpus = data.open(
    cfg, vocab=c['model']['vocab'], batch=1, seed=c['seed'], max_segments=0
  )
  if not mixture and corpus.fingerprint['sha256'] != fingerprint['sha256']:
    raise ValueError(
      f'config.data.mixture={cfg.mixture!r} is no longer the data of the run (another '
      'Python version, or another dataset in that place): name a mixture with --data'
    )
  if corpus.fingerprint['tokenizer'] != fingerprint['tokenizer']:
    raise ValueError(f'--data={mixture!r} has another tokenizer than the run')
  return corpus


def _add_yardsticks(report: dict, loaded: Loaded, corpus: data.Corpus) -> None:
  """Adds the yardsticks, fitted to the rows that the run was trained on."""
  trained, rows = corpus, corpus.rows
  if loaded.about and loaded.step is not None:
    rows = loaded.step * loaded.config['batch']
    trained = _corpus_of_run(loaded, '') if _DATA.value else corpus
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
  """Parses the command line; a mistake in it is one line that names the flag."""
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
    report = run(_WORKDIR.value)
  except (ValueError, NotImplementedError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    return exit_codes.REFUSED
  if jax.process_index() == 0:
    print(evals.table(report))
    if report['stability'] and (summary := events.summary(report['stability'])):
      print(f'unstable steps up to this one: {summary}')
    print(metrics.dumps(report, indent=None))
  return exit_codes.FINISHED


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
