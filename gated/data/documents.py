"""Documents of any size: text in blocks, or token ids, encoded piece by piece.

N tokens of a piece.
"""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gated.data import cuts, tokenizer
from gated.data.faults import Fault

Watch = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Text:
  """A document of text; its blocks can be read more than once."""

  blocks: Iterable[str]

  def encode(self, token: tokenizer.Tokenizer, watch: Watch) -> Iterator[Any]:
    """-> (ids_N, bytes_N) of consecutive pieces; `watch` gets each block of text.

    The ids are those of the whole text. Faults of its input, and ValueError.
    """

    def watched() -> Iterator[str]:
      for block in self.blocks:
        watch(block)
        yield block

    last = None
    for is_encoded, piece in cuts.windows(watched(), token.head):
      ids_N, bytes_N = piece if is_encoded else token.encode(piece)
      if not len(ids_N) and last and not is_encoded:
        last[1][-1] += len(piece.encode())  # Text after the last token counts for it.
      if last:
        yield last
      last = ids_N, bytes_N
    yield last


@dataclasses.dataclass(frozen=True)
class Ids:
  """A document of token ids; its blocks are arrays, and can be read more than once."""

  place: str  # For messages.
  blocks: Iterable[np.ndarray]

  def encode(self, token: tokenizer.Tokenizer, watch: Watch) -> Iterator[Any]:
    """As of Text; a beginning-of-text token at the start is left out."""
    is_first, decoder = True, _decoder()
    for ids_N in self.blocks:
      if is_first and token.bos_token and ids_N[:1].tolist() == [token.bos]:
        ids_N = ids_N[1:]
      is_first = False
      self._check(ids_N, token)
      watch(decoder.decode(token.decode(ids_N)))
      yield ids_N.astype(np.int32), token.sizes(ids_N)

  def _check(self, ids_N: np.ndarray, token: tokenizer.Tokenizer) -> None:
    if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < token.vocab:
      bad = ids_N.min() if ids_N.min() < 0 else ids_N.max()
      raise Fault(
        'no ids of the tokenizer',
        f'{self.place}: the id {bad}, but --tokenizer has {token.vocab} tokens',
      )
    if (ids_N == token.eos).any():
      raise Fault('no ids of the tokenizer', f'{self.place}: an end of text within')


Document = Text | Ids


def _decoder() -> Any:
  # A character may be divided between two blocks.
  return codecs.getincrementaldecoder('utf-8')('replace')
