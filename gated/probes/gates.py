"""Gate scores by layer, head and token: the factors (or summands) of the gated tensor.

B batch  T tokens  L layers  H heads  K head width  C token classes  V vocabulary
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated import config, model
from gated.devices import mesh
from gated.model.gate import ACTIVATIONS

BELOW = (0.05, 0.1, 0.5)  # Shares of scores below these are counted.
BINS = 50
# The range of a histogram if the activation is not bounded.
UNLIMITED = (-2.0, 2.0)
# Classes of tokens: by their characters, and the first token of each document.
CLASSES = ('letters', 'digits', 'spaces', 'other', 'first')
# A head is open at a token if its mean score is at least this.
OPEN = 0.5
_CHUNK = 1024  # Tokens of the vocabulary that a device reads at a time.


def name(cfg: model.Config, position: str = '') -> str:
  """The position of a gate, '' for the first gate -> its name in `cfg.attn.named`.

  ValueError for a model without such a gate.
  """
  names = {own.position: name for name, own in cfg.attn.named.items()}
  if not names:
    raise ValueError("the model has no gate: config.model.attn.gate.position='none'")
  position = position or next(iter(names))
  config.one_of('position of a gate', position, names)
  return names[position]


def scores(net: model.Transformer, batch: Any, position: str = '') -> jax.Array:
  """A model and a batch (B, T) -> the scores of a gate, '' for the first, in float32.

  The shape is (L, B, T, H) for a headwise gate and (L, B, T, H, K) for an elementwise
  one, with the L layers that have the gate. H is 1 if the heads share their score, and
  (H, K) is (1, D) at position 'out'. ValueError for a model without the gate.
  """
  own = name(net.cfg, position)

  def through(block, x_BTD, *rest):
    return block(x_BTD, *rest)[0], of_block(block, x_BTD, own)

  _, score = net.hidden(batch.tokens, batch.segments, batch.positions, through=through)
  return score[..., 0] if net.cfg.attn.named[own].granularity == 'headwise' else score


def sums(
  net: model.Transformer, batch: Any, position: str = ''
) -> tuple[jax.Array, jax.Array]:
  """As `scores` -> (scores summed over tokens, number of tokens).

  The sums are (L, H, K) as in `of_block`; padding does not count.
  """
  live_BT, own = batch.segments > 0, name(net.cfg, position)

  def through(block, x_BTD, *rest):
    score, live = of_block(block, x_BTD, own), live_BT[..., None, None]
    total = None if score is None else jnp.where(live, score, 0).sum((0, 1))
    return block(x_BTD, *rest)[0], total

  documents = batch.segments, batch.positions
  return net.hidden(batch.tokens, *documents, through=through)[1], live_BT.sum()


def of_block(block: model.Block, x_BTD: jax.Array, name: str) -> jax.Array | None:
  """A block, its input and the name of a gate -> its scores (B, T, H, K) in float32.

  None if the layer lacks the gate. H or K is 1 where heads or channels share a score; at
  position 'out' H is 1 and K is D.
  """
  attn, h_BTD = block.attn, block.attn_norm(x_BTD)
  if name not in attn.gates:
    return None
  gate = attn.gates[name]
  from_value = gate.cfg.source == 'value'
  score = gate.score(attn.value(h_BTD) if from_value else h_BTD).astype(jnp.float32)
  # The scores of a learned parameter have B = T = 1.
  score = jnp.broadcast_to(score, (*x_BTD.shape[:2], *score.shape[2:]))
  return score[..., None, :] if score.ndim == 3 else score


def score_range(activation: str) -> tuple[float, float]:
  """The range of a histogram; scores outside of it count in the outer bins.

  It includes 0, 1 and the limits of the activation; if they exceed UNLIMITED, it is
  UNLIMITED.
  """
  act = ACTIVATIONS[activation]
  with jax.ensure_compile_time_eval():
    low, high = (float(act(jnp.float32(logit))) for logit in (-30, 30))
  inside = UNLIMITED[0] <= low <= high <= UNLIMITED[1]
  return (min(low, 0.0), max(high, 1.0)) if inside else UNLIMITED


def edges(activation: str) -> np.ndarray:
  """The BINS + 1 edges of a histogram, in float32."""
  return np.linspace(*score_range(activation), BINS + 1, dtype=np.float32)


def measure(
  score_BTHK: jax.Array, live_BT: jax.Array, class_BTC: jax.Array, activation: str
) -> dict[str, jax.Array]:
  """One layer's scores -> sums over tokens, padding excluded.

  sum           (H,): of the scores
  row_sum, row_square   (B,): sum of a row's scores, and of their squared deviations from
                the row's mean
  below         (3,): number of scores below each limit of BELOW
  histogram     (BINS,): number of scores in each bin, [edge, next edge)
  class_sum     (C,): summed over the tokens of each class; class_BTC is one-hot
  class_count   (C,): number of tokens of each class
  """
  live = live_BT[..., None, None]
  score = jnp.where(live, score_BTHK, 0)
  class_BTC = class_BTC & live_BT[..., None]

  def count(limits: np.ndarray) -> jax.Array:
    less = score_BTHK[None] < limits.reshape(-1, 1, 1, 1, 1)
    return jnp.sum(live[None] & less, (1, 2, 3, 4))

  less = count(edges(activation)[1:-1])
  per_token = score.shape[2] * score.shape[3]
  total = live_BT.sum() * per_token
  count_B = jnp.maximum(live_BT.sum(1) * per_token, 1)
  mean_B11 = (score.sum((1, 2, 3)) / count_B)[:, None, None, None]
  return {
    'sum': score.sum((0, 1, 3)),
    'row_sum': score.sum((1, 2, 3)),
    'row_square': jnp.where(live, jnp.square(score - mean_B11), 0).sum((1, 2, 3)),
    'below': count(np.asarray(BELOW, np.float32)),
    'histogram': jnp.diff(less, prepend=0, append=total),
    'class_sum': jnp.where(class_BTC, score.sum((2, 3))[..., None], 0).sum((0, 1)),
    'class_count': class_BTC.sum((0, 1)),
  }


def weight_norms(net: model.Transformer, name: str) -> jax.Array:
  """The norm of each head's weight in a gate, (L, H); H is 1 at position 'out'."""
  gate = net.blocks.attn.gates[name]
  weight = gate.weight[...].astype(jnp.float32)
  heads = [i for i, axis in enumerate(gate.weight.axes) if axis in ('heads', 'kv_heads')]
  # The stacked weight has its layers before the named axes.
  others = [i for i in range(1, weight.ndim) if i - 1 not in heads]
  norm_LH = jnp.sqrt(jnp.square(weight).sum(others))
  return norm_LH if heads else norm_LH[:, None]


def vocabulary(net: model.Transformer, name: str) -> jax.Array | None:
  """Layer 0's scores of every token, averaged over channels: (V, H).

  A gate of layer 0 reads the normalized embedding, so it depends on the token alone. None
  if layer 0 lacks the gate.
  """
  if net.cfg.gated[name][0] != 0:
    return None
  block = jax.tree.map(lambda leaf: leaf[0], net.blocks)
  vocab, on = net.cfg.vocab, mesh.current()
  rows = 1 if on is None else mesh.ways('batch', on)
  count = -(-vocab // (rows * _CHUNK))
  token_N = jnp.minimum(jnp.arange(count * rows * _CHUNK), vocab - 1)

  def chunk(token_BT):
    score_BTHK = of_block(block, net.embed(token_BT), name)
    assert score_BTHK is not None
    return score_BTHK.mean(-1)

  score_NBTH = jax.lax.map(chunk, token_N.reshape(count, rows, _CHUNK))
  return score_NBTH.reshape(len(token_N), -1)[:vocab]
