"""Pieces of input files, units of work, and what a kind of file needs."""

import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from gated.data.faults import Fault, Report

UNIT = 1 << 24  # Bytes of input in a unit, the work of one process at a time.
MAX_DOCUMENT = 1 << 30  # Bytes of a line or a row, which is held in memory.
BLOCK = 1 << 20  # Characters, bytes or ids of a document in memory.


class Reading(NamedTuple):
  """How input is read: the flags of scripts/prepare_data.py."""

  field: str  # The field with the text or the ids, in JSON lines, Parquet and the hub.
  encoding: str = 'utf-8'  # Of text and JSON lines; Parquet is always UTF-8.
  ids: str = ''  # The dtype of token ids in files that do not name it; '' reads text.
  eos: int = -1  # The id that ends a document of ids.


class Piece(NamedTuple):
  """A file, or bytes (JSON lines), row groups (Parquet), ids or shards of it."""

  path: str
  name: str  # Path relative to the parent of the input; document names start with it.
  kind: str  # A key of sources.KINDS.
  reading: Reading
  start: int
  stop: int


Unit = tuple[Piece, ...]  # The input of one process at a time.
Span = tuple[int, int]  # Bytes of a file.
Split = list[tuple[int, int, int]]  # Start and stop of each piece, its size in bytes.


class Kind(NamedTuple):
  """A kind of file: where to split it, the bytes of a piece, and its documents.

  A document is a text, a text in bytes, or one of gated/data/documents.py.
  """

  split: Callable[[str, Reading], Split]
  spans: Callable[[BinaryIO, Piece], list[Span]]
  read: Callable[[Piece, Report], Iterator[tuple[str, Any]]]


def whole(path: str, reading: Reading) -> Split:
  """A Kind.split for files that are not divided."""
  size = os.path.getsize(path)
  return [(0, size, size)] if size else []


def whole_span(file: BinaryIO, piece: Piece) -> list[Span]:
  return [(0, piece.stop)]


def too_large(path: str, size: str, most: int) -> Fault:
  text = f'{path!r} is one document of {size}, but {most} are allowed; split it'
  return Fault('too large', text)
