"""Collectives of a program: their kinds, groups of chips, and bytes.

Bytes are those that one chip receives, in a group of g chips: (g - 1) / g of the result
of an all-gather, of the input of a reduce-scatter and of an all-to-all, twice that of an
all-reduce, and the whole result of a permutation.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from gated.devices import mesh
from gated.pods.compiled.hlo import Computation, Instruction

# Bytes that a chip receives, as a multiple of (g - 1) / g of the whole array.
FACTORS = {
  'all-gather': 1,
  'all-reduce': 2,
  'reduce-scatter': 1,
  'all-to-all': 1,
  'ragged-all-to-all': 1,
}
KINDS = (*FACTORS, 'collective-permute', 'collective-broadcast')


def kind(computation: Computation, op: Instruction) -> str | None:
  """The kind of collective that an instruction starts; None for other instructions.

  TPUs split an asynchronous collective into fusions that each repeat it; only the one
  with `AsyncCollectiveStart` counts. An all-reduce of which each chip keeps a part is a
  reduce-scatter.
  """
  name = op.opcode.removesuffix('-start')
  if name not in KINDS:
    return None
  targets = {user.target for user in computation.users[op.name]}
  if 'AsyncCollectiveDone' in targets:
    return None
  split = computation.name.startswith('async_collective_fusion')
  if split and 'AsyncCollectiveStart' not in targets:
    return None
  if name == 'all-reduce' and computation.name.startswith('all-reduce-scatter'):
    return 'reduce-scatter'
  return name


def between_slices(op: Instruction) -> str | None:
  """The collective that a TPU's host runs between slices, if `op` receives its result."""
  if op.opcode != 'recv' or 'megascale' not in op.words:
    return None
  return op.find(r'transfer_type="?(\w+)').lower().replace('_', '-') or 'transfer'


def whole(computation: Computation, op: Instruction, kind: str, g: int) -> int:
  """Bytes of the array after it is gathered, or before it is scattered or summed."""
  if not op.opcode.endswith('-start') and kind != 'ragged-all-to-all':
    return op.bytes * g if op.opcode == 'reduce-scatter' else op.bytes
  # The result of a start holds the operands too.
  operands = op.operands[:1] if kind == 'ragged-all-to-all' else op.operands
  size = sum(computation.body[name].bytes for name in operands)
  return size * g if kind == 'all-gather' else size


def received(kind: str, whole: float, g: int) -> float:
  """Bytes that each chip of a group of g receives in a collective on `whole` bytes."""
  return whole * (FACTORS[kind] * (g - 1) / g) if kind in FACTORS else whole


class Layout:
  """The positions of a program's devices in a mesh, and in slices."""

  def __init__(
    self,
    devices: int,
    axes: Mapping[str, int] | None,
    slices: Sequence[int] | None,
  ):
    self._devices, self._slices = devices, slices
    self.slices = len(set(slices)) if slices else 1
    self._axes = dict(axes or {})
    self.crossing = ''
    if slices and axes and devices < len(slices):
      # A TPU's program is that of one slice; its host connects the slices.
      self.crossing = mesh.crossing(axes, self.slices) or ''
      self._axes[self.crossing] //= self.slices
      self._slices = None

  def groups(self, op: Instruction) -> list[tuple[int, ...]]:
    """The groups of more than one device."""
    return [g for g in groups(op.words, self._devices) if len(set(g)) > 1]

  def axis(self, groups: list[tuple[int, ...]]) -> str:
    """The axes along which groups lie: 'fsdp', 'data+fsdp', or '' if not known."""
    shape = list(self._axes.values())
    if math.prod(shape) != self._devices or not shape:
      return ''
    varied = np.zeros(len(shape), bool)
    for group in groups:
      index = np.array(np.unravel_index(np.array(group), shape))
      varied |= np.any(index != index[:, :1], 1)
    return '+'.join(name for name, moves in zip(self._axes, varied) if moves)

  def network(self, groups: list[tuple[int, ...]]) -> str:
    """'network' if a group spans slices or hosts, else 'links'."""
    slice_of = self._slices
    if slice_of and any(len({slice_of[d] for d in group}) > 1 for group in groups):
      return 'network'
    return 'links'


def groups(words: str, devices: int) -> list[tuple[int, ...]]:
  """`replica_groups=...` in any of its forms -> the groups of device numbers.

  {{0,1},{2,3}} lists the groups; {} is one group of all devices. [2,2]<=[2,2]T(1,0)
  reshapes and transposes all numbers; each row is a group. mesh['a'=2,'b'=2],
  device_ids=([2,2]T(1,0)) {'a'} arranges them in a mesh, whose named axes make a group.
  The `source_target_pairs` of a permutation are groups of two.
  """
  listed = re.search(
    r'(?:source_target_pairs|replica_groups)={((?:{[\d,\s]*},?\s*)*)}', words
  )
  rows = re.findall(r'{([\d,\s]+)}', listed[1]) if listed else []
  if rows:
    return [tuple(_ints(row)) for row in rows]
  form = re.search(r'replica_groups=\[([\d,]+)\]<=(\S+)', words)
  if form:
    return [tuple(row) for row in _numbers(form[2]).reshape(_ints(form[1])).tolist()]
  if 'replica_groups=mesh' in words:
    return _mesh_groups(words)
  return [tuple(range(devices))]


def _mesh_groups(words: str) -> list[tuple[int, ...]]:
  """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2} -> the groups.

  'b':(2)2 is the part of size 2 of axis b that follows a part of size 2.
  """
  form = re.search(
    r'=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^ ]*?)\))?\s*{([^}]*)}', words
  )
  assert form, words[:100]
  axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", form[1])}
  parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", form[3])
  shape, grouped = [], []  # each axis as dims that do or do not make a group
  for name, size in axes.items():
    done = 1
    mine = [(int(pre or 1), int(n or size)) for axis, pre, n in parts if axis == name]
    for pre, n in sorted(mine):
      shape += [pre // done, n]
      grouped += [False, True]
      done = pre * n
    shape.append(size // done)
    grouped.append(False)
  numbers = _numbers(form[2] or f'[{math.prod(shape)}]').reshape(shape)
  order = sorted(range(len(shape)), key=grouped.__getitem__)
  width = math.prod(n for n, inside in zip(shape, grouped) if inside)
  return [tuple(row) for row in numbers.transpose(order).reshape(-1, width).tolist()]


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _numbers(text: str) -> np.ndarray:
  """'[4,2]T(1,0)' or '0,2,1,3' -> numbers of devices."""
  form = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if not form:
    return np.array(_ints(text))
  shape = _ints(form[1])
  numbers = np.arange(math.prod(shape)).reshape(shape)
  return numbers.transpose(_ints(form[2])) if form[2] else numbers
