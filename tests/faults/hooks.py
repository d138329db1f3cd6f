"""Settings and reports of faulty.py besides its faults.

set   sets a constant by its full name, "gated.run.lock.MAX_PERIOD", "to" a value
tell  'restored': prints the digest of every restored state on standard error
omit  steps whose update is skipped on the host, while step and data step advance
rest  seconds that each batch of a held-out evaluation takes longer
"""

import dataclasses
import importlib
import sys
import time

import jax
import jax.numpy as jnp
from jax._src import compiler
from jax.experimental import multihost_utils

import train
from gated import plan
from gated.devices import trees
from gated.run import checkpoint


def patch(settings: list[dict]) -> None:
  _cache_compilations_of_all_processes()
  for setting in settings:
    if 'set' in setting:
      module, _, name = setting['set'].rpartition('.')
      owner = importlib.import_module(module)
      assert hasattr(owner, name), setting
      setattr(owner, name, setting['to'])
    elif 'omit' in setting:
      _omit(setting['omit'])
    elif 'rest' in setting:
      _rest(setting['rest'])
    else:
      assert setting['tell'] == 'restored', setting
      _print_restored()


def _cache_compilations_of_all_processes() -> None:
  """JAX caches only those of process 0, and on CPUs each process has its own."""
  write, state_of = compiler._cache_write, compiler.distributed.global_state

  def patched(*args, **options):
    process, state_of.process_id = state_of.process_id, 0
    try:
      write(*args, **options)
    finally:
      state_of.process_id = process

  compiler._cache_write = patched


def digest(state) -> str:
  """A state -> the digest of the arrays that a checkpoint would hold."""
  arrays = checkpoint.split(state)
  if jax.process_count() > 1:
    gather = lambda x: multihost_utils.process_allgather(x, tiled=True)
    arrays = jax.tree.map(gather, arrays)
  return trees.digest(arrays)


def _print_restored() -> None:
  restore = checkpoint.Checkpoints.restore

  def patched(saved, step, like):
    state = restore(saved, step, like)
    print(f'restored: step {step} is {digest(state)}', file=sys.stderr, flush=True)
    return state

  checkpoint.Checkpoints.restore = patched


def _rest(seconds: float) -> None:
  make = train.evaluate_step

  def patched(*args):
    evaluate = make(*args)

    def rested(*batch):
      time.sleep(seconds)
      return evaluate(*batch)

    return rested

  train.evaluate_step = patched


def _omit(steps: list[int]) -> None:
  lower = plan.Plan.train_step
  plan.Plan.train_step = lambda self: _Omitting(lower(self), steps)


class _Omitting:
  """The lowered train step, without the updates of some steps."""

  def __init__(self, lowered, steps: list[int]):
    self._lowered, self._steps = lowered, steps

  def compile(self):
    compiled = self._lowered.compile()

    def run(state, batch):
      if int(state.step) + 1 not in self._steps:
        return compiled(state, batch)
      _, values = compiled(jax.tree.map(jnp.copy, state), batch)
      past = dict(step=state.step + 1, data_step=state.data_step + 1)
      return dataclasses.replace(state, **past), values

    return run
