"""A recipe on a mesh of chips, by arithmetic: memory, FLOPs, traffic, time; and a choice.

Nothing is compiled. The counts come from the code's own tables (the axes of parameters,
`mesh.RULES`, `cross_entropy.inner_size`), and times from `roofline.ASSUMED`.

  Estimate(cfg, sizes, chip)  a recipe on a mesh
  sizes(cfg, count, chip)     the mesh that a recipe requests, or the best for choice=auto
  suggest(cfg, chip, count)   the meshes, remat policies and micro-batches that fit
"""

from gated.pods.estimate.choice import advice, changed, flags, meshes, sizes, suggest
from gated.pods.estimate.one import Estimate, named

__all__ = (
  'Estimate',
  'advice',
  'changed',
  'flags',
  'meshes',
  'named',
  'sizes',
  'suggest',
)
