"""The content of a document: a hash of its words, and a sketch of its similar texts.

Both take a text block by block, so that its size does not matter.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash

from gated.data import tokenizer

SHINGLE = 5  # Words; Lee et al. 2021 (arXiv 2107.06499) use 5-grams and 0.8 as well.
SIMILAR = 0.8  # Jaccard similarity of the sets of shingles of two near-duplicates.
BANDS = 25, 5  # Bands of hashes: 5 in 100,000 pairs at SIMILAR have no band in common.
HASHES = 128  # Of a sketch: its standard error is 0.035 at SIMILAR.
MAX_WORD = 1 << 12  # Characters.
BATCH = 1 << 14  # Shingles hashed at a time.


class Words:
  """The SHA-256 of the words of a text, joined by single spaces."""

  def __init__(self):
    self._sha, self._any, self._inside = hashlib.sha256(), False, False

  def add(self, block: str) -> None:
    words = ' '.join(block.split())
    if words:
      joins = self._inside and not block[0].isspace()
      self._sha.update((' ' if self._any and not joins else '').encode() + words.encode())
    self._any |= bool(words)
    if block:
      self._inside = not block[-1].isspace()

  def number(self) -> int:
    """-> the first 64 bits."""
    return int.from_bytes(self._sha.digest()[:8], 'big')


def check_library() -> None:
  """ValueError unless the package of the sketches is installed."""
  try:
    Sketch()
  except (ImportError, TypeError, ValueError) as error:
    raise ValueError(
      f"--dedup=near needs: pip install 'datasketch>=2' ({error})"
    ) from error


class Sketch:
  """The MinHash of a text's shingles (Broder 1997), by the package datasketch."""

  def __init__(self):
    self._minhash = _minhash(hashfunc=xxhash.xxh32_intdigest)
    self._words: list[str] = []  # The last ones, which begin the next shingles.
    self._part, self._any = '', False

  def add(self, block: str) -> None:
    text = self._part + block
    words = text.split()
    is_open = bool(words) and not text[-1].isspace() and len(words[-1]) < MAX_WORD
    self._part = words.pop() if is_open else ''
    self._update(words)

  def _update(self, words: list[str]) -> None:
    words = self._words + words
    starts = range(len(words) - SHINGLE + 1)
    shingles = [' '.join(words[i : i + SHINGLE]).encode() for i in starts]
    for i in range(0, len(shingles), BATCH):
      self._minhash.update_batch(shingles[i : i + BATCH])
      self._any = True
    self._words = words[max(0, len(words) - SHINGLE + 1) :]

  def values(self) -> np.ndarray:
    """-> HASHES numbers; a text of fewer words than a shingle is one shingle."""
    self._update([self._part] if self._part else [])
    if not self._any:
      self._minhash.update(' '.join(self._words).encode())
    return self._minhash.hashvalues.astype(np.uint32)


def _minhash(**settings: Any) -> Any:
  library: Any = tokenizer.optional('datasketch')
  # The hashes of this scheme are those of all versions and machines.
  return library.MinHash(HASHES, scheme='affine32', **settings)


def first_copies(content_D: np.ndarray) -> np.ndarray:
  """Hashes of documents -> for each whether it is the first with its content."""
  is_first_D = np.zeros(len(content_D), bool)
  is_first_D[np.unique(content_D, return_index=True)[1]] = True
  return is_first_D


def first_alike(sketches: Iterable[np.ndarray], chosen_D: np.ndarray) -> np.ndarray:
  """Sketches of documents -> which of `chosen_D` are unlike the earlier."""
  library: Any = tokenizer.optional('datasketch')
  index = library.MinHashLSH(SIMILAR, HASHES, params=BANDS)
  kept: dict[int, np.ndarray] = {}
  kept_D = np.zeros_like(chosen_D)
  for i, values in enumerate(sketches):
    if not chosen_D[i]:
      continue
    minhash = _minhash(hashvalues=values)
    # The index proposes candidates; the sketches decide.
    if all((kept[j] == values).mean() < SIMILAR for j in index.query(minhash)):
      index.insert(i, minhash)
      kept[i], kept_D[i] = values, True
  return kept_D
