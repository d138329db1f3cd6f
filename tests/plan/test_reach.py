"""Every parameter of every variant reaches the training loss; traced, never run.

A gate position that is listed but wired nowhere would train with a dead parameter.
"""

import importlib

import jax
import numpy as np
import pytest
import rows
import small
from jax.interpreters import partial_eval

from gated import config, data, model, plan
from gated.devices import trees
from gated.model import gate, norms, remedies
from gated.train import step

# The recipes outside the tables, at the smallest scale that each has.
RECIPES = {
  'base': [''],
  'tiny': ['gate=none', 'gate=headwise', 'gate=elementwise'],
  'dense_1b7': ['28l,scale=test', '48l,gate=elementwise,scale=test'],
  'moe_15b': ['scale=test', 'gate=headwise,scale=test'],
  'lr_sweep': ['scale=test'],
}


def dead(cfg: plan.Config) -> list[str]:
  """A recipe -> the parameters whose gradient is a constant, whatever the batch."""
  shape = cfg.batch, cfg.data.length
  integer, weight = (jax.ShapeDtypeStruct(shape, t) for t in (np.int32, np.float32))
  batch = data.Batch(integer, integer, weight, integer, integer)

  def gradients(net, batch):
    return trees.flatten(step.gradients(net, batch, accum=1, loss=cfg.loss).grads)

  net = model.abstract(cfg.model)
  traced, outputs = jax.make_jaxpr(gradients, return_shape=True)(net, batch)
  names = sorted(outputs)
  assert names == sorted(trees.flatten(net))

  def used(name):
    """Whether any input is left in the program of this gradient alone."""
    _, inputs = partial_eval.dce_jaxpr(traced.jaxpr, [other == name for other in names])
    return any(inputs)

  return [name for name in names if not used(name)]


def dead_with(**changes) -> list[str]:
  """Knobs of config.model (attn__gate__form='add') -> the dead parameters."""
  return dead(small.whole(**{f'model__{knob}': v for knob, v in changes.items()}))


@pytest.mark.slow
@pytest.mark.parametrize('position', gate.POSITIONS)
def test_the_gate_of_every_position_reaches_the_loss(position):
  assert dead_with(attn__gate__position=position) == []


@pytest.mark.slow
@pytest.mark.parametrize('normalizer', remedies.NORMALIZERS)
def test_every_parameter_of_every_normalizer_reaches_the_loss(normalizer):
  assert dead_with(attn__normalizer=normalizer) == []


VARIANTS = [
  *(dict(attn__gate__form=form) for form in gate.FORMS),
  *(dict(attn__gate__activation=name) for name in gate.ACTIVATIONS),
  *(
    dict(attn__gate__mean=mean, attn__gate__heads='shared')
    for mean in ('before', 'after')
  ),
  dict(attn__gate__granularity='headwise'),
  dict(attn__gate__source='parameter'),
  dict(attn__gate__inputs='rank:3', attn__gate__bias=True, attn__gate__opens=(1, 5)),
  dict(attn__gates='value inputs=first:3 layers=last:1; out form=add layers=0'),
  dict(attn__gate__source='value', attn__gate__position='value'),
  dict(attn__gate__place='after', attn__gate__position='query'),
  dict(attn__gate__place='after', attn__gate__position='key'),
  *(dict(attn__output=output) for output in remedies.OUTPUTS),
  *(dict(norm=norm) for norm in norms.NORMS),
  dict(branch_norm='rms', branch_clip=3.0, logit_cap=3.0, tied=False),
  dict(attn__bias=True, attn__out_bias=True, attn__logit_cap=3.0),
  dict(attn__sink_tokens=2),
  dict(attn__normalizer='sink_logit', attn__normalizer_layers='last:1'),
  dict(attn__sink_tokens=2, attn__sink_values='zero'),
  dict(layers='unroll', remat='full'),
  dict(attn__differential=True, attn__window=3, attn__global_layers='last:1'),
]


@pytest.mark.slow
@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_every_parameter_of_every_variant_reaches_the_loss(changes):
  assert dead_with(**dict(attn__gate__position='sdpa') | changes) == []


@pytest.mark.full
def test_every_parameter_of_every_recipe_reaches_the_loss():
  recipes = {name: recipe() for name, recipe in rows.recipes([]).items()}
  for file, arguments in RECIPES.items():
    get_config = importlib.import_module(f'configs.{file}').get_config
    recipes |= {f'{file}:{argument}': get_config(argument) for argument in arguments}
  variants = {}
  for name, c in recipes.items():
    cfg = config.build(plan.Config, c.to_dict(), 'config')
    knobs = config.flatten({part: c.to_dict()[part] for part in ('model', 'loss')})
    # Numbers above 1 change shapes and factors only.
    kind = [str(v) if isinstance(v, (str, list)) else min(v, 2) for v in knobs.values()]
    variants.setdefault(tuple(kind), (name, cfg))
  assert len(variants) >= 25
  found = {name: dead(cfg) for name, cfg in variants.values()}
  assert {name: parameters for name, parameters in found.items() if parameters} == {}


def test_a_position_that_is_wired_nowhere_is_found(monkeypatch):
  unwired = gate.Position('G6', 'nothing', 'heads', normed=False)
  monkeypatch.setitem(gate.POSITIONS, 'unwired', unwired)
  assert dead_with(attn__gate__position='unwired') == ['blocks.attn.gate.weight']


def test_a_parameter_behind_a_stopped_gradient_is_found(monkeypatch):
  stop = lambda y, s: y * jax.lax.stop_gradient(s)
  monkeypatch.setitem(gate.FORMS, 'stopped', stop)
  changes = dict(attn__gate__position='sdpa', attn__gate__form='stopped')
  assert dead_with(**changes) == ['blocks.attn.gate.weight']
