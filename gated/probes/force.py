"""Gates forced to a score at inference: open, closed, their mean, or a constant.

L layers  H heads  K head width  B batch  T tokens
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gated import model
from gated.model.gate import FORMS

WORDS = {'open': 1.0, 'closed': 0.0}


class Forced(nnx.Module):
  """A gate whose scores are replaced in the chosen layers; it takes the gate's place.

  Its arrays are stacked over the layers, like the gate's weight: chosen_L, and a score of
  shape (L, H, K), or (L, D) at position 'out'. All dims but L may be 1.
  """

  def __init__(self, gate: Any, chosen_L: jax.Array, score: jax.Array):
    self.gate, self.cfg = gate, gate.cfg
    keep = lambda x: nnx.Variable(x, axes=(None,) * (x.ndim - 1))
    self.chosen, self.forced = keep(chosen_L), keep(score)

  @property
  def weight(self) -> Any:
    """The weight of the gate itself."""
    return self.gate.weight

  def score(self, x: jax.Array) -> jax.Array:
    """As `Gate.score`."""
    forced = self.forced[...][None, None]
    return jnp.where(self.chosen[...], forced, self.gate.score(x))

  def __call__(self, y: jax.Array, x_BTD: jax.Array) -> jax.Array:
    score = self.score(y if self.cfg.source == 'value' else x_BTD)
    return FORMS[self.cfg.form](y.astype(jnp.float32), score).astype(y.dtype)


def arrays(
  cfg: model.Config,
  gates: str | float,
  layers: Sequence[int] | None,
  mean: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """-> the chosen layers and their score, as `Forced` takes them.

  `gates` is a word or a number, as for `Loaded.force`. 'mean', and only 'mean', needs
  `mean`: the gate scores' mean over tokens, (L, H) or (L, H, K). ValueError for a wrong
  argument.
  """
  chosen, constant = check(cfg, gates, layers)
  if (constant is None) != (mean is not None):
    raise ValueError(
      f'gates={gates!r} {"needs a" if constant is None else "takes no"} text'
    )
  depth = cfg.depth
  score = np.full((depth, 1, 1), constant) if mean is None else mean
  shape = (depth, -1) if cfg.attn.gate.position == 'out' else (*score.shape, 1)[:3]
  selected = np.isin(np.arange(depth), chosen)
  return selected, score.reshape(shape).astype(np.float32)


def check(
  cfg: model.Config, gates: str | float, layers: Sequence[int] | None
) -> tuple[np.ndarray, float | None]:
  """-> the numbers of the chosen layers, and their constant score; None for 'mean'.

  ValueError for a model without a gate and for a wrong argument.
  """
  gate, depth = cfg.attn.gate, cfg.depth
  if gate.position == 'none':
    raise ValueError("the model has no gate: config.model.attn.gate.position='none'")
  chosen = np.arange(depth) if layers is None else np.asarray(layers)
  if chosen.ndim != 1 or chosen.dtype.kind not in 'iu':
    raise ValueError(f'layers={layers}, but a list of numbers is needed')
  if not np.isin(chosen, np.arange(depth)).all():
    raise ValueError(f'layers={layers}, but the model has the layers 0 to {depth - 1}')
  if gates == 'mean':
    return chosen, None
  constant = WORDS.get(gates) if isinstance(gates, str) else gates
  if constant is None or not np.isfinite(constant):
    raise ValueError(f'gates={gates!r}, but allowed are {[*WORDS, "mean"]} and numbers')
  return chosen, float(constant)


def parse(spec: str, depth: int) -> tuple[str | float, list[int] | None]:
  """'mean@0,5-7' -> ('mean', [0, 5, 6, 7]); without @ all layers, which is None.

  ValueError if layers of a model of this depth do not follow the @.
  """
  gates, at, places = spec.partition('@')
  layers: list[int] = []
  for part in places.split(',') if at else ():
    match = re.fullmatch(r'([0-9]{1,9})(?:-([0-9]{1,9}))?', part)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if first > last:
      raise ValueError(f'{part!r} is neither a layer nor a range of layers such as 5-7')
    if last >= depth:
      raise ValueError(f'layer {last}, but the model has the layers 0 to {depth - 1}')
    layers += range(first, last + 1)
  try:
    return float(gates), layers if at else None
  except ValueError:
    return gates, layers if at else None


def force(net: model.Transformer, chosen_L: Any, score: Any) -> model.Transformer:
  """A model with a gate, and `arrays` on its devices -> the model with a forced gate."""
  net = jax.tree.map(lambda leaf: leaf, net)  # New modules, the same weights.
  net.blocks.attn.gate = Forced(net.blocks.attn.gate, chosen_L, score)
  return net
