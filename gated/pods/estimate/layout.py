"""A recipe on a mesh: the part of each parameter and of each token that one chip holds.

D width  V vocabulary  F ffn  H heads  G kv heads  K head width  E experts  k of a token
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from gated import model
from gated.devices import mesh
from gated.train import moments, optim

WIDE = 4  # bytes of a float32


class Weight(NamedTuple):
  """One parameter, of all layers."""

  part: str  # layers, embed, head or norm
  axes: tuple[str, ...]  # logical axes that the mesh may split
  size: int  # elements
  itemsize: int  # bytes of an element
  matrix: bool  # whether Muon updates it
  factored: int  # elements of its second moments, if they are factored


@functools.cache
def weights(cfg: model.Config) -> tuple[Weight, ...]:
  """A model's parameters."""
  m = model.abstract(cfg)
  return tuple(
    Weight(
      part=part,
      axes=tuple(axis for axis in mesh.axes_of(leaf) if axis and mesh.RULES[axis]),
      size=leaf.size,
      itemsize=leaf.dtype.itemsize,
      matrix=bool(optim.matrix(leaf)),
      factored=moments.factored_size(leaf.shape),
    )
    for part, tree in dict(
      layers=m.blocks, embed=m.embed, head=m.head, norm=m.norm
    ).items()
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
  )


# Cached, because a search over meshes calls it for each mesh.
flops_per_token = functools.cache(model.flops_per_token)


class Layout:
  """A recipe and the sizes of the mesh's axes -> the sizes of one chip's parts."""

  def __init__(self, cfg: Any, sizes: Mapping[str, int]):
    self.cfg, self.sizes = cfg, dict(sizes)
    m = cfg.model
    self.weights = weights(m)
    self.on: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    self.ways = {axis: mesh.ways(axis, self.on) for axis in mesh.RULES if axis}
    self.devices = self.on.size
    self.compute = jnp.dtype(m.numerics.compute).itemsize
    # Tokens of a micro-batch on one chip.
    rows = cfg.batch // cfg.accum // self.ways['batch']
    self.tokens = rows * cfg.data.length // self.ways['tokens']
    self.tensor, self.context = sizes['tensor'], sizes['context']
    self.fsdp, self.expert = sizes['fsdp'], sizes['expert']
    self.query = m.attn.heads * m.attn.head_dim // self.tensor
    self.key = m.attn.kv_heads * m.attn.head_dim // self.tensor
    self.ffn = m.ffn // self.tensor
    self.vocab = m.vocab // self.tensor
    channels = {'heads': self.query, 'kv_heads': self.key, None: m.width}
    wide = lambda gate: gate.granularity == 'elementwise' and gate.source != 'parameter'
    gates = [gate for gate in m.attn.named.values() if gate.at and wide(gate)]
    self.gate = sum(channels[gate.at.heads] for gate in gates)
    # The routers' own forward pass, before a batch's micro-batches.
    routed = m.moe.experts and cfg.accum > 1 and cfg.loss.balance_over == 'global'
    self.counting = 1 if routed else 0

  def split(self, axes: Sequence[str], *, but: Sequence[str] = ()) -> int:
    """The number of parts of weights with these logical axes, ignoring those in `but`."""
    return math.prod(self.ways[axis] for axis in axes if axis not in but)

  def held(self, part: str = '', *, but: Sequence[str] = (), having: str = '') -> float:
    """Elements of a part's weights on one chip, not split by the axes in `but`.

    Without `part`, all weights; with `having`, only weights with this logical axis.
    """
    return sum(
      w.size / self.split(w.axes, but=but)
      for w in self.weights
      if part in ('', w.part) and (not having or having in w.axes)
    )

  @property
  def stored(self) -> float:
    """Bytes of all weights on one chip."""
    return sum(w.size * w.itemsize / self.split(w.axes) for w in self.weights)

  @property
  def moments(self) -> float:
    """Elements of the optimizer's state on one chip: two for each weight, Muon one.

    Every chip has all factored second moments.
    """
    first = sum(w.size / self.split(w.axes) for w in self.weights)
    if self.cfg.optim.factored:
      return first + sum(w.factored for w in self.weights)
    muon = self.cfg.optim.name == 'muon'
    second = [w for w in self.weights if not (muon and w.matrix)]
    return first + sum(w.size / self.split(w.axes) for w in second)
