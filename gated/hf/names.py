"""ONE TABLE OF NAMES: where each of our parameters lies in their tensors, both ways.

A linear map of theirs is (rows, columns) = (out, in), so ours are transposed, and their
dims of heads opened. A gate of theirs is no tensor of its own but rows of q_proj, in as
many blocks as `Layout.groups`: one for each KV head in the authors' code, [its queries |
their gates]; one for each query head in Qwen3-Next, MaxText and torchtitan, [q | gate].

H heads  G KV heads  K head width  D width  L layers  E experts
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

GATE = 'blocks.attn.gate.weight'
# Ours have none: it is written as zeros, and read only if it is.
GATE_BIAS = 'blocks.attn.gate.bias'

LAYER = 'model.layers.{layer}.'
ATTN, MLP = LAYER + 'self_attn.', LAYER + 'mlp.'
EXPERT = MLP + 'experts.{expert}.'
OURS_ATTN, OURS_FFN = 'blocks.attn.', 'blocks.ffn.'

# Theirs, ours (several share a tensor by rows), and how one becomes the other.
TABLE = (
  ('model.embed_tokens.weight', ('embed.table',), 'plain'),
  (LAYER + 'input_layernorm.weight', ('blocks.attn_norm.scale',), 'scale'),
  (ATTN + 'q_proj.weight', (OURS_ATTN + 'query.weight', GATE), 'inward'),
  (ATTN + 'q_proj.bias', (OURS_ATTN + 'query.bias', GATE_BIAS), 'flat'),
  (ATTN + 'k_proj.weight', (OURS_ATTN + 'key.weight',), 'inward'),
  (ATTN + 'k_proj.bias', (OURS_ATTN + 'key.bias',), 'flat'),
  (ATTN + 'v_proj.weight', (OURS_ATTN + 'value.weight',), 'inward'),
  (ATTN + 'v_proj.bias', (OURS_ATTN + 'value.bias',), 'flat'),
  (ATTN + 'o_proj.weight', (OURS_ATTN + 'out.weight',), 'outward'),
  (ATTN + 'o_proj.bias', (OURS_ATTN + 'out.bias',), 'flat'),
  (ATTN + 'q_norm.weight', (OURS_ATTN + 'query_norm.scale',), 'scale'),
  (ATTN + 'k_norm.weight', (OURS_ATTN + 'key_norm.scale',), 'scale'),
  (LAYER + 'post_attention_layernorm.weight', ('blocks.ffn_norm.scale',), 'scale'),
  (MLP + 'gate_proj.weight', (OURS_FFN + 'act.weight',), 'inward'),
  (MLP + 'up_proj.weight', (OURS_FFN + 'up.weight',), 'inward'),
  (MLP + 'down_proj.weight', (OURS_FFN + 'down.weight',), 'inward'),
  (MLP + 'gate.weight', (OURS_FFN + 'router.weight',), 'inward'),
  (EXPERT + 'gate_proj.weight', (OURS_FFN + 'experts.act',), 'inward'),
  (EXPERT + 'up_proj.weight', (OURS_FFN + 'experts.up',), 'inward'),
  (EXPERT + 'down_proj.weight', (OURS_FFN + 'experts.down',), 'inward'),
  ('model.norm.weight', ('norm.scale',), 'scale'),
  ('lm_head.weight', ('head.table',), 'plain'),
)

# Newer transformers may write all experts of a layer as one tensor, (E, rows, columns).
FUSED = (
  (
    MLP + 'experts.gate_up_proj',
    (OURS_FFN + 'experts.act', OURS_FFN + 'experts.up'),
    'inward',
  ),
  (MLP + 'experts.down_proj', (OURS_FFN + 'experts.down',), 'inward'),
)


class Form(NamedTuple):
  """An array of ours, its layer and expert taken <-> rows of theirs."""

  there: Any  # array -> rows
  back: Any  # rows, our shape -> array
  shape: Any  # our shape -> that of the rows


_rows = lambda s: (s[0], math.prod(s[1:]))
_columns = lambda s: (math.prod(s[:-1]), s[-1])

FORMS = {
  'plain': Form(lambda w: w, lambda t, s: t, lambda s: s),
  'flat': Form(
    lambda b: b.reshape(-1), lambda t, s: t.reshape(s), lambda s: (math.prod(s),)
  ),
  # (D, ...) <-> (..., D), and (..., D) <-> (D, ...).
  'inward': Form(
    lambda w: w.reshape(_rows(w.shape)).T,
    lambda t, s: t.T.reshape(s),
    lambda s: _rows(s)[::-1],
  ),
  'outward': Form(
    lambda w: w.reshape(_columns(w.shape)).T,
    lambda t, s: t.T.reshape(s),
    lambda s: _columns(s)[::-1],
  ),
  # Qwen3-Next keeps a norm's scale less one, w. The difference is exact for scales of
  # at least 1/2, and so is 1 + w in float32 where w comes from bfloat16 and is 0 or at
  # least 2**-16. In bfloat16, 1 + w would lose most of a small w, so ours are float32.
  'centred': Form(
    lambda w: w.astype(np.float32) - 1,
    lambda t, s: t.astype(np.float32) + 1,
    lambda s: s,
  ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
  """How a checkpoint lays its tensors out."""

  groups: (
    int  # Blocks of rows in q_proj, each with its own share of the gate; 0: no gate.
  )
  centred: bool  # Norms' scales less one.
  fused: bool  # One tensor for all experts of a layer.


@dataclass(frozen=True, kw_only=True)
class Entry:
  """A line of the table, in one checkpoint's layout."""

  theirs: str
  ours: tuple[str, ...]
  form: Form
  groups: int
  shapes: tuple[tuple[int, ...], ...]  # Of ours, without the leading dims.
  leading: tuple[int, ...]  # (), (L,) or (L, E), the same of each of ours.

  @property
  def fused(self) -> bool:
    return len(self.leading) == 2 and '{expert}' not in self.theirs

  @property
  def rows(self) -> list[tuple[int, ...]]:
    """The shape of each of ours in the form of theirs."""
    return [self.form.shape(shape) for shape in self.shapes]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of a tensor of theirs."""
    first, *_ = rows = self.rows
    inner = (sum(r[0] for r in rows), *first[1:])
    return (self.leading[1], *inner) if self.fused else inner

  def places(self) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Each tensor's name, its index in ours, and the row of it if experts are fused."""
    for index in np.ndindex(self.leading):
      yield self._name(index), index, index[1] if self.fused else None

  def names(self) -> list[str]:
    """Of the tensors of theirs, in order."""
    leading = self.leading[:1] if self.fused else self.leading
    return [self._name(index) for index in np.ndindex(leading)]

  def _name(self, index: tuple[int, ...]) -> str:
    return self.theirs.format(**dict(zip(('layer', 'expert'), index)))

  def pack(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Of each of ours one layer, and expert -> the tensor of theirs."""
    parts = [self.form.there(array) for array in arrays]
    if len(parts) == 1:
      return parts[0]
    blocks = [p.reshape(self.groups, -1, *p.shape[1:]) for p in parts]
    return np.concatenate(blocks, 1).reshape(-1, *parts[0].shape[1:])

  def unpack(self, tensor: np.ndarray) -> list[np.ndarray]:
    """The inverse of `pack`."""
    parts = [tensor]
    if len(self.ours) > 1:
      blocks = tensor.reshape(self.groups, -1, *tensor.shape[1:])
      ends = np.cumsum([r[0] // self.groups for r in self.rows])[:-1]
      split = np.split(blocks, ends, 1)
      parts = [p.reshape(-1, *tensor.shape[1:]) for p in split]
    return [self.form.back(p, s) for p, s in zip(parts, self.shapes)]


def table(leaves: Mapping[str, Any], layout: Layout) -> list[Entry]:
  """Our leaves by name, and their layout -> the lines that hold them."""
  taken = {theirs: (ours, form) for theirs, ours, form in TABLE}
  if layout.fused:
    taken = {t: e for t, e in taken.items() if '{expert}' not in t}
    taken |= {theirs: (ours, form) for theirs, ours, form in FUSED}
  entries = []
  for theirs, (ours, form) in taken.items():
    if ours[0] not in leaves:
      continue
    if not layout.groups:
      ours = tuple(name for name in ours if name not in (GATE, GATE_BIAS))
    form = 'centred' if form == 'scale' and layout.centred else form
    depth = ('blocks.' in ours[0]) + ('.experts.' in ours[0])
    whole = [_shape(name, leaves) for name in ours]
    entries.append(
      Entry(
        theirs=theirs,
        ours=ours,
        form=FORMS['plain' if form == 'scale' else form],
        groups=1 if '.experts.' in ours[0] else layout.groups,
        shapes=tuple(shape[depth:] for shape in whole),
        leading=whole[0][:depth],
      )
    )
  return entries


def _shape(name: str, leaves: Mapping[str, Any]) -> tuple[int, ...]:
  if name == GATE_BIAS:
    layers, _, *rest = leaves[GATE].shape
    return (layers, *rest)
  return tuple(leaves[name].shape)
