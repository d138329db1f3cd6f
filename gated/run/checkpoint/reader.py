"""The steps of a workdir, to be read: which are there, and which can be trusted.

Opening one changes nothing, beside a run that may be saving.
"""

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
from gated.run.checkpoint import head, manifest
from gated.run.checkpoint.manifest import Damaged

ITEMS = ('model', 'rest')
PATIENCE = 1200  # Seconds that the processes of a run wait for each other in a save.

_log = logging.getLogger('gated')


class Reader:
  """The checkpoints of a run that is another's, or has ended; use it in a `with`."""

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

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    self.close(failing=kind is not None)

  def close(self, *, failing: bool = False) -> None:
    try:
      self._orbax.close()
    except Exception:  # Of a save that has failed, which was told.
      if not failing:
        raise
    if self._staging:
      self._staging.cleanup()

  def steps(self) -> list[int]:
    """The committed steps of this run's history, ascending; not yet verified."""
    gone = head.read(self.directory).discarded
    found = (int(n) for n in storage.names(self.directory) if _is_step(n))
    return sorted(s for s in found if s not in gone and self._committed(s))

  def _committed(self, step: int) -> bool:
    return storage.exists(self.directory / str(step) / manifest.NAME)

  def _without_manifest(self) -> list[str]:
    """Steps as Orbax's own manager laid them out, before there was a manifest."""
    names = filter(_is_step, storage.names(self.directory))
    return [n for n in names if storage.exists(self.directory / n / 'about')]

  def latest(self) -> int | None:
    """The last committed step, or None."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step on disk with the lowest held-out loss, or the last if none has one."""
    losses = {step: self.about(step)['heldout_loss'] for step in self.steps()}
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    return min(losses, key=losses.__getitem__) if losses else self.latest()

  def newest_good(self) -> int | None:
    """The newest step that verifies; None where no step was ever committed.

    Steps that do not are named with the reason. ValueError if all that there were are
    damaged: a run never starts from scratch silently.
    """
    steps, last = self.steps(), head.read(self.directory).step
    faults = []
    if last is not None and last not in steps:
      mark = self.directory / str(last) / manifest.NAME
      faults.append(f'{mark} is missing, and the step was saved')
    if last is None and not steps and (old := self._without_manifest()):
      told = ', '.join(old)
      faults.append(f'{self.directory} has the steps {told} of an earlier version')
    for step in reversed(steps):
      try:
        self.verify(step)
      except Damaged as error:
        faults.append(str(error))
        continue
      for fault in faults:
        _log.warning('passed over: %s', fault)
      if faults:
        _log.warning('going back to step %d, the newest that is whole', step)
      return step
    if faults:
      raise ValueError(
        'no checkpoint is left to go on from: ' + '; '.join(faults) + '. Restore that '
        'folder from elsewhere, name another workdir, or delete it to start afresh'
      )
    return None

  def pick(self, which: str, knob: str) -> int:
    """'latest', 'best' or a number -> a step on disk, verified; ValueError if it is not.

    The latest is the newest that is whole; any other is that step or an error.
    """
    steps = self.steps()
    if not steps and head.read(self.directory).step is None:
      raise ValueError(f'{knob}={which!r}: {self.directory} holds no checkpoint')
    if which not in ('latest', 'best') and not re.fullmatch(r'\d+', which, re.ASCII):
      raise ValueError(f'{knob}={which!r}, but allowed are latest, best, or a step')
    try:
      if which == 'latest':
        found = self.newest_good()
        assert found is not None
        return found
      step = self.best() if which == 'best' else int(which)
      if step is None or step not in steps:
        have = ', '.join(map(str, steps))
        raise ValueError(f'{self.directory} has the steps {have}')
      self.verify(step)
    except ValueError as error:
      raise ValueError(f'{knob}={which!r}: {error}') from error
    return step

  def verify(self, step: int) -> None:
    """Raises Damaged unless every file of the step is what was saved, byte for byte.

    The processes of a run share the work, and all of them raise if one finds a fault.
    """
    fault = ''
    try:
      found, folder = self._manifest(step), self._fetched(step)
      names, n = sorted(found.files), jax.process_count()
      share = names if self._stage else names[jax.process_index() :: n]
      manifest.verify(folder, found, share)
    except Damaged as error:
      fault = str(error)
    faults = list(filter(None, processes.gather(fault)))
    if faults:
      self._local.pop(step, None)
      raise Damaged(faults[0])

  def about(self, step: int) -> dict:
    """What the run said of a step: 'config', 'data', 'heldout_loss' and more."""
    return self._manifest(step).about

  def _manifest(self, step: int) -> manifest.Manifest:
    if step not in self._manifests:
      found = manifest.read(self.directory / str(step))
      if found.step != step:
        raise Damaged(f'{self.directory / str(step)} holds step {found.step}')
      self._manifests[step] = found
    return self._manifests[step]

  def _fetched(self, step: int) -> storage.Path:
    """The folder with a step's files, copied here from where Orbax cannot read."""
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
    """A step -> the state, placed as the abstract state `like` says.

    `like` is a tree of `jax.ShapeDtypeStruct` with shardings. Raises ValueError, naming
    the leaf, for one that is missing or has another shape or dtype.
    """
    model, rest = split(like)
    restored = self.read(step, {'model': model, 'rest': rest})
    return trees.unflatten(like, restored['rest'] | _under('model', restored['model']))

  def shapes(self, step: int) -> dict[str, dict[str, Any]]:
    """All that a step holds, as `read` asks for it, to be placed on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
      item: {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for name, (dtype, *shape) in leaves.items()
      }
      for item, leaves in self._manifest(step).leaves.items()
    }

  def check_state(self, step: int, like: Any) -> None:
    """Raises ValueError, naming the leaf, unless `restore` can read the step."""
    for item, leaves in zip(ITEMS, split(like)):
      self._check(step, item, leaves)

  def check_model(self, step: int, like: Any, *, fresh: bool = False) -> None:
    """Raises ValueError unless `restore_model` can read the step.

    With `fresh`, a gate that the step lacks is no fault.
    """
    self._check(step, 'model', self._saved(step, like, fresh))

  def restore_model(self, step: int, like: Any, *, fresh: Any = None) -> Any:
    """A step -> the model alone, placed as the abstract model `like` says.

    A gate that the step lacks is taken from the model `fresh`, if there is one.
    """
    leaves = self._saved(step, like, fresh is not None)
    found = self.read(step, {'model': leaves})['model']
    kept = trees.flatten(like).keys() - found.keys()
    if kept:
      start = trees.flatten(fresh)
      found |= {name: start[name] for name in kept}
      told = ', '.join(sorted(kept))
      _log.info('%s lacks %s: initialized', self.directory / str(step), told)
    return trees.unflatten(like, found)

  def _saved(self, step: int, like: Any, fresh: bool) -> dict[str, Any]:
    """The leaves that are wanted of a step: all, or all but a gate that it lacks."""
    leaves = trees.flatten(like)
    if not fresh:
      return leaves
    saved = self._manifest(step).leaves['model']
    lacks = lambda name: '.gate.' in name and name not in saved
    return {name: leaf for name, leaf in leaves.items() if not lacks(name)}

  def read(self, step: int, items: dict[str, dict[str, Any]]) -> dict[str, dict]:
    """A step and, by item, {leaf's name: shape with sharding} -> the same of arrays."""
    for item, leaves in items.items():
      self._check(step, item, leaves)
    args = {item: ocp.args.StandardRestore(leaves) for item, leaves in items.items()}
    folder = self._fetched(step)
    try:
      self._check_chunks(folder, items)
      found = dict(self._orbax.restore(folder, args=ocp.args.Composite(**args)).items())
    except (OSError, ValueError):
      raise
    except Exception as error:  # Orbax raises of every kind.
      raise Damaged(f'{folder} cannot be read: {error!r}'[:1000]) from error
    for item, leaves in items.items():
      for name, wanted in leaves.items():
        have = found[item][name]
        same = (have.shape, have.dtype) == (wanted.shape, wanted.dtype)
        placed = wanted.sharding is None or have.sharding.is_equivalent_to(
          wanted.sharding, have.ndim
        )
        if not same or not placed:
          raise ValueError(f'{folder / item}: {name} was read as {have.aval}')
    return found

  def _check_chunks(self, folder: storage.Path, items: Iterable[str]) -> None:
    """Raises Damaged for a chunk larger than its array: it would take any memory."""
    found: Any = self._orbax.metadata(folder).item_metadata
    for item in items:
      for name, array in found[item].tree.items():
        chunk = array.storage.chunk_shape if array.storage else ()
        if any(c > max(s, 1) for c, s in zip(chunk, array.shape)):
          raise Damaged(
            f'{folder / item}: {name} of shape {array.shape} has chunks of {chunk}'
          )

  def _check(self, step: int, item: str, wanted: dict[str, Any]) -> None:
    """Raises ValueError unless what is saved has the names, shapes and dtypes wanted."""
    where = self.directory / str(step) / item
    saved = self._manifest(step).leaves[item]
    for name in sorted(wanted.keys() ^ saved.keys()):
      there = 'is in the checkpoint only' if name in saved else 'is not in the checkpoint'
      raise ValueError(f'{where}: {name} {there}')
    for name, leaf in wanted.items():
      have, want = list(saved[name]), described(leaf)
      if have != want:
        told = [f'{dtype}{tuple(shape)}' for dtype, *shape in (have, want)]
        raise ValueError(f'{where}: {name} is {told[0]} there, but {told[1]} is wanted')


def split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """A State -> (the model's leaves by name, all others by name)."""
  leaves = trees.flatten(state)
  rest = {k: v for k, v in leaves.items() if not k.startswith('model.')}
  return trees.flatten(state.model), rest


def _under(prefix: str, leaves: dict[str, Any]) -> dict[str, Any]:
  return {f'{prefix}.{name}': leaf for name, leaf in leaves.items()}


def described(leaf: Any) -> list:
  """An array or its shape -> [dtype, *shape], as a manifest has it."""
  return [str(leaf.dtype), *leaf.shape]


def _is_step(name: str) -> bool:
  return re.fullmatch(r'0|[1-9]\d{0,17}', name, re.ASCII) is not None
