"""Hugging Face checkpoints: safetensors <-> parameter tree, config.json <-> model.Config.

Supports Qwen3, dense or with experts, with or without the authors' gates, and dense
Qwen3-Next without linear attention.
"""

import dataclasses
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gated import model
from gated.config import differences, one_of
from gated.devices import trees
from gated.hf import files, knobs, meaning, names, tokens
from gated.hf.files import is_checkpoint
from gated.model.layers import DTYPES

__all__ = ['check', 'config', 'is_checkpoint', 'model_knobs', 'read', 'save', 'tokens']

# Knobs that may differ from the initial checkpoint: they have no effect on its weights.
MAY_DIFFER = (
  'config.model.numerics.init_std',
  'config.model.numerics.matmul',
  'config.model.attn.gate.score',
)
GATES = 'config.model.attn.gate', 'config.model.attn.gates'
SHARD_BYTES = 2 << 30

_log = logging.getLogger('gated')


def config(directory: str | Path) -> model.Config:
  """A folder -> the config of its model; ValueError if the model is not supported.

  The dtype of its matrices, and the compute dtype, is that of the embedding in the files.
  """
  source = files.Tensors(directory)
  embedding = source.headers.get(names.TABLE[0][0])
  # An unsupported dtype is reported with the other faults of the tensors.
  dtype = files.DTYPES.get(embedding.dtype if embedding else '', 'float32')
  return _meaning(source, {'numerics': {'weights': dtype, 'compute': dtype}}).cfg


def model_knobs(directory: str | Path, base: Mapping[str, Any]) -> dict[str, Any]:
  """A folder -> the knobs that its config.json gives other values than `base`.

  `base` is nested, as config.model; names begin with `config.model`. A config.json
  without a gate leaves the gates of `base`. ValueError if the model is not supported.
  """
  path = Path(directory) / files.CONFIG
  content = files.read_json(path)
  try:
    theirs = meaning.read(content, base)
  except ValueError as error:
    raise ValueError(f'{path}: {error}'[:1000]) from error
  changed = differences({'model': base}, {'model': dataclasses.asdict(theirs.cfg)})
  gates = () if theirs.groups else GATES
  return {k: value for k, (_, value) in changed.items() if not k.startswith(gates)}


def check(
  directory: str | Path,
  like: model.Transformer,
  *,
  fresh: bool = False,
  allowed: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
  """Raises ValueError unless `read` can fill `like`; reads headers only.

  With `fresh`, the checkpoint may lack a gate. Returns the knobs with which `like`
  computes another function, {knob: (the checkpoint's, ours)}. `allowed` are those, or
  groups of them, that may differ.
  """
  return _matched(files.Tensors(directory), like, fresh, allowed)[1]


def read(
  directory: str | Path,
  like: model.Transformer,
  fresh: model.Transformer | None = None,
  *,
  allowed: Collection[str] = (),
) -> model.Transformer:
  """A folder -> the model, with the dtypes and shardings of the abstract model `like`.

  Leaves of `like` are `jax.ShapeDtypeStruct`; shardings are optional. A gate missing from
  the checkpoint is copied from `fresh`; `allowed` is as in `check`. Host memory holds one
  leaf and one of the file's tensors at a time. ValueError names the tensors that do not
  fit `like`.
  """
  source = files.Tensors(directory)
  entries, _ = _matched(source, like, fresh is not None, allowed)
  leaves = trees.flatten(like)
  filled = {}
  for entry in entries:
    for part, name in enumerate(entry.ours):
      if name in leaves:
        filled[name] = _read_leaf(source, entry, part, leaves[name])
        continue
      for theirs, _, row in entry.places():
        if entry.unpack(source.read(theirs, row))[part].any():
          raise ValueError(f'{theirs}: the gate has a bias, but only 0 is implemented')
  missing = leaves.keys() - filled.keys()
  if missing:
    start = trees.flatten(fresh)
    filled |= {name: start[name] for name in missing}
    _log.info('%s lacks %s: initialized', directory, ', '.join(sorted(missing)))
  return trees.unflatten(like, filled)


def save(
  params: model.Transformer,
  directory: str | Path,
  *,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  packing: str = 'grouped',
  also: Mapping[str, Any] | None = None,
) -> None:
  """Writes a model to a new folder.

  Without a gate, the format is Qwen3 or Qwen3-MoE. With a gate, packing 'grouped' writes
  the authors' layout with the code that opens it in transformers; 'per_head' writes a
  dense model with an elementwise gate as Qwen3-Next, which transformers opens by itself.
  `dtype` defaults to that of each tensor; one that is wider than config.json's, such as a
  norm, is written in the latter if that loses nothing. `also` holds further keys of
  config.json, which have no effect on logits. ValueError names each unsupported knob.
  """
  if jax.process_count() > 1:
    raise ValueError('saving a Hugging Face checkpoint needs a single process')
  one_of('dtype', dtype, (None, *DTYPES))
  kept = dtype or params.cfg.numerics.weights
  content, groups, centred = knobs.write(params.cfg, packing, kept, also or {})
  leaves = knobs.folded(params.cfg, trees.flatten(params))
  if any(name.endswith('.open') for name in leaves):
    raise ValueError('some gates are still opening at this step: export a later step')
  entries = names.table(leaves, groups=groups, centred=centred)
  assert leaves.keys() <= {name for entry in entries for name in entry.ours}
  their_dtypes = {ours: theirs for theirs, ours in files.DTYPES.items()}
  kinds, headers = {}, {}
  for entry in entries:
    kinds[entry.theirs] = dtype or _dtype(entry, leaves, kept)
    tensor = files.Tensor(entry.shape, their_dtypes[kinds[entry.theirs]])
    headers |= dict.fromkeys(entry.names(), tensor)
  files.write(directory, content, headers, _tensors(entries, leaves, kinds), shard_bytes)
  if code := knobs.code(content):
    shutil.copyfile(Path(__file__).with_name(code), Path(directory) / code)


def _meaning(source: files.Tensors, base: Mapping[str, Any]) -> meaning.Meaning:
  path = source.directory / files.CONFIG
  content = files.read_json(path)
  try:
    theirs = meaning.read(content, base)
    # Checked before a name is made for each layer and expert.
    experts = 0 if _fused(source) else theirs.cfg.moe.experts
    for name, count in (('layers', theirs.cfg.depth), ('experts', experts)):
      if count > len(source.headers):
        raise ValueError(f'{count} {name}, but there are {len(source.headers)} tensors')
    return theirs
  except ValueError as error:
    raise ValueError(f'{path}: {error}'[:1000]) from error


def _fused(source: files.Tensors) -> bool:
  return any(name.endswith('.experts.gate_up_proj') for name in source.headers)


def _matched(
  source: files.Tensors, like: model.Transformer, fresh: bool, allowed: Collection[str]
) -> tuple[list[names.Entry], dict[str, tuple[Any, Any]]]:
  """The rows of the table that fill `like`, and the knobs that differ, as in `check`."""
  theirs = _meaning(source, dataclasses.asdict(like.cfg))
  adds = fresh and not theirs.groups
  differs = _differs(source, theirs.cfg, like.cfg, (*allowed, *(GATES if adds else ())))
  leaves = trees.flatten(like)
  groups, centred, fused = theirs.groups, theirs.centred, _fused(source)
  entries = names.table(leaves, groups=groups, centred=centred, fused=fused)
  covered = {name for entry in entries for name in entry.ours}
  faults = [
    f'{name} is missing in the checkpoint'
    for name in leaves.keys() - covered
    if not (adds and names.is_gate(name))
  ]
  shapes = {name: entry.shape for entry in entries for name in entry.names()}
  faults += _faults(source, shapes, tied=like.cfg.tied)
  if faults:
    first = '; '.join(sorted(faults)[:20])
    raise ValueError(f'{source.directory} has {len(faults)} faults: {first}')
  return entries, differs


def _differs(
  source: files.Tensors, theirs: model.Config, ours: model.Config, allowed: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
  """Knobs by which two configs compute differently; ValueError for one not allowed."""
  a, b = ({'model': dataclasses.asdict(cfg)} for cfg in (theirs, ours))
  changed = differences(a, b)
  differs = {k: pair for k, pair in changed.items() if not k.startswith(MAY_DIFFER)}
  groups = tuple(f'{name.rstrip(".")}.' for name in allowed)
  refused = [knob for knob in differs if not f'{knob}.'.startswith(groups)]
  if refused:
    values = (
      f'{k}={ours!r}, but the checkpoint has {theirs!r}'
      for k, (theirs, ours) in differs.items()
      if k in refused
    )
    raise ValueError(
      f'{source.directory}: {"; ".join(values)}. Take the knobs of its config.json with '
      f'--config.model_from={source.directory}, or allow another function with '
      f'--allow_change={",".join(refused)}'
    )
  return differs


def _faults(
  source: files.Tensors, shapes: dict[str, tuple[int, ...]], tied: bool
) -> list[str]:
  """Lists tensors that are missing, unexpected, or of another shape or dtype."""
  faults = [f'{name} is missing' for name in shapes.keys() - source.headers.keys()]
  for name, tensor in source.headers.items():
    shape = shapes.get(name)
    if tensor.dtype not in files.DTYPES:
      faults.append(
        f'{name} has dtype {tensor.dtype}, but only F32 and BF16 are supported'
      )
    elif shape is None:
      if not (tied and _repeats_embedding(source, name)):
        faults.append(f'{name} is not expected')
    elif shape != tensor.shape:
      faults.append(f'{name} has shape {tensor.shape}, but {shape} is expected')
  return faults


def _repeats_embedding(source: files.Tensors, name: str) -> bool:
  """Whether a tensor is an unembedding equal to the embedding; some files store both."""
  embed, head = names.TABLE[0][0], names.TABLE[-1][0]
  if name != head or source.headers.get(embed) != source.headers[name]:
    return False
  rows = range(source.headers[embed].shape[0])
  same = lambda row: np.array_equal(source.read(embed, row), source.read(head, row))
  return all(map(same, rows))


def _read_leaf(
  source: files.Tensors, entry: names.Entry, part: int, like: jax.ShapeDtypeStruct
) -> jax.Array:
  """Reads all layers of one of an entry's leaves, in the dtype and sharding of `like`.

  A tensor shared by several leaves is read once per leaf, to hold one leaf at a time.
  """
  array = np.empty(like.shape, like.dtype)
  for theirs, index, row in entry.places():
    array[index] = entry.unpack(source.read(theirs, row))[part]
  if like.sharding is None:
    placed = jax.device_put(array)
  else:
    shard = lambda index: array[index]
    placed = jax.make_array_from_callback(array.shape, like.sharding, shard)
  # Waits, because an unfinished transfer keeps its leaf in host memory.
  return jax.block_until_ready(placed)


def _dtype(entry: names.Entry, leaves: Mapping[str, jax.Array], kept: str) -> str:
  """The dtype of an entry's tensors: `kept` if that loses nothing, or the leaf's."""
  leaf = leaves[entry.ours[0]]
  if leaf.dtype == kept:
    return kept
  wide = [entry.form.export(np.asarray(leaves[n])) for n in entry.ours if n in leaves]
  exact = all((part.astype(kept).astype(part.dtype) == part).all() for part in wide)
  return kept if exact else str(leaf.dtype)


def _tensors(
  entries: list[names.Entry], leaves: Mapping[str, jax.Array], kinds: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors by name; host memory holds the leaves of one entry at a time.

  Leaves that our model lacks are zeros.
  """
  for entry in entries:
    kept = leaves[entry.ours[0]].dtype
    arrays = [
      np.asarray(leaves[name])
      if name in leaves
      else np.zeros((*entry.leading, *shape), kept)
      for name, shape in zip(entry.ours, entry.shapes)
    ]
    for name, index, _ in entry.places():
      packed = entry.pack([array[index] for array in arrays])
      yield name, packed.astype(kinds[entry.theirs])
