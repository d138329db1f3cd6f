"""The steps to keep, and their removal: only after a newer one is committed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gated import config, storage
from gated.run.checkpoint import manifest


@dataclass(frozen=True, kw_only=True)
class Config:
  """How often a run saves, and which steps it keeps."""

  every: int  # steps between saves
  keep: int  # the number of newest steps to keep, besides the best one
  keep_every: int  # also keep the multiples of this step; 0 for none

  def __post_init__(self):
    config.at_least('config.checkpoint.every', self.every, 1)
    config.at_least('config.checkpoint.keep', self.keep, 1)
    config.at_least('config.checkpoint.keep_every', self.keep_every, 0)


class Measured(NamedTuple):
  """The held-out loss of a step, and what it was measured on: only equals compare."""

  loss: float | None
  on: tuple[str, ...]  # the data's digest, the rows of each domain, and their length


def measured(about: Mapping[str, Any]) -> Measured:
  """The metadata of a step -> Measured; fields that it lacks are None."""
  knobs = config.flatten(about['config'])
  names = 'config.eval.rows', 'config.data.length'
  on = about['data'].get('sha256'), *map(knobs.get, names)
  return Measured(about['heldout_loss'], tuple(map(str, on)))


def best(steps: Mapping[int, Measured]) -> int | None:
  """Steps -> the first with the lowest loss, of those measured like the newest.

  None if no step has a loss.
  """
  bests = _bests(steps)
  known = [step for step, m in steps.items() if m.loss is not None]
  return bests[steps[max(known)].on] if known else None


def _bests(steps: Mapping[int, Measured]) -> dict[tuple, int]:
  """Steps -> the best step of each evaluation."""
  losses: dict[tuple, list[tuple[float, int]]] = {}
  for step, (loss, on) in steps.items():
    if loss is not None:
      losses.setdefault(on, []).append((loss, step))
  return {on: min(pairs)[1] for on, pairs in losses.items()}


def kept(steps: Mapping[int, Measured], *, keep: int, keep_every: int) -> set[int]:
  """Steps -> those to keep.

  The last `keep`, the best of each evaluation, and the multiples of `keep_every`.
  """
  multiples = {step for step in steps if keep_every and step % keep_every == 0}
  return {*sorted(steps)[-keep:], *multiples, *_bests(steps).values()}


def remove(directory: storage.Path, step: int) -> None:
  """Removes a step's folder; an interrupted removal never leaves a committed step."""
  folder, aside = directory / str(step), directory / f'{step}.removed'
  if storage.is_remote(directory):
    storage.remove(folder / manifest.NAME)
    storage.remove(folder)
  elif storage.exists(folder):
    storage.remove(aside)
    folder.rename(aside)
    storage.remove(aside)
