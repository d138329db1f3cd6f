"""The steps to keep, and their removal: only after a newer one is committed."""

from collections.abc import Mapping
from dataclasses import dataclass

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


def best(losses: Mapping[int, float | None]) -> int | None:
  """Steps with their held-out losses -> the first step with the lowest; None for none."""
  known = [(loss, step) for step, loss in losses.items() if loss is not None]
  return min(known)[1] if known else None


def kept(losses: Mapping[int, float | None], *, keep: int, keep_every: int) -> set[int]:
  """Steps with their held-out losses -> those to keep.

  The last `keep`, the one with the lowest loss, and the multiples of `keep_every`.
  """
  multiples = {step for step in losses if keep_every and step % keep_every == 0}
  top = best(losses)
  return {*sorted(losses)[-keep:], *multiples, *(() if top is None else (top,))}


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
