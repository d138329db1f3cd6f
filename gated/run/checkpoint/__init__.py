"""Step-numbered checkpoints that are whole or not there: arrays by Orbax, trust by us.

A step is a folder: `model` and `rest` (optimizer state and counters), each a flat mapping
from a leaf's name to its array, and manifest.json, written last. Reading runs no code.
"""

import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from gated import storage
from gated.devices import processes
from gated.run.checkpoint import head, manifest, reader, retention
from gated.run.checkpoint.head import Head
from gated.run.checkpoint.manifest import Damaged
from gated.run.checkpoint.reader import Reader, split
from gated.run.checkpoint.retention import Config

__all__ = ['Checkpoints', 'Config', 'Damaged', 'Reader', 'SaveFailed', 'split']

LEFTOVER = re.compile(r'\d+\.(removed|digests|orbax-checkpoint-tmp.*)')

_log = logging.getLogger('gated')


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; those before it are as they were."""


class Checkpoints(Reader):
  """The checkpoints of a run that goes on; closing ends a save under way."""

  def __init__(self, directory: storage.PathLike, *, keep: int, keep_every: int):
    """Keeps the last `keep` steps, the best one, and every multiple of `keep_every`."""
    super().__init__(directory)
    if self._stage:
      # All processes write to one folder, which is that of process 0.
      processes.same_host('s3:// checkpoints')
      self._stage = storage.path(processes.gather(str(self._stage))[0])
    self._keep, self._keep_every = keep, keep_every
    self._thread: threading.Thread | None = None
    self._error: tuple[int, BaseException] | None = None
    if jax.process_index() == 0:
      for name in filter(LEFTOVER.fullmatch, storage.names(self.directory)):
        storage.remove(self.directory / name)

  def close(self, *, failing: bool = False) -> None:
    """Waits for a save under way; raises SaveFailed if it failed, unless `failing`."""
    failed = None
    try:
      self.wait()
    except SaveFailed as error:
      failed = error
    super().close(failing=failing or failed is not None)
    if failed and not failing:
      raise failed
    if failed:
      _log.error('%s', failed)

  def save(self, step: int, state: Any, about: dict) -> None:
    """Starts to save; `about` has 'config', 'data' (its fingerprint), 'heldout_loss'.

    Waits for the save before. Raises SaveFailed if that one, or this one's start, failed.
    """
    self.wait()
    model, rest = split(state)
    leaves = {
      item: {name: reader.described(leaf) for name, leaf in tree.items()}
      for item, tree in (('model', model), ('rest', rest))
    }
    found = manifest.Manifest(step=step, about=about, leaves=leaves, files={})
    try:
      self._make_way(step)
      folder = self.directory / str(step)
      if self._stage:
        folder = self._stage / f'write-{step}'
      args = ocp.args.Composite(
        model=ocp.args.StandardSave(model), rest=ocp.args.StandardSave(rest)
      )
      self._orbax.save(folder, args=args, force=True)
    except Exception as error:
      raise self._failure(step, error) from error
    run = lambda: self._commit(folder, found)
    self._thread = threading.Thread(target=run, name='commit')
    self._thread.start()

  def check(self) -> None:
    """Raises SaveFailed if a save in the background has failed; waits for nothing."""
    if self._error:
      (step, error), self._error = self._error, None
      raise self._failure(step, error) from error

  def wait(self) -> None:
    """Waits until what was saved is committed; SaveFailed if it was not."""
    if self._thread:
      self._thread.join()
      self._thread = None
    self.check()

  def newest_good(self) -> int | None:
    self.wait()
    processes.gather('')  # What process 0 has committed, the others are to see.
    return super().newest_good()

  def go_back(self, step: int, *, data_step: int | None = None) -> int | None:
    """Says for good that the run goes on from `step`, whatever was saved past it.

    What is past it stays on disk until a newer step is committed, or it is saved anew.
    `data_step` is where the data goes on, if not where the step left it, and is kept for
    who goes on from the same step again. Returns that, or None.
    """
    self.wait()
    was = head.read(self.directory)
    if data_step is None and was.step == step:
      data_step = was.data_step
    past = {*was.discarded, *(s for s in self.steps() if s > step)}
    now = Head(step=step, discarded=tuple(sorted(past)), data_step=data_step)
    if now != was and jax.process_index() == 0:
      head.write(self.directory, now)
    processes.gather('')
    return data_step

  def _make_way(self, step: int) -> None:
    """Removes what lies where a step is to be saved: damaged, or gone back from."""
    self._manifests.pop(step, None)
    self._local.pop(step, None)
    if jax.process_index() > 0:
      return
    if str(step) in storage.names(self.directory):
      retention.remove(self.directory, step)
    # A kill may have come between the two: the folder gone, and the head saying so still.
    was = head.read(self.directory)
    if step in was.discarded:
      rest = tuple(s for s in was.discarded if s != step)
      head.write(self.directory, dataclasses.replace(was, discarded=rest))

  def _failure(self, step: int, error: BaseException) -> SaveFailed:
    told = f'{type(error).__name__}: {error}'.partition('\n')[0]
    return SaveFailed(
      f'{self.directory}: step {step} could not be saved ({told}); '
      f'the last that was is {self.latest()}'
    )

  def _commit(self, folder: storage.Path, found: manifest.Manifest) -> None:
    """In the background: waits for the arrays, writes the manifest, removes old steps."""
    try:
      self._orbax.wait_until_finished()
      files = self._survey(folder, found.step)
      if jax.process_index() > 0:
        return
      whole = dataclasses.replace(found, files=files)
      home = self.directory / str(found.step)
      if self._stage:
        storage.upload(folder, home, sorted(files))
        storage.remove(folder)
      manifest.write(home, whole)
      self._manifests[found.step] = whole
      gone = head.read(self.directory).discarded
      head.write(self.directory, Head(step=found.step, discarded=gone))
      losses = {step: self._loss(step) for step in self.steps()}
      stay = retention.kept(losses, keep=self._keep, keep_every=self._keep_every)
      for step in sorted({*gone, *losses} - stay):
        retention.remove(self.directory, step)
        self._manifests.pop(step, None)
      if gone:
        head.write(self.directory, Head(step=found.step))
    except BaseException as error:
      self._error = found.step, error

  def _loss(self, step: int) -> float | None:
    try:
      return self.about(step)['heldout_loss']
    except Damaged:
      return None

  def _survey(self, folder: storage.Path, step: int) -> dict[str, list]:
    """The digests of a step's files; the processes of a run share the work."""
    names, n, i = manifest.files(folder), jax.process_count(), jax.process_index()
    mine = manifest.survey(folder, names[i::n])
    if n == 1:
      return mine
    # Notes on the storage that they share; collectives are not for a background thread.
    notes = folder.parent / f'{step}.digests'
    note = lambda process: notes / f'{process}.json'
    storage.write(note(i), json.dumps(mine).encode())
    every = {}
    for process in range(n) if i == 0 else ():
      every |= json.loads(_awaited(lambda: storage.read(note(process), 1 << 28)))  # noqa: B023
    if i == 0:
      storage.remove(notes)
    return every


def _awaited(read: Callable[[], bytes]) -> bytes:
  """What another process is about to write."""
  end = time.monotonic() + reader.PATIENCE
  while True:
    try:
      return read()
    except FileNotFoundError:
      if time.monotonic() > end:
        raise
      time.sleep(0.05)
