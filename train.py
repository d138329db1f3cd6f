"""The story of a run: build, restore, loop, save.

  python train.py --config=configs/tiny.py
  python train.py --config=configs/dense_1b7.py:48l,gate=headwise --config.optim.lr=8e-3

The same command again resumes. The exit codes are listed in gated/run/exit_codes.py.
"""

import logging
import sys
from typing import Any, NamedTuple

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import config, evals
from gated.devices import determinism, mesh, processes
from gated.plan import Run, command, evaluate_step, home, prepare, recipe
from gated.run import checkpoint, exit_codes, recorder, shutdown, terminal
from gated.run import workdir as workdirs
from gated.run.lock import Lock
from gated.run.pulse import Pulse

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe.', lock_config=True)
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


class Services(NamedTuple):
  """The services that all sessions of a run share."""

  saves: checkpoint.Checkpoints
  lock: Lock
  sigterm: shutdown.Sigterm
  pulse: Pulse


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
  with (
    workdirs.held(run.workdir) as lock,
    shutdown.Sigterm() as sigterm,
    checkpoint.Checkpoints(run.workdir / 'checkpoints', **keep) as saves,
  ):
    workdirs.begin(run.workdir, run.resume, saves.steps())
    step = run.lowered.compile()
    pulse = Pulse(
      cfg.stability.stuck_after, code=exit_codes.STUCK, details=processes.this
    )
    run.record_session()
    with pulse, shutdown.without_peers(cfg.stability.peer_timeout):
      try:
        return _sessions(run, step, Services(saves, lock, sigterm, pulse))
      except FloatingPointError as error:
        reason = f'{error}; it was not saved, the last saved step is {saves.latest()}'
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
  if restored is not None:
    _log.info('resumed at step %d of %d', restored, cfg.steps)
  if int(state.step) == cfg.steps:
    return exit_codes.FINISHED
  with recorder.Recorder(
    run.corpus,
    run.workdir,
    log=cfg.log,
    stability=cfg.stability,
    steps=cfg.steps,
    tokens_per_step=plan.tokens_per_step,
    flops_per_token=plan.flops_per_token,
    restored=restored,
    data_step=int(state.data_step),
    beat=services.pulse.beat,
  ) as record:
    if restored is None and cfg.stability.on_spike == 'rollback':
      _save(run, state, services, record, None)  # A rollback may need it.
    return _loop(run, step, state, services, record)


def _loop(run: Run, step, state, services: Services, record: recorder.Recorder) -> int:
  """The loop: data, step, metrics of the previous step, held-out loss, save."""
  cfg, on, corpus = run.plan.cfg, run.plan.mesh, run.corpus
  evaluate = evaluate_step(cfg.model, on, cfg.loss.chunk)
  watch = run.watch()
  batches = corpus.train(int(state.data_step), mesh.rows(on, cfg.batch))
  owed = False  # A save was due at a step that was not finite.
  for number in range(int(state.step) + 1, cfg.steps + 1):
    with record.timer.data():
      batch = mesh.place(next(batches), on, cfg.batch)
    record.profile.before(number)
    state, values = step(state, batch)
    record.profile.after(number, values)
    record.take(number, values, watch(number, state.model, batch))
    services.saves.check()
    stop = services.sigterm.received(number)
    due = number % cfg.checkpoint.every == 0 or number == cfg.steps
    evaluates = due or number % cfg.eval.every == 0
    owed |= due or stop
    workdirs.check_held(services.lock, now=owed)
    if not (evaluates or owed):
      continue
    finite, loss = record.settle(), None
    with record.timer.pause():
      if evaluates:
        heldout = evals.perplexity(
          evaluate, state.model, corpus, on=on, batch=run.plan.micro, limit=cfg.eval.rows
        )
        loss = record.heldout(number, heldout)
      if owed and finite:
        _save(run, state, services, record, loss)
        owed = False
    if stop and not owed:
      record.say(f'{services.sigterm.name}: stopped at step {number}, which is saved')
      return exit_codes.FINISHED if number == cfg.steps else exit_codes.PREEMPTED
  if owed:
    raise FloatingPointError(f'step {cfg.steps}, the last, is not finite')
  return exit_codes.FINISHED


def _save(run: Run, state, services: Services, record, heldout_loss) -> None:
  """Starts to save a state whose step was finite."""
  record.sync()
  about = dict(config=run.config, data=run.corpus.fingerprint)
  about |= dict(heldout_loss=heldout_loss, stability=record.events.report())
  services.saves.save(int(state.step), state, about)
  services.pulse.beat(int(state.step))


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
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
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
    workdir = home.workdir(_WORKDIR.value, c, allowed=_ALLOW.value or [])
    run = prepare(
      c,
      workdir,
      allowed=_ALLOW.value or [],
      restore_step=_RESTORE_STEP.value or '',
      choose=_chooser(cfg),
    )
  except (ValueError, NotImplementedError) as error:
    print(f'train.py: {error}', file=sys.stderr)
    return exit_codes.REFUSED
  if _DRY_RUN.value:
    return exit_codes.FINISHED
  code = shutdown.exit_code(lambda: train(run), workdir, program='train.py')
  if code == exit_codes.FINISHED and jax.process_index() == 0:
    print(f'done: {workdir}')
  return code


if __name__ == '__main__':
  app.run(lambda argv: processes.leave(main(argv)), flags_parser=parse)
