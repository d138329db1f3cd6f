"""Rows of the fault table: a full, read-only or missing disk."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

from faults import evidence
from faults.process import Child
from faults.rows_a import preempt
from faults.world import SAVES, STEPS, Outcome, Row, Skip, Straight, Tally, World

from gated.run import checkpoint

PAGE = 4096  # The least bytes of a file on a tmpfs.
ROOM = 1 << 28  # Bytes of a tmpfs with enough space.


def _mount(*args: object) -> None:
  """Calls mount(8); Skip if this machine does not permit it."""
  try:
    command = ['mount', *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  except OSError as error:
    raise Skip(f'mount(8) cannot be run: {error}') from error
  if done.returncode:
    raise Skip(f'mounting is not permitted: {done.stderr.strip()}')


@contextlib.contextmanager
def _mounted(folder: Path, *args: object) -> Generator[Path]:
  """Mounts on a folder, and unmounts at the end."""
  folder.mkdir(parents=True, exist_ok=True)
  _mount(*args, folder)
  try:
    yield folder
  finally:
    subprocess.run(['umount', '--lazy', str(folder)], check=True, timeout=60)


def _tmpfs(folder: Path, size: int) -> contextlib.AbstractContextManager[Path]:
  return _mounted(folder, '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs')


def _room(folder: Path, size: int) -> None:
  _mount('-o', f'remount,size={size}', folder)


def _fill(folder: Path) -> Path:
  """Writes a file that fills the disk."""
  path = folder / 'filler'
  with contextlib.suppress(OSError), path.open('wb', buffering=0) as file:
    while file.write(bytes(PAGE)):
      pass
  return path


def _pages(folder: Path) -> int:
  """The bytes of a folder's files on a tmpfs."""
  sizes = (p.stat().st_size for p in folder.rglob('*') if p.is_file())
  return sum(-(-size // PAGE) * PAGE for size in sizes)


def _whole(workdir: Path) -> None:
  """AssertionError unless every committed step verifies."""
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    for step in evidence.saved(workdir):
      saved.verify(step)


# 8


def disk_full(world: World, times: int) -> Outcome:
  straight, tally, late = world.straight(), Tally(), dict(checkpoint__every=STEPS)
  one = _pages(evidence.committed(straight.workdir, straight.step))
  for at in ('arrays', 'renamed')[:times]:
    with tally.one(f'ENOSPC at {at} of step 8'):
      _save_reports(world, at, straight)
  for number in range(max(times - 5, 0)):
    fits = number % 3  # The number of steps that fit; at most three are kept.
    size = int((fits + world.random.uniform(0.2, 0.9)) * one) + 16 * PAGE
    with tally.one(f'a disk of {size} bytes, with steps of {one} bytes'):
      _save_fails(world, size, (fits + 1) * SAVES, number % 2 == 0, straight)
  with tally.one('a full disk from step 5 on'):
    _record_fails(world, straight)
  with tally.one('a full disk from step 5 on, without saves'):
    _record_fails(world, world.straight(**late), **late)
  with tally.one('a full disk from the start'):
    _start_fails(world, straight)
  return tally.outcome()


def _save_reports(world: World, at: str, straight: Straight) -> None:
  workdir, step = world.path('full'), 2 * SAVES
  fault = {'do': 'raise', 'errno': 'ENOSPC', 'at': at, 'step': step}
  done = world.train(workdir, fault=fault).wait(90)
  done.expect(7, f'step {step} could not be saved', 'No space left on device')
  assert evidence.saved(workdir) == [SAVES], done.tail()
  world.finish(workdir)
  world.check(workdir, straight)


def _save_fails(
  world: World, size: int, step: int, everything: bool, straight: Straight
) -> None:
  """The save of `step` does not fit; the disk holds the workdir, or only the steps."""
  workdir = world.path('full')
  folder = workdir if everything else workdir / 'checkpoints'
  with _tmpfs(folder, size):
    done = world.train(workdir).wait().expect(7, f'step {step} could not be saved')
    last = evidence.last_step(workdir)
    assert last < step + SAVES, f'it was reported as late as step {last}'
    assert evidence.saved(workdir) == list(range(SAVES, step, SAVES)), done.tail()
    _whole(workdir)
    _room(folder, ROOM)
    world.finish(workdir)
    world.check(workdir, straight)


def _record_fails(world: World, straight: Straight, **options) -> None:
  folder = world.path('full')
  workdir = folder / 'run'
  with _tmpfs(folder, ROOM):
    child = world.train(workdir, **options)
    assert _reached(child, workdir, 5), child.err
    filler = _fill(folder)
    done = child.wait()
    _whole(workdir)
    filler.unlink()
    world.finish(workdir, **options)
    world.check(workdir, straight)
    done.expect(7, 'No space left on device')


def _start_fails(world: World, straight: Straight) -> None:
  folder = world.path('full')
  workdir = folder / 'run'
  with _tmpfs(folder, 64 * PAGE):
    filler = _fill(folder)
    world.train(workdir).wait().expect(2, 'No space left on device', '--workdir')
    filler.unlink()
    _room(folder, ROOM)
    world.finish(workdir)
    world.check(workdir, straight)


# 9


def unwritable(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for case in CASES[:times]:
    with tally.one(str(case.__doc__)):
      case(world, straight)
  return tally.outcome()


def _read_only_parent(world: World, straight: Straight) -> None:
  """the folder above the workdir is read-only"""
  folder = world.path('read-only')
  with _mounted(folder, '--bind', folder.parent), _read_only(folder):
    refused = world.train(folder / 'run').wait()
    refused.expect(2, '--workdir', 'not a writable folder')


def _read_only_workdir(world: World, straight: Straight) -> None:
  """the workdir is read-only in the second session"""
  workdir = world.path('left')
  preempt(world, workdir, 6)
  before = evidence.contents(workdir)
  with _mounted(workdir, '--bind', workdir), _read_only(workdir):
    refused = world.train(workdir).wait()
    refused.expect(2, '--workdir', 'not a writable folder')
  assert evidence.contents(workdir) == before
  world.finish(workdir)
  world.check(workdir, straight)


@contextlib.contextmanager
def _read_only(folder: Path) -> Generator[None]:
  _mount('-o', 'remount,ro,bind', folder)
  yield
  _mount('-o', 'remount,rw,bind', folder)


def _file_as_workdir(world: World, straight: Straight) -> None:
  """a file in place of the workdir"""
  workdir = world.path('file')
  workdir.write_text('in the way\n')
  world.train(workdir).wait().expect(2, '--workdir', 'not a writable folder')
  assert workdir.read_text() == 'in the way\n'


def _file_as_checkpoints(world: World, straight: Straight) -> None:
  """a file in place of checkpoints/"""
  workdir = world.path('file')
  workdir.mkdir()
  (workdir / 'checkpoints').write_text('in the way\n')
  stopped = world.train(workdir).wait(90)
  assert stopped.code in (2, 7), f'exit code {stopped.code}: {stopped.tail()}'
  stopped.expect(stopped.code, 'checkpoints')
  assert (workdir / 'checkpoints').read_text() == 'in the way\n'
  (workdir / 'checkpoints').unlink()
  world.finish(workdir)
  world.check(workdir, straight)


def _while_it_runs(
  world: World, straight: Straight, harm: Callable[[Path], None]
) -> None:
  """The harm comes after the second save: the run saves again, or exits with 7."""
  workdir = world.path('vanishing')
  child = world.train(workdir)
  assert _reached(child, workdir, 2 * SAVES + 1), child.err
  harm(workdir)
  done = child.wait()
  assert done.code in (0, 7), f'exit code {done.code}: {done.tail()}'
  done.expect(done.code)
  if done.code:
    world.finish(workdir)
  world.check(workdir, straight)


def _reached(child: Child, workdir: Path, step: int) -> bool:
  return bool(child.until(lambda: evidence.last_step(workdir) >= step))


def _checkpoints_removed(world: World, straight: Straight) -> None:
  """checkpoints/ is removed during the run"""

  def harm(workdir: Path) -> None:
    gone = world.path('gone')
    os.rename(workdir / 'checkpoints', gone)  # Atomic, because a save may be running.
    shutil.rmtree(gone)

  _while_it_runs(world, straight, harm)


def _checkpoints_replaced(world: World, straight: Straight) -> None:
  """checkpoints/ is replaced by a file during the run"""

  def harm(workdir: Path) -> None:
    os.rename(workdir / 'checkpoints', workdir / 'aside')
    (workdir / 'checkpoints').write_text('in the way\n')

  workdir = world.path('vanishing')
  child = world.train(workdir)
  assert _reached(child, workdir, 2 * SAVES + 1), child.err
  harm(workdir)
  child.wait(90).expect(7, 'could not be saved')
  (workdir / 'checkpoints').unlink()
  os.rename(workdir / 'aside', workdir / 'checkpoints')
  world.finish(workdir)
  world.check(workdir, straight)


def _workdir_moved(world: World, straight: Straight) -> None:
  """the workdir is moved away during the run, and back after its end"""
  workdir, away = world.path('vanishing'), world.path('away')
  child = world.train(workdir)
  assert _reached(child, workdir, 2 * SAVES + 1), child.err
  os.rename(workdir, away)
  done = child.wait()
  assert done.code in (0, 7, 8), f'exit code {done.code}: {done.tail()}'
  done.expect(done.code)
  left = evidence.contents(workdir) if workdir.exists() else {}
  shutil.rmtree(workdir, ignore_errors=True)
  os.rename(away, workdir)
  _whole(workdir)
  world.finish(workdir)
  world.check(workdir, straight)
  assert done.code, f'it exited with 0, and left {sorted(left)}'


CASES = (
  _read_only_parent,
  _read_only_workdir,
  _file_as_workdir,
  _file_as_checkpoints,
  _checkpoints_removed,
  _checkpoints_replaced,
  _workdir_moved,
)

ROWS_A = [
  Row('8', 'the disk is full', disk_full, 11, 0),
  Row(
    '9',
    'a folder is read-only, replaced by a file, or deleted',
    unwritable,
    len(CASES),
    0,
  ),
]
