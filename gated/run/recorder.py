"""Reads the metrics of each step one step late, logs and judges them."""

import contextlib
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import jax

from gated import data, storage
from gated.run import events, metrics, watchdog
from gated.run.events import Events
from gated.train import guard

# Measures of a step by kind: values on the devices, and how to read them on the host:
# scalars by name, or the texts of 'samples'.
Watched = dict[str, tuple[Any, Callable[[Any], Any]]]

_log = logging.getLogger('gated')


class Rollback(Exception):
  """The run must restore a good step and continue its data at `data_step`."""

  def __init__(self, data_step: int, reason: str):
    super().__init__(reason)
    self.data_step = data_step


class Recorder(contextlib.ExitStack):
  """Records one session, from the restored state to its end."""

  def __init__(
    self,
    corpus: data.Corpus,
    workdir: storage.Path,
    *,
    log: metrics.Config,
    stability: guard.Config,
    steps: int,
    tokens_per_step: int,
    restored: int | None,
    data_step: int,
    beat: Callable[[str], None],
  ):
    """Starts at the `restored` step (None: a fresh start), after `data_step` batches.

    `steps` is the length of the whole run; `beat` is called with each finished step, as
    'step 42'.
    """
    super().__init__()
    step = restored or 0
    self._every, self._steps = log.every, steps
    self._corpus, self._beat = corpus, beat
    self._ahead = data_step - step
    self._late: tuple[int, Any, Watched] | None = None
    self._finite = True
    writes = jax.process_index() == 0
    window = log.profile_first, log.profile_last
    self.events = Events(workdir, data_step=data_step, enabled=writes)
    for first, last in metrics.gaps(workdir / 'metrics.jsonl', step, log.every):
      if writes:
        _log.warning('metrics.jsonl has no record of steps %d to %d', first, last)
    self._log = metrics.Log(
      workdir,
      step=-1 if restored is None else restored,
      enabled=writes,
      tensorboard=log.tensorboard,
      wandb=log.wandb,
    )
    self.profile = metrics.Profile(workdir, *window, enabled=writes)
    self._progress = metrics.Progress(steps, start=step, seconds=10, enabled=writes)
    self.push(self._summarize)  # Runs last: an ExitStack unwinds in reverse order.
    for part in (self._log, self.profile, self._progress):
      self.enter_context(part)
    self.timer = metrics.Timer(
      tokens_per_step=tokens_per_step,
      peak=metrics.peak(jax.devices()[0]),
      devices=jax.device_count(),
    )
    rollbacks = self.events.report()['rollbacks']
    self._watchdog = watchdog.Watchdog(stability, rollbacks=rollbacks)
    self.say, self.sync = self._progress.say, self._log.sync

  def _summarize(self, kind, *_) -> None:
    """Prints the counts of bad steps at the end of a session without an error."""
    if jax.process_index() == 0 and self.events.all and kind is None:
      summary = events.summary(self.events.report())
      print(f'unstable steps: {summary} ({events.NAME})', file=sys.stderr)

  def take(self, step: int, values: Any, watched: Watched | None = None) -> None:
    """Takes a step's metrics on the device, and reads those of the previous step.

    `watched` describes the state after the step, as `Plan.watch` returns it.
    """
    self.settle()
    self._late = step, values, watched or {}

  def settle(self) -> bool:
    """Reads the metrics that `take` holds -> True if the last step was finite.

    Raises Rollback if the run must go back, FloatingPointError if it must stop.
    """
    if self._late:
      late, self._late = self._late, None
      self._finite = self._read(*late)
    return self._finite

  def _read(self, step: int, values: Any, watched: Watched) -> bool:
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    scalars = {kind: read(jax.device_get(tree)) for kind, (tree, read) in watched.items()}
    self.timer.tick(values['flops_per_token'])
    self._beat(f'step {step}')
    action, reason = self._watchdog.judge(values)
    if step % self._every == 0 or step == self._steps or action != 'go':
      row = values | self.timer.read() | metrics.memory()
      self._log.write(step, 'train', row)
      self._progress.update(step, row)
    for kind, row in scalars.items():
      if kind == 'samples':
        self._log.write_samples(step, row)
      else:
        self._log.write(step, kind, row)
    if action != 'go':
      self.say(f'step {step}: {reason}')
      data_step = step - 1 + self._ahead
      records = self._corpus.record_ids(data_step)
      self.events.write(
        step, data_step, action=action, why=reason, values=values, records=records
      )
      if action == 'rollback':
        raise Rollback(data_step + 1, reason)
      if action == 'stop':
        raise FloatingPointError(f'step {step}: {reason}')
    # The verdict covers the loss, the gradient and the update, but not the parameters.
    broken = guard.VERDICTS[int(values['verdict'])] == 'not finite'
    return not broken and math.isfinite(values['param_norm'])

  def resumed(self, step: int, rates: dict[str, float]) -> None:
    """Logs the learning rates on both sides of a restored step."""
    self._log.write(step, 'resumed', rates)

  def heldout(self, step: int, report: dict) -> float | None:
    """Logs a held-out evaluation -> its loss in nats; None without held-out data.

    FloatingPointError if the loss is not finite.
    """
    if report['loss'] is None:
      return None
    flat = {'loss': report['loss']}
    for domain, summary in report['domains'].items():
      names = [k for k in ('nats_per_token', 'bits_per_byte') if summary[k] is not None]
      flat |= {f'{domain}/{k}': summary[k] for k in names}
    self._log.write(step, 'heldout', flat)
    bits = {name: summary['bits_per_byte'] for name, summary in report['domains'].items()}
    listed = (f'{d} -' if x is None else f'{d} {x:.4f}' for d, x in bits.items())
    self.say(f'step {step}: held-out bits per byte: {", ".join(listed)}')
    if not math.isfinite(report['loss']):
      raise FloatingPointError(f'step {step}: the held-out loss is {report["loss"]}')
    return report['loss']
