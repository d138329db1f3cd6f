"""A recipe on a mesh: what of each parameter and of each token one chip holds.

D width  V vocabulary  F ffn  H heads  G kv heads  K head width  E experts  k of a token
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from gated import model
from gated.devices import mesh
from gated.train import optim

WIDE = 4  # bytes of a float32
BYTES = {'float32': 4, 'bfloat16': 2}


@dataclass(frozen=True, kw_only=True)
class Weights:
  """Parameters that are split alike."""

  part: str  # layers, embed, head or norm
  axes: tuple[str, ...]  # logical ones that the mesh may split
  count: int  # numbers, of all layers together
  stored: int  # bytes of all of them
  matrices: int  # of the numbers, those in matrices that Muon would take


@functools.cache
def weights(cfg: model.Config) -> tuple[Weights, ...]:
  """A model's parameters, by part and by how they are split."""
  shapes = model.abstract(cfg)
  found: dict[tuple, list[int]] = {}
  is_parameter = lambda x: isinstance(x, nnx.Variable)
  parts = dict(layers=shapes.blocks, embed=shapes.embed, head=shapes.head)
  for part, tree in {**parts, 'norm': shapes.norm}.items():
    for leaf in jax.tree.leaves(tree, is_leaf=is_parameter):
      axes = tuple(sorted(a for a in mesh.axes_of(leaf) if a and mesh.RULES[a]))
      sums = found.setdefault((part, axes), [0, 0, 0])
      sums[0] += leaf.size
      sums[1] += leaf.size * leaf.dtype.itemsize
      sums[2] += leaf.size if optim.matrix(leaf) else 0
  return tuple(
    Weights(part=part, axes=axes, count=count, stored=stored, matrices=matrices)
    for (part, axes), (count, stored, matrices) in found.items()
  )


# A model is looked at once for a sweep over many meshes.
flops_per_token = functools.cache(model.flops_per_token)


class Layout:
  """A recipe, and sizes of the mesh's axes -> sizes of what lies on one chip."""

  def __init__(self, cfg: Any, sizes: Mapping[str, int]):
    self.cfg, self.sizes = cfg, dict(sizes)
    m = cfg.model
    self.weights = weights(m)
    self.on: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    self.ways = {axis: mesh.ways(axis, self.on) for axis in mesh.RULES if axis}
    self.devices = self.on.size
    self.compute = BYTES[m.numerics.compute]
    self.rows = cfg.batch // cfg.accum // self.ways['batch']
    # Tokens of a micro-batch on one chip.
    self.tokens = self.rows * cfg.data.length // self.ways['tokens']
    self.tensor, self.context = sizes['tensor'], sizes['context']
    self.fsdp, self.expert = sizes['fsdp'], sizes['expert']
    self.query = m.attn.heads * m.attn.head_dim // self.tensor
    self.key = m.attn.kv_heads * m.attn.head_dim // self.tensor
    self.ffn = m.ffn // self.tensor
    self.vocab = m.vocab // self.tensor
    gate = m.attn.gate
    wide = gate.granularity == 'elementwise' and gate.source != 'parameter'
    channels = {'heads': self.query, 'kv_heads': self.key, None: m.width}
    self.gate = channels[gate.at.heads] if gate.at and wide else 0
    # The routers' own forward pass, before a batch's micro-batches.
    asked = m.moe.experts and cfg.accum > 1 and cfg.loss.balance_over == 'global'
    self.counting = 1 if asked else 0

  def split(self, axes: Sequence[str], *, but: Sequence[str] = ()) -> int:
    """Into how many parts weights with these logical axes are split, but for some."""
    n = 1
    for axis in axes:
      n *= self.ways[axis] if axis not in but else 1
    return n

  def held(self, *parts: str, but: Sequence[str] = (), having: str = '') -> float:
    """Numbers of the parts' weights on one chip, not split by the axes in `but`.

    Of all parts if none is named; if `having` names a logical axis, of weights with it.
    """
    return sum(
      w.count / self.split(w.axes, but=but)
      for w in self.weights
      if (not parts or w.part in parts) and (not having or having in w.axes)
    )

  @property
  def stored(self) -> float:
    """Bytes of all weights on one chip, as they are kept."""
    return sum(w.stored / self.split(w.axes) for w in self.weights)

  @property
  def moments(self) -> float:
    """Numbers that the optimizer keeps on one chip: two for each weight, Muon one."""
    fewer = 1 if self.cfg.optim.name == 'muon' else 0
    kept = lambda w: 2 * w.count - fewer * w.matrices
    return sum(kept(w) / self.split(w.axes) for w in self.weights)
