"""Names for the leaves of a tree, such as `model.blocks.attn.gate.weight`."""

import hashlib
from typing import Any

import jax
import numpy as np


def name(path) -> str:
  """A key path of JAX -> attributes, keys and indices joined by dots.

  Omits a last part `value`, the field of Flax's parameters.
  """
  parts = [str(getattr(k, 'name', getattr(k, 'key', getattr(k, 'idx', k)))) for k in path]
  return '.'.join(parts[:-1] if parts[-1:] == ['value'] else parts)


def flatten(tree: Any) -> dict[str, Any]:
  """A tree -> {name: leaf}, in the order of the tree."""
  return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
  """{name: leaf} -> a tree with the structure and the names of `like`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], like)


def digest(tree: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bits of all leaves; reads them to the host."""
  sha = hashlib.sha256()
  for key, leaf in sorted(flatten(tree).items()):
    array = np.asarray(leaf)
    sha.update(f'{key}:{array.dtype}:{array.shape}:'.encode())
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()
