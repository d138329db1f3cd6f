"""What faulty.py sets and watches in a run besides its faults.

set   a constant by its full name, "gated.run.lock.MAX_PERIOD", "to" a value
tell  'restored': every state that is restored, by its digest, on standard error
omit  steps whose update is left out, on the host: batch and step go by, and no more
"""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
from jax._src import compiler
from jax.experimental import multihost_utils

from gated import plan
from gated.devices import trees
from gated.run import checkpoint


def patch(wishes: list[dict]) -> None:
  _keep_what_every_process_compiles()
  for wish in wishes:
    if 'set' in wish:
      module, _, name = wish['set'].rpartition('.')
      owner = importlib.import_module(module)
      assert hasattr(owner, name), wish
      setattr(owner, name, wish['to'])
    elif 'omit' in wish:
      _omit(wish['omit'])
    else:
      assert wish['tell'] == 'restored', wish
      _tell_what_is_restored()


def _keep_what_every_process_compiles() -> None:
  """JAX's cache keeps what process 0 compiles, and on CPUs each has its own."""
  write, of = compiler._cache_write, compiler.distributed.global_state

  def patched(*args, **options):
    process, of.process_id = of.process_id, 0
    try:
      write(*args, **options)
    finally:
      of.process_id = process

  compiler._cache_write = patched


def digest(state) -> str:
  """A state, wherever it lies -> the digest of what a checkpoint would hold of it."""
  here = checkpoint.split(state)
  if jax.process_count() > 1:
    here = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), here)
  return trees.digest(here)


def _tell_what_is_restored() -> None:
  restore = checkpoint.Checkpoints.restore

  def patched(saved, step, like):
    state = restore(saved, step, like)
    print(f'restored: step {step} is {digest(state)}', file=sys.stderr, flush=True)
    return state

  checkpoint.Checkpoints.restore = patched


def _omit(steps: list[int]) -> None:
  lower = plan.Plan.train_step
  plan.Plan.train_step = lambda the: _Omitting(lower(the), steps)


class _Omitting:
  """The lowered train step, but for some steps."""

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
