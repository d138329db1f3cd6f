"""What chips send each other: which collective, in what groups, how many bytes.

Bytes are those that one chip receives, for a group of g chips: (g - 1) / g of the result
of an all-gather, of the input of a reduce-scatter and of what an all-to-all exchanges,
twice that of what an all-reduce sums, all of what a permutation moves.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from gated.pods.compiled.hlo import Computation, Instruction

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
SHARE = {
  'all-gather': lambda size, g: size * (g - 1) / g,
  'all-reduce': lambda size, g: 2 * size * (g - 1) / g,
  'reduce-scatter': lambda size, g: size * (g - 1),  # of its result
  'all-to-all': lambda size, g: size * (g - 1) / g,
  'ragged-all-to-all': lambda size, g: size * (g - 1) / g,
  'collective-permute': lambda size, g: size,
  'collective-broadcast': lambda size, g: size,
}


def kind(computation: Computation, op: Instruction) -> str | None:
  """Which of KINDS an instruction starts; None for those that start none.

  TPUs spread an asynchronous collective over fusions, each of which repeats it: the one
  beside `AsyncCollectiveStart` counts. An all-reduce of which each chip keeps a part is
  a reduce-scatter.
  """
  name = op.opcode.removesuffix('-start')
  if name not in KINDS:
    return None
  users = computation.users.get(op.name, [])
  targets = {user.target for user in users}
  if 'AsyncCollectiveDone' in targets:
    return None
  spread = computation.name.startswith('async_collective_fusion')
  if spread and 'AsyncCollectiveStart' not in targets:
    return None
  if name == 'all-reduce' and computation.name.startswith('all-reduce-scatter'):
    return 'reduce-scatter'
  return name


def received(computation: Computation, op: Instruction, name: str, g: int) -> float:
  """Bytes that each chip of a group of g receives."""
  if g <= 1:
    return 0.0
  if op.opcode.endswith('-start') or name == 'ragged-all-to-all':
    # The result of a start holds the operands too.
    size = _moved(computation, op, name, g)
  else:
    size = op.bytes
  if name == 'reduce-scatter' and op.opcode.startswith('all-reduce'):
    size /= g
  return SHARE[name](size, g)


def _moved(computation: Computation, op: Instruction, name: str, g: int) -> float:
  """The size of the result, from that of the operands."""
  operands = op.operands if name != 'ragged-all-to-all' else op.operands[:1]
  size = sum(computation.body[n].bytes for n in operands if n in computation.body)
  return {'all-gather': size * g, 'reduce-scatter': size / g}.get(name, size)


class Layout:
  """How a program's devices lie in a mesh, and in slices."""

  def __init__(
    self,
    devices: int,
    axes: Mapping[str, int] | None,
    slices: Sequence[int] | None,
  ):
    self._devices, self._slices = devices, slices
    self.slices = len(set(slices)) if slices else 1
    self.crossing = ''
    self._axes = dict(axes) if axes else {}
    if slices and axes and self.slices > 1:
      placed = np.asarray(slices).reshape(list(axes.values()))
      self.crossing = next(
        name for n, name in enumerate(axes) if np.any(placed != placed.take([0], n))
      )
      if devices < len(slices):
        # A TPU's program is that of one slice; its host sees to what is between them.
        self._axes[self.crossing] //= self.slices
        self._slices = None

  def groups(self, words: str) -> list[tuple[int, ...]]:
    return groups(words, self._devices)

  def axis(self, of: list[tuple[int, ...]]) -> str:
    """The axes along which groups lie: 'fsdp', 'data+fsdp', or '' if not known."""
    shape = list(self._axes.values())
    if math.prod(shape) != self._devices or not shape:
      return ''
    varied = np.zeros(len(shape), bool)
    for group in of:
      at = np.array(np.unravel_index(np.array(group), shape))
      varied |= np.any(at != at[:, :1], 1)
    return '+'.join(name for name, moves in zip(self._axes, varied) if moves)

  def network(self, of: list[tuple[int, ...]]) -> str:
    where = self._slices
    if where and any(len({where[d] for d in group}) > 1 for group in of):
      return 'network'
    return 'links'


def groups(words: str, devices: int) -> list[tuple[int, ...]]:
  """`replica_groups=...` in any of its forms -> the groups, of numbers of devices.

  {{0,1},{2,3}} lists them; [2,2]<=[2,2]T(1,0) reshapes and transposes all numbers, a
  group a row; mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'} lays them out in a mesh,
  of which the named axes make a group. {} is one group of all. A permutation's
  `source_target_pairs` are groups of two.
  """
  pairs = re.search(r'source_target_pairs={(.*?)}(?:,\s*\w|\s*$)', words)
  if pairs:
    return _listed(pairs[1])
  found = re.search(r'replica_groups=(.)', words)
  if not found:
    return [tuple(range(devices))]
  text = words[found.start(1) :]
  if text.startswith('{'):
    end = re.match(r'{(?:{[^{}]*},?\s*)*}', text)
    return (_listed(end[0]) if end else []) or [tuple(range(devices))]
  if text.startswith('['):
    form = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    assert form, text[:100]
    numbers = _laid(_ints(form[2]), form[3])
    return [tuple(map(int, row)) for row in numbers.reshape(_ints(form[1]))]
  return _of_mesh(text)


def _of_mesh(text: str) -> list[tuple[int, ...]]:
  """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2} -> the groups.

  An axis may be split: 'b':(2)2 is the part of size 2 of b that follows one of size 2.
  """
  form = re.match(r'mesh\[([^\]]*)\](?:,\s*device_ids=\(([^ ]*?)\))?\s*{([^}]*)}', text)
  assert form, text[:100]
  axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", form[1])}
  shape = list(axes.values())
  order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', form[2] or '')
  if order:
    numbers = _laid(_ints(order[1]), order[2])
  elif form[2]:
    numbers = np.array(_ints(form[2]))
  else:
    numbers = np.arange(math.prod(shape))
  chosen, split = [], []
  parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", form[3])
  for name, size in axes.items():
    mine = [(int(pre), int(n)) for axis, pre, n in parts if axis == name and n]
    whole = any(axis == name and not n for axis, _, n in parts)
    if not mine:
      chosen += [len(split)] if whole else []
      split.append(size)
      continue
    done = 1
    for pre, n in sorted(mine):
      split.append(pre // done)
      chosen.append(len(split))
      split.append(n)
      done = pre * n
    split.append(size // done)
  numbers = numbers.reshape(split)
  rest = [d for d in range(len(split)) if d not in chosen]
  width = math.prod(split[d] for d in chosen)
  rows = numbers.transpose(rest + chosen).reshape(-1, width)
  return [tuple(map(int, row)) for row in rows]


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _laid(shape: Sequence[int], order: str | None) -> np.ndarray:
  numbers = np.arange(math.prod(shape)).reshape(shape)
  return numbers.transpose(_ints(order)) if order else numbers


def _listed(text: str) -> list[tuple[int, ...]]:
  rows = re.findall(r'{([\d,\s]+)}', text.replace('{{', '{').replace('}}', '}'))
  return [tuple(int(n) for n in row.split(',')) for row in rows]


def across(op: Instruction) -> str | None:
  """The collective that a TPU's host does between slices, for a `recv` of its result."""
  if op.opcode != 'recv' or 'megascale' not in op.words:
    return None
  found = re.search(r'transfer_type="?(\w+)', op.words)
  return found[1].lower().replace('_', '-') if found else 'transfer'
