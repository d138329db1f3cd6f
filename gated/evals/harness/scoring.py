"""Continuations after contexts -> their log-likelihoods: one forward pass per input.

Requests with the same input, context and continuation less its last token, share a row:
such as the letters of a multiple choice. What a row must report are its asks: the
log-probability of a token at a position. Only these positions meet the vocabulary.

Rows are sorted by length, longest first, padded on the right, which a causal model does
not see, and split over all devices of all processes. A program of another shape takes
seconds to compile, so few lengths, numbers of rows and numbers of asks occur.

B rows of a batch  T tokens  S asks of a row  D width  V vocabulary
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gated import model
from gated.devices import mesh

TOKENS = 1 << 14  # Of a batch per device, unless its rows are counted.
CHUNK = 1024  # Asks per device whose logits are in memory at a time.
SHORTEST = 16  # Tokens of the shortest row.
STEPS = 4  # Row lengths in an octave.

Tokens = Sequence[int]


class Request(NamedTuple):
  """A continuation of at least one token, after a context of at least one."""

  context: tuple[int, ...]
  continuation: tuple[int, ...]


class Answer(NamedTuple):
  """The log-likelihood of a continuation, in nats; whether greedy decoding gives it."""

  nats: float
  greedy: bool


def request(context: Tokens, continuation: Tokens, length: int) -> Request:
  """Token ids -> a request that fits a model of `length` tokens, as lm-eval cuts it.

  The last length + 1 tokens remain; the model reads all but the last one. ValueError for
  a continuation that is empty or longer than `length`.
  """
  if not 0 < len(continuation) <= length:
    raise ValueError(
      f'a continuation has {len(continuation)} tokens, but 1 to {length} are possible'
    )
  tokens = (*context, *continuation)[-(length + 1) :]
  cut = len(tokens) - len(continuation)
  return Request(tokens[:cut], tokens[cut:])


@dataclass
class Row:
  """An input, its asks, and the requests that they answer."""

  tokens: tuple[int, ...]
  asks: dict[tuple[int, int], int]  # (position, token) -> the index of the ask
  members: list[tuple[Request, list[int]]]  # the asks of each request


def rows(requests: Sequence[Request]) -> list[Row]:
  """Requests -> the rows that answer them, longest first; equal requests once."""
  by_input: dict[tuple[int, ...], Row] = {}
  for each in dict.fromkeys(requests):
    tokens = (*each.context, *each.continuation[:-1])
    row = by_input.setdefault(tokens, Row(tokens, {}, []))
    first = len(each.context) - 1
    asks = [
      row.asks.setdefault((first + i, token), len(row.asks))
      for i, token in enumerate(each.continuation)
    ]
    row.members.append((each, asks))
  return sorted(by_input.values(), key=lambda row: (-len(row.tokens), row.tokens))


def padded_length(count: int) -> int:
  """A number of tokens -> the length of its row: 1 of STEPS in each octave."""
  step = max(SHORTEST, (1 << (count - 1).bit_length()) // (2 * STEPS))
  return -(-count // step) * step


def padded_asks(count: int, length: int) -> int:
  """A number of asks -> a power of 4; at least 64 in rows of 1024 tokens.

  Few numbers occur, and a long row has room for some more asks.
  """
  least = max(count, min(length, 1024) // 16)
  return 4 ** max(1, -(-(least - 1).bit_length() // 2))


def padded_rows(count: int, full: int) -> int:
  """A number of rows, at most `full` -> `full`, or its 4th, 16th, ... part."""
  while count <= -(-full // 4) < full:
    full = -(-full // 4)
  return full


def batches(
  ordered: Sequence[Row], *, size: int, ways: int
) -> Iterator[tuple[list[Row], int]]:
  """Rows, longest first -> batches, with the rows per device of a full one.

  A full batch has `size` rows per device, or 0: TOKENS tokens.
  """
  start = 0
  while start < len(ordered):
    length = padded_length(len(ordered[start].tokens))
    full = size or max(1, TOKENS // length)
    yield list(ordered[start : start + ways * full]), full
    start += ways * full


def arrays(batch: Sequence[Row], *, ways: int, full: int) -> tuple[np.ndarray, ...]:
  """Rows -> (token_BT, position_BS, target_BS), padded in all three dims."""
  length = padded_length(max(len(row.tokens) for row in batch))
  asks = padded_asks(max(len(row.asks) for row in batch), length)
  size = ways * padded_rows(-(-len(batch) // ways), full)
  token_BT = np.zeros((size, length), np.int32)
  ask_BS2 = np.zeros((size, asks, 2), np.int32)
  for i, row in enumerate(batch):
    token_BT[i, : len(row.tokens)] = row.tokens
    ask_BS2[i, : len(row.asks)] = [*row.asks]
  return token_BT, ask_BS2[..., 0], ask_BS2[..., 1]


def measure(
  net: model.Transformer, token_BT: Any, position_BS: Any, target_BS: Any
) -> tuple[Any, Any]:
  """Asks -> (their log-probabilities, their ranks from 0; of equals, the smaller id)."""
  return ask(net, net.hidden(token_BT)[0], position_BS, target_BS)


def ask(
  net: model.Transformer, x_BTD: Any, position_BS: Any, target_BS: Any
) -> tuple[Any, Any]:
  """The final hidden states of rows, and their asks -> the results of `measure`."""
  x_BSD = jnp.take_along_axis(x_BTD, position_BS[..., None], 1)
  x_BSD = mesh.constrain(x_BSD, 'batch', None, None)
  B, S = target_BS.shape
  on = mesh.current()
  here = B // (1 if on is None else mesh.ways('batch', on))
  # S is a power of 4, so the parts are equal.
  parts = S // max(1, min(S, 1 << (max(1, CHUNK // here).bit_length() - 1)))

  def answers(part):
    x_BsD, target_Bs = part
    logit_BsV = mesh.constrain(net.logits(x_BsD), 'batch', None, 'vocab')
    target_Bs1 = target_Bs[..., None]
    logit_Bs = jnp.take_along_axis(logit_BsV, target_Bs1, -1)[..., 0]
    nats_Bs = logit_Bs - jax.nn.logsumexp(logit_BsV, -1)
    # Compared so that a NaN leaves no token the best.
    id_V = jnp.arange(logit_BsV.shape[-1])[None, None]
    same_BsV = (logit_BsV == logit_Bs[..., None]) & (id_V >= target_Bs1)
    after_BsV = (logit_BsV < logit_Bs[..., None]) | same_BsV
    return nats_Bs, (~after_BsV).sum(-1)

  cut = lambda a: jnp.moveaxis(a.reshape(B, parts, S // parts, *a.shape[2:]), 1, 0)
  join = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, S)
  return jax.tree.map(join, jax.lax.map(answers, (cut(x_BSD), cut(target_BS))))


def total(nats_S: np.ndarray, rank_S: np.ndarray) -> Answer:
  """The results of `measure` for a continuation's tokens -> its answer."""
  return Answer(float(nats_S.sum(dtype=float)), not rank_S.any())


class Work(NamedTuple):
  """A batch: what computes its results, of what, and the rows of these results."""

  measured: Callable  # compiled for all devices; its results are on all processes
  arrays: tuple[np.ndarray, ...]
  rows: Sequence[Row | None]  # None: padding


# Rows -> batches of some of them, and the other rows.
Shared = Callable[[Sequence[Row]], tuple[Iterable[Work], Sequence[Row]]]


def score(
  requests: Sequence[Request],
  measured: Callable,
  net: model.Transformer,
  *,
  on: Mesh,
  size: int,
  answer: Callable[[np.ndarray, np.ndarray], Any] = total,
  shared: Shared = lambda ordered: ((), ordered),
) -> Iterator[dict[Request, Any]]:
  """Requests -> their answers, a batch at a time; all processes must call it.

  `measured` is `measure`, compiled for all devices of `on`; its results are on all
  processes. `answer` makes an answer of the results for a continuation's tokens.
  """
  ways = mesh.ways('batch', on)
  first, alone = shared(rows(requests))
  whole = batches(alone, size=size, ways=ways)
  works = (
    Work(measured, arrays(batch, ways=ways, full=full), batch) for batch, full in whole
  )
  started = None
  for work in itertools.chain(first, works):
    count = len(work.arrays[0])
    held = list(mesh.rows(on, count))
    placed = mesh.place(tuple(x[held] for x in work.arrays), on, count)
    before, started = started, (work.rows, work.measured(net, *placed))
    if before:  # The devices compute the next batch meanwhile.
      yield _answers(*before, answer)
  if started:
    yield _answers(*started, answer)


def _answers(
  batch: Sequence[Row | None], measured: Any, answer: Callable
) -> dict[Request, Any]:
  """A batch and what was measured of it -> the answers of its rows."""
  nats_BS, rank_BS = (np.asarray(x) for x in measured)
  return {
    each: answer(nats_S[asks], rank_S[asks])
    for row, nats_S, rank_S in zip(batch, nats_BS, rank_BS)
    if row is not None
    for each, asks in row.members
  }
