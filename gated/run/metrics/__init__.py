"""What a run says of itself: metrics.jsonl and its views, its speed, and run.json.

Everything here runs on the host. Files are written by process 0 alone: the writers take
`enabled`.
"""

from gated.run.metrics.log import Log, Progress, check_wandb
from gated.run.metrics.provenance import manifest
from gated.run.metrics.records import (
  Damaged,
  append,
  dumps,
  exists,
  last_step,
  plain,
  read,
  truncate,
)
from gated.run.metrics.settings import Config
from gated.run.metrics.speed import Profile, Timer, check_remote, memory, peak

__all__ = [
  'Config',
  'Damaged',
  'Log',
  'Profile',
  'Progress',
  'Timer',
  'append',
  'check_remote',
  'check_wandb',
  'dumps',
  'exists',
  'last_step',
  'manifest',
  'memory',
  'peak',
  'plain',
  'read',
  'truncate',
]
