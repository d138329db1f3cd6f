"""A session of a run: its services, saves, evaluations, and its end."""

from typing import Any, NamedTuple

import jax

from gated import data, evals
from gated.plan.prepare import Run
from gated.run import checkpoint, exit_codes, recorder, shutdown
from gated.run.lock import Lock
from gated.run.pulse import Pulse


class Services(NamedTuple):
  """The services that all sessions of a run share."""

  saves: checkpoint.Checkpoints
  lock: Lock
  sigterm: shutdown.Sigterm
  pulse: Pulse


class Session(NamedTuple):
  """A session of a run: from a restored state to its end, a signal or a rollback."""

  run: Run
  services: Services
  record: recorder.Recorder
  evaluate: Any  # as of plan.evaluate_step

  def save(self, state: Any) -> None:
    """Starts to save a state whose step was finite."""
    run, step = self.run, int(state.step)
    self.record.sync()
    about: dict[str, Any] = dict(config=run.config, data=run.corpus.fingerprint)
    about |= dict(heldout_loss=None, stability=self.record.events.report())
    self.services.saves.save(step, state, about)
    self.services.pulse.beat(f'the start of the save of step {step}')

  def measure(self, state: Any) -> bool:
    """Evaluates a state on held-out text -> False if a signal ended the evaluation.

    If the step is saved, its manifest gets the loss.
    """
    run, services, step = self.run, self.services, int(state.step)
    plan = run.plan

    def after(batch: str) -> bool:
      services.pulse.beat(f'{batch} in the evaluation of step {step}')
      services.saves.check()
      return services.sigterm.received()

    options: dict[str, Any] = dict(on=plan.mesh, batch=plan.micro, after=after)
    options |= dict(limit=plan.cfg.eval.rows)
    report = evals.perplexity(self.evaluate, state.current, run.corpus, **options)
    if report is not None:
      loss = self.record.heldout(step, report)
      services.saves.measured(step, loss, run.config, run.corpus.fingerprint)
    return report is not None

  def stopped(self, step: int, *, finished: bool) -> int:
    """Reports the stop at a saved step -> the exit code."""
    name = self.services.sigterm.name
    self.record.say(f'{name}: stopped at step {step}, which is saved')
    return exit_codes.FINISHED if finished else exit_codes.PREEMPTED

  def rescue(self, state: Any, error: data.Unreadable) -> data.Unreadable:
    """Saves the last state of a single process -> the error, with the last saved step."""
    saves, finite = self.services.saves, self.record.settle()
    saves.wait()
    if finite and jax.process_count() == 1 and int(state.step) not in saves.steps():
      self.save(state)
      saves.wait()
    return error.saved(saves.latest())
