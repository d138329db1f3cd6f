"""Rows that begin with one context share its forward pass.

The choices of a question differ in a few tokens after a long context. The keys and values
of the context are computed once, and repeated for its rows; these hold the other tokens.
The numbers differ from those of whole rows by rounding only.

C contexts of a batch  P tokens of a context  N rows of a context  R rows (C * N)
T tokens of a row beyond its context  S asks of a row
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gated import model
from gated.devices import mesh
from gated.evals import generate
from gated.evals.harness import scoring
from gated.evals.harness.scoring import Row, Work

SHORTEST = 32  # Tokens of a context that is worth a pass of its own.
MOST = 8  # Rows of a context in a batch.
CACHED = 2 * scoring.TOKENS  # Slots of the cache per device, unless rows are counted.


class Family(NamedTuple):
  """Rows that begin with the same tokens, all before their first ask."""

  context: tuple[int, ...]
  rows: list[Row]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(N, T, P), padded: the rows, their tokens, the tokens of the context."""
    longest = max(len(row.tokens) for row in self.rows) - len(self.context)
    power = lambda count: 1 << (count - 1).bit_length()
    T = scoring.SHORTEST if longest <= scoring.SHORTEST else max(64, power(longest))
    return power(len(self.rows)), T, scoring.padded_length(len(self.context))

  @property
  def pays(self) -> bool:
    """Whether sharing needs fewer padded tokens than each row alone."""
    N, T, P = self.shape
    alone = sum(scoring.padded_length(len(row.tokens)) for row in self.rows)
    return len(self.rows) > 1 and alone > P + N * T


def works(
  rows: Sequence[Row], measured: Callable, *, on: Mesh, size: int
) -> tuple[Iterator[Work], Sequence[Row]]:
  """The batches of rows that share a context, and the other rows (scoring.Shared).

  `measured` is `measure`, compiled for all devices of `on`. A context axis cannot split
  the few tokens of a row, so with one no rows share a pass.
  """
  if on.shape['context'] > 1:
    return iter(()), rows
  ways = mesh.ways('batch', on)
  sharing, alone = families(rows)
  made = (
    Work(measured, arrays(batch, ways=ways, full=full), slots(batch))
    for batch, full in batches(sharing, size=size, ways=ways)
  )
  return made, alone


def families(rows: Sequence[Row]) -> tuple[list[Family], list[Row]]:
  """Rows -> those that share a context, largest shapes first, and the others in order."""
  by_context: dict[tuple[int, ...], list[Row]] = {}
  for row in rows:
    first = min(position for position, _ in row.asks)
    if first >= SHORTEST:
      by_context.setdefault(row.tokens[:first], []).append(row)
  candidates = (
    Family(context, own[i : i + MOST])
    for context, own in by_context.items()
    for i in range(0, len(own), MOST)
  )
  shared = [family for family in candidates if family.pays]
  taken = {id(row) for family in shared for row in family.rows}
  key = lambda family: (*(-n for n in family.shape), family.context)
  return sorted(shared, key=key), [row for row in rows if id(row) not in taken]


def batches(
  ordered: Sequence[Family], *, size: int, ways: int
) -> Iterator[tuple[list[Family], int]]:
  """Families -> batches with one N and T each, and the families per device of a full one.

  A full batch has `size` rows per device, or 0: CACHED slots.
  """
  start = 0
  while start < len(ordered):
    N, T, P = ordered[start].shape
    full = max(1, size // N if size else CACHED // (N * (P + T)))
    part = ordered[start : start + ways * full]
    batch = [each for each in part if each.shape[:2] == (N, T)]
    yield batch, full
    start += len(batch)


def slots(batch: Sequence[Family]) -> list[Row | None]:
  """Families of a batch -> the row of each result of `measure`; None for padding."""
  N = batch[0].shape[0]
  return [row for each in batch for row in (*each.rows, *[None] * (N - len(each.rows)))]


def arrays(batch: Sequence[Family], *, ways: int, full: int) -> tuple[np.ndarray, ...]:
  """Families of a batch -> (context_CP, start_C1, token_CNT, position_CNS, target_CNS).

  Positions count from the end of the context, where `start` is.
  """
  N, T, P = batch[0].shape  # The first context is the longest.
  C = ways * scoring.padded_rows(-(-len(batch) // ways), full)
  asks = max(len(row.asks) for each in batch for row in each.rows)
  S = scoring.padded_asks(asks, T)
  context_CP, start_C1 = np.zeros((C, P), np.int32), np.zeros((C, 1), np.int32)
  token_CNT, ask_CNS2 = np.zeros((C, N, T), np.int32), np.zeros((C, N, S, 2), np.int32)
  for c, (context, rows) in enumerate(batch):
    start_C1[c] = first = len(context)
    context_CP[c, :first] = context
    for n, row in enumerate(rows):
      token_CNT[c, n, : len(row.tokens) - first] = row.tokens[first:]
      ask_CNS2[c, n, : len(row.asks)] = [(at - first, token) for at, token in row.asks]
  return context_CP, start_C1, token_CNT, ask_CNS2[..., 0], ask_CNS2[..., 1]


def measure(
  net: model.Transformer,
  context_CP: Any,
  start_C1: Any,
  token_CNT: Any,
  position_CNS: Any,
  target_CNS: Any,
) -> tuple[Any, Any]:
  """As scoring.measure, of arrays (C * N, S)."""
  (C, P), (_, N, T) = context_CP.shape, token_CNT.shape
  chunk = min(generate.CHUNK, P)
  chunks = -(-P // chunk)
  slots_CS = jnp.pad(context_CP, ((0, 0), (0, chunks * chunk - P + T)))
  cache = generate.prefill(net, slots_CS, chunks, chunk=chunk)
  repeat = lambda x: mesh.constrain(jnp.repeat(x, N, 1), *generate.AXES)
  flat = lambda x: x.reshape(C * N, *x.shape[2:])
  start_R = jnp.repeat(start_C1[:, 0], N)
  cache = jax.tree.map(repeat, cache)
  x_RTD, _ = generate.extend(net, flat(token_CNT), start_R, cache)
  return scoring.ask(net, x_RTD, flat(position_CNS), flat(target_CNS))
