"""What keeps a run alive: a guard in the graph, a watchdog and a pulse on the host.

The guard leaves everything as it was at a bad step, without asking the host. The watchdog
judges a step's metrics, one step late. The pulse ends a run whose steps no longer come.

And what judges runs by their logs, once they have ended: their spikes, their early
warnings, whether they diverged, how much they mind the learning rate and the seed.
"""

from gated.stability.early import warnings
from gated.stability.guard import ON_SPIKE, VERDICTS, Config, Guarded, guard, report
from gated.stability.judge import Rule, best_rate, diverged, lowest, sensitivity
from gated.stability.leaving import Leaving, end, leave
from gated.stability.pulse import Pulse
from gated.stability.seeds import Noise, Spread, noise, spread
from gated.stability.spikes import Spike, excess, limit, spikes
from gated.stability.watchdog import Watchdog

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
