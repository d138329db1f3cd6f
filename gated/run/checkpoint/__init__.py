"""Step-numbered checkpoints that are complete or absent: arrays by Orbax, checks by us.

A step is a folder: `model` and `rest` (optimizer state and counters), each a flat mapping
from a leaf's name to its array, and manifest.json, written last. Reading runs no code.
"""

import contextlib
import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable, Collection
from concurrent import futures
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

# Orbax's index of all arrays of an item, merged from the files of each process.
INDEX = 'manifest.ocdbt'
LEFTOVER = re.compile(r'\d+\.(removed|digests|orbax-checkpoint-tmp.*)')

_log = logging.getLogger('gated')


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; earlier ones are intact."""


class Checkpoints(Reader):
  """The checkpoints of a run in progress; leaving the `with` waits for the last save."""

  def __init__(
    self,
    directory: storage.PathLike,
    *,
    keep: int,
    keep_every: int,
    beat: Callable[[str], None] = lambda work: None,
  ):
    """Keeps steps as `retention.kept` chooses them.

    `beat` is called after each part of a save, with its name.
    """
    super().__init__(directory)
    if self._stage:
      # All processes write to one folder, which is that of process 0.
      processes.same_host('s3:// checkpoints')
      self._stage = storage.path(processes.gather(str(self._stage))[0])
    self._keep, self._keep_every, self._beat = keep, keep_every, beat
    self._pool = futures.ThreadPoolExecutor(1, 'commit')
    self._commits: dict[int, futures.Future] = {}  # The step being saved, if any.
    if jax.process_index() == 0:
      for name in filter(LEFTOVER.fullmatch, storage.names(self.directory)):
        storage.remove(self.directory / name)

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.wait()
    except SaveFailed as failed:
      super().__exit__(SaveFailed, failed, None)
      if kind is None:
        raise
      _log.error('%s', failed)
    else:
      super().__exit__(kind, error, traceback)
    finally:
      self._pool.shutdown()

  def save(self, step: int, state: Any, about: dict) -> None:
    """Starts to save; `about` has 'config', 'data' (its fingerprint), 'heldout_loss'.

    Waits for the previous save. Raises SaveFailed if that save failed or this one cannot
    start.
    """
    self.wait()
    items = split(state)
    leaves = {
      item: {name: reader.described(leaf) for name, leaf in tree.items()}
      for item, tree in items.items()
    }
    draft = manifest.Manifest(step=step, about=about, leaves=leaves, files={})
    stage = self._stage
    folder = stage / f'write-{step}' if stage else self.directory / str(step)
    args = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    try:
      self._make_way(step)
      self._orbax.save(folder, args=ocp.args.Composite(**args), force=True)
    except Exception as error:
      raise self._failure(step, error) from error
    self._commits[step] = self._pool.submit(self._commit, folder, draft)

  def measured(self, step: int, loss: float | None, config: dict, data: dict) -> None:
    """Adds a held-out loss to the manifest of a saved step, in the background.

    Does nothing if the step is not saved, or was saved with another evaluation in its
    recipe or on other data than those that were measured now.
    """
    commit = self._commits.pop(step, None)
    if loss is not None and (commit or step in self._manifests):
      measured = dict(config=config, data=data, heldout_loss=loss)
      self._commits[step] = self._pool.submit(self._measure, commit, step, measured)
    elif commit:
      self._commits[step] = commit

  def check(self) -> None:
    """Raises SaveFailed if a save in the background has failed; does not wait."""
    if all(commit.done() for commit in self._commits.values()):
      self.wait()

  def wait(self) -> None:
    """Waits until the last save is committed; raises SaveFailed if it failed."""
    while self._commits:
      step, commit = self._commits.popitem()
      if error := commit.exception():
        raise self._failure(step, error) from error

  def newest_good(self) -> int | None:
    self.wait()
    processes.gather('')  # A barrier: process 0 has committed the step.
    return super().newest_good()

  def go_back(
    self, step: int, *, data_step: int | None = None, asked: str | None = None
  ) -> int | None:
    """Discards the steps after `step` from the history, for later sessions as well.

    They stay on disk until a newer step is committed, or they are saved again. Pass
    `data_step` if the data must not continue where the step stopped. It is stored, and
    later sessions that resume from the same step get it as the result. `asked` is the
    --restore_step that a session follows; None keeps the stored one.
    """
    self.wait()
    old = head.read(self.directory)
    if data_step is None and old.step == step:
      data_step = old.data_step
    discarded = {*old.discarded, *(s for s in self.steps() if s > step)}
    asked = old.asked if asked is None else asked
    new = Head(
      step=step, discarded=tuple(sorted(discarded)), data_step=data_step, asked=asked
    )
    if new != old and jax.process_index() == 0:
      head.write(self.directory, new)
    processes.gather('')
    return data_step

  def _make_way(self, step: int) -> None:
    """Removes a damaged or discarded step that is to be saved again."""
    self._manifests.pop(step, None)
    self._local.pop(step, None)
    if jax.process_index() > 0:
      return
    if str(step) in storage.names(self.directory):
      retention.remove(self.directory, step)
    # If a kill ends the process here, the step is gone but still listed in head.json.
    old = head.read(self.directory)
    if step in old.discarded:
      discarded = tuple(s for s in old.discarded if s != step)
      head.write(self.directory, dataclasses.replace(old, discarded=discarded))

  def _failure(self, step: int, error: BaseException) -> SaveFailed:
    reason = f'{type(error).__name__}: {error}'.partition('\n')[0]
    return SaveFailed(
      f'{self.directory}: step {step} could not be saved ({reason}); '
      f'the last saved step is {self.latest()}'
    )

  def _commit(self, folder: storage.Path, draft: manifest.Manifest) -> None:
    """In the background: waits for the arrays, writes the manifest, removes old steps."""
    self._orbax.wait_until_finished()
    self._beat(f'the arrays of step {draft.step}')
    files = self._survey(folder, draft.step)
    self._beat(f'the digests of step {draft.step}')
    if jax.process_index() > 0:
      return
    # Orbax only warns if it merged nothing; a restore then finds no array.
    for index in (f'{item}/{INDEX}' for item in draft.leaves):
      if index not in files:
        raise FileNotFoundError(f'{folder / index} was not written')
    complete = dataclasses.replace(draft, files=files)
    home = self.directory / str(draft.step)
    if self._stage:
      storage.upload(folder, home, sorted(files))
      storage.remove(folder)
    manifest.write(home, complete)
    self._manifests[draft.step] = complete
    self._beat(f'the save of step {draft.step}')
    old = head.read(self.directory)
    discarded, new = old.discarded, Head(step=draft.step, asked=old.asked)
    head.write(self.directory, dataclasses.replace(new, discarded=discarded))
    self._prune(discarded)
    if discarded:
      head.write(self.directory, new)

  def _measure(self, commit: futures.Future | None, step: int, measured: dict) -> None:
    """In the background, after the commit of the step: see `measured`."""
    if commit:
      commit.result()
    if jax.process_index() > 0:
      return
    old = self._manifest(step)
    about = old.about | {'heldout_loss': measured['heldout_loss']}
    if retention.measured(about) == retention.measured(measured):
      complete = dataclasses.replace(old, about=about)
      manifest.write(self.directory / str(step), complete)
      self._manifests[step] = complete
    self._prune(())

  def _prune(self, discarded: Collection[int]) -> None:
    """Removes old steps, and the discarded ones."""
    steps = {step: self._measured(step) for step in self.steps()}
    kept = retention.kept(steps, keep=self._keep, keep_every=self._keep_every)
    for step in sorted({*discarded, *steps} - kept):
      retention.remove(self.directory, step)
      self._manifests.pop(step, None)

  def _measured(self, step: int) -> retention.Measured:
    with contextlib.suppress(Damaged):
      return retention.measured(self.about(step))
    return retention.Measured(None, ())

  def _survey(self, folder: storage.Path, step: int) -> dict[str, list]:
    """The digests of a step's files; the processes of a run share the work."""
    names, count, own = manifest.files(folder), jax.process_count(), jax.process_index()
    digests = manifest.survey(folder, names[own::count])
    if count == 1:
      return digests
    # A background thread must not run collectives: exchange the digests in files.
    notes = folder.parent / f'{step}.digests'
    storage.write(notes / f'{own}.json', json.dumps(digests).encode())
    if own == 0:
      for process in range(1, count):
        digests |= _awaited(notes / f'{process}.json')
      storage.remove(notes)
    return digests


def _awaited(path: storage.Path) -> dict[str, list]:
  """The digests that another process is about to write."""
  end = time.monotonic() + reader.PATIENCE
  while True:
    try:
      return storage.read_json(path, 1 << 28)
    except FileNotFoundError:
      if time.monotonic() > end:
        raise
      time.sleep(0.05)
