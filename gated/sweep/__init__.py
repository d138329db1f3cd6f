"""Sweeps: many runs of one recipe, each a plain command, in one folder.

  FOLDER/sweep.json     recipe, points, versions: all that is needed to run it again
  FOLDER/code.tar.gz    the sources that it was made with, which its points are run with
  FOLDER/points/NAME/   a workdir of train.py for each point
  FOLDER/logs/NAME.log  what the point printed

What became of a point is told by its workdir alone, whoever launched it.
"""

from gated.sweep.code import CARRIED
from gated.sweep.compare import Comparison, Difference, Losses, folders, runs
from gated.sweep.folder import NAME, is_current, local, open, unpacked, write
from gated.sweep.grid import Point, Sweep, check_here, only, plan
from gated.sweep.machine import Room, Slot, room
from gated.sweep.runner import Row, Runner, rows
from gated.sweep.state import ENDED, State, living, state
from gated.sweep.table import View, show, told

__all__ = [
  'CARRIED',
  'ENDED',
  'NAME',
  'Comparison',
  'Difference',
  'Losses',
  'Point',
  'Room',
  'Row',
  'Runner',
  'Slot',
  'State',
  'Sweep',
  'View',
  'check_here',
  'folders',
  'is_current',
  'living',
  'local',
  'only',
  'open',
  'plan',
  'room',
  'rows',
  'runs',
  'show',
  'state',
  'told',
  'unpacked',
  'write',
]
