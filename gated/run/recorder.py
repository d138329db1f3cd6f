"""What is done with a step's numbers: read one step late, written, shown, and judged."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any, Self

import jax

from gated import data, storage
from gated.run import events, metrics, watchdog
from gated.run.events import Events
from gated.train import guard


class Rollback(Exception):
  """The run is to go back to a good step; its data goes on at `data_step`."""

  def __init__(self, data_step: int, why: str):
    super().__init__(why)
    self.data_step = data_step


class Recorder:
  """The recorder of one session, from a restored state to the end; use it in a `with`."""

  def __init__(
    self,
    corpus: data.Corpus,
    workdir: storage.Path,
    *,
    log: metrics.Config,
    stability: guard.Config,
    steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    restored: int | None,
    data_step: int,
    beat: Callable[[int], None],
  ):
    """Begins at the `restored` step (None: a fresh start), after `data_step` batches.

    `steps` are those of the whole run; `beat` is called with each finished step.
    """
    step = restored or 0
    self._every, self._steps = log.every, steps
    self._corpus, self._beat = corpus, beat
    self._ahead = data_step - step
    self._late: tuple[int, Any, Any] | None = None
    self._finite = True
    writes = jax.process_index() == 0
    window = log.profile_first, log.profile_last
    self._open = contextlib.ExitStack()
    enter = self._open.enter_context
    self.events = Events(workdir, data_step=data_step, enabled=writes)
    self._log = enter(
      metrics.Log(
        workdir,
        step=-1 if restored is None else restored,
        enabled=writes,
        tensorboard=log.tensorboard,
        wandb=log.wandb,
      )
    )
    self.profile = enter(metrics.Profile(workdir, *window, enabled=writes))
    self._progress = enter(
      metrics.Progress(steps, start=step, seconds=10, enabled=writes)
    )
    self.timer = metrics.Timer(
      tokens_per_step=tokens_per_step,
      flops_per_token=flops_per_token,
      peak=metrics.peak(jax.devices()[0]),
      devices=jax.device_count(),
    )
    rollbacks = self.events.report()['rollbacks']
    self._watchdog = watchdog.Watchdog(stability, rollbacks=rollbacks)
    self.say, self.sync = self._progress.say, self._log.sync

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception) -> None:
    self._open.__exit__(*exception)
    if jax.process_index() == 0 and self.events.all and exception[:1] == (None,):
      summary = events.summary(self.events.report())
      print(f'unstable steps: {summary} ({events.NAME})', file=sys.stderr)

  def take(self, step: int, values: Any, indicators: Any = None) -> None:
    """A step's metrics, still on the device: reads those of the step before.

    `indicators` are those of the state after it, where they are due.
    """
    self.settle()
    self._late = step, values, indicators

  def settle(self) -> bool:
    """Reads what was taken last, if that is still to be done -> whether it is finite.

    Raises Rollback where the run is to go back, FloatingPointError where it is to stop.
    """
    if self._late:
      late, self._late = self._late, None
      self._finite = self._read(*late)
    return self._finite

  def _read(self, step: int, values: Any, indicators: Any) -> bool:
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    indicators = jax.device_get(indicators)
    self.timer.tick()
    self._beat(step)
    action, why = self._watchdog.judge(values)
    if step % self._every == 0 or step == self._steps or action != 'go':
      told = values | self.timer.read() | metrics.memory()
      self._log.write(step, 'train', told)
      self._progress.update(step, told)
    if indicators:
      self._log.write(step, 'indicators', {k: x.item() for k, x in indicators.items()})
    if action != 'go':
      self.say(f'step {step}: {why}')
      data_step = step - 1 + self._ahead
      records = self._corpus.record_ids(data_step)
      self.events.write(
        step, data_step, action=action, why=why, values=values, records=records
      )
      if action == 'rollback':
        raise Rollback(data_step + 1, why)
      if action == 'stop':
        raise FloatingPointError(f'step {step}: {why}')
    # The verdict is of the loss, the gradient and the update.
    broken = guard.VERDICTS[int(values['verdict'])] == 'not finite'
    return not broken and math.isfinite(values['param_norm'])

  def heldout(self, step: int, found: dict) -> float | None:
    """A held-out evaluation -> its loss in nats, written; None where nothing is held out.

    FloatingPointError where it is not finite.
    """
    self._beat(step)
    if found['loss'] is None:
      return None
    flat = {'loss': found['loss']}
    for domain, summary in found['domains'].items():
      flat |= {f'{domain}/{k}': summary[k] for k in ('nats_per_token', 'bits_per_byte')}
    self._log.write(step, 'heldout', flat)
    bits = [f'{d} {s["bits_per_byte"]:.4f}' for d, s in found['domains'].items()]
    self.say(f'step {step}: held-out bits per byte: {", ".join(bits)}')
    if not math.isfinite(found['loss']):
      raise FloatingPointError(f'step {step}: the held-out loss is {found["loss"]}')
    return found['loss']
