"""The story of a run: build, restore, loop, save.

  python train.py --config=configs/tiny.py
  python train.py --config=configs/dense_1b7.py:48l,gate=headwise --config.optim.lr=8e-3

The same command again resumes. Exit codes:

  0  done
  2  refused: bad input or a workdir of another run; nothing was touched
  3  the loss, the gradient or the parameters are not finite, or too many steps were bad
  4  told to leave by SIGTERM: saved, and the same command goes on
  5  another process of the run is lost (134: and JAX's runtime noticed it first)
  6  no step came for config.stability.stuck_after seconds; the stacks are on stderr
  7  a checkpoint could not be written; those before it are whole
  8  another run took the workdir over
"""

import dataclasses
import logging
import sys
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import (
  checkpoint,
  config,
  data,
  deterministic,
  evals,
  ledger,
  mesh,
  metrics,
  outcome,
  plan,
  processes,
  recorder,
  stability,
  storage,
  weights,
)
from gated import workdir as workdirs
from gated.lock import Lock

CODES: dict[type[Exception], int] = {
  workdirs.InUse: outcome.REFUSED,
  metrics.Damaged: outcome.REFUSED,
  FloatingPointError: outcome.UNSTABLE,
  checkpoint.SaveFailed: outcome.NOT_SAVED,
  workdirs.Taken: outcome.TAKEN,
}

# Of these, what all processes of a run meet at the same place.
TOGETHER = workdirs.InUse, FloatingPointError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', "Default: runs/<recipe>-<config's hash>.")
_RESTORE_STEP = flags.DEFINE_string(
  'restore_step', '', 'Go on from this saved step, or fail; the newest otherwise.'
)
_ALLOW = flags.DEFINE_list(
  'allow_change', [], "Knobs, groups of them or 'data' that may differ on resumption."
)
_DETERMINISTIC = flags.DEFINE_bool('deterministic', False, 'To the last bit, on GPUs.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check everything, count, and leave.')
_COORDINATOR = flags.DEFINE_string('coordinator', '', "'auto' or HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes form the run.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.')
_TIMEOUT = flags.DEFINE_float('start_timeout', 300, 'Seconds to wait for all of them.')

_log = logging.getLogger('gated')


class Run(NamedTuple):
  """A run that is sure to be allowed, before it costs anything."""

  config: dict  # The resolved recipe.
  workdir: storage.Path
  plan: plan.Plan
  corpus: data.Corpus
  step: Any  # The train step: lowered, and compiled once the run begins.
  weights: weights.Source | None  # What to start from.
  found: workdirs.Found  # What the workdir holds: the step to go on from.


def prepare(c: dict, workdir: storage.Path) -> Run:
  """A resolved recipe -> Run; ValueError if it or the workdir cannot be used."""
  cfg = config.build(plan.Config, c, 'config')
  metrics.check_wandb(cfg.log.wandb)
  metrics.check_remote(workdir, profile_first=cfg.log.profile_first)
  the = plan.Plan(cfg)
  corpus = data.open(cfg.data, **the.reads)
  fingerprint = corpus.fingerprint
  found = workdirs.check(
    workdir,
    c,
    fingerprint,
    like=the.state,
    allowed=_ALLOW.value or [],
    restore_step=_RESTORE_STEP.value or '',
  )
  start, changed = None, found.changed
  if cfg.init_from and found.step is None:
    start = weights.find(cfg.init_from, the.state.model, corpus)
    changed['config.init_from'] = cfg.init_from, str(start)
    changed |= {f'{knob} since config.init_from': v for knob, v in start.differs.items()}
  told = {'config': c, 'data': fingerprint['sha256'], 'step': found.step}
  processes.agree('the recipe, the data or the checkpoints', config.digest(told))
  _log.info('%s', the)
  if not corpus.domains:
    _log.info('the data holds nothing out: there is no held-out loss, and no best step')
  return Run(c, workdir, the, corpus, the.train_step(), start, found)


def train(run: Run) -> int:
  """Prepared -> trained and saved in its workdir -> the exit code."""
  cfg, folder = run.plan.cfg, run.workdir / 'checkpoints'
  kept = dict(keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every)
  which = lambda: f'This was process {jax.process_index()} of {jax.process_count()}.'
  with (
    workdirs.held(run.workdir) as lock,
    stability.Leaving() as leaving,
    checkpoint.Checkpoints(folder, **kept) as saved,
  ):
    _check_unmoved(run, saved)
    workdirs.begin(run.workdir)
    run = run._replace(step=run.step.compile())
    pulse = stability.Pulse(cfg.stability.stuck_after, code=outcome.STUCK, told=which)
    if jax.process_index() == 0:
      metrics.manifest(
        run.workdir / 'run.json',
        config=run.config,
        data=run.corpus.fingerprint,
        step=run.found.step or -1,
        changed=run.found.changed,
      )
    with pulse:
      try:
        return _sessions(run, Hands(saved, lock, leaving, pulse))
      except FloatingPointError as error:
        last = saved.latest()
        told = f'{error}; it was not saved, the last that was is {last}'
        raise FloatingPointError(told) from error
      except Exception as error:
        known = type(error) in CODES or storage.is_full(error)
        if jax.process_count() > 1 and not known:
          stability.end(error, lost=outcome.LOST_PEER, timeout=cfg.stability.peer_timeout)
        raise


class Hands(NamedTuple):
  """What a run holds from its first session to its last."""

  saved: checkpoint.Checkpoints
  lock: Lock
  leaving: stability.Leaving
  pulse: stability.Pulse


def _sessions(run: Run, hands: Hands) -> int:
  """To the end of the run, or until it has to leave, however often it goes back."""
  while True:
    try:
      return _session(run, hands)
    except recorder.GoBack as back:
      data_step = back.data_step
    good = hands.saved.newest_good()
    assert good is not None  # Step 0 at least.
    _log.warning('going back to step %d, and past the data of this one', good)
    hands.saved.go_back(good, data_step=data_step)
    run = run._replace(found=run.found._replace(step=good))


def _session(run: Run, hands: Hands) -> int:
  """From where the checkpoints stand to the end of the run, or until it has to leave."""
  cfg = run.plan.cfg
  state = _start(run, hands.saved)
  step, data_step = int(state.step), int(state.data_step)
  if step:
    _log.info('resumed at step %d of %d', step, cfg.steps)
  if step == cfg.steps:
    return 0
  with recorder.Recorder(
    run.plan,
    run.corpus,
    run.workdir,
    step=step,
    data_step=data_step,
    beat=hands.pulse.beat,
  ) as record:
    if run.found.step is None and cfg.stability.on_spike == 'rollback':
      _save(run, state, hands, record, None)  # Something to go back to from the start.
    code = _loop(run, state, hands, record)
  if jax.process_index() == 0 and record.ledger.events:
    told = ledger.told(record.ledger.report())
    print(f'not undisturbed: {told} ({ledger.NAME})', file=sys.stderr)
  return code


def _loop(run: Run, state, hands: Hands, record: recorder.Recorder) -> int:
  """Steps from where the state is to the end; metrics are read one step late."""
  cfg, on, corpus = run.plan.cfg, run.plan.mesh, run.corpus
  evaluate = plan.evaluate_step(cfg.model, on, cfg.loss.chunk)
  indicators = run.plan.indicators()
  batches = corpus.train(int(state.data_step), mesh.rows(on, cfg.batch))
  owed = False  # Whether a save was due at a step that was not finite.
  for step in range(int(state.step) + 1, cfg.steps + 1):
    with record.timer.data():
      batch = mesh.place(next(batches), on, cfg.batch)
    record.profile.before(step)
    state, values = run.step(state, batch)
    record.profile.after(step, values)
    record.take(step, values, indicators(step, state.model, batch))
    hands.saved.check()
    workdirs.check_held(hands.lock)
    leave = hands.leaving.now(step)
    due = step % cfg.checkpoint.every == 0 or step == cfg.steps
    look = due or step % cfg.eval.every == 0
    owed |= due or leave
    if not (look or owed):
      continue
    finite, loss = record.settle(), None
    if look:
      with record.timer.pause():
        heldout = evals.perplexity(
          evaluate,
          state.model,
          corpus,
          on=on,
          batch=run.plan.micro,
          limit=cfg.eval.rows,
        )
        loss = record.heldout(step, heldout)
    if owed and finite:
      with record.timer.pause():
        _save(run, state, hands, record, loss)
      owed = False
    if leave and not owed:
      record.say(f'told to leave at step {step}, which is saved')
      return 0 if step == cfg.steps else outcome.TOLD_TO_LEAVE
  if owed:
    raise FloatingPointError(f'step {cfg.steps}, the last, is not finite')
  return 0


def _save(run: Run, state, hands: Hands, record: recorder.Recorder, heldout_loss) -> None:
  """Starts to save a state that was seen to be finite."""
  record.sync()
  about = dict(config=run.config, data=run.corpus.fingerprint)
  about |= dict(heldout_loss=heldout_loss, stability=record.ledger.report())
  hands.saved.save(int(state.step), state, about)
  hands.pulse.beat(int(state.step))


def _check_unmoved(run: Run, saved: checkpoint.Checkpoints) -> None:
  """InUse if the run that had the workdir has gone on since it was looked at."""
  if saved.steps() != run.found.steps:
    raise workdirs.InUse(f'--workdir={run.workdir} has moved on meanwhile: start again')


def _start(run: Run, saved: checkpoint.Checkpoints):
  """The state to go on from: a saved step, other weights, or a fresh start."""
  if run.found.step is not None:
    state = saved.restore(run.found.step, run.plan.state)
    data_step = saved.go_back(run.found.step)
    if data_step is not None:
      where = state.data_step.sharding
      state = dataclasses.replace(
        state, data_step=jax.device_put(np.int32(data_step), where)
      )
    return state
  state = run.plan.init()
  if run.weights:
    model = weights.read(run.weights, run.plan.state.model, state.model)
    state = dataclasses.replace(state, model=model)
  return state


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
    sys.exit(outcome.REFUSED)


def main(argv: list[str]) -> int:
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger('gated').setLevel(logging.INFO)
  c = _CONFIG.value.to_dict()
  try:
    cfg = config.build(plan.Config, c, 'config')
    if _DETERMINISTIC.value:
      deterministic.ask()
    workdir = storage.path(_WORKDIR.value or f'runs/{c["name"]}-{_digest(c)}')
    where = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    peer_timeout = cfg.stability.peer_timeout
    processes.start(*where, peer_timeout=peer_timeout, start_timeout=_TIMEOUT.value)
    run = prepare(c, workdir)
  except (ValueError, NotImplementedError) as error:
    print(f'train.py: {error}', file=sys.stderr)
    return outcome.REFUSED
  if _DRY_RUN.value:
    return 0
  try:
    code = train(run)
    workdirs.conclude(workdir, code, 'done' if code == 0 else 'told to leave')
  except tuple(CODES) as error:
    print(f'train.py: {error}', file=sys.stderr)
    code = CODES[type(error)]
    if code not in (outcome.REFUSED, outcome.TAKEN):  # Of those, another has the workdir.
      workdirs.conclude(workdir, code, str(error))
    if not isinstance(error, TOGETHER):
      stability.leave(code)
  except Exception as error:
    full = storage.is_full(error)
    workdirs.conclude(workdir, outcome.NOT_SAVED if full else outcome.FAILED, str(error))
    if not full:
      raise
    print(f'train.py: --workdir={workdir} cannot be written: {error}', file=sys.stderr)
    stability.leave(outcome.NOT_SAVED)
  if code == 0 and jax.process_index() == 0:
    print(f'done: {workdir}')
  return code


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
