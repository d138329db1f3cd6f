"""What a step's metrics ask of the run: to go on, to note it, to go back, or to stop."""

import dataclasses
import math
from collections.abc import Mapping

from gated.train.guard import VERDICTS, Config


@dataclasses.dataclass(frozen=True)
class Watchdog:
  """Judges steps by their metrics alone, so that all processes of a run judge alike."""

  cfg: Config
  _: dataclasses.KW_ONLY
  rollbacks: int  # done so far in the run, by all of its sessions

  def judge(self, values: Mapping[str, float]) -> tuple[str, str]:
    """A step's metrics, on the host -> (action, why).

    The action is 'go', 'note' (go on, but write it down), 'rollback' or 'stop'. Read are
    loss, grad_norm, param_norm, and what `report` gives.
    """
    cfg, verdict = self.cfg, VERDICTS[int(values['verdict'])]
    if not math.isfinite(values['param_norm']):
      return self._back(f'the parameter norm is {_call(values["param_norm"])}')
    if verdict == 'fine':
      return 'go', ''
    why = self._why(values)
    if values['bad_in_row'] >= cfg.max_bad_steps:
      limit = f'config.stability.max_bad_steps={cfg.max_bad_steps}'
      return self._back(f'{values["bad_in_row"]:.0f} bad steps in a row ({limit}): {why}')
    if verdict == 'spike' and cfg.on_spike == 'rollback':
      return self._back(why)
    return 'note', why

  def _back(self, why: str) -> tuple[str, str]:
    """To go back if the config says so and a rollback is left; otherwise to stop."""
    if self.cfg.on_spike != 'rollback':
      return 'stop', why
    if self.rollbacks >= self.cfg.max_rollbacks:
      spent = f'config.stability.max_rollbacks={self.cfg.max_rollbacks}'
      return 'stop', f'{why}; no rollback is left ({spent})'
    return 'rollback', why

  def _why(self, values: Mapping[str, float]) -> str:
    """What is wrong with a step that is not fine."""
    told = {'loss': 'the loss', 'grad_norm': 'the gradient norm'}
    broken = {k: text for k, text in told.items() if not math.isfinite(values[k])}
    if broken:
      return ' and '.join(f'{text} is {_call(values[k])}' for k, text in broken.items())
    if VERDICTS[int(values['verdict'])] == 'not finite':
      return 'the update is not finite'
    far = {k: values[f'{k}_zscore'] for k in told}
    return ' and '.join(
      f'{told[k]} {values[k]:.4g} is {z:.3g} standard deviations above its mean'
      for k, z in far.items()
      if z > self.cfg.threshold or z == max(far.values())
    )


def _call(value: float) -> str:
  return 'NaN' if math.isnan(value) else 'infinite'
