"""The story of a run: build, restore, loop, save.

  python train.py --config=configs/tiny.py
  python train.py --config=configs/dense_1b7.py:48l,gate=headwise --config.optim.lr=8e-3

The same command again resumes. Exit codes: 0 done, 2 refused (bad input, nothing was
touched), 3 the loss or the gradient is not finite.
"""

import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import checkpoint, config, data, evals, mesh, metrics, plan

REFUSED, NOT_FINITE = 2, 3

# What may differ between a run and its resumption; the data are held by fingerprint.
MAY_CHANGE = (
  'config.name',
  'config.steps',
  'config.mesh.',
  'config.eval.',
  'config.checkpoint.',
  'config.log.',
  'config.data.mixture',
  'config.data.tokenizer',
  'config.data.cache',
  'config.data.verify',
  'config.data.workers',
  'config.data.prefetch',
)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', "Default: runs/<recipe>-<config's hash>.")
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check everything, count, and leave.')
_COORDINATOR = flags.DEFINE_string('coordinator', '', "'auto' or HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes form the run.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.')

_log = logging.getLogger('gated')


def run(c: dict, workdir: Path, dry_run: bool) -> None:
  """A resolved recipe -> a trained, saved model in `workdir`.

  Raises ValueError before any work for a recipe or a workdir that cannot be used.
  """
  cfg = config.build(plan.Config, c, 'config')
  the = plan.Plan(cfg)
  corpus = data.open(cfg.data, **the.reads)
  changed = _check_owner(workdir, c, corpus.fingerprint)
  weights = _find_weights(cfg.init_from)
  _log.info('%s', the)
  lowered = the.train_step()
  if dry_run:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  first = jax.process_index() == 0
  kept = dict(keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every)
  with checkpoint.Checkpoints(workdir / 'checkpoints', **kept) as saved:
    state = _start(the, saved, weights)
    begun = int(state.step)
    restored = begun or -1
    if begun:
      _log.info('resumed at step %d of %d', begun, cfg.steps)
    if first:
      metrics.manifest(
        workdir / 'run.json',
        config=c,
        data=corpus.fingerprint,
        step=restored,
        changed=changed,
      )
    if begun == cfg.steps:
      return
    window = cfg.log.profile_first, cfg.log.profile_last
    with (
      metrics.Log(
        workdir,
        step=restored,
        enabled=first,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
      ) as log,
      metrics.Profile(workdir, *window, enabled=first) as profile,
    ):
      out = Outlets(c, saved, log, profile, first)
      _loop(the, lowered.compile(), state, corpus, out)


class Outlets(NamedTuple):
  """What the loop writes to."""

  config: dict
  saved: checkpoint.Checkpoints
  log: metrics.Log
  profile: metrics.Profile
  first: bool  # Whether this is process 0, which speaks for all.


def _loop(the: plan.Plan, train_step, state, corpus: data.Corpus, out: Outlets) -> None:
  """Steps from where the state is to the end; metrics are read one step late."""
  cfg, begun = the.cfg, int(state.step)
  evaluate = plan.evaluate_step(cfg.model, the.mesh, cfg.loss.chunk)
  batches = corpus.train(int(state.data_step), mesh.rows(the.mesh, cfg.batch))
  timer = metrics.Timer(
    tokens_per_step=the.tokens_per_step,
    flops_per_token=the.flops_per_token,
    peak=metrics.peak(jax.devices()[0]),
    devices=jax.device_count(),
  )
  progress = metrics.Progress(cfg.steps, start=begun, seconds=10, enabled=out.first)
  late = None
  for step in range(begun + 1, cfg.steps + 1):
    with timer.data():
      batch = mesh.place(next(batches), the.mesh, cfg.batch)
    out.profile.before(step)
    state, values = train_step(state, batch)
    out.profile.after(step, values)
    if late:
      _record(*late, cfg, timer, progress, out)
    late = step, values
    save = step % cfg.checkpoint.every == 0 or step == cfg.steps
    if save or step % cfg.eval.every == 0:
      _record(*late, cfg, timer, progress, out)
      late = None
      with timer.pause():
        heldout = evals.perplexity(
          evaluate,
          state.model,
          corpus,
          mesh=the.mesh,
          batch=the.micro,
          limit=cfg.eval.rows,
        )
        _tell(step, heldout, progress, out)
        if save:
          _save(step, state, heldout['loss'], corpus, out)
  progress.close()


def _save(step: int, state, loss: float, corpus: data.Corpus, out: Outlets) -> None:
  """Starts a save of a state whose own numbers were seen to be finite."""
  if not np.isfinite(loss):
    raise FloatingPointError(f'step {step}: held-out loss {loss}; not saved')
  out.log.sync()
  about = dict(config=out.config, data=corpus.fingerprint, heldout_loss=loss)
  out.saved.save(step, state, about)


def _record(step: int, values, cfg: plan.Config, timer, progress, out: Outlets) -> None:
  """Reads a step's metrics and writes them where due; ends a run that is not finite."""
  values = {name: float(value) for name, value in jax.device_get(values).items()}
  timer.tick()
  finite = np.isfinite([values[k] for k in ('loss', 'grad_norm', 'param_norm')]).all()
  if step % cfg.log.every == 0 or step == cfg.steps or not finite:
    values |= timer.read() | metrics.memory()
    out.log.write(step, 'train', values)
    progress.update(step, values)
  if not finite:
    raise FloatingPointError(
      f'step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, '
      f'parameter norm {values["param_norm"]}; not saved, the last step that was is '
      f'{out.saved.latest() or "none"}'
    )


def _tell(step: int, heldout: dict, progress, out: Outlets) -> None:
  flat = {'loss': heldout['loss']}
  for domain, summary in heldout['domains'].items():
    flat |= {f'{domain}/{k}': summary[k] for k in ('nats_per_token', 'bits_per_byte')}
  out.log.write(step, 'heldout', flat)
  bits = [f'{d} {s["bits_per_byte"]:.4f}' for d, s in heldout['domains'].items()]
  progress.say(f'step {step}: held-out bits per byte: {", ".join(bits)}')


def _start(the: plan.Plan, saved: checkpoint.Checkpoints, weights):
  """The state to go on from: the latest step, other weights, or a fresh start."""
  latest = saved.latest()
  if latest is not None:
    if latest > the.cfg.steps:
      steps = the.cfg.steps
      raise ValueError(f'config.steps={steps}, but {saved.directory} is at {latest}')
    return saved.restore(latest, the.state)
  state = the.init()
  if weights:
    folder, step = weights
    with checkpoint.reading(folder) as source:
      model = source.restore_model(step, the.state.model)
    state = dataclasses.replace(state, model=model)
  return state


def _find_weights(init_from: str) -> tuple[Path, int] | None:
  """'WORKDIR[:STEP]' -> its checkpoints and the step; ValueError if not there."""
  if not init_from:
    return None
  workdir, _, step = init_from.partition(':')
  folder = Path(workdir) / 'checkpoints'
  if not folder.is_dir():
    raise ValueError(f'config.init_from={init_from!r}: there is no {folder}')
  with checkpoint.reading(folder) as source:
    return folder, source.pick(step or 'latest', 'config.init_from')


def _check_owner(workdir: Path, c: dict, fingerprint: dict) -> dict[str, Any]:
  """Which knobs differ from those of the run in `workdir`; ValueError if they may not."""
  manifest, saves = workdir / 'run.json', workdir / 'checkpoints'
  if manifest.exists():
    old = json.loads(manifest.read_text())
  elif saves.is_dir():
    with checkpoint.reading(saves) as saved:
      latest = saved.latest()
      old = saved.about(latest) if latest is not None else None
  else:
    old = None
  if old is None:
    return {}
  changed = config.differences(old['config'], c)
  refused = {k: v for k, v in changed.items() if not k.startswith(MAY_CHANGE)}
  if old['data']['sha256'] != fingerprint['sha256']:
    refused['data'] = old['data']['sha256'][:12], fingerprint['sha256'][:12]
  if refused:
    listed = '\n'.join(f'  {k}: {a!r} there, {b!r} here' for k, (a, b) in refused.items())
    raise ValueError(
      f'--workdir={workdir} belongs to a run that differs in\n{listed}\n'
      'Name another workdir, or start from its weights with --config.init_from'
    )
  return changed


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is told in one line, naming the knob."""
  try:
    known = config.flatten(base.get_config().to_dict())
    for typed in re.findall(r'(?m)^--(config\.[^=]*)', '\n'.join(argv)):
      if not any(f'{knob}.'.startswith(f'{typed}.') for knob in known):
        raise ValueError(f'{typed} is no knob{config.nearest(typed, known)}')
    left = flags.FLAGS(argv)
    if len(left) > 1:
      raise ValueError(f'unknown argument {left[1]!r}')
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing')
    return left
  except Exception as error:
    # A recipe's own error arrives wrapped in its traceback.
    told = str(error).split('Error: ')[-1] if 'Traceback' in str(error) else str(error)
    print(f'train.py: {" ".join(told.split())}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  _log.setLevel(logging.INFO)
  c = _CONFIG.value.to_dict()
  try:
    config.build(plan.Config, c, 'config')
    workdir = Path(_WORKDIR.value or f'runs/{c["name"]}-{config.digest(c)[:8]}')
    mesh.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    run(c, workdir, _DRY_RUN.value)
  except (ValueError, NotImplementedError) as error:
    print(f'train.py: {error}', file=sys.stderr)
    return REFUSED
  except FloatingPointError as error:
    print(f'train.py: {error}', file=sys.stderr)
    return NOT_FINITE
  if jax.process_index() == 0 and not _DRY_RUN.value:
    print(f'done: {workdir}')
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
