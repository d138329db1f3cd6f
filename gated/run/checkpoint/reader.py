"""Reads the saved steps of a workdir: lists, verifies and restores them.

Reading changes nothing, and works beside a run that is saving.
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gated import storage
from gated.devices import processes, trees
from gated.run.checkpoint import head, manifest, retention
from gated.run.checkpoint.manifest import Damaged

ITEMS = ('model', 'rest')
ATTEMPTS = 5  # The most choices of a step of a run that removes its steps.
PATIENCE = 1200  # Seconds that the processes of a run wait for each other in a save.

_log = logging.getLogger('gated')


class Reader(contextlib.AbstractContextManager):
  """The checkpoints of any run, read-only; use it in a `with`."""

  def __init__(self, directory: storage.PathLike):
    directory = storage.path(directory)
    # Orbax reads and writes gs:// itself; s3:// goes through a local folder.
    self._staging = self._stage = None
    if str(directory).startswith('s3://'):
      self._staging = tempfile.TemporaryDirectory(prefix='gated-')
      self._stage = storage.path(self._staging.name)
    elif not storage.is_remote(directory):
      directory = storage.path(Path(directory).absolute())
    self.directory = directory
    self._manifests: dict[int, manifest.Manifest] = {}
    self._local: dict[int, storage.Path] = {}
    handlers: Any = {item: ocp.StandardCheckpointHandler() for item in ITEMS}
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(**handlers),
      async_options=ocp.options.AsyncOptions(timeout_secs=PATIENCE),
    )

  def __exit__(self, kind, error, traceback) -> None:
    # Orbax raises the error of a failed save again; it was already reported.
    with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
      self._orbax.close()
    if self._staging:
      self._staging.cleanup()

  def steps(self) -> list[int]:
    """The committed steps of this run's history, ascending; not yet verified."""
    discarded = head.read(self.directory).discarded
    committed = map(int, self._folders(manifest.NAME))
    return sorted(step for step in committed if step not in discarded)

  def _folders(self, marker: str) -> list[str]:
    """The folders that are named like steps and hold an entry `marker`."""
    is_step = re.compile(r'0|[1-9]\d{0,17}', re.ASCII).fullmatch
    names = filter(is_step, storage.names(self.directory))
    return [name for name in names if storage.exists(self.directory / name / marker)]

  def followed(self) -> str:
    """The --restore_step that the last session followed; '' for none."""
    return head.read(self.directory).asked

  def latest(self) -> int | None:
    """The last committed step, or None."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the lowest held-out loss, or the last if none has one.

    Steps whose loss was measured on other text than the newest one are left out.
    """
    steps = {s: retention.measured(self.about(s)) for s in self.steps()}
    best = retention.best(steps)
    if best is None:
      return self.latest()
    measured = {s: m for s, m in steps.items() if m.loss is not None}
    if others := sorted(s for s, m in measured.items() if m.on != steps[best].on):
      _log.warning(
        'the best step is %d, but the loss of %s was measured on other held-out rows or '
        'data, and is not compared',
        *(best, ', '.join(map(str, others))),
      )
    return best

  def newest_good(self) -> int | None:
    """The newest step that verifies; None if no step was ever committed.

    Skipped steps are logged with the reason. ValueError if every step is damaged: a run
    never starts from scratch silently.
    """
    steps, last = self.steps(), head.read(self.directory).step
    good, faults = None, []
    if last is not None and last not in steps:
      path = self.directory / str(last) / manifest.NAME
      faults.append(f'{path} is missing, but the step was saved')
    # Earlier versions had no manifest: Orbax's CheckpointManager laid out the steps.
    if last is None and not steps and (old := ', '.join(self._folders('about'))):
      faults.append(f'{self.directory} has the steps {old} of an earlier version')
    for step in reversed(steps):
      try:
        self.verify(step)
        good = step
        break
      except Damaged as error:
        faults.append(str(error))
    if faults and good is None:
      raise ValueError(
        f'no valid checkpoint is left: {"; ".join(faults)}. Restore that folder from a '
        'copy, choose another workdir, or delete it to start from scratch'
      )
    for fault in faults:
      _log.warning('skipped: %s', fault)
    if faults:
      _log.warning('using step %d, the newest valid one', good)
    return good

  def pick(self, which: str, knob: str) -> int:
    """'latest', 'best' or a number -> a step on disk, verified; otherwise ValueError.

    'latest' is the newest valid step; the others are never replaced by another step. If
    the run removes its steps meanwhile, 'latest' and 'best' are chosen again.
    """
    for left in reversed(range(ATTEMPTS)):
      steps = self.steps()
      try:
        step = self._pick(which, knob, steps)
      except (ValueError, OSError):
        if not left or which.isdigit() or not self.removed(steps):
          raise
      else:
        if not left or which != 'latest' or max(steps) not in self.removed(steps):
          return step
      _log.info('%s: a step was removed meanwhile, choosing again', self.directory)
    raise AssertionError

  def removed(self, steps: Iterable[int]) -> set[int]:
    """Those of the steps that are no longer there."""
    if jax.process_count() > 1:
      return set()  # The processes of a run may see different folders.
    removed = set(steps) - set(self.steps())
    for step in removed:
      self._manifests.pop(step, None)
    return removed

  def _pick(self, which: str, knob: str, steps: list[int]) -> int:
    if not steps and head.read(self.directory).step is None:
      raise ValueError(f'{knob}={which!r}: {self.directory} holds no checkpoint')
    if which not in ('latest', 'best') and not re.fullmatch(r'\d+', which, re.ASCII):
      raise ValueError(f'{knob}={which!r}, but allowed are latest, best, or a step')
    try:
      if which == 'latest':
        newest = self.newest_good()
        assert newest is not None
        return newest
      step = self.best() if which == 'best' else int(which)
      if step is None or step not in steps:
        raise ValueError(f'{self.directory} has the steps {", ".join(map(str, steps))}')
      self.verify(step)
    except ValueError as error:
      raise ValueError(f'{knob}={which!r}: {error}') from error
    return step

  def verify(self, step: int) -> None:
    """Raises Damaged unless every file of the step is byte for byte as saved.

    The processes of a run share the work, and all of them raise if one finds a fault.
    """
    fault = ''
    try:
      saved, folder = self._manifest(step), self._fetched(step)
      names, count = sorted(saved.files), jax.process_count()
      share = names if self._stage else names[jax.process_index() :: count]
      manifest.verify(folder, saved, share)
    except Damaged as error:
      fault = str(error)
    faults = list(filter(None, processes.gather(fault)))
    if faults:
      self._local.pop(step, None)
      raise Damaged(faults[0])

  def about(self, step: int) -> dict:
    """The metadata of a step: 'config', 'data', 'heldout_loss' and more."""
    return self._manifest(step).about

  def _manifest(self, step: int) -> manifest.Manifest:
    if step not in self._manifests:
      folder = self.directory / str(step)
      content = manifest.read(folder)
      if content.step != step:
        raise Damaged(f'{folder} holds step {content.step}')
      self._manifests[step] = content
    return self._manifests[step]

  def _fetched(self, step: int) -> storage.Path:
    """The folder of a step's files; a local copy where Orbax cannot read the store."""
    folder = self.directory / str(step)
    if not self._stage:
      return folder
    if step not in self._local:
      local = self._stage / f'read-{step}'
      try:
        storage.download(folder, local, sorted(self._manifest(step).files))
      except FileNotFoundError as error:
        raise Damaged(f'{folder} lacks a file: {error}') from error
      self._local[step] = local
    return self._local[step]

  def restore(self, step: int, like: Any) -> Any:
    """A step -> the state, with the shardings of the abstract state `like`.

    `like` is a tree of `jax.ShapeDtypeStruct`. ValueError, naming the leaf, for one that
    is missing or has another shape or dtype.
    """
    items = self.read(step, split(like))
    model = {f'model.{name}': leaf for name, leaf in items['model'].items()}
    return trees.unflatten(like, items['rest'] | model)

  def shapes(self, step: int) -> dict[str, dict[str, Any]]:
    """All arrays of a step, in the form that `read` takes, for one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
      item: {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for name, (dtype, *shape) in leaves.items()
      }
      for item, leaves in self._manifest(step).leaves.items()
    }

  def check_model(self, step: int, like: Any) -> None:
    """Raises ValueError unless the step has the model `like`; it may lack gates."""
    self.check_items(step, {'model': self._without_new_gates(step, like)})

  def restore_model(self, step: int, like: Any, *, fresh: Any = None) -> Any:
    """A step -> the model alone, with the shardings of the abstract model `like`.

    Gates that the step lacks come from the model `fresh`, if given.
    """
    leaves = trees.flatten(like)
    expected = leaves if fresh is None else self._without_new_gates(step, like)
    arrays = self.read(step, {'model': expected})['model']
    if missing := sorted(leaves.keys() - expected.keys()):
      initial = trees.flatten(fresh)
      arrays |= {name: initial[name] for name in missing}
      folder = self.directory / str(step)
      _log.info('%s lacks %s: initialized', folder, ', '.join(missing))
    return trees.unflatten(like, arrays)

  def _without_new_gates(self, step: int, like: Any) -> dict[str, Any]:
    """The leaves of the model `like`, without the gates that the step lacks."""
    saved = self._manifest(step).leaves['model']
    gate = re.compile(r'\.attn\.gate(_\w+)?\.')
    new = lambda name: gate.search(name) and name not in saved
    return {name: leaf for name, leaf in trees.flatten(like).items() if not new(name)}

  def read(self, step: int, items: dict[str, dict[str, Any]]) -> dict[str, dict]:
    """A step and {item: {leaf: shape with sharding}} -> {item: {leaf: array}}."""
    self.check_items(step, items)
    args = {item: ocp.args.StandardRestore(leaves) for item, leaves in items.items()}
    folder = self._fetched(step)
    try:
      self._check_chunks(folder, items)
      arrays = dict(self._orbax.restore(folder, args=ocp.args.Composite(**args)).items())
    except (OSError, ValueError):
      raise
    except Exception as error:  # Orbax raises errors of every type.
      raise Damaged(f'{folder} cannot be read: {error!r}'[:1000]) from error
    for item, leaves in items.items():
      for name, leaf in leaves.items():
        array = arrays[item][name]
        same = (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        placed = leaf.sharding is None or array.sharding.is_equivalent_to(
          leaf.sharding, array.ndim
        )
        if not same or not placed:
          raise ValueError(f'{folder / item}: {name} was read as {array.aval}')
    return arrays

  def _check_chunks(self, folder: storage.Path, items: Iterable[str]) -> None:
    """Raises Damaged for a chunk larger than its array: it could fill the memory."""
    metadata: Any = self._orbax.metadata(folder).item_metadata
    for item in items:
      for name, array in metadata[item].tree.items():
        chunk = array.storage.chunk_shape if array.storage else ()
        if any(c > max(s, 1) for c, s in zip(chunk, array.shape)):
          raise Damaged(
            f'{folder / item}: {name} of shape {array.shape} has chunks of {chunk}'
          )

  def check_items(self, step: int, items: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError, naming the leaf, unless `read` can read the step."""
    for item, expected in items.items():
      folder = self.directory / str(step) / item
      saved = self._manifest(step).leaves[item]
      for name in sorted(expected.keys() ^ saved.keys()):
        fault = 'in the checkpoint only' if name in saved else 'not in the checkpoint'
        raise ValueError(f'{folder}: {name} is {fault}')
      for name, leaf in expected.items():
        entries = list(saved[name]), described(leaf)
        # Earlier versions kept norm scales and biases in the dtype of the matrices.
        widens = (entries[0][0], entries[1][0]) == ('bfloat16', 'float32')
        if entries[0][widens:] != entries[1][widens:]:
          old, new = (f'{dtype}{tuple(shape)}' for dtype, *shape in entries)
          raise ValueError(f'{folder}: {name} is {old} there, but {new} is expected')


def split(state: Any) -> dict[str, dict[str, Any]]:
  """A State -> {'model': its leaves by name, 'rest': all others by name}."""
  leaves = trees.flatten(state)
  rest = {k: v for k, v in leaves.items() if not k.startswith('model.')}
  return {'model': trees.flatten(state.model), 'rest': rest}


def described(leaf: Any) -> list:
  """An array or its shape -> [dtype, *shape], as a manifest stores it."""
  return [str(leaf.dtype), *leaf.shape]
