"""A recipe on a mesh of chips, by arithmetic: memory, FLOPs, traffic, time; and a choice.

Nothing is compiled. What the code does is counted from the same tables that it is built
from (the parameters' axes, `mesh.RULES`, `cross_entropy.inner_size`), and time follows
from the assumptions in `roofline.ASSUMED`.

  of(cfg, sizes, chip)      a recipe on a mesh -> its Estimate
  sizes(cfg, count, chip)   the mesh that a recipe asks for, chosen if it is to be
  suggest(cfg, chip, count) all that fits, best first
"""

from gated.pods.estimate.choice import changed, meshes, sizes, suggest, tail
from gated.pods.estimate.one import Estimate, named, of
from gated.pods.estimate.roofline import ASSUMED, Roofline, Traffic, assumed, roofline

__all__ = [
  'ASSUMED',
  'Estimate',
  'Roofline',
  'Traffic',
  'assumed',
  'changed',
  'meshes',
  'named',
  'of',
  'roofline',
  'sizes',
  'suggest',
  'tail',
]
