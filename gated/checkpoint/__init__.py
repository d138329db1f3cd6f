"""Step-numbered checkpoints through Orbax: state, config and data fingerprint together.

A step holds three items: `model` and `rest` (optimizer state and counters), each a flat
mapping from a leaf's name to its array, and `about`, JSON. Reading one runs no code.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from gated import trees

_log = logging.getLogger('gated')


def reading(directory: str | Path) -> 'Checkpoints':
  """The checkpoints of a run that is another's, or has ended."""
  # Orbax warns of what it does with a folder that it may only read.
  log = logging.getLogger('absl')
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    return Checkpoints(directory, keep=0, keep_every=0)
  finally:
    log.setLevel(level)


class Checkpoints:
  """The checkpoints of one workdir; close it, or use it in a `with`, to end saves."""

  def __init__(self, directory: str | Path, *, keep: int, keep_every: int):
    """Keeps the last `keep` steps, the best one, and every multiple of `keep_every`.

    With `keep` 0 it only reads, beside a run that may be saving, and changes nothing.
    """
    best = policy.BestN(
      get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    policies: list = [policy.LatestN(keep), best]
    if keep_every:
      policies.append(policy.EveryNSteps(keep_every))
    reads = keep == 0
    handlers = {name: ocp.StandardCheckpointHandler() for name in ('model', 'rest')}
    self.directory = Path(directory).absolute()
    self.manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(policies),
        # Orbax writes metrics down only where it is told how to rank them.
        best_fn=_loss,
        best_mode='min',
        enable_async_checkpointing=True,
        cleanup_tmp_directories=not reads and jax.process_index() == 0,
        read_only=reads,
      ),
      item_handlers=handlers | {'about': ocp.JsonCheckpointHandler()},
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def close(self) -> None:
    """Waits for a save under way; raises if it failed."""
    self.manager.wait_until_finished()
    self.manager.close()

  def steps(self) -> list[int]:
    """The steps on disk, ascending."""
    return sorted(self.manager.all_steps())

  def latest(self) -> int | None:
    """The last step on disk, or None."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step on disk with the lowest held-out loss, or the last if none has one."""
    losses = {step: self.about(step)['heldout_loss'] for step in self.steps()}
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    return min(losses, key=losses.__getitem__) if losses else self.latest()

  def pick(self, which: str, knob: str) -> int:
    """'latest', 'best' or a number -> a step on disk; ValueError if it is not."""
    if not self.steps():
      raise ValueError(f'{knob}={which!r}: {self.directory} holds no checkpoint')
    named = {'latest': self.latest, 'best': self.best}
    if which not in named and not which.isdecimal():
      raise ValueError(f'{knob}={which!r}, but allowed are latest, best, or a step')
    step = named[which]() if which in named else int(which)
    if step not in self.steps():
      have = ', '.join(map(str, self.steps()))
      raise ValueError(f'{knob}={which!r}: {self.directory} has the steps {have}')
    return step

  def save(self, step: int, state: Any, about: dict) -> None:
    """Starts to save; `about` has 'config', 'data' (its fingerprint), 'heldout_loss'."""
    model, rest = split(state)
    args = ocp.args.Composite(
      model=ocp.args.StandardSave(model),
      rest=ocp.args.StandardSave(rest),
      about=ocp.args.JsonSave(about),
    )
    loss = about['heldout_loss']
    metrics = None if loss is None else {'heldout_loss': loss}
    if not self.manager.save(step, args=args, metrics=metrics, force=True):
      raise RuntimeError(f'{self.directory}: step {step} was not saved')

  def about(self, step: int) -> dict:
    """The JSON saved with a step."""
    args = ocp.args.Composite(about=ocp.args.JsonRestore())
    return self.manager.restore(step, args=args)['about']

  def restore(self, step: int, like: Any) -> Any:
    """A step -> the state, placed as the abstract state `like` says.

    `like` is a tree of `jax.ShapeDtypeStruct` with shardings. Raises ValueError, naming
    the leaf, for one that is missing or has another shape or dtype.
    """
    model, rest = split(like)
    restored = self.read(step, {'model': model, 'rest': rest})
    return trees.unflatten(like, restored['rest'] | _under('model', restored['model']))

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
      _log.info('%s lacks %s, which starts afresh', self.directory / str(step), told)
    return trees.unflatten(like, found)

  def _saved(self, step: int, like: Any, fresh: bool) -> dict[str, Any]:
    """The leaves that are wanted of a step: all, or all but a gate that it lacks."""
    leaves = trees.flatten(like)
    saved = self.manager.item_metadata(step)['model'] if fresh else None
    if saved is None:
      return leaves
    lacks = lambda name: '.gate.' in name and name not in saved
    return {name: leaf for name, leaf in leaves.items() if not lacks(name)}

  def read(self, step: int, items: dict[str, dict[str, Any]]) -> dict[str, dict]:
    """A step and, by item, {leaf's name: shape with sharding} -> the same of arrays."""
    for item, leaves in items.items():
      self._check(step, item, leaves)
    args = {item: ocp.args.StandardRestore(leaves) for item, leaves in items.items()}
    return dict(self.manager.restore(step, args=ocp.args.Composite(**args)).items())

  def _check(self, step: int, item: str, wanted: dict[str, Any]) -> None:
    """Raises ValueError unless what is saved has the names, shapes and dtypes wanted."""
    where, saved = (
      self.directory / str(step) / item,
      self.manager.item_metadata(step)[item],
    )
    if saved is None:
      raise ValueError(f'{where} is not there')
    for name in sorted(wanted.keys() ^ saved.keys()):
      there = 'is in the checkpoint only' if name in saved else 'is not in the checkpoint'
      raise ValueError(f'{where}: {name} {there}')
    for name, leaf in wanted.items():
      have = (tuple(saved[name].shape), str(saved[name].dtype))
      want = (tuple(leaf.shape), str(leaf.dtype))
      if have != want:
        raise ValueError(f'{where}: {name} is {have} there, but {want} is wanted')


def _loss(metrics: dict) -> float:
  return metrics['heldout_loss']


def split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """A State -> (the model's leaves by name, all others by name)."""
  leaves = trees.flatten(state)
  rest = {k: v for k, v in leaves.items() if not k.startswith('model.')}
  return trees.flatten(state.model), rest


def _under(prefix: str, leaves: dict[str, Any]) -> dict[str, Any]:
  return {f'{prefix}.{name}': leaf for name, leaf in leaves.items()}
