"""Sweeps: many runs of one recipe in one folder, each a plain command.

  FOLDER/sweep.json     recipe, points, versions: enough to run it again
  FOLDER/code.tar.gz    the sources that its points run with, also those added later
  FOLDER/points/NAME/   the train.py workdir of each point
  FOLDER/logs/NAME.log  the output of the point

A point's workdir alone determines its state, whoever launched it.
"""

from gated.sweep.compare import folders, runs
from gated.sweep.folder import CARRIED, NAME, is_current, local, open, unpacked, write
from gated.sweep.grid import Point, Sweep, check_here, only, plan
from gated.sweep.growth import Growth, check_axis, extend, join, resolver
from gated.sweep.machine import room
from gated.sweep.runner import Runner, rows
from gated.sweep.state import ENDED, state
from gated.sweep.table import View, conclude, show

__all__ = ['CARRIED', 'NAME', 'is_current', 'local', 'open', 'unpacked', 'write']
__all__ += ['Point', 'Sweep', 'check_here', 'folders', 'only', 'plan', 'runs']
__all__ += ['Growth', 'check_axis', 'extend', 'join', 'resolver']
__all__ += ['ENDED', 'Runner', 'View', 'conclude', 'room', 'rows', 'show', 'state']
