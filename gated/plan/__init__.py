"""A whole recipe, joined and checked, and the mesh, state and steps built from it."""

from gated.plan.plan import Plan, amount, evaluate_step, placed, reading
from gated.plan.prepare import Run, prepare
from gated.plan.recipe import Config, check_mesh

__all__ = [
  'Config',
  'Plan',
  'Run',
  'amount',
  'check_mesh',
  'evaluate_step',
  'placed',
  'prepare',
  'reading',
]
