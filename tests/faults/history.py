"""The numbers of a run: its checkpoints, its events, and runs to compare with."""

import shutil
from pathlib import Path

import numpy as np
from faults import evidence
from faults.world import SMALL, World

from configs import tiny
from gated import config, data, plan
from gated.devices import trees
from gated.run import metrics
from gated.run.checkpoint import head
from gated.run.events import read as read_events

# The saved values that a skipped update changes.
COUNTERS = ('in_row', 'skipped', 'spikes', 'verdict', 'loss_zscore', 'grad_norm_zscore')
RINGS = ('losses', 'norms', 'filled')


def leaves(world: World, workdir: Path, step: int) -> dict[str, np.ndarray]:
  """All arrays of a saved step by name, on the host."""
  results = trees.flatten(world.read(workdir, step))
  return {name: np.asarray(leaf) for name, leaf in results.items()}


def trained(world: World, workdir: Path, step: int, *, rings: bool = True) -> str:
  """A digest of the trained values of a saved step, without the counters of bad steps.

  With `rings`, it includes the statistics that detect a spike.
  """
  left_out = COUNTERS + (() if rings else RINGS)
  arrays = leaves(world, workdir, step)
  assert {f'rest.opt.{name}' for name in COUNTERS + RINGS} < arrays.keys()
  names = {f'rest.opt.{name}' for name in left_out}
  return trees.digest({k: v for k, v in arrays.items() if k not in names})


def check_finite(world: World, workdir: Path) -> None:
  """AssertionError if any leaf of any step on disk is not finite."""
  for step in evidence.saved(workdir):
    for name, leaf in leaves(world, workdir, step).items():
      assert np.isfinite(leaf).all(), f'step {step}: {name} is not finite'


def corpus(**knobs) -> data.Corpus:
  """The data of a small run."""
  c = tiny.get_config()
  c.update_from_flattened_dict(SMALL | {k.replace('__', '.'): knobs[k] for k in knobs})
  cfg = config.build(plan.Config, c.to_dict(), 'config')
  sizes = dict(vocab=cfg.model.vocab, batch=cfg.batch, seed=cfg.seed, max_segments=0)
  return data.open(cfg.data, **sizes)


def events(workdir: Path) -> list[tuple[int, int, str]]:
  """(step, data_step, action) of every event."""
  return [(e['step'], e['data_step'], e['action']) for e in read_events(workdir)]


def values(workdir: Path) -> dict[int, dict]:
  """The record of each step in metrics.jsonl; AssertionError for two of one step."""
  results = [r for r in metrics.read(workdir / 'metrics.jsonl') if r['kind'] == 'train']
  by_step = {r['step']: r for r in results}
  assert len(by_step) == len(results), 'a step has two records'
  return by_step


def continued_from(
  world: World, source: Path, step: int, data_step: int, **options
) -> Path:
  """Continues a copy of `source` from a saved step, with data from `data_step`."""
  workdir = world.path('reference')
  shutil.copytree(source, workdir)
  for later in evidence.saved(workdir):
    if later > step:
      shutil.rmtree(evidence.committed(workdir, later))
  head.write(workdir / 'checkpoints', head.Head(step=step, data_step=data_step))
  world.finish(workdir, **options)
  return workdir
