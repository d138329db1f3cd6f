"""What a program of ours must not do, told from what was compiled.

Each returns the offences as lines to read; none is the wish.
"""

from collections.abc import Sequence

from gated.devices.chips import GIB
from gated.pods.compiled import Buffer, Program

# Into so many parts at most a mesh splits an expert's matrix.
PART = 8

# Files whose arrays are the attention's and the loss's.
ATTENTION = ('gated/model/attention.py', 'gated/kernels/attention')
LOSS = ('gated/kernels/cross_entropy',)
NEITHER = ('gated/kernels/grouped',)


def whole_experts(program: Program, *, experts: int, width: int, ffn: int) -> list[str]:
  """All-gathers whose result holds (a part of) each expert of a layer.

  Such a result has a dim of all experts beside one of the model's or the FFN's width, or
  is as large as a number of whole stacks of their matrices. What is less than a PART of
  one is a router's.
  """
  stack = experts * width * ffn
  found = []
  for gather in program.gathers:
    dims, size = gather.dims, gather.size
    named = experts in dims and (width in dims or ffn in dims)
    if (named and size * PART >= stack) or size % stack == 0:
      found.append(f'an all-gather holds all experts: {_line(gather)}')
  return found


def large_buffers(program: Program, limit: int = GIB) -> list[str]:
  """Arrays of the loss or of attention that take more than `limit` bytes of a chip."""
  held = {'the loss': of_loss, 'attention': of_attention}
  return [
    f'a buffer of {name} is over {limit / GIB:g} GiB: {_line(buffer)}'
    for buffer in program.buffers
    if buffer.bytes > limit
    for name, of in held.items()
    if of(buffer)
  ]


def squares(
  program: Program, *, length: int, parts: int, also: Sequence[int]
) -> list[str]:
  """Arrays that have a row of all tokens for each token, a shard's tokens included.

  `parts` is into how many shards the mesh splits a row of `length`. Where the length is
  also another size of the model (`also`), only what attention makes can be told.
  """
  rows = {length, length // parts}
  found = []
  for buffer in program.buffers:
    dims = list(buffer.dims)
    if length not in dims:
      continue
    dims.remove(length)
    square = any(n in rows for n in dims)
    if square and (of_attention(buffer) or not rows & set(also)):
      found.append(f'an array of tokens by tokens: {_line(buffer)}')
  return found


def of_loss(buffer: Buffer) -> bool:
  return buffer.place.file.startswith(LOSS)


def of_attention(buffer: Buffer) -> bool:
  """Made in attention, as far as is known."""
  file = buffer.place.file
  return file.startswith(ATTENTION) and not file.startswith((*LOSS, *NEITHER))


def _line(buffer: Buffer) -> str:
  where = str(buffer.place) or buffer.source
  return f'{buffer.shape}, {buffer.bytes / GIB:.3g} GiB, {where}'
