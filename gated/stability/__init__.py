"""What keeps a run alive: a guard in the graph, a watchdog and a pulse on the host.

The guard leaves everything as it was at a bad step, without asking the host. The watchdog
judges a step's metrics, one step late. The pulse ends a run whose steps no longer come.
"""

from gated.stability.guard import ON_SPIKE, VERDICTS, Config, Guarded, guard, report
from gated.stability.leaving import Leaving, end, leave
from gated.stability.pulse import Pulse
from gated.stability.watchdog import Watchdog

__all__ = [
  'ON_SPIKE',
  'VERDICTS',
  'Config',
  'Guarded',
  'Leaving',
  'Pulse',
  'Watchdog',
  'end',
  'guard',
  'leave',
  'report',
]
