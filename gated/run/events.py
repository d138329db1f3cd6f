"""spikes.jsonl: every step that was not fine, what was done about it, and its records.

  {"step": 57, "data_step": 57, "action": "rollback", "why": ..., "loss": ...,
   "loss_zscore": ..., "grad_norm": ..., "grad_norm_zscore": ..., "skipped": true,
   "records": [[part of the mixture, shard, record], ...]}

`data_step` counts the batches read before it, and never goes back, as a step does after
a rollback: it says which events are of the history that a run goes on from. A run that
was rescued forty times has forty lines here, and cannot pass as stable.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gated import storage
from gated.run import metrics

NAME = 'spikes.jsonl'
KEPT = ('loss', 'loss_zscore', 'grad_norm', 'grad_norm_zscore', 'param_norm')


class Events:
  """The events of a run, with those of earlier sessions that still stand."""

  def __init__(self, workdir: storage.Path, *, data_step: int, enabled: bool):
    """Drops the events from `data_step` on: those batches are about to be read again.

    All processes of a run read it; only one that is `enabled` writes.
    """
    self._path, self._enabled = workdir / NAME, enabled
    every = read(workdir)
    self.all = [event for event in every if event['data_step'] < data_step]
    if enabled and len(self.all) < len(every):
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
    """One event; `values` are the step's metrics, `records` say which its batch held."""
    event: dict[str, Any] = {'step': step, 'data_step': data_step}
    event |= {'action': action, 'why': why, 'skipped': values['bad_in_row'] > 0}
    event |= {name: values[name] for name in KEPT}
    event['records'] = [list(record) for record in records]
    self.all.append(event)
    if self._enabled:
      metrics.append(self._path, event)

  def report(self) -> dict[str, int]:
    """How many steps were spikes or not finite, updates skipped, rollbacks made."""
    return {
      'bad steps': len(self.all),
      'skipped updates': sum(bool(event['skipped']) for event in self.all),
      'rollbacks': sum(event['action'] == 'rollback' for event in self.all),
    }


def read(workdir: storage.Path) -> list[dict[str, Any]]:
  """A workdir -> the events of its run, in the order in which they happened.

  metrics.Damaged if a line is none.
  """
  path = workdir / NAME
  events = metrics.read(path) if metrics.exists(path) else []
  for event in events:
    if 'data_step' not in event or type(event['data_step']) is not int:
      raise metrics.Damaged(f'{path}: step {event["step"]} has no data_step')
  return events


def summary(report: Mapping[str, int]) -> str:
  """A report -> what of it happened: '2 bad steps, 1 rollbacks'."""
  return ', '.join(f'{n} {what}' for what, n in report.items() if n)
