"""Chooses the response to a step: continue, record it, roll back, or stop."""

import dataclasses
import math
from collections.abc import Mapping

from gated.train.guard import VERDICTS, Config


@dataclasses.dataclass(frozen=True)
class Watchdog:
  """Judges steps by their metrics only, so all processes of a run agree."""

  cfg: Config
  _: dataclasses.KW_ONLY
  rollbacks: int  # made by the run so far, in all its sessions

  def judge(self, values: Mapping[str, float]) -> tuple[str, str]:
    """A step's metrics, on the host -> (action, reason).

    The action is 'go', 'note' (continue, and record the step), 'rollback' or 'stop'. It
    depends on loss, grad_norm, param_norm and the values of `guard.report`.
    """
    cfg, verdict = self.cfg, VERDICTS[int(values['verdict'])]
    if not math.isfinite(values['param_norm']):
      return self._back(f'the parameter norm is {_name(values["param_norm"])}')
    if verdict == 'fine':
      return 'go', ''
    reason = self._reason(values)
    if values['bad_in_row'] >= cfg.max_bad_steps:
      limit = f'config.stability.max_bad_steps={cfg.max_bad_steps}'
      return self._back(
        f'{values["bad_in_row"]:.0f} bad steps in a row ({limit}): {reason}'
      )
    if verdict == 'spike' and cfg.on_spike == 'rollback':
      return self._back(reason)
    return 'note', reason

  def _back(self, reason: str) -> tuple[str, str]:
    """Rolls back if the config allows it and a rollback is left; otherwise stops."""
    if self.cfg.on_spike != 'rollback':
      return 'stop', reason
    if self.rollbacks >= self.cfg.max_rollbacks:
      spent = f'config.stability.max_rollbacks={self.cfg.max_rollbacks}'
      return 'stop', f'{reason}; no rollback is left ({spent})'
    return 'rollback', reason

  def _reason(self, values: Mapping[str, float]) -> str:
    """Describes the fault of a bad step."""
    names = {'loss': 'the loss', 'grad_norm': 'the gradient norm'}
    broken = {k: text for k, text in names.items() if not math.isfinite(values[k])}
    if broken:
      return ' and '.join(f'{text} is {_name(values[k])}' for k, text in broken.items())
    if VERDICTS[int(values['verdict'])] == 'not finite':
      return 'the update is not finite'
    far = {k: values[f'{k}_zscore'] for k in names}
    return ' and '.join(
      f'{names[k]} {values[k]:.4g} is {z:.3g} standard deviations above its mean'
      for k, z in far.items()
      if z > self.cfg.threshold or z == max(far.values())
    )


def _name(value: float) -> str:
  return 'NaN' if math.isnan(value) else 'infinite'
