"""train.py with a fault in it: the same command line, exit codes and files.

  GATED_FAULT='{"do": "kill", "at": "renaming", "step": 8}' python tests/faults/faulty.py

A fault of the host happens once, at a place of the run at a step:

  do     kill    SIGKILL to itself                term   SIGTERM to itself
         stop    SIGSTOP to itself                sleep  for "seconds"
         stall   waits for ever                   hold   likewise, keeping Python's lock
         raise   OSError with "errno", the name of it: "ENOSPC"
  at     one of AT, below
  step   of the loop, or the one that is being saved

A fault of the numbers acts inside the compiled step, at each of "steps": [first, last]:

  do     scale by "factor", nan, inf
  what   loss (and so all gradients), gradients, updates, or parameters as the step begins
  leaf   a part of the name of a leaf, for all but the loss; '' for all of them
  by     'step', or 'data_step': then it is in the data, and no rollback meets it again

A step with such a fault compiled into it may differ in its last bits from one without,
even where the fault does not act: compare it with one whose "steps" never come.
"""

import ctypes
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import hooks
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from absl import app
from orbax.checkpoint._src.path import atomicity

import train
from gated import storage
from gated.devices import trees
from gated.run import checkpoint, recorder
from gated.run.checkpoint import head, manifest, retention
from gated.train import losses, optim, step

# Where a fault of the host may happen, in the order of a save.
AT = (
  'step',  # after a step was begun, before its metrics are read
  'arrays',  # before Orbax is asked to write
  'renaming',  # Orbax's temporary folder is whole, and not yet renamed
  'renamed',  # the step's folder is there, without its manifest
  'draft',  # the manifest's draft is written, and not yet in its place
  'committed',  # the manifest is there, and head.json does not know it
  'pruning',  # before the first of the old steps is removed
  'aside',  # an old step's folder was renamed to STEP.removed
  'pruned',  # half of the files of that folder are gone
)


def act(fault: dict) -> None:
  """Does once what a fault of the host is to do."""
  if fault.get('done'):
    return
  fault['done'] = True
  print(f'fault: {fault["do"]} at {fault["at"]}', file=sys.stderr, flush=True)
  ACTS[fault['do']](fault)


def _signal(number: int):
  return lambda _: os.kill(os.getpid(), number)


def _raise(fault: dict) -> None:
  number = getattr(errno, fault['errno'])
  raise OSError(number, os.strerror(number))


def _stall(_) -> None:
  while True:
    time.sleep(1)


def _hold(_) -> None:
  # A function of PyDLL is called without letting go of Python's lock.
  ctypes.PyDLL(None).sleep(1_000_000)


ACTS = {
  'kill': _signal(signal.SIGKILL),
  'term': _signal(signal.SIGTERM),
  'stop': _signal(signal.SIGSTOP),
  'sleep': lambda fault: time.sleep(fault['seconds']),
  'stall': _stall,
  'hold': _hold,
  'raise': _raise,
}


class Places:
  """Calls the faults of the host at their places; `saving` is what is committed."""

  def __init__(self, faults: list[dict]):
    self._faults, self.saving = faults, -1
    assert all(f['at'] in AT and f['do'] in ACTS for f in faults), faults

  def at(self, place: str, number: int | None = None) -> None:
    here = self.saving if number is None else number
    for fault in self._faults:
      if fault['at'] == place and fault['step'] == here:
        act(fault)

  def patch(self) -> None:
    """Puts the places into the code that a run goes through."""
    self._before(recorder.Recorder, 'take', lambda _, n, *__: self.at('step', n))
    arrays = lambda _, folder, **__: self.at('arrays', _step(folder))
    self._before(ocp.AsyncCheckpointer, 'save', arrays)
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalized(path, *args, **options):
      if path.get_final().parent.name == 'checkpoints':
        self.at('renaming', _step(path.get_final()))
      return await finalize(path, *args, **options)

    atomicity.AtomicRenameTemporaryPath.finalize = finalized
    # What follows is the commit's, in the background, beside the loop.
    commit = lambda _, __, found: self._begin(found.step)
    self._before(checkpoint.Checkpoints, '_commit', commit)
    self._before(manifest, 'write', lambda *_: self.at('renamed'))
    self._before(os, 'replace', self._replacing)
    self._before(head, 'write', lambda *_: self.at('committed'))
    self._before(retention, 'remove', lambda *_: self.at('pruning'))
    self._before(storage, 'remove', self._removing)

  def _before(self, owner, name: str, call) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def patched(*args, **options):
      call(*args, **options)
      return function(*args, **options)

    setattr(owner, name, patched)

  def _begin(self, number: int) -> None:
    self.saving = number

  def _replacing(self, _, target) -> None:
    if Path(target).name == manifest.NAME and Path(target).parent.name.isdecimal():
      self.at('draft')

  def _removing(self, path) -> None:
    if not str(path).endswith('.removed') or not os.path.exists(path):
      return
    self.at('aside')
    if any(fault['at'] == 'pruned' for fault in self._faults):
      files = sorted(p for p in Path(path).rglob('*') if p.is_file())
      for file in files[: len(files) // 2]:
        file.unlink()
      self.at('pruned')


def _step(folder) -> int:
  """The step that a folder is of: its own, or where it is staged for a store."""
  return int(Path(folder).name.removeprefix('write-'))


class Numbers:
  """Puts faults of the numbers into the step, while it is traced."""

  def __init__(self, faults: list[dict]):
    self._faults = faults
    self._now = {}  # The traced counters of the step that is being traced.
    assert all(
      f['what'] in ('loss', 'gradients', 'updates', 'parameters') for f in faults
    )

  def patch(self) -> None:
    if not self._faults:
      return
    taken, lost, made = step.train, losses.total, optim.make

    def poisoned_train(state, batch, **options):
      self._now = {'step': state.step + 1, 'data_step': state.data_step + 1}
      model = self._poison('parameters', state.model)
      return taken(dataclasses.replace(state, model=model), batch, **options)

    def poisoned_loss(model, *args, **options):
      model = _leak(model, self._scales('gradients', model))
      total, (terms, report) = lost(model, *args, **options)
      factor = self._scales('loss', total)
      terms = terms | {'loss': terms['loss'] * factor}
      return total * factor, (terms, report)

    def poisoned_make(*args, **options):
      tx = optax.with_extra_args_support(made(*args, **options))

      def update(grads, state, params=None, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return self._poison('updates', updates), state

      return optax.GradientTransformationExtraArgs(tx.init, update)

    step.train, losses.total, optim.make = poisoned_train, poisoned_loss, poisoned_make

  def _poison(self, what: str, tree):
    return jax.tree.map(
      lambda x, f: x * f.astype(x.dtype), tree, self._scales(what, tree)
    )

  def _scales(self, what: str, tree):
    """For each leaf what it is to be multiplied by: 1 where nothing acts on it."""

    def scale(path, _):
      factor = jnp.ones(())
      for fault in self._faults:
        if fault['what'] == what and fault.get('leaf', '') in trees.name(path):
          first, last = fault['steps']
          now = self._now[fault.get('by', 'step')]
          acts = (now >= first) & (now <= last)
          factor = factor * jnp.where(acts, NUMBERS[fault['do']](fault), 1.0)
      return factor

    if not jax.tree.leaves(tree):
      return tree
    return jax.tree_util.tree_map_with_path(scale, tree)


NUMBERS = {
  'scale': lambda fault: fault['factor'],
  'nan': lambda _: jnp.nan,
  'inf': lambda _: jnp.inf,
}


@jax.custom_vjp
def _leak(tree, scales):
  """A tree as it is, whose gradients are multiplied by what `scales` says."""
  return tree


def _leak_forward(tree, scales):
  return tree, scales


def _leak_backward(scales, grads):
  scaled = jax.tree.map(lambda g, f: g * f.astype(g.dtype), grads, scales)
  return scaled, jax.tree.map(jnp.zeros_like, scales)


_leak.defvjp(_leak_forward, _leak_backward)


def main() -> None:
  faults = json.loads(os.environ['GATED_FAULT'])
  faults = faults if isinstance(faults, list) else [faults]
  Numbers([fault for fault in faults if 'what' in fault]).patch()
  Places([fault for fault in faults if 'at' in fault]).patch()
  hooks.patch([wish for wish in faults if not {'what', 'at'} & wish.keys()])
  app.run(train.main, flags_parser=train.parse)


if __name__ == '__main__':
  main()
