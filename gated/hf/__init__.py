"""Hugging Face both ways: safetensors <-> parameter tree, config.json <-> model.Config.

Read are Qwen3, dense or with experts, with or without the authors' gates; and the gate of
Qwen3-Next, where it has no layers of linear attention. Written are Qwen3 and its gated
kin. One table of names serves both directions.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated import model
from gated.config import differences, one_of
from gated.devices import trees
from gated.hf import files, knobs, meaning, names
from gated.hf.files import is_checkpoint
from gated.model.layers import DTYPES

__all__ = ['check', 'config', 'is_checkpoint', 'load', 'read', 'save']

# What a run may set otherwise than the checkpoint that it starts from: a longer context.
MAY_DIFFER = (
  'config.model.attn.rope_base',
  'config.model.attn.yarn.',
  'config.model.numerics.init_std',
)
SHARD_BYTES = 2 << 30
CENTRED = (
  'norms are kept less one there, and 1 + w loses most of a small w unless weights are '
  'kept in float32 (config.model.numerics.weights)'
)

_log = logging.getLogger('gated')


def load(
  directory: str | Path, *, dtype: str | None = None, compute: str | None = None
) -> model.Transformer:
  """A folder -> the model, `model(tokens) -> logits`, on the default device.

  Weights are kept in `dtype`, by default as the embedding is in the files, and compute is
  in the same unless told otherwise. Those of Qwen3-Next are kept in float32, for its
  norms add 1 to what is in the files. ValueError names what cannot be read.
  """
  cfg = config(directory, dtype=dtype, compute=compute)
  return read(directory, model.abstract(cfg))


def config(
  directory: str | Path, *, dtype: str | None = None, compute: str | None = None
) -> model.Config:
  """A folder -> the config of its model; `dtype` and `compute` as in `load`."""
  source = files.Tensors(directory)
  kept = dtype or _dtype(source)
  for name, value in (('dtype', kept), ('compute', compute or kept)):
    one_of(name, value, DTYPES)
  numerics = {'weights': kept, 'compute': compute or kept}
  there = _meaning(source, {'numerics': numerics})
  if not there.centred or kept == 'float32':
    return there.cfg
  if dtype:
    raise ValueError(f'{source.directory}: dtype={dtype!r}, but {CENTRED}')
  return _meaning(source, {'numerics': numerics | {'weights': 'float32'}}).cfg


def check(directory: str | Path, like: model.Transformer, *, fresh: bool = False) -> None:
  """Raises ValueError unless `read` can fill `like`; reads headers only.

  With `fresh`, a gate that the checkpoint lacks is no fault.
  """
  _matched(files.Tensors(directory), like, fresh)


def read(
  directory: str | Path, like: model.Transformer, fresh: model.Transformer | None = None
) -> model.Transformer:
  """A folder -> the model, placed as the abstract model `like` says.

  Leaves of `like` are `jax.ShapeDtypeStruct`, with shardings or without. A gate that the
  checkpoint lacks is taken from `fresh`. Host memory holds one leaf at a time, and one
  tensor of theirs. The ValueError of a checkpoint that does not fit names each of its
  tensors that does not.
  """
  source = files.Tensors(directory)
  entries = _matched(source, like, fresh is not None)
  leaves = trees.flatten(like)
  filled = {}
  for entry in entries:
    for name in entry.ours:
      if name in leaves:
        filled[name] = _place(_gather(source, entry, name, leaves[name]), leaves[name])
      else:
        _check_zero(source, entry, name)
  kept = leaves.keys() - filled.keys()
  if kept:
    start = trees.flatten(fresh)
    filled |= {name: start[name] for name in kept}
    _log.info('%s lacks %s, which starts afresh', directory, ', '.join(sorted(kept)))
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
  """A model -> a new folder, which transformers opens where it knows the architecture.

  Without a gate that is Qwen3 or Qwen3-MoE. With one, packing 'grouped' is the authors'
  Qwen3, which only their code opens; 'per_head' writes a dense model with an elementwise
  gate as Qwen3-Next, which transformers knows. Tensors keep their dtype unless `dtype`
  names another. `also` are keys of config.json without an effect on logits. ValueError
  names each knob that Hugging Face has no word for.
  """
  if jax.process_count() > 1:
    raise ValueError('only a single process writes a Hugging Face checkpoint')
  one_of('dtype', dtype, (None, *DTYPES))
  kept = dtype or params.cfg.numerics.weights
  content, groups, centred = knobs.write(params.cfg, packing, kept, also or {})
  leaves = trees.flatten(params)
  layout = names.Layout(groups=groups, centred=centred, fused=False)
  entries = names.table(leaves, layout)
  assert leaves.keys() <= {name for entry in entries for name in entry.ours}
  pieces = list(_pieces(entries))
  headers = {}
  for entry, name, _ in pieces:
    wanted = dtype or str(leaves[entry.ours[0]].dtype)
    theirs = next(k for k, ours in files.DTYPES.items() if ours == wanted)
    headers[name] = files.Tensor(entry.shape, theirs)
  arrays = _packed(pieces, leaves, headers)
  files.write(directory, content, headers, arrays, shard_bytes)


def _meaning(source: files.Tensors, base: Mapping[str, Any]) -> meaning.Meaning:
  path = source.directory / files.CONFIG
  content = files.read_json(path)
  try:
    found = meaning.read(content, base)
    # Names are about to be made for all of them.
    experts = 0 if _fused(source) else found.cfg.moe.experts
    for name, count in (('layers', found.cfg.depth), ('experts', experts)):
      if count > len(source.headers):
        raise ValueError(f'{count} {name}, but there are {len(source.headers)} tensors')
    return found
  except ValueError as error:
    raise ValueError(f'{path}: {error}'[:1000]) from error


def _fused(source: files.Tensors) -> bool:
  return any(name.endswith('.experts.gate_up_proj') for name in source.headers)


def _dtype(source: files.Tensors) -> str:
  """The dtype that the embedding has in the files; another kind is named by `check`."""
  embedding = source.headers.get(names.TABLE[0][0])
  return files.DTYPES.get(embedding.dtype if embedding else '', 'float32')


def _matched(
  source: files.Tensors, like: model.Transformer, fresh: bool
) -> list[names.Entry]:
  """The lines of the table that fill `like`; ValueError if headers do not suit them."""
  there = _meaning(source, dataclasses.asdict(like.cfg))
  adds = fresh and not there.groups
  _check_knobs(source, there.cfg, like.cfg, adds)
  layout = names.Layout(groups=there.groups, centred=there.centred, fused=_fused(source))
  leaves = trees.flatten(like)
  entries = names.table(leaves, layout)
  covered = {name for entry in entries for name in entry.ours}
  faults = [
    f'{name} of ours has no counterpart'
    for name in leaves.keys() - covered - ({names.GATE} if adds else set())
  ]
  wanted = {name: entry.shape for entry in entries for name in entry.names()}
  faults += _faults(source, wanted, tied=like.cfg.tied)
  faults += [
    f'{name} of ours is {leaves[name].dtype}, but {CENTRED}'
    for entry in entries
    for name in entry.ours
    if entry.form is names.FORMS['centred'] and leaves[name].dtype != jnp.float32
  ]
  if faults:
    told = '; '.join(sorted(faults)[:20])
    raise ValueError(f'{source.directory} has {len(faults)} faults: {told}')
  return entries


def _check_knobs(source, theirs: model.Config, ours: model.Config, adds: bool) -> None:
  """Raises ValueError, naming each knob, if two configs do not compute the same."""
  a, b = ({'model': dataclasses.asdict(cfg)} for cfg in (theirs, ours))
  may = MAY_DIFFER + (('config.model.attn.gate.',) if adds else ())
  told = [
    f'{knob}={here!r}, but {there!r} there'
    for knob, (there, here) in differences(a, b).items()
    if not knob.startswith(may)
  ]
  if told:
    raise ValueError(f'{source.directory}: ' + '; '.join(told))


def _faults(
  source: files.Tensors, wanted: dict[str, tuple[int, ...]], tied: bool
) -> list[str]:
  """What is missing, extra, of another shape, or of a dtype that is not read."""
  have = source.headers
  faults = [f'{name} is missing' for name in wanted.keys() - have.keys()]
  for name, tensor in have.items():
    shape = wanted.get(name)
    if tensor.dtype not in files.DTYPES:
      faults.append(f'{name} has dtype {tensor.dtype}, but F32 and BF16 are read')
    elif shape is None:
      if not (tied and _repeats_embedding(source, name)):
        faults.append(f'{name} is not expected')
    elif shape != tensor.shape:
      faults.append(f'{name} has shape {tensor.shape}, but {shape} is expected')
  return faults


def _repeats_embedding(source: files.Tensors, name: str) -> bool:
  """Whether a tensor is an unembedding equal to the embedding, as some files have it."""
  embed, head = names.TABLE[0][0], names.TABLE[-1][0]
  if name != head or source.headers.get(embed) != source.headers[name]:
    return False
  rows = range(source.headers[embed].shape[0])
  same = lambda row: np.array_equal(source.read(embed, row), source.read(head, row))
  return all(map(same, rows))


def _gather(source: files.Tensors, entry: names.Entry, name: str, like) -> np.ndarray:
  """One leaf of ours, all its layers, in its dtype.

  Where leaves share a tensor, it is read for each: one pass would hold them all.
  """
  array = np.empty(like.shape, like.dtype)
  at = entry.ours.index(name)
  for theirs, index, row in entry.places():
    array[index] = entry.unpack(source.read(theirs, row))[at]
  return array


def _check_zero(source: files.Tensors, entry: names.Entry, name: str) -> None:
  """Raises ValueError unless the rows of a leaf that ours lack are zero."""
  at = entry.ours.index(name)
  for theirs, _, row in entry.places():
    if entry.unpack(source.read(theirs, row))[at].any():
      raise ValueError(f'{theirs}: the gate has a bias, but only 0 is implemented')


def _place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
  if like.sharding is None:
    placed = jax.device_put(array)
  else:
    take = lambda index: array[index]
    placed = jax.make_array_from_callback(array.shape, like.sharding, take)
  # A transfer under way would keep its leaf in host memory beside the next one.
  return jax.block_until_ready(placed)


def _pieces(entries: list[names.Entry]) -> Iterator[tuple[names.Entry, str, tuple]]:
  """Each tensor of theirs with its line and index: those outside of layers come first."""
  outside = [entry for entry in entries if not entry.leading]
  inside = [entry for entry in entries if entry.leading]
  for entry in outside:
    yield from ((entry, name, index) for name, index, _ in entry.places())
  by_layer: dict[int, list] = {}
  for entry in inside:
    for name, index, _ in entry.places():
      by_layer.setdefault(index[0], []).append((entry, name, index))
  for pieces in by_layer.values():
    yield from pieces


def _packed(pieces, leaves, headers) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of theirs, in order; one layer of a leaf is in host memory at a time."""
  held: tuple[Any, list[np.ndarray]] = (None, [])
  for entry, name, index in pieces:
    if held[0] != (entry.ours, index[:1]):
      held = (entry.ours, index[:1]), _layer(entry, leaves, index[:1])
    packed = entry.pack([array[index[1:]] for array in held[1]])
    dtype = jnp.dtype(files.DTYPES[headers[name].dtype])
    yield name, packed.astype(dtype)


def _layer(entry: names.Entry, leaves, index: tuple) -> list[np.ndarray]:
  """One layer of the arrays of ours that a line holds; zeros where ours have none."""
  first = leaves[entry.ours[0]]
  return [
    np.asarray(leaves[name][index] if index else leaves[name])
    if name in leaves
    else np.zeros(shape, first.dtype)
    for name, shape in zip(entry.ours, entry.shapes)
  ]
