"""The row of the fault table with workdirs and data in an object store."""

import logging
import signal
import time
from collections.abc import Callable

import servers
from faults import evidence
from faults.process import Child
from faults.rows_b import slowly
from faults.world import SMALL, STEPS, Outcome, Row, Skip, Straight, Tally, World

from gated import storage
from gated.data import cache, embedded

STORES = {'s3': servers.s3, 'gs': servers.gs}
KILLS = 3
LARGEST = 1 << 24  # The most bytes of a damaged object.


def in_a_store(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for name in ('gcsfs', 'google.auth'):  # They warn about missing credentials.
    logging.getLogger(name).setLevel(logging.ERROR)
  for open_store in list(STORES.values())[:times]:
    try:
      with open_store() as bucket:
        _all_faults(world, tally, bucket, straight)
    except servers.Missing as missing:
      raise Skip(str(missing)) from missing
  return tally.outcome()


def _all_faults(world: World, tally: Tally, bucket: str, straight: Straight) -> None:
  """One run in a bucket gets all faults, one after the other."""
  workdir, data = storage.path(f'{bucket}/run'), storage.path(f'{bucket}/data')
  local = embedded.directory(SMALL['data.length'], 'bytes', cache.default())
  storage.upload(local, data, storage.sizes(local))
  options = dict(data__mixture=str(data), data__cache=str(world.path('cache')))

  def train(*faults: dict, pace: float = 0.05) -> Child:
    return world.train(workdir, fault=[*slowly(pace), *faults], **options)

  def preempt_at(step: int) -> str:
    done = train({'do': 'term', 'at': 'step', 'step': step}).wait().expect(4)
    assert max(_saved(workdir)) == step, f'step {step} is not in {_saved(workdir)}'
    return done.err

  for _ in range(KILLS):
    moment = world.random.uniform(0.0, 5.0)
    with tally.one(f'{bucket}: killed {moment:.1f} s after the compilation'):
      _killed(train({'do': 'kill', 'at': 'step', 'step': 12}), moment)
  with tally.one(f'{bucket}: SIGTERM'):
    preempt_at(14)
  for harm, step in ((_deleted, 14), (_truncated, 15), (_flipped, 17)):
    with tally.one(f'{bucket}: an object {harm.__name__[1:]} of step {step}'):
      before = max(s for s in _saved(workdir) if s < step)
      name = harm(workdir / 'checkpoints' / str(step))
      err = preempt_at(step + (1 if step == 14 else 2))
      for message in ('skipped: ', name, f'using step {before}'):
        assert message in err, f'no {message!r} on stderr: {err[-1500:]}'
  with tally.one(f'{bucket}: a second writer, and the end'):
    rest = {'do': 'sleep', 'at': 'step', 'step': STEPS - 1, 'seconds': 25}
    first = train(rest, pace=0.0)
    assert first.until(lambda: first.err.count('fault: sleep') > 2), first.err
    message = f'in use by process {first.pid} on '
    world.train(workdir, **options).wait().expect(2, message)
    first.wait().expect(0)
    _check_as_on_disk(world, workdir, straight)


def _killed(child: Child, moment: float) -> None:
  assert child.until(lambda: 'attention runs' in child.err), child.err
  time.sleep(moment)
  done = child.kill()  # Unless it killed itself at step 12.
  assert done.code == -signal.SIGKILL, done.tail()


def _saved(workdir: storage.Path) -> list[int]:
  folder = workdir / 'checkpoints'
  steps = (int(name) for name in storage.names(folder) if name.isdecimal())
  return [s for s in sorted(steps) if storage.exists(folder / str(s) / 'manifest.json')]


def _largest(folder: storage.Path) -> str:
  sizes = {name: size for name, size in storage.sizes(folder).items() if '/' in name}
  return max(sizes, key=sizes.__getitem__)


def _harmed(change: Callable[[bytearray], None], folder: storage.Path) -> str:
  name = _largest(folder)
  content = bytearray(storage.read(folder / name, LARGEST))
  change(content)
  storage.write(folder / name, bytes(content))
  return name


def _deleted(folder: storage.Path) -> str:
  name = _largest(folder)
  storage.remove(folder / name)
  return name


def _truncated(folder: storage.Path) -> str:
  def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]

  return _harmed(cut, folder)


def _flipped(folder: storage.Path) -> str:
  def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1

  return _harmed(flip, folder)


def _check_as_on_disk(world: World, workdir: storage.Path, straight: Straight) -> None:
  """AssertionError unless it ended as the run on a local disk."""
  for kind, expected in (('train', straight.losses), ('heldout', straight.heldout)):
    actual = evidence.losses(workdir, kind)
    assert actual == expected, (
      f'{len(actual)} {kind} records differ from the {len(expected)} expected'
    )
  assert world.digest(workdir, STEPS) == straight.digest, 'different bits'
  left = storage.names(workdir), storage.names(workdir / 'checkpoints')
  assert 'lock.json' not in left[0], left
  assert all(name.isdecimal() or name == 'head.json' for name in left[1]), left


ROWS_B = [
  Row('S', 'faults of every kind, with workdirs in s3:// and gs://', in_a_store, 2, 0)
]
