"""Rows of the fault table: faults of a machine, wrong places, absurd numbers."""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from faults import evidence
from faults.process import Child, Done
from faults.rows_a_disk import _room, _tmpfs
from faults.rows_e import each
from faults.world import STEPS, Outcome, Row, Skip, Straight, World, arguments

FAULT = 9  # An exit code.


def one_line(done: Done, code: int, *messages: str) -> None:
  """AssertionError unless a program reported its error in one line."""
  assert 'Traceback' not in done.err, done.err[-3000:]
  done.expect(code, *messages)


# 41


def blame(world: World, times: int) -> Outcome:
  return each(world, BLAME[:times])


def _worker_killed(world: World, straight: Straight) -> None:
  """kill -9 of a data worker: the last step is saved"""
  workdir = world.path('worker')
  child = world.train(workdir, fault=_paced(6), data__workers=2, data__prefetch=1)
  child.until(lambda: evidence.last_step(workdir) >= 6)
  os.kill(_workers(child)[0], signal.SIGKILL)
  one_line(child.wait(), FAULT, 'config.data.workers=2', 'killed', 'last saved step is')
  at = evidence.last_step(workdir)
  assert at == max(evidence.saved(workdir)), f'{at} is not in {evidence.saved(workdir)}'
  world.finish(workdir, data__workers=2)
  world.check(workdir, straight)


def _paced(first: int) -> list[dict]:
  """Slow steps from the first on, so that a fault comes in time."""
  rest = {'do': 'sleep', 'at': 'step', 'seconds': 0.4}
  return [rest | {'step': step} for step in range(first, STEPS)]


def _workers(child: Child) -> list[int]:
  """The pids of the data workers of a run."""
  workers = []
  for folder in Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      parent = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
      command = (folder / 'cmdline').read_text()
      if parent == child.pid and 'spawn_main' in command:
        workers.append(int(folder.name))
  assert workers, 'no data worker runs'
  return workers


def _small_shared_memory(world: World, straight: Straight) -> None:
  """64 kB of /dev/shm: the run names it, and not the workdir"""
  workdir = world.path('shared')
  mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
  done = _unshared(world, mount, workdir, data__workers=2).wait()
  if 'mount:' in done.err or 'unshare:' in done.err:
    raise Skip(f'mounting is not permitted: {done.tail()}')
  one_line(done, FAULT, 'No space left on device')
  assert f'--workdir={workdir} cannot be written' not in done.err, done.tail()
  world.finish(workdir, data__workers=2)
  world.check(workdir, straight)


def _unshared(world: World, script: str, workdir: Path, **knobs) -> Child:
  """Starts a run below a shell that may mount: python -c 'exec unshare ... train.py'."""
  source = (
    'import os, sys; '
    "os.execvp('unshare', ['unshare', '-m', 'sh', '-c', sys.argv[1], 'sh', "
    'sys.executable, *sys.argv[2:]])'
  )
  return world.spawn(['-c', source, script, *arguments(workdir, **knobs)])


def _dataset(world: World) -> Path:
  out, texts = world.path('dataset'), world.path('texts')
  texts.mkdir(parents=True)
  for i in range(400):
    (texts / f'{i}.txt').write_text(f'document number {i}, with some words. ' * 60)
  sizes = ['--length=128', '--tokenizer=bytes', '--heldout=0.1', '--shard_rows=1024']
  command = ['scripts/prepare_data.py', f'--out={out}', f'--domain=text={texts}', *sizes]
  world.spawn(command).wait().expect(0)
  return out


def _shard_damaged(world: World, _: Straight) -> None:
  """a shard is truncated, or overwritten, in a run"""
  source = _dataset(world)
  for harm in ('truncated', 'overwritten'):
    folder, workdir = world.path('dataset'), world.path('damaged')
    shutil.copytree(source, folder)
    child = world.train(workdir, fault=_paced(4), data__mixture=folder, data__prefetch=1)
    child.until(lambda workdir=workdir: evidence.last_step(workdir) >= 4)
    for shard in folder.glob('*-train-*.array_record'):
      size = shard.stat().st_size
      os.truncate(shard, size // 9)
      if harm == 'overwritten':
        with shard.open('r+b') as file:
          file.write(os.urandom(size))
    done = child.wait()
    one_line(done, 1, 'config.data.mixture', 'last saved step is')
    assert evidence.last_step(workdir) == max(evidence.saved(workdir)), done.tail()
    again = world.train(workdir, data__mixture=folder).wait()
    one_line(again, 2, 'config.data.mixture', 'array_record')


PLACES: dict[str, dict[str, Any]] = {
  'tensorboard': dict(log__tensorboard=True),
  'samples': dict(log__samples=4),
  'profile': dict(log__profile_first=2, log__profile_last=3),
  'checkpoints': {},
}


def _file_in_place(world: World, _: Straight) -> None:
  """a file in place of a folder, which --dry_run notices"""
  files, commands = [], []
  for name, knobs in PLACES.items():
    workdir = world.path('places')
    workdir.mkdir(parents=True)
    (workdir / name).write_text('in the way\n')
    for flags in (['--dry_run'], []):
      files.append(workdir / name)
      commands.append(arguments(workdir, flags=flags, **knobs))
  for file, done in zip(files, world.many(commands), strict=True):
    one_line(done, 2, f'{file} is not a writable folder')


def _folder_in_place(world: World, _: Straight) -> None:
  """a folder or device in place of a file, which --dry_run notices"""
  for name in ('metrics.jsonl', 'run.json', 'spikes.jsonl', 'lock.json', 'outcome.json'):
    workdir = world.path('places')
    (workdir / name).mkdir(parents=True)
    done = world.train(workdir, flags=['--dry_run']).wait()
    one_line(done, 2, f'{workdir / name} is not a writable file')
  for target in ('/dev/null', '/nowhere/metrics.jsonl'):
    workdir = world.path('places')
    workdir.mkdir(parents=True)
    (workdir / 'metrics.jsonl').symlink_to(target)
    done = world.train(workdir, flags=['--dry_run']).wait()
    one_line(done, 2, 'metrics.jsonl is not a writable file')


def _broken_link(world: World, _: Straight) -> None:
  """the workdir is a link that leads nowhere"""
  workdir = world.path('link')
  workdir.parent.mkdir(parents=True, exist_ok=True)
  workdir.symlink_to(world.path('nowhere'))
  done = world.train(workdir, flags=['--dry_run']).wait()
  one_line(done, 2, '--workdir', 'not a writable folder')


ABSURD: dict[str, Any] = {
  'stability__window': 1 << 40,
  'stability__peer_timeout': 1 << 40,
  'data__prefetch': 1 << 40,
  'data__workers': 1 << 20,
  'data__length': 1 << 40,
  'steps': 1 << 40,
  'accum': 1 << 40,
  'optim__warmup': 1 << 40,
  'model__width': 1 << 40,
  'log__sample_tokens': 1 << 40,
  'seed': 1 << 70,
}


def _absurd(world: World, _: Straight) -> None:
  """absurd numbers in knobs"""
  commands = [
    arguments(world.path('absurd'), flags=['--dry_run'], **{knob: value})
    for knob, value in ABSURD.items()
  ]
  for knob, done in zip(ABSURD, world.many(commands), strict=True):
    one_line(done, 2, f'config.{knob.replace("__", ".")}')


def _absurd_batch(world: World, straight: Straight) -> None:
  """eval.py --batch=1000000"""
  flags = ['--batch=1000000', '--rows=8', '--yardsticks=none']
  copy = world.path('copy')
  shutil.copytree(straight.workdir, copy)
  world.spawn(['eval.py', f'--workdir={copy}', *flags]).wait().expect(0)


def _input(world: World) -> str:
  texts = world.path('texts')
  texts.mkdir(parents=True)
  (texts / 'a.txt').write_text('a line of text\n' * 99)
  return f'--domain=a={texts}'


def _prepared(world: World, out: Path | str, *flags: str) -> Done:
  sizes = ['--length=64', '--tokenizer=bytes', '--heldout=0', '--processes=1']
  command = ['scripts/prepare_data.py', f'--out={out}', *sizes, *flags]
  return world.spawn(command).wait()


def _preparation(world: World, _: Straight) -> None:
  """wrong flags of prepare_data"""
  domain, file, link = _input(world), world.path('file'), world.path('link')
  file.write_text('in the way\n')
  link.symlink_to(world.path('nowhere') / 'x')
  for out in (file, file / 'below'):
    one_line(_prepared(world, out, domain), 2, '--out')
  one_line(_prepared(world, world.path('out'), '--domain=a=/nowhere'), 2, '/nowhere')
  one_line(_prepared(world, world.path('out'), domain, '--heldout=2'), 2, '--heldout')


def _preparation_full(world: World, _: Straight) -> None:
  """a disk that is full, for prepare_data: 9, and the same command goes on"""
  domain = _input(world)
  out = world.path('out')
  with _tmpfs(out, 4096 * 8):
    filler = out / 'filler'
    with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
      while file.write(bytes(4096)):
        pass
    one_line(_prepared(world, out, domain), FAULT, 'No space left', str(out))
    _room(out, 1 << 26)
    filler.unlink()
    _prepared(world, out, domain).expect(0)


BLAME = (
  _worker_killed,
  _file_in_place,
  _small_shared_memory,
  _shard_damaged,
  _folder_in_place,
  _broken_link,
  _absurd,
  _absurd_batch,
  _preparation,
  _preparation_full,
)

ROWS_E = [
  Row('41', 'faults of a machine, wrong places, absurd numbers', blame, 10, 0),
]
