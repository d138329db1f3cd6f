"""One table of tensor names: Hugging Face <-> our parameters.

"Theirs" are tensors of a Hugging Face checkpoint. Their linear weights are (out, in), the
transpose of ours, and have no separate head dims. Their gate is a part of q_proj's rows,
which form `groups` blocks: one per KV head in the authors' code, [its queries |
their gates]; one per query head in Qwen3-Next, MaxText and torchtitan, [q | gate].

H heads  G KV heads  K head width  D width  L layers  E experts
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

GATE = 'blocks.attn.gate.weight'
# Our gates have no bias: it is written as zeros, and must be zero when read.
GATE_BIAS = 'blocks.attn.gate.bias'


def is_gate(name: str) -> bool:
  """Whether a leaf of ours belongs to one of the gates."""
  return name.startswith('blocks.attn.gate')


LAYER = 'model.layers.{layer}.'
ATTN, MLP = LAYER + 'self_attn.', LAYER + 'mlp.'
EXPERT = MLP + 'experts.{expert}.'
OURS_ATTN, OURS_FFN = 'blocks.attn.', 'blocks.ffn.'

# Their tensor, our leaves (several share its rows), and the conversion in FORMS.
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

# Newer transformers may store all experts of a layer in one tensor, (E, rows, columns).
FUSED = (
  (
    MLP + 'experts.gate_up_proj',
    (OURS_FFN + 'experts.act', OURS_FFN + 'experts.up'),
    'inward',
  ),
  (MLP + 'experts.down_proj', (OURS_FFN + 'experts.down',), 'inward'),
)


class Form(NamedTuple):
  """Conversion of one layer and expert of our array <-> rows of their tensor."""

  export: Any  # array -> rows
  restore: Any  # rows, our shape -> array
  shape: Any  # our shape -> shape of the rows


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
  # Qwen3-Next stores w = scale - 1 of a norm. The difference is exact for scales of at
  # least 1/2. 1 + w is exact in float32 if w comes from bfloat16 and is 0 or at least
  # 2**-16. In bfloat16, 1 + w would lose most of a small w, so our scales are float32.
  'centred': Form(
    lambda w: w.astype(np.float32) - 1,
    lambda t, s: t.astype(np.float32) + 1,
    lambda s: s,
  ),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
  """A row of the table, in the layout of one checkpoint."""

  theirs: str
  ours: tuple[str, ...]
  form: Form
  groups: int
  shapes: tuple[tuple[int, ...], ...]  # of our leaves, without the leading dims
  leading: tuple[int, ...]  # (), (L,) or (L, E), equal for all leaves of the entry

  @property
  def fused(self) -> bool:
    return len(self.leading) == 2 and '{expert}' not in self.theirs

  @property
  def rows(self) -> list[tuple[int, ...]]:
    """The exported shape of each of our leaves."""
    return [self.form.shape(shape) for shape in self.shapes]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of their tensor."""
    inner = (sum(row[0] for row in self.rows), *self.rows[0][1:])
    return (self.leading[1], *inner) if self.fused else inner

  def places(self) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Each tensor's name, its index in our leaves, and its row if experts are fused."""
    for index in np.ndindex(self.leading):
      name = self.theirs.format(**dict(zip(('layer', 'expert'), index)))
      yield name, index, index[1] if self.fused else None

  def names(self) -> list[str]:
    """The names of their tensors, in order."""
    return list(dict.fromkeys(name for name, _, _ in self.places()))

  def pack(self, arrays: list[np.ndarray]) -> np.ndarray:
    """One layer and expert of each of our leaves -> their tensor."""
    parts = [self.form.export(array) for array in arrays]
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
    return [self.form.restore(p, s) for p, s in zip(parts, self.shapes)]


def table(
  leaves: Mapping[str, Any], *, groups: int, centred: bool, fused: bool = False
) -> list[Entry]:
  """Our leaves by name -> the rows of the table that hold them.

  `groups` counts the blocks of q_proj's rows, each with its part of the gate; 0: no gate.
  `centred`: norms store their scale minus one. `fused`: one tensor holds all experts of a
  layer.
  """
  rows = TABLE
  if fused:
    rows = (*(row for row in TABLE if '{expert}' not in row[0]), *FUSED)
  entries = []
  for theirs, ours, form in rows:
    if ours[0] not in leaves:
      continue
    if not groups:
      ours = tuple(name for name in ours if name not in (GATE, GATE_BIAS))
    if form == 'scale':
      form = 'centred' if centred else 'plain'
    depth = ('blocks.' in ours[0]) + ('.experts.' in ours[0])
    full = [_shape(name, leaves) for name in ours]
    entries.append(
      Entry(
        theirs=theirs,
        ours=ours,
        form=FORMS[form],
        groups=1 if '.experts.' in ours[0] else groups,
        shapes=tuple(shape[depth:] for shape in full),
        leading=full[0][:depth],
      )
    )
  return entries


def _shape(name: str, leaves: Mapping[str, Any]) -> tuple[int, ...]:
  if name == GATE_BIAS:
    layers, _, *rest = leaves[GATE].shape
    return (layers, *rest)
  return tuple(leaves[name].shape)
