"""Held-out loss by position: the mean over the targets that follow as many tokens.

A position counts the tokens before the one that predicts, from 0: in its document if the
model masks documents, else in its row. Position p predicts from p + 1 tokens.

B batch  T tokens  P positions
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from gated import model
from gated.train import losses


def measure(net: model.Transformer, batch: Any, *, chunk: int) -> tuple[Any, Any]:
  """A batch -> (the result of `losses.per_row`, the arguments of `Curve.add`)."""
  nll_BT = losses.per_token(net, batch, chunk=chunk)
  index_BT = jnp.broadcast_to(jnp.arange(nll_BT.shape[1])[None], nll_BT.shape)
  position_BT = batch.positions if net.cfg.mask_documents else index_BT
  return losses.row_sums(nll_BT, batch), (nll_BT, batch.weights, position_BT)


class Curve:
  """Sums of losses by position, over batches; host arithmetic in float64."""

  def __init__(self):
    self._nats_P = self._weight_P = np.zeros(0)

  def add(self, nll_BT: Any, weight_BT: Any, position_BT: Any) -> None:
    """Adds the losses of a batch, weighted; positions as `measure` gives them."""
    counted_BT = np.asarray(weight_BT) > 0
    nll_N, weight_N, position_N = (
      np.asarray(x)[counted_BT] for x in (nll_BT, weight_BT, position_BT)
    )
    size = max(len(self._nats_P), int(position_N.max(initial=-1)) + 1)
    sums = lambda x_N: np.bincount(position_N, x_N.astype(float), size)
    self._nats_P = _padded(self._nats_P, size) + sums(weight_N * nll_N.astype(float))
    self._weight_P = _padded(self._weight_P, size) + sums(weight_N)

  def report(self, cfg: model.Config) -> dict[str, Any]:
    """-> the curve: mean nats and number of targets by position.

    The mean of a position without targets is None.
    """
    means = self._nats_P / np.where(self._weight_P > 0, self._weight_P, 1)
    return {
      'position_in': 'document' if cfg.mask_documents else 'row',
      'nats_per_token': [
        float(x) if weight else None for x, weight in zip(means, self._weight_P)
      ],
      'tokens': self._weight_P.astype(int).tolist(),
    }


def _padded(x_P: np.ndarray, size: int) -> np.ndarray:
  return np.pad(x_P, (0, size - len(x_P)))
