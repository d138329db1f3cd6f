"""The records of a run: metrics.jsonl and its views, its speed, and run.json.

Everything here runs on the host. Only process 0 writes files: the writers take `enabled`.
"""

from gated.run.metrics.log import Config, Log, Progress, check_wandb
from gated.run.metrics.provenance import amend, manifest
from gated.run.metrics.records import (
  Damaged,
  append,
  dumps,
  exists,
  gaps,
  last,
  last_step,
  plain,
  read,
)
from gated.run.metrics.speed import Profile, Timer, check_remote, memory, peak

__all__ = ['Config', 'Log', 'Progress', 'amend', 'check_wandb', 'manifest']
__all__ += ['Damaged', 'append', 'dumps', 'exists', 'gaps', 'last', 'last_step', 'plain']
__all__ += ['Profile', 'Timer', 'check_remote', 'memory', 'peak', 'read']
