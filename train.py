"""The story of a run: build, restore, loop, save.

  python train.py --config=configs/tiny.py
  python train.py --config=configs/dense_1b7.py:48l,gate=headwise --config.optim.lr=8e-3

The same command again resumes. The exit codes are listed in gated/run/exit_codes.py.
"""

import logging
import sys
from typing import Any

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import config, data, storage
from gated.data.progress import Progress
from gated.devices import determinism, mesh, processes, programs
from gated.plan import Run, command, evaluate_step, home, prepare, recipe
from gated.plan.session import Services, Session
from gated.run import checkpoint, exit_codes, recorder, shutdown, terminal
from gated.run import workdir as workdirs
from gated.run.pulse import Pulse

_CONFIG = command.define_recipe(flags, config_flags)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', "Folder of the run; default: runs/<recipe>-<config's hash>."
)
_RESTORE_STEP = flags.DEFINE_string(
  'restore_step', '', 'Resume from this saved step: a number, latest or best.'
)
_ALLOW = flags.DEFINE_list(
  'allow_change', [], "Knobs, groups of knobs or 'data' that may change on resumption."
)
_DETERMINISTIC = flags.DEFINE_bool('deterministic', False, 'Bit-exact results on GPUs.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check, count parameters, and exit.')
_PRINT = flags.DEFINE_bool('print_config', False, 'Print the recipe as YAML, and exit.')
_PROCESSES = processes.define(flags)

_log = logging.getLogger('gated')


def _chooser(cfg: recipe.Config) -> Any:
  """The estimator that chooses an automatic mesh; other runs do not import it."""
  if cfg.mesh.choice == 'hand':
    return None
  from gated.pods import estimate

  return estimate.sizes


def train(run: Run) -> int:
  """Trains and saves -> the exit code."""
  cfg = run.plan.cfg
  keep = dict(keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every)
  pulse = Pulse(cfg.stability.stuck_after, code=exit_codes.STUCK, details=processes.this)
  # JAX reports what it traced, lowered or compiled: each is work done.
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: pulse.beat(event)
  )
  with (
    workdirs.held(run.workdir) as lock,
    shutdown.Sigterm() as sigterm,
    checkpoint.Checkpoints(run.workdir / 'checkpoints', beat=pulse.beat, **keep) as saves,
  ):
    workdirs.begin(run.workdir, run.resume, saves.steps())
    with Progress('compiling the train step', enabled=jax.process_index() == 0):
      step = run.lowered.compile()
    run.record_session()
    with pulse, shutdown.without_peers(cfg.stability.peer_timeout, run.workdir):
      try:
        return _sessions(run, step, Services(saves, lock, sigterm, pulse))
      except checkpoint.SaveFailed:
        workdirs.check_held(lock, now=True)  # A new owner may have removed the step.
        raise
      except FloatingPointError as error:
        reason = f'{error}; the last saved step is {saves.latest()}'
        raise FloatingPointError(reason) from error


def _sessions(run: Run, step: Any, services: Services) -> int:
  """Trains to the end of the run or a SIGTERM, with a new session after each rollback."""
  while True:
    try:
      return _session(run, step, services)
    except recorder.Rollback as rollback:
      data_step = rollback.data_step
    good = services.saves.newest_good()
    assert good is not None  # Step 0 at least.
    _log.warning('rolling back to step %d, and skipping the data since then', good)
    services.saves.go_back(good, data_step=data_step)
    run = run._replace(resume=run.resume._replace(step=good))


def _session(run: Run, step: Any, services: Services) -> int:
  """Trains from the restored state to the end of the run, a SIGTERM or a rollback."""
  cfg, plan, restored = run.plan.cfg, run.plan, run.resume.step
  state = run.first_state(services.saves)
  services.pulse.beat('the first state')
  if restored is not None:
    _log.info('resumed at step %d of %d', restored, cfg.steps)
  owes = restored is not None and run.owes_evaluation(restored)
  if int(state.step) == cfg.steps and not owes:
    return exit_codes.FINISHED
  with recorder.Recorder(
    run.corpus,
    run.workdir,
    log=cfg.log,
    stability=cfg.stability,
    steps=cfg.steps,
    tokens_per_step=plan.tokens_per_step,
    restored=restored,
    data_step=int(state.data_step),
    beat=services.pulse.beat,
  ) as record:
    if restored is not None and (rates := run.changed_rates(services.saves, state)):
      record.resumed(restored, rates)
    evaluate = evaluate_step(cfg.model, plan.mesh, cfg.loss.chunk)
    session = Session(run, services, record, evaluate)
    if restored is None and cfg.stability.on_spike == 'rollback':
      session.save(state)  # A rollback may need it.
    if owes and not session.measure(state):
      return session.stopped(restored, finished=False)
    return _loop(session, step, state)


def _loop(session: Session, step: Any, state: Any) -> int:
  """The loop: data, step, metrics of the previous step, save, held-out loss."""
  run, services, record = session.run, session.services, session.record
  cfg, on = run.plan.cfg, run.plan.mesh
  watch = run.watch()
  batches = run.corpus.train(int(state.data_step), mesh.rows(on, cfg.batch))
  owed = False  # A save was due at a step that was not finite.
  for number in range(int(state.step) + 1, cfg.steps + 1):
    try:
      with record.timer.data():
        batch = mesh.place(next(batches), on, cfg.batch)
    except data.Unreadable as error:
      raise session.rescue(state, error) from error
    record.profile.before(number)
    state, values = step(state, batch)
    record.profile.after(number, values)
    services.pulse.beat(f'the start of step {number}')
    record.take(number, values, watch(number, state.current, batch))
    services.saves.check()
    stop = services.sigterm.received()
    due = number % cfg.checkpoint.every == 0 or number == cfg.steps
    owed |= due or stop
    workdirs.check_held(services.lock, now=owed)
    measures = run.evaluates(number)
    if not (measures or owed):
      continue
    finite, measured = record.settle(), False
    with record.timer.pause():
      saved = owed and finite
      if saved:
        session.save(state)
      if measures and not stop:
        measured = session.measure(state)
        stop = not measured
      if stop and finite and not saved:  # The signal came in the evaluation.
        session.save(state)
        saved = True
      owed &= not saved
    if stop and saved:
      return session.stopped(number, finished=measured and number == cfg.steps)
  if owed:
    raise FloatingPointError(f'step {cfg.steps}, the last, is not finite')
  return exit_codes.FINISHED


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; an error is reported in one line that names the knob."""
  try:
    command.parse(argv, flags.FLAGS, base, __doc__, folder='workdir')
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing; --help lists the recipes')
    return argv[:1]
  except ValueError as error:
    print(f'train.py: {error}', file=sys.stderr)
    sys.exit(exit_codes.REFUSED)


def main(argv: list[str]) -> int:
  terminal.steady()
  absl.logging.set_verbosity(absl.logging.WARNING)
  _log.setLevel(logging.INFO)
  c = _CONFIG.value.to_dict()
  try:
    cfg = config.build(recipe.Config, c, 'config')
    if _PRINT.value:
      print(command.as_yaml(c, base.get_config().to_dict()))
      return exit_codes.FINISHED
    if _DETERMINISTIC.value:
      determinism.enable()
    processes.start(**_PROCESSES(), peer_timeout=cfg.stability.peer_timeout)
    programs.keep(data.cache.default())
    allowed, restore = _ALLOW.value or [], _RESTORE_STEP.value or ''
    workdir = home.workdir(_WORKDIR.value, c, allowed=allowed)
    first = jax.process_index() == 0
    with shutdown.leaving(), Progress('checking the data and workdir', enabled=first):
      choose = _chooser(cfg)
      run = prepare(c, workdir, allowed=allowed, restore_step=restore, choose=choose)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'train.py: {error}', file=sys.stderr)
    return exit_codes.FAULT if storage.is_passing(error) else exit_codes.REFUSED
  if _DRY_RUN.value:
    return exit_codes.FINISHED
  code = shutdown.exit_code(lambda: train(run), workdir, program='train.py')
  if code == exit_codes.FINISHED and jax.process_index() == 0:
    print(f'done: {workdir}')
  return code


if __name__ == '__main__':
  app.run(lambda argv: processes.leave(main(argv)), flags_parser=parse)
