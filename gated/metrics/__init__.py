"""What a run says of itself: metrics.jsonl and its views, its speed, and run.json.

Everything here runs on the host. Files are written by process 0 alone: the writers take
`enabled`.
"""

from gated.metrics.log import (
  Log,
  Progress,
  check_wandb,
  dumps,
  read,
  truncate,
  write_json,
)
from gated.metrics.provenance import manifest
from gated.metrics.speed import PEAK, Profile, Timer, memory, peak

__all__ = [
  'PEAK',
  'Log',
  'Profile',
  'Progress',
  'Timer',
  'check_wandb',
  'dumps',
  'manifest',
  'memory',
  'peak',
  'read',
  'truncate',
  'write_json',
]
