"""A row of the fault table: the best step, after another evaluation."""

import shutil
from typing import Any

from faults import evidence
from faults.world import STEPS, Outcome, Row, Tally, World, arguments

from gated.run import checkpoint

# 53


def other_evaluations(world: World, times: int) -> Outcome:
  """config.eval.rows changes on resumption: only equal evaluations compare."""
  tally, first = Tally(), world.path('evaluated')
  knobs: dict[str, Any] = dict(optim__schedule='constant', checkpoint__keep=1)
  world.finish(first, eval__rows=8, steps=16, **knobs)
  before = evidence.saved(first)
  copies = {rows: world.path(f'rows-{rows}') for rows in (1, 2, 0)[:times]}
  for copy in copies.values():
    shutil.copytree(first, copy)
  commands = [arguments(w, eval__rows=rows, **knobs) for rows, w in copies.items()]
  for (rows, workdir), done in zip(copies.items(), world.many(commands), strict=True):
    losses = dict(evidence.losses(workdir, 'heldout'))
    with tally.one(f'--step=best after eval.rows=8 became {rows}'):
      done.expect(0)
      with checkpoint.Reader(workdir / 'checkpoints') as saved:
        steps, best = saved.steps(), saved.pick('best', '--step')
      assert best == min((s for s in losses if s > 16), key=lambda s: losses[s]), best
    with tally.one(f'the steps that are kept after eval.rows={rows}'):
      old = min(before, key=lambda s: losses[s])
      assert steps == sorted({old, best, STEPS}), (steps, losses)
  return tally.outcome()


ROWS_D = [
  Row('53', 'eval.rows changes on resumption: the best step', other_evaluations, 3, 0),
]
