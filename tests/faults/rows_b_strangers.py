"""Rows of the fault table: a second writer of a workdir, and crafted checkpoints."""

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import evidence
from faults.process import Child
from faults.rows_a import preempt
from faults.rows_b import slowly
from faults.world import Outcome, Row, Straight, Tally, World

from gated import config

# 17

REFUSED, TAKEN = 2, 8


def writers(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for case in WRITERS[:times]:
    with tally.one(case.__name__.replace('_', ' ')):
      case(world, straight)
  return tally.outcome()


def _started(world: World, workdir: Path, *more: dict) -> Child:
  """A slow run that holds its workdir."""
  child = world.train(workdir, fault=[*slowly(), *more])
  assert child.until(lambda: evidence.last_step(workdir) >= 5), child.err
  return child


def a_second_run_is_refused(world: World, straight: Straight) -> None:
  workdir = world.path('two')
  # It is stopped while the other run starts.
  first = world.train(workdir, fault={'do': 'stop', 'at': 'step', 'step': 7})
  assert first.until(lambda: 'fault: stop' in first.err), first.err
  message = f'in use by process {first.pid} on {platform.node()} since 20'
  world.train(workdir).wait().expect(REFUSED, message)
  first.signal(signal.SIGCONT)
  first.wait().expect(0)
  world.check(workdir, straight)


def the_lock_of_a_killed_run_is_taken_over(world: World, straight: Straight) -> None:
  workdir = world.path('stale')
  killed = _started(world, workdir)
  killed.signal(signal.SIGKILL)
  killed.wait()
  message = f'was left locked by process {killed.pid} on {platform.node()}'
  world.finish(workdir).expect(0, message, 'taking it over')
  world.check(workdir, straight)


def _note(workdir: Path, **changes: Any) -> bytes:
  """Writes the lock of another machine atomically; it is fresh unless changed."""
  now = time.time()
  note = dict(host='far', machine='far', pid=7, started=1, since=now, beat=now)
  content = json.dumps(note | dict(period=0.2, token='theirs') | changes).encode()
  workdir.mkdir(exist_ok=True)
  (workdir / 'draft').write_bytes(content)
  os.replace(workdir / 'draft', workdir / 'lock.json')
  return content


def a_fresh_lock_of_another_machine_refuses(world: World, straight: Straight) -> None:
  workdir = world.path('far')
  note = _note(workdir)
  message = 'in use by process 7 on far since 20', 'remove', 'lock.json'
  world.train(workdir).wait().expect(REFUSED, *message)
  assert evidence.contents(workdir) == {'lock.json': note}
  (workdir / 'lock.json').unlink()  # As the message says.
  world.finish(workdir)
  world.check(workdir, straight)


def an_old_lock_of_another_machine_is_taken_over(
  world: World, straight: Straight
) -> None:
  workdir = world.path('far')
  _note(workdir, beat=time.time() - 601)
  world.finish(workdir).expect(0, 'was left locked by process 7 on far', 'taking it over')
  world.check(workdir, straight)


def one_of_two_simultaneous_runs_is_refused(world: World, straight: Straight) -> None:
  workdir = world.path('both')
  children = [world.train(workdir, fault=slowly()) for _ in range(2)]
  results = sorted((child.wait() for child in children), key=lambda done: done.code)
  assert [done.code for done in results] == [0, REFUSED], [
    done.tail() for done in results
  ]
  message = results[1].expect(REFUSED).err
  assert any(t in message for t in ('taken at the same time by', 'is in use by')), message
  world.check(workdir, straight)


def a_taken_over_run_exits(world: World, straight: Straight) -> None:
  workdir = world.path('robbed')
  beats = {'set': 'gated.run.lock.MAX_PERIOD', 'to': 0.2}
  old = world.train(workdir, fault=[{'do': 'stop', 'at': 'step', 'step': 7}, beats])
  assert old.until(lambda: 'fault: stop' in old.err), old.err
  note = _note(workdir, beat=1e9)
  old.signal(signal.SIGCONT)
  old.wait().expect(TAKEN, 'was taken over by process 7 on far')
  assert (workdir / 'lock.json').read_bytes() == note, 'the new lock was changed'
  world.finish(workdir).expect(0, 'was left locked by process 7 on far')
  world.check(workdir, straight)


WRITERS = (
  a_second_run_is_refused,
  the_lock_of_a_killed_run_is_taken_over,
  a_fresh_lock_of_another_machine_refuses,
  an_old_lock_of_another_machine_is_taken_over,
  one_of_two_simultaneous_runs_is_refused,
  a_taken_over_run_exits,
)


# 19

LEFT, OLDER = 10, 8  # Saved steps of a preempted run; the last is damaged.
HUGE = (1 << 62) - 1
PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."  # Loading it runs touch(1).
MOST = 1 << 28  # Extra bytes of memory that a crafted checkpoint may take.

Spoil = Callable[[Path, Path], None]  # (a step's folder, a folder outside the workdir)


def forged(change: Callable[[dict], Any]) -> Spoil:
  """Changes the manifest, with a matching digest."""

  def spoil(folder: Path, _: Path) -> None:
    path = folder / 'manifest.json'
    content = json.loads(path.read_text())
    content.pop('sha256')
    change(content)
    sha256 = config.digest(content)
    path.write_text(json.dumps(content | {'sha256': sha256}))

  return spoil


def entry(name: str, size: int = 6) -> Spoil:
  return forged(lambda c: c['files'].update({name: [size, '0' * 32]}))


def leaf(*shape: Any, dtype: str = 'float32') -> Spoil:
  return forged(lambda c: c['leaves']['model'].update({'embed.table': [dtype, *shape]}))


def manifest_of(content: bytes) -> Spoil:
  def spoil(folder: Path, _: Path) -> None:
    (folder / 'manifest.json').write_bytes(content)

  return spoil


def linked(folder: Path, outside: Path) -> None:
  """Replaces a file of the payload by a link to the same bytes outside."""
  file = max((folder / 'model').rglob('*'), key=lambda p: p.is_file() * p.stat().st_size)
  shutil.move(file, outside / 'payload')
  file.symlink_to(outside / 'payload')


def linked_whole(folder: Path, outside: Path) -> None:
  """A link to a damaged step outside: the link is removed, its target stays."""
  shutil.move(folder, outside / 'step')
  folder.symlink_to(outside / 'step')
  forged(lambda c: c.update(step=99))(outside / 'step', outside)


def pickles(folder: Path, outside: Path) -> None:
  """Adds pickles beside the payload, with names that loaders look for."""
  content = PICKLE % os.fsencode(outside / 'executed')
  for name in ('state.pkl', 'model/data.pkl', 'model/embed.table.npy', '__init__.py'):
    (folder / name).write_bytes(content)


def pickled(folder: Path, outside: Path) -> None:
  content = PICKLE % os.fsencode(outside / 'executed')
  (folder / 'manifest.json').write_bytes(content)


CRAFTED: dict[str, tuple[str, Spoil]] = {
  'a name that goes up': ('is outside of the folder', entry('../../../outside/secret')),
  'a name from the root': ('is outside of the folder', entry('/etc/passwd')),
  'a name with a NUL': ('is outside of the folder', entry('a\0b')),
  'a payload linked out': ('is outside of the folder', linked),
  'a step linked out': ('holds step 99', linked_whole),
  'files that are a list': (
    'cannot be used',
    forged(lambda c: c.update(files=[])),
  ),
  'a config that is text': (
    'about.config',
    forged(lambda c: c['about'].update(config='x')),
  ),
  'a file of 4 EiB': (f'but {HUGE} were saved', entry('model/_METADATA', HUGE)),
  'a shape of 2^62': ('has embed.table of', leaf(1 << 62, 4)),
  'a shape of 10^5 axes': ('has embed.table of', leaf(*[1] * 10**5)),
  'brackets within brackets': (
    'cannot be used',
    manifest_of(b'[' * 10**6),
  ),
  'a pickle for a manifest': ('cannot be used', pickled),
  'a manifest too large': (
    'but 20000 are allowed',
    manifest_of(b' ' * 30000),
  ),
  'another step inside': (f'{LEFT} holds step 9', forged(lambda c: c.update(step=9))),
  'pickles beside the payload': ('', pickles),
}


def crafted(world: World, times: int) -> Outcome:
  """The newest step is crafted: the run skips it, or ignores the added files."""
  straight, tally, base = world.straight(), Tally(), world.path('base')
  preempt(world, base, LEFT)
  size = max(p.stat().st_size for p in base.rglob('manifest.json'))
  assert size < 20000, f'a manifest has {size} bytes'
  limit = {'set': 'gated.run.checkpoint.manifest.LIMIT', 'to': 20000}
  for name, (message, spoil) in list(CRAFTED.items())[:times]:
    with tally.one(name):
      faults = [limit] if name == 'a manifest too large' else []
      _crafted(world, base, message, spoil, straight, faults)
  return tally.outcome()


def _crafted(
  world: World, base: Path, message: str, spoil: Spoil, straight: Straight, faults: list
) -> None:
  home = world.path('crafted')
  workdir, outside = home / 'run', home / 'outside'
  outside.mkdir(parents=True)
  (outside / 'secret').write_bytes(b'secret')
  shutil.copytree(base, workdir)
  spoil(evidence.committed(workdir, LEFT), outside)
  before = evidence.contents(outside)
  child = world.train(workdir, fault=faults)
  memory = _peak_memory(child)
  done = child.wait().expect(0, *(['skipped: ', message] if message else []))
  assert f'resumed at step {OLDER if message else LEFT} of' in done.err, done.tail()
  assert evidence.contents(outside) == before, 'a file outside was changed'
  assert sorted(os.listdir(home)) == ['outside', 'run'], os.listdir(home)
  assert memory < _usual_memory(world) + MOST, f'it took {memory >> 20} MiB'
  world.check(workdir, straight)


def _peak_memory(child: Child) -> int:
  """The peak memory of a process, in bytes."""
  peak = 0
  with contextlib.suppress(OSError):
    while child.lives():
      status = Path(f'/proc/{child.pid}/status').read_text()
      lines = [line for line in status.splitlines() if line.startswith('VmHWM:')]
      peak = max([peak, *(int(line.split()[1]) << 10 for line in lines)])
      time.sleep(0.02)
  return peak


@functools.cache
def _usual_memory(world: World) -> int:
  """The peak memory of an undisturbed run, in bytes."""
  return _peak_memory(world.train(world.path('usual')))


ROWS_B = [
  Row('17', 'two writers of one workdir', writers, len(WRITERS), 1),
  Row('19', 'crafted checkpoints', crafted, len(CRAFTED), 0),
]
