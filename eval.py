"""The story of an evaluation: restore or import, measure, report.

  python eval.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=best
  python eval.py --workdir=Qwen3-0.6B --data=DIR --length=4096

Prints a table by domain of held-out text, beside two yardsticks on the same text, and as
its last line the report as JSON, which it also writes to WORKDIR/eval/STEP.json. In place
of a workdir may stand a folder of Hugging Face's, to which nothing is written. Exit code
2: refused.
"""

import dataclasses
import itertools
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from configs import base
from gated import config, data, evals, hf, model, plan, storage
from gated.devices import mesh, processes
from gated.run import checkpoint, events, metrics

REFUSED = 2

# Of what a checkpoint says about itself.
NEEDED = (
  'config.model',
  'config.data',
  'config.loss.chunk',
  'config.seed',
  'config.batch',
  'data.sha256',
  'data.tokenizer',
  'stability.rollbacks',
)

_WORKDIR = flags.DEFINE_string(
  'workdir', '', "Of a run of train.py, or a Hugging Face checkpoint's folder."
)
_STEP = flags.DEFINE_string('step', 'latest', 'latest, best (held-out), or a number.')
_DATA = flags.DEFINE_string(
  'data', '', "Another mixture; '' is the run's own, stdlib for a Hugging Face folder."
)
_LENGTH = flags.DEFINE_integer(
  'length', 0, "Tokens in a row, for a Hugging Face folder; 0 is base.py's."
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', "Of stdlib, for a Hugging Face folder; '' is base.py's."
)
_CACHE = flags.DEFINE_string('cache', '', "Where the embedded corpus is; '' as usual.")
_ROWS = flags.DEFINE_integer('rows', 0, 'Held-out rows read per domain; 0 for all.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows per device at a time.')
_BIGRAM_ROWS = flags.DEFINE_integer(
  'bigram_rows', 65536, 'At most so many of the training rows seen fit the bigram model.'
)
_XZ_BYTES = flags.DEFINE_integer(
  'xz_bytes', 1 << 26, 'xz compresses the first so many bytes of a domain; 0 for all.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', '', "'auto' or HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes evaluate.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.')
_TIMEOUT = flags.DEFINE_float('start_timeout', 300, 'Seconds to wait for all of them.')


class Subject(NamedTuple):
  """What is evaluated, and on what."""

  cfg: model.Config
  params: model.Transformer
  on: Mesh
  corpus: data.Corpus
  chunk: int  # Tokens per device whose logits exist at a time.
  step: int | None  # Of a run; None for imported weights.
  about: dict | None  # What the run saved with the step.


def run(workdir: storage.Path) -> dict:
  """A workdir, or a folder of Hugging Face's -> the report.

  ValueError for what cannot be evaluated.
  """
  for flag, low in (
    (_ROWS, 0), (_XZ_BYTES, 0), (_BATCH, 1), (_BIGRAM_ROWS, 1), (_LENGTH, 0)
  ):  # fmt: skip
    config.at_least(f'--{flag.name}', flag.value, low)
  folder = Path(workdir)
  if not storage.is_remote(workdir) and hf.is_checkpoint(folder):
    subject = _imported(folder)
  else:
    subject = _restored(workdir)
  cfg, params, on, corpus, chunk, step, about = subject
  batch = _BATCH.value * mesh.ways('batch', on)
  evaluate = plan.evaluate_step(cfg, on, chunk)
  limit = _ROWS.value
  report: dict[str, Any] = {'step': step} | evals.perplexity(
    evaluate, params, corpus, on=on, batch=batch, limit=limit
  )
  if not report['domains']:
    raise ValueError(f'--data={_DATA.value!r}: nothing is held out there to evaluate on')
  if jax.process_index() == 0:
    yardsticks = _yardsticks(subject)
    for domain, summary in report['domains'].items():
      summary |= yardsticks[domain]
    report |= {'data': corpus.fingerprint['sha256'], 'rows_limit': limit}
    report['stability'] = about['stability'] if about else None
    if step is not None and about is not None:
      metrics.write_json(_path(workdir, step, corpus, about), report)
  return report


def _restored(workdir: storage.Path) -> Subject:
  """A step of a run, on the run's own data or on others."""
  directory = workdir / 'checkpoints'
  if not storage.names(directory):
    raise ValueError(
      f'--workdir={workdir}: it holds no checkpoints, nor config.json and *.safetensors'
    )
  for flag in (_LENGTH, _TOKENIZER):
    if flag.value:
      raise ValueError(f'--{flag.name}={flag.value}, but {workdir} is a run with its own')
  with checkpoint.Reader(directory) as saved:
    step = saved.pick(_STEP.value, '--step')
    about = saved.about(step)
    try:
      for knob in NEEDED:
        config.dig(about, knob)
    except ValueError as error:
      raise ValueError(f'{directory / str(step)}: {error}') from error
    corpus = _open(about, _DATA.value)
    c = about['config']['model']
    cfg = _fitting(config.build(model.Config, c, 'config.model'), corpus)
    on, like = plan.reading(cfg)
    params = saved.restore_model(step, like)
  return Subject(cfg, params, on, corpus, about['config']['loss']['chunk'], step, about)


def _imported(folder: Path) -> Subject:
  """Hugging Face's weights, on data of the same tokenizer."""
  if _STEP.value != 'latest':
    raise ValueError(f'--step={_STEP.value!r}, but {folder} has no steps')
  cfg, c = hf.config(folder), base.get_config().to_dict()
  told = dict(mixture=_DATA.value, length=_LENGTH.value, tokenizer=_TOKENIZER.value)
  knobs = {k: v for k, v in (told | dict(cache=_CACHE.value)).items() if v}
  data_cfg = config.build(data.Config, c['data'] | knobs, 'config.data')
  corpus = data.open(data_cfg, vocab=cfg.vocab, batch=1, seed=c['seed'], max_segments=0)
  theirs = folder / 'tokenizer.json'
  if theirs.is_file():
    corpus.check_tokenizer(theirs)
  else:
    print(f'eval.py: {theirs} is not there: the data may be of another', file=sys.stderr)
  cfg = _fitting(cfg, corpus)
  on, like = plan.reading(cfg)
  params = hf.read(folder, like)
  return Subject(cfg, params, on, corpus, c['loss']['chunk'], None, None)


def _fitting(cfg: model.Config, corpus: data.Corpus) -> model.Config:
  """A model that takes the data's rows: more documents only cost a kernel more."""
  most = max(cfg.attn.max_segments, corpus.max_segments)
  return dataclasses.replace(cfg, attn=dataclasses.replace(cfg.attn, max_segments=most))


def _open(about: dict, mixture: str) -> data.Corpus:
  """The run's own data, checked to be the same ('' for `mixture`), or another mixture."""
  c, fingerprint = about['config'], about['data']
  # Where something is built is for who evaluates to say, not for a checkpoint.
  knobs = c['data'] | {'cache': _CACHE.value}
  knobs |= {'mixture': mixture} if mixture else {}
  cfg = config.build(data.Config, knobs, 'config.data')
  # A corpus opened with a batch of one row reads what the run read, row by row.
  vocab, seed = c['model']['vocab'], c['seed']
  corpus = data.open(cfg, vocab=vocab, batch=1, seed=seed, max_segments=0)
  if not mixture and corpus.fingerprint['sha256'] != fingerprint['sha256']:
    raise ValueError(
      f'config.data.mixture={cfg.mixture!r} is no longer what the run was trained on '
      '(another Python version, or another dataset at that place); name data to '
      'evaluate on with --data'
    )
  if corpus.fingerprint['tokenizer'] != fingerprint['tokenizer']:
    raise ValueError(f'--data={mixture!r} has another tokenizer than the run')
  return corpus


def _yardsticks(subject: Subject) -> dict[str, dict]:
  """By domain: bits per byte of a bigram model, and of xz.

  The bigram model is fitted to the rows that the run has trained on; for imported
  weights, to the rows that there are.
  """
  corpus, about, seen = subject.corpus, subject.about, subject.corpus.rows
  if about is not None and subject.step is not None:
    seen = subject.step * about['config']['batch']
  seen = min(seen, _BIGRAM_ROWS.value)
  trained = _open(about, '') if _DATA.value and about else corpus
  rows = itertools.islice(trained.train(0, [0]), seen)
  pairs = ((row.tokens, row.targets, row.weights) for row in rows)
  bigram = evals.Bigram.fit(pairs, vocab=corpus.vocab)
  fitted = {'bigram_rows': seen}
  return {d: fitted | _beside(corpus, d, bigram) for d in corpus.domains}


def _beside(corpus: data.Corpus, domain: str, bigram: evals.Bigram) -> dict[str, float]:
  nats, size = 0.0, 0
  rows = range(64)
  held = corpus.heldout(domain, batch=len(rows), rows=rows, limit=_ROWS.value)
  for batch, bytes_B in held:
    nats += (bigram.nll(batch.tokens, batch.targets) * batch.weights).sum()
    size += int(bytes_B.sum())
  text = corpus.heldout_text(domain, _ROWS.value)[: _XZ_BYTES.value or None]
  return {
    'bigram_bits_per_byte': float(nats / np.log(2) / size),
    'xz_bits_per_byte': evals.xz(text),
    'xz_bytes': len(text),
  }


def _path(
  workdir: storage.Path, step: int, corpus: data.Corpus, about: dict
) -> storage.Path:
  """WORKDIR/eval/STEP.json; on other data than the run's own, with their name added."""
  folder, digest = workdir / 'eval', corpus.fingerprint['sha256']
  own = digest == about['data']['sha256']
  return folder / (f'{step}.json' if own else f'{step}-{digest[:8]}.json')


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is told in one line."""
  try:
    left = flags.FLAGS(argv)
    if left[1:] or not _WORKDIR.value:
      raise ValueError(f'unknown argument {left[1]!r}' if left[1:] else 'no --workdir')
    return left
  except (flags.Error, ValueError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  try:
    where = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    peer_timeout = base.get_config().stability.peer_timeout
    processes.start(*where, peer_timeout=peer_timeout, start_timeout=_TIMEOUT.value)
    report = run(storage.path(_WORKDIR.value))
  except (ValueError, NotImplementedError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    return REFUSED
  if jax.process_index() == 0:
    print(evals.table(report))
    if report['stability'] and (told := events.summary(report['stability'])):
      print(f'the run was not undisturbed up to this step: {told}')
    print(metrics.dumps(report, indent=None))
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
