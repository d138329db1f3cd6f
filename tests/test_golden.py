"""Numbers that may not move unnoticed: recipes as they resolve, and first losses.

A change that must not move numbers leaves both files as they are. One that may moves them
on purpose: run `python tests/test_golden.py`, read the difference, and say in the commit
what moved and why.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import small

from configs import base, dense_1b7, moe_15b, table1, table2, table3, table4, table6, tiny
from gated import config, model, plan
from gated.train import guard, optim, step

FOLDER = Path(__file__).parent / 'golden'
STALE = 'If this is meant, run `python tests/test_golden.py` and say why in the commit.'
# A few of the tables' rows stand for all; tests/test_configs.py builds each.
ROWS = {
  table1: ('g1_headwise', 'k8,scale=proxy', 'plus4_experts,scale=test'),
  table2: (
    '28l_4e-3_elementwise',
    '48l_8e-3_sandwich',
    '48l_1t_8e-3_baseline,scale=proxy',
  ),
  table3: ('sdpa_rmsnorm',),
  table4: ('input_independent',),
  table6: ('switch_v_1top1',),
  moe_15b: ('gate=none', 'gate=elementwise,scale=proxy'),
  dense_1b7: [f'{s},gate={g}' for s in dense_1b7.SHAPES for g in base.GATES],
}
RECIPES = {
  'base': base.get_config,
  'tiny': tiny.get_config,
  **{
    f'{recipe.__name__.removeprefix("configs.")}:{row}': functools.partial(
      recipe.get_config, row
    )
    for recipe, rows in ROWS.items()
    for row in rows
  },
}


def resolved(name):
  """A recipe as differences from base, by knob; base itself in full."""
  c = RECIPES[name]().to_dict()
  config.build(plan.Config, c, 'config')
  if name == 'base':
    return config.flatten(c)
  changed = config.differences(base.get_config().to_dict(), c)
  return {knob: now for knob, (_, now) in changed.items()}


@functools.cache
def losses(gate, accum):
  """The first five losses of a small model from seed 0, on one device."""
  gates = {f'model__attn__gate__{k}': v for k, v in base.GATES[gate].items()}
  cfg = small.whole(loss__z=1e-3, model__numerics__init_std=0.1, **gates)
  tx = guard.guard(optim.make(cfg.optim, steps=5, multipliers={}), cfg.stability)
  schedule = optim.schedule(cfg.optim, 5)
  run = functools.partial(step.train, tx=tx, schedule=schedule, accum=accum)
  run = jax.jit(functools.partial(run, loss=cfg.loss))
  build = functools.partial(model.Transformer, cfg.model)
  state = jax.jit(lambda: step.init(build, tx, 0))()
  values = []
  for i in range(5):
    state, metrics = run(state, small.batch(8, cfg.data.length, seed=i))
    values.append(float(metrics['loss']))
  return values


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_resolves_as_it_did(name):
  golden = json.loads((FOLDER / 'recipes.json').read_text())
  assert resolved(name) == golden[name], STALE


FAST = 'elementwise'  # Of the three gates, in the inner loop.
GATES = [g if g == FAST else pytest.param(g, marks=pytest.mark.slow) for g in base.GATES]


@pytest.mark.slow
@pytest.mark.parametrize('accum', [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize('gate', GATES)
def test_the_first_losses_have_not_changed(gate, accum):
  """To 1e-5 of a loss, as versions and processors differ in the last bits."""
  golden = json.loads((FOLDER / 'losses.json').read_text())
  np.testing.assert_allclose(losses(gate, accum), golden[gate], rtol=1e-5, err_msg=STALE)


if __name__ == '__main__':
  FOLDER.mkdir(exist_ok=True)
  for file, content in (
    ('recipes', {name: resolved(name) for name in RECIPES}),
    ('losses', {gate: losses(gate, 1) for gate in base.GATES}),
  ):
    (FOLDER / f'{file}.json').write_text(json.dumps(content, indent=1) + '\n')
