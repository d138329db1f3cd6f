"""Which steps stay, and how one goes: only after a newer one is committed."""

from collections.abc import Mapping
from dataclasses import dataclass

from gated import config, storage
from gated.run.checkpoint import manifest


@dataclass(frozen=True, kw_only=True)
class Config:
  """How often a run saves, and which steps stay."""

  every: int  # steps between saves
  keep: int  # the newest steps that stay, beside the best
  keep_every: int  # multiples of it stay for good; 0 for none

  def __post_init__(self):
    config.at_least('config.checkpoint.every', self.every, 1)
    config.at_least('config.checkpoint.keep', self.keep, 1)
    config.at_least('config.checkpoint.keep_every', self.keep_every, 0)


def kept(losses: Mapping[int, float | None], *, keep: int, keep_every: int) -> set[int]:
  """Steps with their held-out losses -> those to keep.

  The last `keep`, the one with the lowest loss, and the multiples of `keep_every`.
  """
  steps = sorted(losses)
  known = {step: loss for step, loss in losses.items() if loss is not None}
  best = [min(known, key=lambda step: (known[step], step))] if known else []
  multiples = [step for step in steps if keep_every and step % keep_every == 0]
  return {*steps[-keep:], *best, *multiples}


def remove(directory: storage.Path, step: int) -> None:
  """A step's folder goes; what a kill leaves of it is not taken for a step."""
  folder, aside = directory / str(step), directory / f'{step}.removed'
  if storage.is_remote(directory):
    storage.remove(folder / manifest.NAME)
    storage.remove(folder)
  elif storage.exists(folder):
    storage.remove(aside)
    folder.rename(aside)
    storage.remove(aside)
