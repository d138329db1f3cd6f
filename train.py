"""The story of a run: build, restore, loop, save.

  python train.py --config=configs/tiny.py
  python train.py --config=configs/dense_1b7.py:48l,gate=headwise --config.optim.lr=8e-3

The same command again resumes. Exit codes: 0 done, 2 refused (bad input, nothing was
touched), 3 the loss or the gradient is not finite.
"""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import checkpoint, config, data, evals, mesh, metrics, plan, weights

REFUSED, NOT_FINITE = 2, 3

# What may differ between a run and its resumption; the data are held by fingerprint.
MAY_CHANGE = (
  'config.name',
  'config.steps',
  'config.mesh.',
  'config.eval.',
  'config.checkpoint.',
  'config.log.',
  'config.paper.',
  'config.data.',
  # How a step is computed, which moves its last bits only, and what other devices need.
  'config.accum',
  'config.loss.chunk',
  'config.model.layers',
  'config.model.remat',
  'config.model.attn.backend',
  'config.model.attn.max_segments',
  'config.model.moe.backend',
)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', "Default: runs/<recipe>-<config's hash>.")
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check everything, count, and leave.')
_COORDINATOR = flags.DEFINE_string('coordinator', '', "'auto' or HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes form the run.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.')

_log = logging.getLogger('gated')


class Run(NamedTuple):
  """A run that is sure to be allowed, before it costs anything."""

  config: dict  # The resolved recipe.
  workdir: Path
  plan: plan.Plan
  corpus: data.Corpus
  step: jax.stages.Lowered
  weights: weights.Source | None  # What to start from.
  changed: dict[str, Any]  # Knobs that differ from the session before.


def prepare(c: dict, workdir: Path) -> Run:
  """A resolved recipe -> Run; ValueError if it or the workdir cannot be used."""
  cfg = config.build(plan.Config, c, 'config')
  metrics.check_wandb(cfg.log.wandb)
  the = plan.Plan(cfg)
  corpus = data.open(cfg.data, **the.reads)
  changed, latest = _check_owner(workdir, c, corpus.fingerprint)
  if latest is not None and latest > cfg.steps:
    raise ValueError(f'config.steps={cfg.steps}, but {workdir} is at step {latest}')
  start = None
  if cfg.init_from and latest is None:
    start = weights.find(cfg.init_from, the.state.model, corpus)
    changed['config.init_from'] = cfg.init_from, str(start)
    changed |= {f'{knob} since config.init_from': v for knob, v in start.differs.items()}
  told = {'config': c, 'data': corpus.fingerprint['sha256'], 'step': latest}
  mesh.agree('the recipe, the data or the checkpoints', config.digest(told))
  _log.info('%s', the)
  if not corpus.domains:
    _log.info('the data holds nothing out: there is no held-out loss, and no best step')
  return Run(c, workdir, the, corpus, the.train_step(), start, changed)


def train(run: Run) -> None:
  """Prepared -> trained and saved in its workdir."""
  cfg = run.plan.cfg
  run.workdir.mkdir(parents=True, exist_ok=True)
  kept = dict(keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every)
  with checkpoint.Checkpoints(run.workdir / 'checkpoints', **kept) as saved:
    state = _start(run, saved)
    begun = int(state.step)
    first = jax.process_index() == 0
    restored = begun or -1
    if begun:
      _log.info('resumed at step %d of %d', begun, cfg.steps)
    if first:
      metrics.manifest(
        run.workdir / 'run.json',
        config=run.config,
        data=run.corpus.fingerprint,
        step=restored,
        changed=run.changed,
      )
    if begun == cfg.steps:
      return
    window = cfg.log.profile_first, cfg.log.profile_last
    with (
      metrics.Log(
        run.workdir,
        step=restored,
        enabled=first,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
      ) as log,
      metrics.Profile(run.workdir, *window, enabled=first) as profile,
      metrics.Progress(cfg.steps, start=begun, seconds=10, enabled=first) as progress,
    ):
      timer = metrics.Timer(
        tokens_per_step=run.plan.tokens_per_step,
        flops_per_token=run.plan.flops_per_token,
        peak=metrics.peak(jax.devices()[0]),
        devices=jax.device_count(),
      )
      _loop(run, state, Outlets(saved, log, profile, progress, timer))


class Outlets(NamedTuple):
  """What the loop writes to."""

  saved: checkpoint.Checkpoints
  log: metrics.Log
  profile: metrics.Profile
  progress: metrics.Progress
  timer: metrics.Timer


def _loop(run: Run, state, out: Outlets) -> None:
  """Steps from where the state is to the end; metrics are read one step late."""
  cfg, on, corpus = run.plan.cfg, run.plan.mesh, run.corpus
  train_step = run.step.compile()
  evaluate = plan.evaluate_step(cfg.model, on, cfg.loss.chunk)
  batches = corpus.train(int(state.data_step), mesh.rows(on, cfg.batch))
  late = None
  for step in range(int(state.step) + 1, cfg.steps + 1):
    with out.timer.data():
      batch = mesh.place(next(batches), on, cfg.batch)
    out.profile.before(step)
    state, values = train_step(state, batch)
    out.profile.after(step, values)
    if late:
      _record(cfg, *late, out)
    late = step, values
    save = step % cfg.checkpoint.every == 0 or step == cfg.steps
    if save or step % cfg.eval.every == 0:
      _record(cfg, *late, out)
      late = None
      with out.timer.pause():
        heldout = evals.perplexity(
          evaluate,
          state.model,
          corpus,
          on=on,
          batch=run.plan.micro,
          limit=cfg.eval.rows,
        )
        _tell(step, heldout, out)
        if save:
          out.log.sync()
          about = dict(config=run.config, data=corpus.fingerprint)
          out.saved.save(step, state, about | dict(heldout_loss=heldout['loss']))


def _record(cfg: plan.Config, step: int, values, out: Outlets) -> None:
  """Reads a step's metrics and writes them where due; ends a run that is not finite."""
  values = {name: float(value) for name, value in jax.device_get(values).items()}
  out.timer.tick()
  norms = {k: values[k] for k in ('loss', 'grad_norm', 'param_norm')}
  finite = np.isfinite(list(norms.values())).all()
  if step % cfg.log.every == 0 or step == cfg.steps or not finite:
    values |= out.timer.read() | metrics.memory()
    out.log.write(step, 'train', values)
    out.progress.update(step, values)
  if not finite:
    _stop(step, norms, out)


def _tell(step: int, heldout: dict, out: Outlets) -> None:
  """Writes a held-out loss; ends a run where it is not finite."""
  if heldout['loss'] is None:
    return
  flat = {'loss': heldout['loss']}
  for domain, summary in heldout['domains'].items():
    flat |= {f'{domain}/{k}': summary[k] for k in ('nats_per_token', 'bits_per_byte')}
  out.log.write(step, 'heldout', flat)
  bits = [f'{d} {s["bits_per_byte"]:.4f}' for d, s in heldout['domains'].items()]
  out.progress.say(f'step {step}: held-out bits per byte: {", ".join(bits)}')
  if not np.isfinite(heldout['loss']):
    _stop(step, {'held-out loss': heldout['loss']}, out)


def _stop(step: int, numbers: dict[str, float], out: Outlets) -> None:
  told = ', '.join(f'{name} {value}' for name, value in numbers.items())
  last = out.saved.latest()
  raise FloatingPointError(
    f'step {step} is not finite ({told}) and was not saved; '
    f'the last that was is {"none" if last is None else last}'
  )


def _start(run: Run, saved: checkpoint.Checkpoints):
  """The state to go on from: the latest step, other weights, or a fresh start."""
  latest = saved.latest()
  if latest is not None:
    return saved.restore(latest, run.plan.state)
  state = run.plan.init()
  if run.weights:
    model = weights.read(run.weights, run.plan.state.model, state.model)
    state = dataclasses.replace(state, model=model)
  return state


def _check_owner(
  workdir: Path, c: dict, fingerprint: dict
) -> tuple[dict[str, Any], int | None]:
  """-> (knobs that differ from those of the run in `workdir`, its latest step if any).

  ValueError if they may not differ, or if nothing can be written there.
  """
  saves, old, latest = workdir / 'checkpoints', None, None
  parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ValueError(f'--workdir={workdir}: {parent} is no folder that can be written to')
  if saves.is_dir():
    with checkpoint.reading(saves) as saved:
      latest = saved.latest()
      old = saved.about(latest) if latest is not None else None
  manifest = workdir / 'run.json'
  if manifest.exists():
    try:
      old = json.loads(manifest.read_text())
      old = {'config': dict(old['config']), 'data': dict(old['data'])}
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'--workdir={workdir}: {manifest} is damaged: {error!r}'
      ) from error
  elif old is None and (workdir / 'metrics.jsonl').exists():
    raise ValueError(f'--workdir={workdir} has a metrics.jsonl, but no run that made it')
  if old is None:
    return {}, None
  changed = config.differences(old['config'], c)
  refused = {k: v for k, v in changed.items() if not k.startswith(MAY_CHANGE)}
  never = ['config.data.length']
  if c['model']['moe']['experts'] and c['loss']['balance_over'] != 'global':
    never.append('config.accum')  # Routers are asked to balance by micro-batch.
  refused |= {knob: changed[knob] for knob in never if knob in changed}
  if old['data']['sha256'] != fingerprint['sha256']:
    refused['data'] = old['data']['sha256'][:12], fingerprint['sha256'][:12]
  if refused:
    listed = '\n'.join(f'  {k}: {a!r} there, {b!r} here' for k, (a, b) in refused.items())
    raise ValueError(
      f'--workdir={workdir} belongs to a run that differs in\n{listed}\n'
      'Name another workdir, or start from its weights with --config.init_from'
    )
  return changed, latest


def _digest(c: dict) -> str:
  """What names a run's default folder: all of its recipe but what the paper says."""
  return config.digest({knob: c[knob] for knob in c if knob != 'paper'})[:8]


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is told in one line, naming the knob."""
  try:
    config.check_command(argv, config.flatten(base.get_config().to_dict()))
    left = flags.FLAGS(argv)
    if len(left) > 1:
      raise ValueError(f'unknown argument {left[1]!r}')
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing')
    return left
  except Exception as error:
    print(f'train.py: {config.plain(error)}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger('gated').setLevel(logging.INFO)
  c = _CONFIG.value.to_dict()
  try:
    config.build(plan.Config, c, 'config')
    workdir = Path(_WORKDIR.value or f'runs/{c["name"]}-{_digest(c)}')
    mesh.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    run = prepare(c, workdir)
  except (ValueError, NotImplementedError) as error:
    print(f'train.py: {error}', file=sys.stderr)
    return REFUSED
  if _DRY_RUN.value:
    return 0
  try:
    train(run)
  except FloatingPointError as error:
    print(f'train.py: {error}', file=sys.stderr)
    return NOT_FINITE
  if jax.process_index() == 0:
    print(f'done: {workdir}')
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
