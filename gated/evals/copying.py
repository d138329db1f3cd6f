"""Teacher-forced copying by distance: the loss on the repeat of a random span.

As the forgetting curve (arXiv 2410.04727), with losses: a row holds a span of random
tokens, text, and the span again, `distance` tokens after its start. Its control has
another span at the start. The first token of a repeat does not count: nothing announces
it. The difference of the losses is what the model copies; it is 0 without memory.

B rows  T tokens
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gated import data
from gated.devices import mesh
from gated.evals.harness.scoring import padded_length

SPAN = 32  # Tokens of a span.
ROWS = 32  # Rows of a distance, unless their number is given.


def rows(
  ids_N: np.ndarray, distance: int, *, count: int, seed: int
) -> tuple[data.Batch, data.Batch]:
  """The tokens of a text -> `count` rows with a repeat, and their controls.

  The spans are drawn from the distinct tokens of the text. ValueError for a text that is
  shorter than the distance.
  """
  room = distance - SPAN
  if room < 0 or room > len(ids_N):
    raise ValueError(
      f'--copying={distance}, but a distance is at least {SPAN}, and at most {SPAN} more '
      f'than the {len(ids_N)} tokens of the text'
    )
  rng = np.random.default_rng([seed, distance])
  size = padded_length(distance + SPAN - 1)
  spans = rng.choice(np.unique(ids_N), (2, count, SPAN))
  starts = rng.integers(0, len(ids_N) - room + 1, count)
  text = np.stack([ids_N[i : i + room] for i in starts])
  batches = []
  for first in spans:
    whole = np.concatenate([first, text, spans[0]], 1).astype(np.int32)
    pad = lambda x: np.pad(x, ((0, 0), (0, size - x.shape[1])))
    token_BT, target_BT = pad(whole[:, :-1]), pad(whole[:, 1:])
    weight_BT = np.zeros(token_BT.shape, np.float32)
    weight_BT[:, distance : distance + SPAN - 1] = 1
    segment_BT = np.broadcast_to(np.arange(size) < distance + SPAN - 1, token_BT.shape)
    index_BT = np.broadcast_to(np.arange(size, dtype=np.int32), token_BT.shape)
    segment_BT = segment_BT.astype(np.int32)
    batches.append(data.Batch(token_BT, target_BT, weight_BT, segment_BT, index_BT))
  return batches[0], batches[1]


def measure(
  evaluate: Callable,
  ids_N: np.ndarray,
  *,
  distances: Sequence[int],
  on: Mesh,
  count: int,
  batch: int,
  seed: int,
  after: Callable[[int], Any],
) -> dict[str, Any]:
  """A model and a text -> the losses by distance, in nats per token of a repeat.

  `evaluate(batch)` gives each row's sums of (nats, weight); `batch` is rows per device at
  a time; `after` is called with the number of rows that were read.
  """
  count = count or ROWS
  ways = mesh.ways('batch', on)
  size = ways * min(batch, -(-count // ways))
  held = list(mesh.rows(on, size))
  report = {}
  for distance in distances:
    losses = []
    for part in rows(ids_N, distance, count=count, seed=seed):
      means = []
      for start in range(0, count, size):
        take = np.arange(start, start + size)[held] % count
        local = jax.tree.map(lambda x, take=take: x[take], part)
        nats_B, weight_B = evaluate(mesh.place(local, on, size))
        means += (np.asarray(nats_B, float) / np.asarray(weight_B)).tolist()
        after(min(size, count - start))
      losses.append(np.array(means[:count]))
    repeat_B, control_B = losses
    gain_B = control_B - repeat_B
    error = gain_B.std(ddof=1) / np.sqrt(count) if count > 1 else None
    report[str(distance)] = {
      'nats_per_token': float(repeat_B.mean()),
      'control': float(control_B.mean()),
      'gain': float(gain_B.mean()),
      'gain_stderr': None if error is None else float(error),
    }
  return {'span': SPAN, 'rows': count, 'seed': seed, 'distances': report}


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Reports -> a line for each distance of each."""
  lines = ['  '.join(f'{h:>12}' for h in ('distance', 'nats/token', 'control', 'gain'))]
  for each in reports:
    for distance, losses in each['copying']['distances'].items():
      cells = [f'{losses[key]:12.4f}' for key in ('nats_per_token', 'control', 'gain')]
      error = losses['gain_stderr']
      lines.append('  '.join([f'{distance:>12}', *cells]))
      lines[-1] += '' if error is None else f' ± {error:.4f}'
      lines[-1] += f'  {each["label"]}'
  return '\n'.join(lines)
