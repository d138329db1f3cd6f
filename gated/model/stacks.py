"""Layers stacked along a leading dim: split into runs, unstacked, and joined again.

L layers
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=(1, 2))
def opened(step: jax.Array | int, opens: tuple[int, int], count: int) -> jax.Array:
  """Training steps done -> how far a gate has opened, in [0, 1], for `count` layers.

  `opens` is as in `gate.Config`.
  """
  first, last = opens
  share = (step - first) / max(last - first, 1)
  share = jnp.where(step >= last, 1.0, jnp.clip(share, 0.0, 1.0))
  return jnp.full(count, share, jnp.float32)


def unstack(layers: Any, depth: int) -> list[Any]:
  """A tree stacked over layers -> a list of `depth` layers."""
  parts = split(layers, (1,) * depth)
  return [jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), part) for part in parts]


def split(layers: Any, sizes: Sequence[int]) -> list[Any]:
  """A tree stacked over layers -> stacks of `sizes` layers each.

  Its gradient is one concatenation per leaf.
  """
  leaves, tree = jax.tree.flatten(layers)
  parts = [jax.lax.split(leaf, tuple(sizes)) for leaf in leaves]
  return [jax.tree.unflatten(tree, part) for part in zip(*parts)]


def joined(stacks: Sequence[Any]) -> Any:
  """Dicts, tuples or arrays stacked over runs of layers -> stacked over all layers.

  A leaf that some layers lack, such as a gate's, is stacked over the layers that have it.
  """
  if len(stacks) == 1:
    return stacks[0]
  leaves: dict[Any, list[jax.Array]] = {}
  for stack in stacks:
    for path, leaf in jax.tree_util.tree_leaves_with_path(stack):
      leaves.setdefault(path, []).append(leaf)
  fullest = max(stacks, key=lambda stack: len(jax.tree.leaves(stack)))
  join = lambda path, _: jnp.concatenate(leaves[path])
  return jax.tree_util.tree_map_with_path(join, fullest)


def copied(module: Any) -> Any:
  """A module -> new modules with the same weights, which may be changed."""
  return jax.tree.map(lambda leaf: leaf, module)
