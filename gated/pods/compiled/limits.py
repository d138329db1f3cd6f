"""Checks of a compiled program: no gathered experts, large buffers or square arrays.

Each check returns the violations as lines of text.
"""

from collections.abc import Sequence

from gated.devices.chips import GIB
from gated.pods.compiled import Buffer, Program

# A mesh splits an expert's matrix into at most this many parts.
PART = 8

# Files that make the arrays of attention and of the loss.
ATTENTION = ('gated/model/attention.py', 'gated/kernels/attention')
LOSS = 'gated/kernels/cross_entropy'


def whole_experts(program: Program, *, experts: int, width: int, ffn: int) -> list[str]:
  """All-gathers whose result holds (a part of) each expert of a layer.

  Such a result has a dim of all experts and one of the model's or the FFN's width, or
  the size of whole stacks of their matrices. Results below 1/PART of a stack belong to
  routers.
  """
  stack = experts * width * ffn
  violations = []
  for gather in program.gathers:
    dims, size = gather.shape.dims, gather.shape.size
    named = experts in dims and (width in dims or ffn in dims)
    if (named and size * PART >= stack) or size % stack == 0:
      violations.append(f'an all-gather holds all experts: {_line(gather)}')
  return violations


def large_buffers(program: Program, limit: int = GIB) -> list[str]:
  """Arrays of the loss or of attention larger than `limit` bytes on a chip."""
  return [
    f'a buffer of {name} is over {limit / GIB:g} GiB: {_line(buffer)}'
    for buffer in program.buffers
    for name, files in (('the loss', LOSS), ('attention', ATTENTION))
    if buffer.bytes > limit and buffer.place.file.startswith(files)
  ]


def squares(
  program: Program, *, length: int, parts: int, also: Sequence[int]
) -> list[str]:
  """Arrays with two dims of tokens: a whole row by a whole row, or by a shard of it.

  The mesh splits a row of `length` into `parts` shards. If the length equals another size
  of the model (`also`), only the arrays of attention are checked.
  """
  rows = {length, length // parts}
  ambiguous = rows & set(also)
  violations = []
  for buffer in program.buffers:
    dims = list(buffer.shape.dims)
    if length not in dims:
      continue
    dims.remove(length)
    checked = not ambiguous or buffer.place.file.startswith(ATTENTION)
    if checked and rows & set(dims):
      violations.append(f'an array of tokens by tokens: {_line(buffer)}')
  return violations


def _line(buffer: Buffer) -> str:
  origin = str(buffer.place) or buffer.source
  return f'{buffer.shape}, {buffer.bytes / GIB:.3g} GiB, {origin}'
