"""Sweeps with crafted logs, for the tests of reports."""

import csv
import io
import math

import numpy as np

from configs import base
from gated import storage, sweep
from gated.run.metrics import records
from gated.sweep import judge
from gated.sweep.report import points, published, results, tables, text

RULE = judge.Rule(multiple=1.5, rise=0.5, tail=0.05)
STEPS, INIT = 200, 6.0
RATES = (1e-3, 4e-3, 8e-3)
VARIANTS = {
  'baseline': {},
  'elementwise': {'model.attn.gate.position': 'sdpa'},
  'stuck': {'model.branch_norm': 'rms'},
}


def losses(kind: str, level: float, seed: int) -> np.ndarray:
  """A training curve that falls from INIT to about `level`."""
  n = {'partial': 60, 'failed': 20, 'broken': 120}.get(kind, STEPS)
  step = np.arange(n)
  noise = np.random.default_rng(seed).normal(0, 0.005, n)
  loss = level + (INIT - level) * np.exp(-step / 10) + noise
  loss[0] = INIT
  if kind == 'spiky':
    for at, height in ((80, 0.9), (140, 0.4)):
      loss[at : at + 6] += height * np.exp(-np.arange(6) / 2)
  if kind in ('lost', 'broken'):
    loss[90:] = 5.5 + noise[90:]
  if kind == 'broken':
    loss[-1] = math.nan
  return loss


def run(
  workdir: storage.Path, kind: str, level: float, seed: int, *, heldout=False, **of
):
  """Writes the files of a run into a workdir; `of` may hold its probes and its data."""
  if kind == 'absent':
    return
  lines = []
  loss = losses(kind, level, seed)
  for i, value in enumerate(loss):
    wild = kind in ('lost', 'broken') and i > 85
    norm = 30.0 if wild else 1.0 + 0.1 * math.sin(i)
    train = {'loss': float(value), 'grad_norm': norm, 'param_norm': 10.0}
    train |= {'update_norm': 0.01, 'lr': 1e-3, 'tokens': 256.0, 'skipped': 0.0}
    train |= {'spikes': 0.0, 'verdict': 0.0 if math.isfinite(value) else 1.0}
    train |= {'step_seconds': 0.5, 'tokens_per_second': 512.0}
    lines.append({'step': i + 1, 'kind': 'train', 'time': 1e9 + i} | train)
    if i % 20 == 19:
      logits = {'attention_logit': 300.0 if wild else 6.0, 'output_logit': 1.0 + i / 100}
      residual = {'residual_rms_first': 1.0, 'residual_rms_last': 3.0}
      record = {
        'step': i + 1,
        'kind': 'indicators',
        'time': 1e9 + i,
        **logits,
        **residual,
      }
      lines.append(record | {'residual_growth': 3.0})
  if heldout and len(loss) == STEPS:
    held = {'loss': float(loss[-1]) + 0.05}
    lines.append({'step': STEPS, 'kind': 'heldout', 'time': 1e9} | held)
  if of.get('probes'):
    lines += [
      {
        'step': step,
        'kind': 'probes',
        'time': 1e9,
        **{k: v * factor for k, v in of['probes'].items()},
      }
      for step, factor in ((1, 9.0), (len(loss) - 2, 1.0))
    ]
  storage.write(workdir / 'metrics.jsonl', b''.join(map(records.line, lines)))
  session = {'devices': 2, 'device_kind': 'cpu'}
  storage.write_json(
    workdir / 'run.json',
    {'config': {}, 'data': {'sha256': of.get('data', '0a1b')}, 'sessions': [session]},
  )
  code = {'broken': 3, 'failed': 1, 'partial': 4}.get(kind, 0)
  end = {'code': code, 'step': len(loss), 'told': f'{kind} | why', 'time': 1e9}
  storage.write_json(workdir / 'outcome.json', end)


def point(changes: dict, **labels: str) -> sweep.Point:
  """Labels and their knobs -> a point."""
  c = base.get_config()
  c.update_from_flattened_dict({'steps': STEPS} | changes)
  name = '-'.join(labels.values()).replace('/', '_')
  return sweep.Point(
    name=f'{name}-0a1b2c',
    labels=labels,
    changes=changes,
    command=('train.py',),
    config=c.to_dict(),
  )


def grid(variants, rates=RATES, seeds=(0, 1, 2)) -> list[sweep.Point]:
  return [
    point(
      {'optim.lr': lr, 'seed': seed} | VARIANTS.get(v, {}),
      variant=v,
      lr=f'{lr:g}',
      seed=str(seed),
    )
    for v in variants
    for lr in rates
    for seed in seeds
  ]


def fate(p: sweep.Point) -> tuple[str, float]:
  """A point -> the kind of its run, and its final loss."""
  lr, seed = p.config['optim']['lr'], p.config['seed']
  baseline = p.labels['variant'] == 'baseline'
  level = (2.5 if baseline else 2.4) + 20 * abs(lr - 4e-3) + 0.003 * seed
  kind = 'spiky' if lr == 4e-3 and baseline else 'calm'
  if lr == 8e-3 and baseline:
    kind = ('lost', 'broken', 'calm')[seed]
  return kind, level


def trained(folder, grid, fate=fate, *, heldout=False, name='lab', **of) -> sweep.Sweep:
  """A sweep whose points have run; `of` maps a point to more of its run, by name."""
  swept = sweep.Sweep(
    folder=storage.path(folder),
    name=name,
    recipe='configs/lab.py',
    overrides=(),
    flags=(),
    points=tuple(grid),
    rule=RULE,
  )
  for i, p in enumerate(grid):
    more = {key: give(p) for key, give in of.items()}
    kind, level = fate(p)
    run(swept.workdir(p), kind, level, i, heldout=heldout, **more)
  return swept


def judged(*sweeps):
  """Sweeps -> their judged points, and their lines."""
  batch = points.read(sweeps, RULE, {})
  return batch, points.gather(batch)


def described(swept, result=None, *, baseline='', resolve=None) -> str:
  """The Markdown of a sweep's report, without figures; `result` is that of `judged`."""
  batch, lines = result or judged(swept)
  return text.markdown(
    text.Report(
      name=swept.name,
      about={'recipe': swept.recipe},
      points=batch,
      lines=lines,
      rule=RULE,
      spikes={},
      baseline=results.baseline(lines, baseline),
      rows=published.rows(lines, resolve),
      notes={},
      captions={},
    )
  )


def rows(table: tables.Table) -> list[dict[str, str]]:
  return list(csv.DictReader(io.StringIO(table.csv().decode())))
