"""Loss and gradients do not depend on how a model is split over devices.

Each mesh axis alone, and together; dense and with experts, gated and not, in packed rows.
"""

import functools
import math

import jax
import numpy as np
import pytest
import small

from gated import model
from gated.devices import mesh, trees
from gated.train import step

MESHES = [
  *({axis: 8} for axis in mesh.AXES),
  dict(fsdp=2, tensor=2, context=2),
  dict(fsdp=2, expert=4),
  dict(data=2, expert=2, tensor=2),
]
SHAPE = dict(attn__heads=8, attn__kv_heads=8, attn__head_dim=4)
MODELS = {
  'dense': {},
  'experts': dict(moe__experts=8, moe__top_k=3, moe__shared=1),
}
GATES = {
  'none': dict(attn__gate__position='none'),
  'headwise': dict(attn__gate__position='sdpa', attn__gate__granularity='headwise'),
  'elementwise': dict(attn__gate__position='sdpa'),
}


@functools.cache
def gradient(kind: str, gate: str, **sizes: int):
  """One step -> its metrics and the gradient of every parameter, on the host."""
  axes = dict.fromkeys(mesh.AXES, 1) | sizes
  on = mesh.make(**axes, devices=jax.devices()[: math.prod(axes.values())])
  changes = SHAPE | MODELS[kind] | GATES[gate]
  knobs = {f'model__{knob}': value for knob, value in changes.items()}
  cfg = small.whole(loss__z=1e-3, loss__balance=0.1, loss__router_z=0.1, **knobs)
  run = functools.partial(step.gradients, accum=1, loss=cfg.loss)
  net = small.filled(model.abstract(cfg.model))
  net = jax.device_put(net, mesh.shardings(jax.eval_shape(lambda: net), on))
  batch = mesh.place(small.batch(8, 16), on, 8)
  with jax.set_mesh(on):
    grads, losses, *_ = jax.device_get(jax.jit(run)(net, batch))
  return losses, trees.flatten(grads)


def assert_same(kind, gate, sizes):
  exact, exact_gradient = gradient(kind, gate)
  metrics, gradients = gradient(kind, gate, **sizes)
  np.testing.assert_allclose(metrics['loss'], exact['loss'], rtol=0, atol=1e-5)
  for name, value in exact.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  assert gradients.keys() == exact_gradient.keys()
  for name, value in exact_gradient.items():
    assert np.abs(value).max() > 0, name
    atol = 1e-5 * max(1.0, np.abs(value).max())
    np.testing.assert_allclose(gradients[name], value, rtol=0, atol=atol, err_msg=name)


FEW = [
  ('dense', 'elementwise', dict(fsdp=2, tensor=2, context=2)),
  ('experts', 'headwise', dict(data=2, expert=2, tensor=2)),
]


# Experts on that mesh are looked at in test_moe.py, too.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'gate', 'sizes'),
  [FEW[0], pytest.param(*FEW[1], marks=pytest.mark.slow)],
  ids=str,
)
def test_loss_and_gradients_agree_with_one_device(kind, gate, sizes):
  assert_same(kind, gate, sizes)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
  ('kind', 'gate', 'sizes'),
  [
    *((kind, 'elementwise', sizes) for kind in MODELS for sizes in MESHES),
    *((kind, 'none', dict(fsdp=2, tensor=2, context=2)) for kind in MODELS),
  ],
  ids=str,
)
def test_they_agree_on_every_mesh(kind, gate, sizes):
  if (kind, gate, sizes) not in FEW:
    assert_same(kind, gate, sizes)
