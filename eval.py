"""The story of an evaluation: restore, measure, report.

  python eval.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=best

Prints a table by domain of held-out text, beside two yardsticks on the same text, and as
its last line the report as JSON, which it also writes to WORKDIR/eval/STEP.json. Exit
code 2: refused.
"""

import itertools
import logging
import sys
from pathlib import Path

import absl.logging
import jax
import numpy as np
from absl import app, flags

from gated import checkpoint, config, data, evals, mesh, metrics, model, plan

_WORKDIR = flags.DEFINE_string('workdir', '', 'Of a run of train.py.')
_STEP = flags.DEFINE_string('step', 'latest', 'latest, best (held-out), or a number.')
_DATA = flags.DEFINE_string('data', '', "Another mixture; '' is the run's own.")
_CACHE = flags.DEFINE_string('cache', '', "Where the embedded corpus is; '' as usual.")
_ROWS = flags.DEFINE_integer('rows', 0, 'Held-out rows read per domain; 0 for all.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows per device at a time.')
_BIGRAM = flags.DEFINE_integer(
  'bigram_rows', 65536, 'At most so many training rows are fitted by the bigram model.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', '', "'auto' or HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes evaluate.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.')


def run(workdir: Path) -> dict:
  """A workdir -> the report; ValueError for what cannot be evaluated."""
  directory = workdir / 'checkpoints'
  if not directory.is_dir():
    raise ValueError(f'--workdir={workdir}: it holds no checkpoints')
  for name, value, low in (('rows', _ROWS.value, 0), ('batch', _BATCH.value, 1)):
    config.at_least(f'--{name}', value, low)
  with checkpoint.reading(directory) as saved:
    step = saved.pick(_STEP.value, '--step')
    about = saved.about(step)
    c = about['config']
    on = _mesh(c)
    cfg = config.build(model.Config, c['model'], 'config.model')
    weights = mesh.shardings(model.abstract(cfg), on)
    params = saved.restore_model(step, plan.placed(model.abstract(cfg), weights))
  corpus = _open(c, about['data'])
  batch = _BATCH.value * mesh.ways('batch', on)
  evaluate = plan.evaluate_step(cfg, on, c['loss']['chunk'])
  report = {'step': step} | evals.perplexity(
    evaluate, params, corpus, mesh=on, batch=batch, limit=_ROWS.value
  )
  report['data'] = corpus.fingerprint['sha256']
  if jax.process_index() == 0:
    seen = step * c['batch']
    for domain, yardsticks in _yardsticks(corpus, seen).items():
      report['domains'][domain] |= yardsticks
    report['bigram_rows'] = min(seen, _BIGRAM.value)
    metrics.write_json(_folder(workdir) / f'{step}.json', report)
  return report


def _mesh(c: dict):
  """All devices, with the weights split over as many as divide the model's width."""
  devices = jax.device_count()
  fsdp = next(
    n for n in range(devices, 0, -1) if c['model']['width'] % n == 0 == devices % n
  )
  return mesh.make(data=devices // fsdp, fsdp=fsdp, expert=1, tensor=1, context=1)


def _open(c: dict, fingerprint: dict) -> data.Corpus:
  """The run's own data, checked to be the same; or the mixture of --data."""
  knobs = c['data'] | {'cache': _CACHE.value or c['data']['cache']}
  knobs |= {'mixture': _DATA.value} if _DATA.value else {}
  cfg = config.build(data.Config, knobs, 'config.data')
  most = c['model']['attn']['max_segments'] if c['model']['mask_documents'] else 0
  opts = dict(vocab=c['model']['vocab'], batch=1, seed=c['seed'], max_segments=most)
  corpus = data.open(cfg, **opts)
  if not _DATA.value and corpus.fingerprint['sha256'] != fingerprint['sha256']:
    raise ValueError(
      f'config.data.mixture={cfg.mixture!r} is no longer what the run was trained on '
      '(another Python version, or another dataset at that place); name data to '
      'evaluate on with --data'
    )
  if corpus.fingerprint['tokenizer'] != fingerprint['tokenizer']:
    raise ValueError(f'--data={_DATA.value} has another tokenizer than the run')
  return corpus


def _yardsticks(corpus: data.Corpus, seen: int) -> dict[str, dict[str, float]]:
  """By domain: bits per byte of a bigram model of the rows trained on, and of xz."""
  # A corpus opened with a batch of one row reads what the run read, row by row.
  rows = itertools.islice(corpus.train(0, [0]), min(seen, _BIGRAM.value))
  pairs = ((row.tokens, row.targets, row.weights) for row in rows)
  bigram = evals.Bigram.fit(pairs, vocab=corpus.vocab)
  return {d: _beside(corpus, d, bigram) for d in corpus.domains}


def _beside(corpus: data.Corpus, domain: str, bigram: evals.Bigram) -> dict[str, float]:
  nats, size = 0.0, 0
  rows = range(64)
  held = corpus.heldout(domain, batch=len(rows), rows=rows, limit=_ROWS.value)
  for batch, bytes_B in held:
    nats += (bigram.nll(batch.tokens, batch.targets) * batch.weights).sum()
    size += int(bytes_B.sum())
  text = corpus.heldout_text(domain, _ROWS.value)
  return {
    'bigram_bits_per_byte': float(nats / np.log(2) / size),
    'xz_bits_per_byte': evals.xz(text),
  }


def _folder(workdir: Path) -> Path:
  folder = workdir / 'eval'
  folder.mkdir(exist_ok=True)
  return folder


def main(argv: list[str]) -> int:
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  try:
    if len(argv) > 1 or not _WORKDIR.value:
      raise ValueError(f'unknown argument {argv[1]!r}' if argv[1:] else 'no --workdir')
    mesh.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    report = run(Path(_WORKDIR.value))
  except (ValueError, NotImplementedError) as error:
    print(f'eval.py: {error}', file=sys.stderr)
    return 2
  if jax.process_index() == 0:
    print(evals.table(report))
    print(metrics.dumps(report, indent=None))
  return 0


if __name__ == '__main__':
  app.run(main)
