"""What keeps a run alive: a guard in the graph, a watchdog and a pulse on the host.

The guard leaves everything as it was at a bad step, without asking the host. The watchdog
judges a step's metrics, one step late. The pulse ends a run whose steps no longer come.

And what judges runs by their logs, once they have ended: their spikes, their early
warnings, whether they diverged, how much they mind the learning rate and the seed.
"""

from gated.sweep.judge.rule import Rule, best_rate, diverged, lowest, sensitivity
from gated.sweep.judge.seeds import Noise, Spread, noise, spread
from gated.sweep.judge.spikes import Spike, excess, limit, spikes
from gated.sweep.judge.warnings import warnings

__all__ = [
  'ON_SPIKE',
  'VERDICTS',
  'Config',
  'Guarded',
  'Leaving',
  'Noise',
  'Pulse',
  'Rule',
  'Spike',
  'Spread',
  'Watchdog',
  'best_rate',
  'diverged',
  'end',
  'excess',
  'guard',
  'leave',
  'limit',
  'lowest',
  'noise',
  'report',
  'sensitivity',
  'spikes',
  'spread',
  'warnings',
]
