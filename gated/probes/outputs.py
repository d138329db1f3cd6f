"""The SDPA output before and after its gate, the values, and the rank of their maps.

B batch  T tokens  H heads  G KV heads  K head width  L layers
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated.model import attention
from gated.probes.attention import EXACT

SMALL = (1e-2, 1e-3)  # Limits of |y|, as in Fig. 5 of the paper.


def measure(
  trace: attention.Trace,
  score_BTHK: jax.Array | None,
  live_BT: jax.Array,
  first_BT: jax.Array,
) -> dict[str, Any]:
  """One layer -> sums over tokens and channels; padding does not count.

  `score_BTHK` is the score of the gate after SDPA, None without one; its H and K may be
  1. `first_BT` marks the first token of each document.

  before, after, scaled   of y, of the gated y, and of y times the row's mean score:
    'sum' (H,): summed |y|;  'small' (2,): number of |y| below each of SMALL
  gram_before, gram_after   (H, K, K): y^T y
  documents                 (): number of documents that start in the batch
  value_first, value_other  (G,): summed norms of the values of documents' first tokens,
                            and of all other tokens
  """
  before = trace.sdpa.astype(jnp.float32)
  after = trace.gated.astype(jnp.float32)
  scaled = before
  if score_BTHK is not None:
    live = live_BT[..., None, None]
    channels = score_BTHK.shape[2] * score_BTHK.shape[3]
    sum_B = jnp.where(live, score_BTHK, 0).sum((1, 2, 3))
    mean_B = sum_B / jnp.maximum(live_BT.sum(1) * channels, 1)
    scaled = before * mean_B[:, None, None, None]
  norm_BTG = jnp.linalg.norm(trace.value.astype(jnp.float32), axis=-1)
  starts_BT = live_BT & first_BT
  first = jnp.where(starts_BT[..., None], norm_BTG, 0).sum((0, 1))
  gram = lambda y: jnp.einsum('bthk,bthl->hkl', y, y, **EXACT)
  alive = lambda y: jnp.where(live_BT[..., None, None], y, 0)
  return {
    'before': _sizes(before, live_BT),
    'after': _sizes(after, live_BT),
    'scaled': _sizes(scaled, live_BT),
    'gram_before': gram(alive(before)),
    'gram_after': gram(alive(after)),
    'documents': starts_BT.sum(),
    'value_first': first,
    'value_other': jnp.where(live_BT[..., None], norm_BTG, 0).sum((0, 1)) - first,
  }


def _sizes(y_BTHK: jax.Array, live_BT: jax.Array) -> dict[str, jax.Array]:
  size = jnp.abs(y_BTHK)
  live = live_BT[..., None, None]
  small = [jnp.sum(live & (size < limit)) for limit in SMALL]
  return {'sum': jnp.where(live, size, 0).sum((0, 1, 3)), 'small': jnp.stack(small)}


def ranks_of_grams(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Y^T Y (..., K, K) -> the stable and the effective rank of Y."""
  square = np.linalg.eigvalsh(np.asarray(gram, np.float64))
  return _ranks(np.sqrt(np.maximum(square, 0)))


def ranks_of_maps(value_LDGK: np.ndarray, out_LHKD: np.ndarray) -> np.ndarray:
  """W_V and W_O -> stable and effective rank of W_V W_O per head: (2, L, H).

  Without a gate, each head's value and output projections are this one linear map, of
  rank K at most (section 4.1 of the paper).
  """
  depth, heads = out_LHKD.shape[:2]
  shared = heads // value_LDGK.shape[2]
  ranks = np.empty((2, depth, heads))
  for i in range(depth):
    values = np.moveaxis(np.asarray(value_LDGK[i], np.float64), 1, 0)
    outs = np.asarray(out_LHKD[i], np.float64).swapaxes(1, 2)
    right_GKK, left_HKK = np.linalg.qr(values).R, np.linalg.qr(outs).R
    product = np.repeat(right_GKK, shared, 0) @ left_HKK.swapaxes(1, 2)
    ranks[:, i] = _ranks(np.linalg.svd(product, compute_uv=False))
  return ranks


def _ranks(singular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Singular values s -> (sum(s^2) / max(s)^2, exp(entropy of s / sum(s))); 0 if s = 0.

  The second is the effective rank of Roy and Vetterli 2007.
  """
  largest, total = singular.max(-1), singular.sum(-1)
  some = np.where(largest > 0, largest, 1)
  stable = np.square(singular).sum(-1) / some**2
  share = singular / np.where(total > 0, total, 1)[..., None]
  entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), -1)
  return stable, np.where(largest > 0, np.exp(entropy), 0)
