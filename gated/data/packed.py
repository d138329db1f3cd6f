"""Compressed files, recognized by their first bytes, whatever their name."""

import bz2
import gzip
import io
import lzma
import pathlib
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

from gated.data import tokenizer
from gated.data.faults import Fault, describe

SUFFIXES = ('.gz', '.zst', '.bz2', '.xz')
MAX_WINDOW = 1 << 31  # Bytes; files of `zstd --long=31` need as many.
BLOCK = 1 << 13  # Bytes read at a time: few, because they may unpack to very many.


class _Zstandard(io.RawIOBase):
  """The content of all zstd frames of a file; EOFError if the last one is cut.

  The reader of the library takes a cut file for a complete one.
  """

  def __init__(self, path: str):
    library: Any = tokenizer.optional('zstandard')
    self._start = library.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj
    self._file, self._frame, self._left = open_plain(path), None, b''

  def readable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()
    super().close()

  def readinto(self, buffer: Any) -> int:
    while not self._left and (data := self._file.read(BLOCK)):
      pieces = []
      while data:
        self._frame = self._frame or self._start()
        pieces.append(self._frame.decompress(data))
        data = b''
        if self._frame.eof:
          data, self._frame = self._frame.unused_data, None
      self._left = memoryview(b''.join(pieces))
    if not self._left and self._frame:
      raise EOFError('the last zstd frame is cut')
    count = min(len(buffer), len(self._left))
    buffer[:count], self._left = self._left[:count], self._left[count:]
    return count


# The first bytes of a file -> its reader. None of them begins a text in UTF-8, except
# those of bz2 and of a zstd frame to skip, which no text has in practice.
READERS: dict[bytes, Callable[[str], Any]] = {
  rb'\x1f\x8b': gzip.open,
  rb'BZh[1-9](1AY&SY|\x17rE8P\x90)': bz2.open,
  rb'\xfd7zXZ\0': lzma.open,
  rb'(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)': lambda path: io.BufferedReader(
    _Zstandard(path), 1 << 20
  ),
}


def is_packed(path: str) -> bool:
  """Whether a file is compressed; OSError if it cannot be read."""
  return _reader(path) is not open_plain


def open_plain(path: str) -> BinaryIO:
  return pathlib.Path(path).open('rb')


def _reader(path: str) -> Callable[[str], Any]:
  with open(path, 'rb') as file:
    head = file.read(16)
  for magic, reader in READERS.items():
    if re.match(magic, head):
      return reader
  return open_plain


@contextmanager
def unpacked(path: str) -> Generator[Any, None, None]:
  """The content of a file, compressed or not; Fault if it is damaged or cut."""
  try:
    with _reader(path)(path) as file:
      yield file
  except (Fault, GeneratorExit):
    raise
  except OSError as error:
    # The libraries also raise OSError for damaged content, without a number.
    reason = 'unreadable' if error.errno else 'damaged archive'
    raise Fault(reason, f'{path} cannot be unpacked: {describe(error)}') from error
  except Exception as error:  # Each library raises its own.
    text = f'{path} cannot be unpacked: {describe(error)}'
    raise Fault('damaged archive', text) from error
