"""Early warnings: scalars that grow in a model before its loss diverges.

  attention_logit     the largest |q k| / sqrt(K), over layers, heads and visible pairs of
                      queries and keys as the kernel reads them (after QK-norm, gates,
                      RoPE and YaRN's scale), before a soft cap, without sinks
  attention_layer     the layer of this logit, from 0
  output_logit        root mean square of the logits, over tokens and the vocabulary,
                      before a soft cap
  residual_rms_first  root mean square of the residual stream, after the embedding
  residual_rms_last   the same after the last layer, before the final norm
  residual_growth     last / first

At large learning rates attention logits grow and output logits drift, both before the
loss diverges (arXiv 2309.14322, section 3). The residual stream can outgrow the layers'
updates; the norms hide this from the loss. Padding is excluded. Non-finite
numbers are reported unchanged: they are warnings too.

A separate program computes the scalars in a forward pass over a few rows of a step's
batch, with the model's own layers. The train step does not change.

B batch  T tokens  D width  H heads  G KV heads  K head width  V vocabulary
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gated import kernels, model
from gated.devices import mesh

# The minimum number of rows to read from a batch that has as many. Each device reads at
# least one, so meshes of up to eight devices read the same rows.
ROWS = 8


class _Seen(NamedTuple):
  """The measurements of one layer."""

  score: jax.Array  # the largest |score|; NaN if any score is NaN
  before: jax.Array  # the root mean square of the residual stream before the layer
  after: jax.Array  # the same after the layer


def measure(net: model.Transformer, batch: Any, *, micro: int) -> dict[str, jax.Array]:
  """A model and a step's batch (B, T) in micro-batches of `micro` rows -> scalars."""
  batch = some_rows(batch, micro)
  live_BT = batch.segments > 0
  documents = batch.segments, batch.positions
  x_BTD, seen = net.hidden(batch.tokens, *documents, through=_layer)
  first, last = seen.before[0], seen.after[-1]
  layer = jnp.where(jnp.isnan(seen.score), jnp.inf, seen.score).argmax()
  return {
    'attention_logit': seen.score[layer],
    'attention_layer': layer,
    'output_logit': _logit_rms(x_BTD, net.unembedding(), live_BT),
    'residual_rms_first': first,
    'residual_rms_last': last,
    'residual_growth': last / first,
  }


def scalars(values: dict[str, Any]) -> dict[str, float]:
  """The result of `measure`, on the host -> Python scalars."""
  return {name: value.item() for name, value in values.items()}


def some_rows(batch: Any, micro: int) -> Any:
  """A batch (B, T) -> some of its rows, evenly spaced; see ROWS.

  Row i of R is row i * B / R of the batch, so each device reads rows that it already has.
  """
  rows, length = _rows(micro, mesh.ways('batch')), batch.tokens.shape[1]
  some = lambda x: mesh.constrain(x.reshape(rows, -1, length)[:, 0], 'batch', 'tokens')
  return type(batch)(*map(some, batch))


def _rows(micro: int, ways: int) -> int:
  """The number of rows to read: equal on all devices, and evenly spaced in a batch."""
  fits = (n for n in range(ways, micro + 1, ways) if micro % n == 0)
  return next(n for n in fits if n >= min(ROWS, micro))


def _layer(block: model.Block, x_BTD, angle_BTk, segment_BT, live_BT):
  """Calls a block -> its output and its measurements."""
  # The block computes the same queries and keys; the compiler computes them only once.
  q_BTHK, k_BTGK = block.attn.query_and_key(block.attn_norm(x_BTD), angle_BTk)
  documents = segment_BT, live_BT
  opts: dict[str, Any] = dict(window=block.attn.window, size=jnp.abs)
  score_H = kernels.largest_scores(q_BTHK, k_BTGK, *documents, **opts)
  # A maximum over devices may ignore a NaN.
  score = jnp.where(jnp.isnan(score_H).any(), jnp.nan, score_H.max())
  y_BTD, _ = block(x_BTD, angle_BTk, segment_BT, live_BT)
  return y_BTD, _Seen(score, _rms(x_BTD, live_BT), _rms(y_BTD, live_BT))


def _logit_rms(x_BTD, w_VD, live_BT) -> jax.Array:
  """Root mean square of the logits, from w^T w: sum over V of (x w)^2 = x (w^T w) x^T."""
  vocab, width = w_VD.shape
  # A device holds some columns of w. Here it takes an equal number of whole rows instead,
  # so that no device holds all of w.
  ways = mesh.ways('embed')
  padding = -vocab % (ways * mesh.ways('vocab'))
  w_VD = jnp.pad(w_VD.astype(x_BTD.dtype), ((0, padding), (0, 0)))
  w_VsD = mesh.constrain(w_VD.reshape(-1, ways, width), 'vocab', 'embed', None)
  f32 = dict(preferred_element_type=jnp.float32)
  gram_DD = jnp.einsum('vsd,vse->de', w_VsD, w_VsD, **f32)
  x_BTD = x_BTD.astype(jnp.float32)
  with jax.default_matmul_precision('highest'):
    y_BTD = jnp.einsum('btd,de->bte', x_BTD, gram_DD)
  return _root_mean((x_BTD * y_BTD).sum(-1) / vocab, live_BT)


def _rms(x_BTD, live_BT) -> jax.Array:
  return _root_mean(jnp.square(x_BTD.astype(jnp.float32)).mean(-1), live_BT)


def _root_mean(square_BT, live_BT) -> jax.Array:
  """The root of the mean over tokens that are not padding."""
  mean = jnp.where(live_BT, square_BT, 0).sum() / jnp.maximum(live_BT.sum(), 1)
  # Rounding may leave the mean just below zero.
  return jnp.sqrt(jnp.where(mean < 0, 0, mean))
