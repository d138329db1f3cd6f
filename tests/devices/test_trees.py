"""A leaf's name is the path that a reader would write to reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import model
from gated.devices import trees
from gated.train import optim, step


@pytest.fixture(scope='module')
def state():
  cfg = small.model_config(attn__gate__position='value')
  tx = optim.make(small.optim_config(), steps=5, multipliers={})
  return jax.eval_shape(lambda: step.init(lambda key: model.Transformer(cfg, key), tx, 0))


def test_names_join_attributes_keys_and_indices_by_dots(state):
  names = list(trees.flatten(state))
  assert len(set(names)) == len(names) == len(jax.tree.leaves(state))
  # The projection called value keeps its name; the field that holds an array loses it.
  expected = {
    'step',
    'data_step',
    'model.embed.table',
    'model.blocks.attn.value.weight',
    'model.blocks.attn.gate.weight',
    'model.blocks.ffn_norm.scale',
    'model.norm.scale',
    'opt.1.mu.blocks.attn.value.weight',
  }
  assert expected <= set(names)
  assert list(trees.flatten({'a': [1, (2, 3)]})) == ['a.0', 'a.1.0', 'a.1.1']


def test_unflatten_undoes_flatten(state):
  leaves = trees.flatten(state)
  back = trees.unflatten(state, dict(reversed(leaves.items())))
  assert jax.tree.structure(back) == jax.tree.structure(state)
  assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state)))


def test_unflatten_misses_a_leaf_by_its_name():
  with pytest.raises(KeyError, match='b'):
    trees.unflatten({'a': 1, 'b': 2}, {'a': 1})


def test_digest_sees_each_bit_dtype_shape_and_name():
  tree = {'a': np.arange(4, dtype=np.float32), 'b': np.zeros((), np.int32)}
  variants = [
    tree | {'a': np.nextafter(tree['a'], 9)},
    tree | {'a': tree['a'].view(np.int32)},
    tree | {'a': tree['a'].reshape(2, 2)},
    {'c': tree['a'], 'b': tree['b']},
    {'a': tree['a']},
  ]
  digests = {trees.digest(t) for t in [tree, *variants]}
  assert len(digests) == 1 + len(variants)
  assert trees.digest(dict(reversed(tree.items()))) == trees.digest(tree)


def test_digest_does_not_depend_on_where_an_array_lies():
  x = jnp.arange(16.0).reshape(8, 2)
  devices = jax.sharding.Mesh(jax.devices(), 'd')
  split = jax.device_put(x, jax.NamedSharding(devices, jax.P('d')))
  assert trees.digest({'x': split}) == trees.digest({'x': np.asarray(x)})
