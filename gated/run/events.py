"""spikes.jsonl: all bad steps, the response to each, and the records in its batch.

  {"step": 57, "data_step": 57, "action": "rollback", "why": ..., "loss": ...,
   "loss_zscore": ..., "grad_norm": ..., "grad_norm_zscore": ..., "skipped": true,
   "records": [[part of the mixture, shard, record], ...]}

`data_step` is the number of batches read before the step. Unlike `step` it never
decreases, even after a rollback, so it decides which events belong to the history of a
resumed run. A run with forty rollbacks has at least forty lines here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gated import storage
from gated.run import metrics

NAME = 'spikes.jsonl'
KEPT = ('loss', 'loss_zscore', 'grad_norm', 'grad_norm_zscore', 'param_norm')


class Events:
  """The events of a run, including the valid ones of earlier sessions."""

  def __init__(self, workdir: storage.Path, *, data_step: int, enabled: bool):
    """Drops the events from `data_step` on: the run reads those batches again.

    All processes of a run read the file; only the `enabled` one writes it.
    """
    self._path, self._enabled = workdir / NAME, enabled
    saved = read(workdir)
    self.all = [event for event in saved if event['data_step'] < data_step]
    if enabled and len(self.all) < len(saved):
      lines = [metrics.dumps(event, indent=None) + '\n' for event in self.all]
      storage.write(self._path, ''.join(lines).encode())

  def write(
    self,
    step: int,
    data_step: int,
    *,
    action: str,
    why: str,
    values: Mapping[str, float],
    records: Sequence[Sequence],
  ) -> None:
    """Appends an event: the step's metrics `values` and the `records` of its batch."""
    event = {
      'step': step,
      'data_step': data_step,
      'action': action,
      'why': why,
      'skipped': values['bad_in_row'] > 0,
      **{name: values[name] for name in KEPT},
      'records': [list(record) for record in records],
    }
    self.all.append(event)
    if self._enabled:
      metrics.append(self._path, event)

  def report(self) -> dict[str, int]:
    """Counts the bad steps, the skipped updates and the rollbacks."""
    return {
      'bad steps': len(self.all),
      'skipped updates': sum(bool(event['skipped']) for event in self.all),
      'rollbacks': sum(event['action'] == 'rollback' for event in self.all),
    }


def read(workdir: storage.Path) -> list[dict[str, Any]]:
  """A workdir -> the events of its run, in order; metrics.Damaged for a bad line."""
  path = workdir / NAME
  events = metrics.read(path) if metrics.exists(path) else []
  for event in events:
    if type(event.get('data_step')) is not int:
      raise metrics.Damaged(f'{path}: step {event["step"]} has no data_step')
  return events


def summary(report: Mapping[str, int]) -> str:
  """A report -> its nonzero counts as text: '2 bad steps, 1 rollbacks'."""
  return ', '.join(f'{n} {name}' for name, n in report.items() if n)
