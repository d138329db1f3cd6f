"""muP: learning rates that transfer from a narrow model to a wide one.

Maximal update parametrization (arXiv 2203.03466) relative to a base width n0. With
r = width / n0, the initial values and learning rates of the standard parametrization are
multiplied by:

  parameters                              initial std    AdamW        Muon
  from and to the stream (hidden)         1 / sqrt(r)    1 / r        1 / sqrt(r)
  from the stream to a fixed size         1 / r          1 / r        -
  embeddings, unembedding, vectors        1              1            -
  logits (the output multiplier)          1 / r

This is Table 8 of the paper, which allows tied embeddings. Headwise gates are hidden: the
number of heads grows with the width. Parameters with a fixed fan-out, such as routers and
the first maps of gated norms, have no multiplier and follow the output weights of Table
3. Muon's updates have a fixed RMS, hence a spectral norm that grows like sqrt(r); the
spectral condition asks for sqrt(fan_out / fan_in) (arXiv 2310.17813, Condition 1).

Multipliers are folded into the parameter before them, as an initial value and a learning
rate (Lemma J.1): the output multiplier into the scale of the last norm, the attention
scale 1 / d (Definition 4.1; d is the head width) into the queries. So evaluation,
generation and export need no code for muP.

Weight decay is decoupled, lr * weight_decay, and keeps the rate of the standard
parametrization: only the update is multiplied, as in the authors' package (mup.MuAdamW:
lr / r, weight_decay * r) and as arXiv 2510.19093 finds necessary. The unit scale of every
tensor in u-muP (2407.17465) is not implemented.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from gated.devices import mesh, trees

TRANSFERS = ('none', 'mup')

# Parameters whose initial std is 1 / sqrt(fan_in) at any width.
STANDARD = ('reduce',)
# Norm of a model -> the parameters that scale its last output, and the inverse: {name:
# power of the output multiplier}. The gated norm's projection reads the scaled output.
# Dynamic tanh is absent: its input has no fixed scale.
OUTPUTS = {
  'rms': {'norm.scale': 1},
  'pre_affine': {'norm.rms.scale': 1},
  'gated': {'norm.rms.scale': 1, 'norm.down.weight': -1},
}


@dataclass(frozen=True)
class Growth:
  """The ratios of a model's sizes to those of the base model."""

  width: float
  head_dim: float
  multipliers: dict[str, float]  # parts of parameters' names -> folded multipliers

  def __str__(self) -> str:
    """The growth of width and heads, for the log."""
    hidden = f'rates of matrices / {self.width:g} (Muon / {self.width**0.5:.3g})'
    scores = f', scores / {self.head_dim**0.5:.3g}' if self.head_dim != 1 else ''
    return f'{hidden}, logits / {self.width:g}{scores}'

  def of(self, axes: tuple[str | None, ...]) -> float:
    """The ratio of the product of these logical axes; 1 for fixed sizes."""
    heads = self.width / self.head_dim
    ratios = dict.fromkeys(('embed', 'ffn', 'channels'), self.width)
    ratios |= {'heads': heads, 'kv_heads': heads, 'head_dim': self.head_dim}
    return math.prod(ratios.get(axis or '', 1.0) for axis in axes)

  def multiplier(self, name: str) -> float:
    """The product of the multipliers folded into the parameter of this name."""
    parts = self.multipliers.items()
    return math.prod(m for part, m in parts if f'{name}.'.startswith(f'{part}.'))


def growth(optim: Any, model: Any) -> Growth | None:
  """The configs of the optimizer and the model -> the growth; None without transfer.

  ValueError for models whose multipliers cannot be folded.
  """
  if optim.transfer == 'none':
    return None
  width = model.width / optim.base_width
  head_dim = model.attn.head_dim / (optim.base_head_dim or model.attn.head_dim)
  _check(model, head_dim)
  multipliers = {part: width**-power for part, power in OUTPUTS[model.norm].items()}
  query = 'attn.query_norm' if model.attn.qk_norm else 'attn.query'
  multipliers[f'blocks.{query}'] = head_dim**-0.5
  return Growth(width, head_dim, multipliers)


def _check(model: Any, head_dim: float) -> None:
  if model.attn.value_scale != 'none':
    raise ValueError(
      "config.optim.transfer='mup' with config.model.attn.value_scale="
      f'{model.attn.value_scale!r}: its constant follows the initial values, which muP '
      "changes; allowed is value_scale='none'"
    )
  if model.norm not in OUTPUTS:
    raise ValueError(
      f"config.optim.transfer='mup' with config.model.norm={model.norm!r}, but allowed "
      f'are {", ".join(map(repr, OUTPUTS))}'
    )
  attn, gates = model.attn, model.attn.named.items()
  added = [name for name, gate in gates if gate.form == 'add' and gate.at.normed]
  valued = [name for name, gate in gates if gate.source == 'value']
  wrong = [f"{attn.knob(name)}.form='add' on queries or keys" for name in added]
  wrong += [f"{attn.knob(name)}.source='value'" for name in valued]
  wrong += ['config.model.attn.differential=True'] * attn.differential
  if head_dim != 1 and wrong:
    raise ValueError(
      f'config.optim.base_head_dim other than {attn.head_dim} with {wrong[0]}: no rule '
      'for it is known; allowed is base_head_dim=0'
    )


def initial(model: Any, growth: Growth | None) -> Any:
  """A model with the standard initial values -> with those of muP."""
  powers = lambda name, _: (0.0, 0.0) if name.endswith(STANDARD) else (-0.5, -1.0)
  return model if growth is None else _scaled(model, growth, powers)


def scaled(updates: Any, growth: Growth, *, muon: Callable[[Any], bool]) -> Any:
  """Directions of a step, before decay and the learning rate -> those of muP.

  `muon(parameter)` is whether Muon updates it.
  """
  return _scaled(updates, growth, lambda _, p: (-0.5 if muon(p) else -1.0, -1.0))


def _scaled(
  tree: Any, growth: Growth, powers: Callable[[str, Any], tuple[float, float]]
) -> Any:
  """Multiplies each parameter by a power of its fan-in's growth, and by its multiplier.

  `powers`: (name, parameter) -> the power if its fan-out grows, and if it is fixed.
  """

  def scale(path, parameter):
    name, (fan_in, fan_out) = trees.name(path), fans(mesh.axes_of(parameter), growth)
    factor = fan_in ** powers(name, parameter)[fan_out == 1] * growth.multiplier(name)
    return jax.tree.map(lambda x: x * factor, parameter) if factor != 1 else parameter

  is_parameter = lambda x: isinstance(x, nnx.Variable)
  return jax.tree_util.tree_map_with_path(scale, tree, is_leaf=is_parameter)


def fans(axes: tuple[str | None, ...], growth: Growth) -> tuple[float, float]:
  """The logical axes of a parameter -> the growth of its fan-in and of its fan-out.

  A matrix reads or writes the stream ('embed'); all other parameters have a fixed fan-in.
  """
  axes = tuple(axis for axis in axes if axis not in ('layers', 'experts'))
  if len(axes) > 1 and axes[0] == 'embed':
    return growth.of(axes[:1]), growth.of(axes[1:])
  if len(axes) > 1 and axes[-1] == 'embed':
    return growth.of(axes[:-1]), growth.of(axes[-1:])
  return 1.0, growth.of(axes)
