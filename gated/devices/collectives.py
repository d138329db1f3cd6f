"""Groups of devices and their collectives, for use inside `jax.shard_map`.

A group is either all devices along some mesh axes, or one of several equal parts of
them.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Group:
  """A group of `size` devices; with size 1 every collective returns its input."""

  axes: tuple[str, ...] = ()
  size: int = 1
  parts: tuple[tuple[int, ...], ...] | None = None  # indices along the axes; None: all

  @property
  def _named(self) -> dict[str, Any]:
    parts = self.parts and [list(part) for part in self.parts]
    return dict(axis_name=self.axes, axis_index_groups=parts)

  def sizes(self) -> list[int]:
    """The sizes of the equal subgroups that the group can be split into, ascending."""
    return [n for n in range(1, self.size + 1) if self.size % n == 0]

  def split(self, indices: np.ndarray) -> 'Group':
    """Subgroups, one for each row of an array of indices along the axes."""
    count, size = indices.shape
    parts = None if count == 1 else tuple(map(tuple, indices.tolist()))
    return ALONE if size == 1 else Group(self.axes, size, parts)

  def all_gather(self, x: jax.Array, dim: int) -> jax.Array:
    """Concatenates the devices' shards along a dim."""
    if self.size == 1:
      return x
    return jax.lax.all_gather(x, axis=dim, tiled=True, **self._named)

  def reduce_scatter(self, x: jax.Array, dim: int) -> jax.Array:
    """Sums over the devices and keeps this device's shard along a dim."""
    if self.size == 1:
      return x
    return jax.lax.psum_scatter(x, scatter_dimension=dim, tiled=True, **self._named)

  def all_to_all(self, x: jax.Array, *, split: int, join: int) -> jax.Array:
    """Shards the dim `split` and gathers the dim `join`."""
    if self.size == 1:
      return x
    opts: dict[str, Any] = dict(split_axis=split, concat_axis=join, tiled=True)
    return jax.lax.all_to_all(x, **opts, **self._named)

  def sum(self, x: jax.Array) -> jax.Array:
    return x if self.size == 1 else jax.lax.psum(x, **self._named)

  def max(self, x: jax.Array) -> jax.Array:
    return x if self.size == 1 else jax.lax.pmax(x, **self._named)

  def index(self) -> jax.Array | int:
    """This device's index in its group, from 0."""
    if self.size == 1:
      return 0
    index = jax.lax.axis_index(self.axes)
    if self.parts is None:
      return index
    by_axis = {p: i for part in self.parts for i, p in enumerate(part)}
    return jax.numpy.asarray([by_axis[p] for p in range(len(by_axis))])[index]

  def shard(self, x: jax.Array, dim: int) -> jax.Array:
    """This device's shard of an array that every device of the group holds."""
    if self.size == 1:
      return x
    size = x.shape[dim] // self.size
    return jax.lax.dynamic_slice_in_dim(x, self.index() * size, size, dim)


ALONE = Group()


def along(spec: P, mesh: Any) -> Group:
  """The group of all devices along the axes in a PartitionSpec."""
  parts = [(p,) if isinstance(p, str) else (p or ()) for p in spec]
  axes = tuple(itertools.chain(*parts))
  return Group(axes, math.prod(mesh.shape[axis] for axis in axes))


@dataclass(frozen=True)
class TableGroups:
  """The groups that share a table (V, D) and the tokens that index it.

  The group `width` is split in two levels: an inner group gathers its members' tokens;
  an outer group holds the devices with equal index in their inner groups.
  """

  vocab: Group = ALONE  # shards V
  width: Group = ALONE  # shards D
  inner: Group = ALONE
  outer: Group = ALONE
  tokens: Group = ALONE  # shards the tokens
  replicas: Group = ALONE  # shards the tokens, not D

  def with_inner(self, n: int) -> 'TableGroups':
    """The same with inner groups of n devices.

    A device's index in `width` is n times its index in `outer`, plus that in `inner`.
    """
    indices = np.arange(self.width.size).reshape(-1, n)
    inner, outer = self.width.split(indices), self.width.split(indices.T)
    return dataclasses.replace(self, inner=inner, outer=outer)


def table_groups(mesh: Any, table: P, tokens: P) -> TableGroups:
  """Specs of a table (V, D) and tokens (B, T) -> the groups, with inner groups of 1."""
  vocab, width = (along(P(part), mesh) for part in table)
  split = along(tokens, mesh)
  assert set(width.axes) <= set(split.axes)
  replicas = along(P(*(a for a in split.axes if a not in width.axes)), mesh)
  return TableGroups(vocab, width, ALONE, width, split, replicas)
