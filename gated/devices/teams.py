"""Devices that work on one array together, and what they pass to each other.

For use inside of `jax.shard_map`. All the devices along some mesh axes are a team; or
each few neighbours among them are one, and those of the same place in each few another.
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
class Team:
  """Of `size` devices; one device alone passes nothing on."""

  axes: tuple[str, ...] = ()
  size: int = 1
  groups: tuple[tuple[int, ...], ...] | None = None  # places along the axes; None: all

  @property
  def _named(self) -> dict[str, Any]:
    groups = self.groups and [list(group) for group in self.groups]
    return dict(axis_name=self.axes, axis_index_groups=groups)

  def sizes(self) -> list[int]:
    """Of the teams that this one can be parted into, ascending."""
    return [n for n in range(1, self.size + 1) if self.size % n == 0]

  def some(self, places: np.ndarray) -> 'Team':
    """The teams whose places along the axes are the rows of an array."""
    count, size = places.shape
    groups = None if count == 1 else tuple(map(tuple, places.tolist()))
    return ALONE if size == 1 else Team(self.axes, size, groups)

  def gather(self, x: jax.Array, dim: int) -> jax.Array:
    """Each one's part -> all parts, one after the other along a dim."""
    if self.size == 1:
      return x
    return jax.lax.all_gather(x, axis=dim, tiled=True, **self._named)

  def scatter(self, x: jax.Array, dim: int) -> jax.Array:
    """Each one's summand -> one's own part, along a dim, of their sum."""
    if self.size == 1:
      return x
    return jax.lax.psum_scatter(x, scatter_dimension=dim, tiled=True, **self._named)

  def exchange(self, x: jax.Array, *, split: int, join: int) -> jax.Array:
    """All of one dim and a part of another -> a part of the one and all of the other."""
    if self.size == 1:
      return x
    opts: dict[str, Any] = dict(split_axis=split, concat_axis=join, tiled=True)
    return jax.lax.all_to_all(x, **opts, **self._named)

  def sum(self, x: jax.Array) -> jax.Array:
    return x if self.size == 1 else jax.lax.psum(x, **self._named)

  def max(self, x: jax.Array) -> jax.Array:
    return x if self.size == 1 else jax.lax.pmax(x, **self._named)

  def place(self) -> jax.Array | int:
    """Which of the team this device is, from 0."""
    if self.size == 1:
      return 0
    place = jax.lax.axis_index(self.axes)
    if self.groups is None:
      return place
    where = {p: i for group in self.groups for i, p in enumerate(group)}
    return jax.numpy.asarray([where[p] for p in range(len(where))])[place]

  def own(self, x: jax.Array, dim: int) -> jax.Array:
    """What `gather` made -> one's own part of it."""
    if self.size == 1:
      return x
    part = x.shape[dim] // self.size
    return jax.lax.dynamic_slice_in_dim(x, self.place() * part, part, dim)


ALONE = Team()


def along(spec: P, mesh: Any) -> Team:
  """The team of all the devices along the axes in a PartitionSpec."""
  parts = [(p,) if isinstance(p, str) else (p or ()) for p in spec]
  axes = tuple(itertools.chain(*parts))
  return Team(axes, math.prod(mesh.shape[axis] for axis in axes))


@dataclass(frozen=True)
class Sharing:
  """A table of V vectors of width D, and tokens that it is for: who works with whom."""

  vocab: Team = ALONE  # those who split V
  width: Team = ALONE  # those who split D
  near: Team = ALONE  # of them, neighbours who take each other's tokens in
  far: Team = ALONE  # and those of the same place among their neighbours
  tokens: Team = ALONE  # those who split the tokens
  rest: Team = ALONE  # of them, those who do not split D

  def by(self, n: int) -> 'Sharing':
    """The same with n neighbours.

    A device's place in `width` is n times its place in `far`, plus that in `near`.
    """
    places = np.arange(self.width.size).reshape(-1, n)
    near, far = self.width.some(places), self.width.some(places.T)
    return dataclasses.replace(self, near=near, far=far)


def sharing(mesh: Any, table: P, tokens: P) -> Sharing:
  """How a table (V, D) and tokens (B, T) are split -> their Sharing, with 1 neighbour."""
  vocab, width = (along(P(part), mesh) for part in table)
  split = along(tokens, mesh)
  assert set(width.axes) <= set(split.axes)
  rest = along(P(*(axis for axis in split.axes if axis not in width.axes)), mesh)
  return Sharing(vocab, width, ALONE, width, split, rest)
