"""Gates forced to a score at inference: open, closed, their mean, or a constant.

L layers  H heads  K head width  B batch  T tokens
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gated import config, model
from gated.model.gate import FORMS
from gated.probes import gates as probe

WORDS = {'open': 1.0, 'closed': 0.0}


class Forced(nnx.Module):
  """Replaces a gate: the same scores, but forced ones in the chosen layers.

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
  """-> the arrays of `Forced`: the chosen layers, and their scores.

  `gates` and `layers` are as for `check`. Only 'mean' needs and takes `mean`, the gate
  scores' mean over tokens, (L, H) or (L, H, K). ValueError for a wrong argument.
  """
  own, chosen, constant = check(cfg, gates, layers)
  if (constant is None) != (mean is not None):
    raise ValueError(
      f'gates={gates!r} {"needs a" if constant is None else "takes no"} text'
    )
  gated = cfg.gated[own]
  score = np.full((len(gated), 1, 1), constant) if mean is None else mean
  out = cfg.attn.named[own].position == 'out'
  shape = (len(gated), -1) if out else (*score.shape, 1)[:3]
  return np.isin(gated, chosen), score.reshape(shape).astype(np.float32)


def check(
  cfg: model.Config, gates: str | float, layers: Sequence[int] | None
) -> tuple[str, np.ndarray, float | None]:
  """-> a gate's name, its chosen layers, and their constant score; None for 'mean'.

  `gates` is a word or a number, for the first gate; 'POSITION:' before it selects another
  gate. `layers` are by default all that have the gate. ValueError for a model without the
  gate and for a wrong argument.
  """
  position, _, word = str(gates).rpartition(':')
  own = probe.name(cfg, position)
  gated, chosen = cfg.gated[own], np.asarray(cfg.gated[own] if layers is None else layers)
  if chosen.ndim != 1 or chosen.dtype.kind not in 'iu':
    raise ValueError(f'layers={layers}, but a list of numbers is needed')
  if not np.isin(chosen, gated).all():
    whole = f'0 to {cfg.depth - 1}' if len(gated) == cfg.depth else f'{[*gated]} with it'
    raise ValueError(f'layers={layers}, but the model has the layers {whole}')
  try:
    constant = None if word == 'mean' else WORDS[word] if word in WORDS else float(word)
  except ValueError:
    constant = np.nan
  if constant is not None and not np.isfinite(constant):
    raise ValueError(f'gates={gates!r}, but allowed are {[*WORDS, "mean"]} and numbers')
  return own, chosen, constant


def parse(spec: str, depth: int) -> tuple[str | float, list[int] | None]:
  """'mean@0,5-7' -> ('mean', [0, 5, 6, 7]); the layers are None without @.

  ValueError unless the text after @ names layers of a model of this depth, as for
  `config.layers`.
  """
  gates, at, places = spec.partition('@')
  layers = [*config.layers('layers', places, depth)] if at else None
  try:
    return float(gates), layers
  except ValueError:
    return gates, layers


def force(
  net: model.Transformer, name: str, chosen_L: Any, score: Any
) -> model.Transformer:
  """A model, a gate's name and `arrays` on its devices -> the model with forced gates."""
  net = jax.tree.map(lambda leaf: leaf, net)  # New modules, the same weights.
  forced = Forced(net.blocks.attn.gates[name], chosen_L, score)
  setattr(net.blocks.attn, name, forced)
  return net
