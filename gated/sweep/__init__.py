"""Sweeps: many runs of one recipe, each a plain command, in one folder.

  FOLDER/sweep.json     recipe, points, versions: all that is needed to run it again
  FOLDER/code.tar.gz    the sources that it was made with, which its points are run with
  FOLDER/points/NAME/   a workdir of train.py for each point
  FOLDER/logs/NAME.log  what the point printed

What became of a point is told by its workdir alone, whoever launched it.
"""

from gated.sweep.code import pack, unpack
from gated.sweep.folder import NAME, open, write
from gated.sweep.grid import RULE, Point, Sweep, only, plan
from gated.sweep.state import State, living, state

__all__ = [
  'NAME',
  'RULE',
  'Point',
  'State',
  'Sweep',
  'living',
  'only',
  'open',
  'pack',
  'plan',
  'state',
  'unpack',
  'write',
]
