"""train.py with faults: the same command line, exit codes and files.

  GATED_FAULT='{"do": "kill", "at": "renaming", "step": 8}' python tests/faults/faulty.py

A fault of the host happens once, at a place and step of the run:

  do     kill    SIGKILL to itself                term   SIGTERM to itself
         stop    SIGSTOP to itself                sleep  for "seconds"
         stall   waits forever                    hold   the same, holding the GIL
         raise   OSError with the number of "errno", such as "ENOSPC"
  at     one of AT, below
  step   the step of the loop, or the one being saved

A fault of the numbers acts inside the compiled step, at each of "steps": [first, last]:

  do     scale by "factor", nan, inf
  what   loss (and so all gradients), gradients, updates, or parameters before the step
  leaf   a part of a leaf's name, not for the loss; '' for all leaves
  by     'step', or 'data_step': then it belongs to the data, and a rollback skips it

A program with such a fault may differ from one without in the last bits, even at other
steps: compare it with one whose "steps" never come.
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
from gated import plan, storage
from gated.devices import trees
from gated.run import checkpoint, recorder
from gated.run.checkpoint import head, manifest, retention
from gated.train import losses, optim, step

# The places of faults of the host, in the order of a save.
AT = (
  'step',  # after a step is dispatched, before its metrics are read
  'evaluating',  # before the first batch of its evaluation
  'arrays',  # before Orbax writes
  'renaming',  # Orbax's temporary folder is complete but not renamed
  'renamed',  # the step's folder exists, without its manifest
  'draft',  # the manifest's temporary file is written but not renamed
  'committed',  # the manifest exists, and head.json is not updated
  'pruning',  # before the first of the old steps is removed
  'aside',  # an old step's folder was renamed to STEP.removed
  'pruned',  # half of the files of that folder are deleted
)


def act(fault: dict) -> None:
  """Carries out a fault of the host, once."""
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
  # PyDLL calls a function without releasing the GIL.
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
  """Carries out the faults of the host at their places; `saving` is the saved step."""

  def __init__(self, faults: list[dict]):
    self._faults, self.saving = faults, -1
    assert all(f['at'] in AT and f['do'] in ACTS for f in faults), faults

  def at(self, place: str, number: int | None = None) -> None:
    here = self.saving if number is None else number
    for fault in self._faults:
      if fault['at'] == place and fault['step'] == here:
        act(fault)

  def patch(self) -> None:
    """Patches the code of a run at the places."""
    self._before(recorder.Recorder, 'take', lambda _, n, *__: self.at('step', n))
    evaluating = lambda _, state: self.at('evaluating', int(state.step))
    self._before(train.Session, 'measure', evaluating)
    arrays = lambda _, folder, **__: self.at('arrays', _step(folder))
    self._before(ocp.AsyncCheckpointer, 'save', arrays)
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalized(path, *args, **options):
      if path.get_final().parent.name == 'checkpoints':
        self.at('renaming', _step(path.get_final()))
      return await finalize(path, *args, **options)

    atomicity.AtomicRenameTemporaryPath.finalize = finalized
    # The commit runs in the background, beside the loop.
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
  """The step of a folder: its name, also where it is staged for a store."""
  return int(Path(folder).name.removeprefix('write-'))


class Numbers:
  """Adds faults of the numbers to the step while it is traced.

  Which of them act is an input of the compiled step, so that runs with faults at other
  steps share it: fault i adds 2^(i + 1) to the first weight of its batches, which is 0 or
  1 without faults.
  """

  def __init__(self, faults: list[dict]):
    self._faults = faults
    self._acting = []  # Of each fault, in the step being traced.
    assert all(
      f['what'] in ('loss', 'gradients', 'updates', 'parameters') for f in faults
    )

  def patch(self) -> None:
    if not self._faults:
      return
    train_step, total_loss, make_optimizer = step.train, losses.total, optim.make
    lower = plan.Plan.train_step

    def poisoned_train(state, batch, **options):
      first = batch.weights[0, 0]
      marks = (first // 2).astype(jnp.int32)
      self._acting = [(marks >> i) % 2 == 1 for i, _ in enumerate(self._faults)]
      weights = batch.weights.at[0, 0].set(first - 2 * marks.astype(first.dtype))
      batch = batch._replace(weights=weights)
      model = self._poison('parameters', state.model)
      return train_step(dataclasses.replace(state, model=model), batch, **options)

    def poisoned_loss(model, *args, **options):
      model = _leak(model, self._scales('gradients', model))
      total, (terms, report) = total_loss(model, *args, **options)
      factor = self._scales('loss', total)
      terms = terms | {'loss': terms['loss'] * factor}
      return total * factor, (terms, report)

    def poisoned_make(*args, **options):
      tx = optax.with_extra_args_support(make_optimizer(*args, **options))

      def update(grads, state, params=None, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return self._poison('updates', updates), state

      return optax.GradientTransformationExtraArgs(tx.init, update)

    step.train, losses.total, optim.make = poisoned_train, poisoned_loss, poisoned_make
    plan.Plan.train_step = lambda self_: _Marking(lower(self_), self._marks)

  def _marks(self, state) -> int:
    """The state before a step -> what the faults of this step add to a weight."""
    now = {name: int(getattr(state, name)) + 1 for name in ('step', 'data_step')}
    acts = lambda f: f['steps'][0] <= now[f.get('by', 'step')] <= f['steps'][1]
    return sum(2 << i for i, fault in enumerate(self._faults) if acts(fault))

  def _poison(self, what: str, tree):
    return jax.tree.map(
      lambda x, f: x * f.astype(x.dtype), tree, self._scales(what, tree)
    )

  def _scales(self, what: str, tree):
    """The factor of each leaf: 1 without a fault."""

    def scale(path, _):
      factor = jnp.ones(())
      for fault, acts in zip(self._faults, self._acting):
        if fault['what'] == what and fault.get('leaf', '') in trees.name(path):
          factor = factor * jnp.where(acts, NUMBERS[fault['do']](fault), 1.0)
      return factor

    if not jax.tree.leaves(tree):
      return tree
    return jax.tree_util.tree_map_with_path(scale, tree)


class _Marking:
  """The lowered train step, whose batches are marked before it."""

  def __init__(self, lowered, marks):
    self._lowered, self._marks = lowered, marks

  def compile(self):
    compiled = self._lowered.compile()

    def run(state, batch):
      if marks := self._marks(state):
        add = lambda weights: weights.at[0, 0].add(float(marks))
        place = batch.weights.sharding
        weights = jax.jit(add, out_shardings=place)(batch.weights)
        batch = batch._replace(weights=weights)
      return compiled(state, batch)

    return run


NUMBERS = {
  'scale': lambda fault: fault['factor'],
  'nan': lambda _: jnp.nan,
  'inf': lambda _: jnp.inf,
}


@jax.custom_vjp
def _leak(tree, scales):
  """Returns the tree; its gradients are multiplied by `scales`."""
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
