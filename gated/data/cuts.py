"""Long texts -> pieces, cut where the pre-tokenizer cuts anyway.

A cut is tested: the text behind it must have the same tokens with and without the text
before it. So the ids of the pieces are those of the whole text.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WINDOW = 1 << 18  # Characters that are encoded at a time.
TAIL = 1 << 11  # Characters behind a cut that are compared.
TRIES = 16  # Cuts that are tested in a window.
MAX_WHOLE = 1 << 24  # Characters of a text that has no cut; they take about 3 GiB.
WORD_END = re.compile(r'\S(?=[ \n])')


def find(encode: Callable[[str], Any], pieces: Any, text: str) -> tuple[int, int]:
  """A text and its tokenizers.Encoding -> tokens and characters before a cut, or 0, 0."""
  ids, tries = pieces.ids, 0
  for i in range(len(ids) - 1, 0, -1):
    if pieces.token_to_word(i) == pieces.token_to_word(i - 1):
      continue
    _, place = pieces.token_to_chars(i - 1)
    if len(text) - place < TAIL:
      continue
    if encode(text[place:]).ids == ids[i:]:
      return i, place
    if (tries := tries + 1) == TRIES:
      break
  return 0, 0


def windows(
  blocks: Iterable[str], head: Callable[[str], tuple[int, Any]] | None
) -> Iterator[tuple[bool, Any]]:
  """Blocks of a text -> the results of `head` for consecutive pieces, then the rest.

  head(text) -> (length of its first piece, or 0 if it has no cut; a result for it).
  Yields (True, result) for each piece, and (False, text) for the last one. ValueError
  for a text without a cut in MAX_WHOLE characters.
  """
  text, size = '', WINDOW
  for block in blocks:
    text += block
    while len(text) > size:
      length, result = head(text[:size]) if head else (0, None)
      if length:
        yield True, result
        text, size = text[length:], WINDOW
      elif size < MAX_WHOLE:
        size *= 2
      else:
        raise ValueError(
          f'the tokenizer cannot cut a text of more than {MAX_WHOLE:,} characters, which '
          'would take too much memory in one piece: split the document'
        )
  yield False, text


def words(blocks: Iterable[str]) -> Iterator[str]:
  """Blocks of a text -> pieces that end with words, for the training of a BPE.

  GPT-2's pattern cuts at the end of each word, so the counts of its words do not change.
  """
  text = ''
  for block in blocks:
    text += block
    if len(text) >= WINDOW:
      ends = [match.end() for match in WORD_END.finditer(text, len(text) - TAIL)]
      place = ends[-1] if ends else len(text) if len(text) >= MAX_WHOLE else 0
      if place:
        yield text[:place]
        text = text[place:]
  yield text
