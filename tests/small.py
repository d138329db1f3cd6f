"""Small recipes, models and batches for the tests: changes to `configs/base.py`.

Weights are drawn wider than a recipe would, so that attention is far from uniform and
gates are far from one half: a mistake then shows in the third digit, not in the ninth.
"""

import functools
import math
import re
import zlib

import jax
import numpy as np

from configs import base
from gated import config, data, kernels, model, plan
from gated.devices import mesh, trees
from gated.kernels.attention import blockwise, splash
from gated.model import attention, gate, layers
from gated.train import optim

RECIPE = {
  'steps': 5,
  'batch': 8,
  'model.vocab': 40,
  'model.width': 16,
  'model.depth': 2,
  'model.ffn': 24,
  'model.numerics.compute': 'float32',
  'model.numerics.init_std': 0.3,
  'model.attn.heads': 4,
  'model.attn.kv_heads': 2,
  'model.attn.head_dim': 8,
  'model.attn.gate.std': 0.5,
  'loss.chunk': 16,
  'optim.warmup': 2,
  'data.length': 16,
}


def recipe(**changes) -> dict:
  """Knobs with __ for each dot (model__attn__heads=2) -> a whole nested recipe."""
  c = base.get_config().to_dict()
  for knob, value in (
    RECIPE | {k.replace('__', '.'): v for k, v in changes.items()}
  ).items():
    *path, last = knob.split('.')
    group = functools.reduce(lambda d, key: d[key], path, c)
    assert last in group, knob
    group[last] = value
  return c


def whole(**changes) -> plan.Config:
  return config.build(plan.Config, recipe(**changes), 'config')


def _part(cls, prefix, changes):
  c = recipe(**{f'{prefix}__{key}': value for key, value in changes.items()})
  group = functools.reduce(lambda d, key: d[key], prefix.split('__'), c)
  return config.build(cls, group, 'config.' + prefix.replace('__', '.'))


def model_config(**changes) -> model.Config:
  return _part(model.Config, 'model', changes)


def attention_config(**changes) -> attention.Config:
  return _part(attention.Config, 'model__attn', changes)


def gate_config(**changes) -> gate.Config:
  return _part(gate.Config, 'model__attn__gate', changes)


def numerics(**changes) -> layers.Numerics:
  return _part(layers.Numerics, 'model__numerics', changes)


def optim_config(**changes) -> optim.Config:
  return _part(optim.Config, 'optim', changes)


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
  """A mesh of as many devices as its axes need; those not named have size 1."""
  axes = dict.fromkeys(mesh.AXES, 1) | sizes
  return mesh.make(**axes, devices=jax.devices()[: math.prod(axes.values())])


def largest_array(compiled) -> int:
  """The most elements of an array anywhere in a device's compiled program."""
  dims = re.findall(r'\b(?:pred|[a-z]+\d+)\[([\d,]+)\]', compiled.as_text())
  return max(math.prod(map(int, each.split(','))) for each in dims)


def blocks(monkeypatch, most: int) -> None:
  """Blocks of a size to have several of; without a TPU, its kernel is interpreted."""
  monkeypatch.setattr(blockwise, 'MOST', most)
  if jax.default_backend() == 'cpu':
    interpreted = functools.partial(splash.attend, blocks=(128,), interpret=True)
    monkeypatch.setitem(kernels.ATTENTION, 'splash', interpreted)


@functools.cache
def transformer(cfg: model.Config, seed: int = 0) -> model.Transformer:
  """A model as it starts."""
  return jax.jit(lambda key: model.Transformer(cfg, key))(jax.random.key(seed))


def filled(shapes, seed: int = 0):
  """Shapes of a model or a part of one -> arrays of those shapes; nothing is compiled.

  A leaf depends on the seed and its own name: models that share a name share the value.
  """

  def fill(name, leaf):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    value = 0.3 * rng.normal(size=leaf.shape)
    return jax.numpy.asarray(1 + value if name.endswith('scale') else value, leaf.dtype)

  leaves = trees.flatten(shapes)
  return trees.unflatten(
    shapes, {name: fill(name, leaf) for name, leaf in leaves.items()}
  )


def model_of(**changes) -> model.Transformer:
  """A model of `small.model_config(**changes)`, filled."""
  return filled(model.abstract(model_config(**changes)))


def angles(positions, dim: int, base: float) -> jax.Array:
  """RoPE's, without YaRN."""
  c = recipe()['model']['attn']['yarn']
  plain = config.build(layers.Yarn, c, 'config.model.attn.yarn')
  frequency = layers.rope_frequencies(dim, base, plain)
  return layers.rope_angles(jax.numpy.asarray(positions), frequency)


def batch(rows: int, length: int, *, vocab: int = 40, seed: int = 0) -> data.Batch:
  """Random rows of two or three documents and some padding, the weights uneven by row."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (rows, length), np.int32)
  targets = rng.integers(0, vocab, (rows, length), np.int32)
  segments, positions = np.zeros((2, rows, length), np.int32)
  weights = np.zeros((rows, length), np.float32)
  for row in range(rows):
    ends = np.sort(rng.choice(np.arange(2, length), 3, replace=False))
    ends[-1] = length if row % 2 else ends[-1]
    for document, (a, b) in enumerate(zip([0, *ends], ends)):
      segments[row, a:b] = document + 1
      positions[row, a:b] = np.arange(b - a)
      weights[row, a : b - 1] = 1 if row % 3 else 0.5
  return data.Batch(tokens, targets, weights, segments, positions)
