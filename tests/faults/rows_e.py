"""Rows of the fault table: liveness, blame, long waits, and machines of two runs."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from faults import evidence
from faults.process import Child, Done
from faults.rows_a_disk import _room, _tmpfs
from faults.rows_b import PAIR, PLAIN
from faults.world import STEPS, Outcome, Row, Skip, Straight, Tally, World, arguments

FAULT = 9  # An exit code.
AT = 12  # A step that is saved and evaluated.
REST = {'rest': 1.0}  # Seconds of a batch: an evaluation has 16 batches.
SLOW = dict(eval__rows=64, eval__every=AT, checkpoint__every=AT)


def _done(tally: Tally, cases: Sequence[Callable], *args) -> Outcome:
  for case in cases:
    with tally.one(str(case.__doc__)):
      case(*args)
  return tally.outcome()


# 40


def liveness(world: World, times: int) -> Outcome:
  return _done(Tally(), LIVENESS[:times], world, world.straight())


def _evaluation_outlasts(world: World, _: Straight) -> None:
  """an evaluation takes longer than stuck_after"""
  workdir = world.path('slow')
  child = world.train(workdir, fault=REST, stability__stuck_after=10, **SLOW)
  child.wait().expect(0)
  world.check(workdir, world.straight(**SLOW))


def _stopped_in(world: World, number: int, options: dict, step: int) -> None:
  """A signal in the evaluation of a step: it is saved, and evaluated in the next session.

  The evaluation ends at its next batch.
  """
  workdir = world.path('stopped')
  fault = {'do': 'sleep', 'at': 'evaluating', 'step': step, 'seconds': 0.0}
  child = world.train(workdir, fault=[fault, REST], **options)
  assert child.until(lambda: 'fault: sleep at evaluating' in child.err), child.err
  time.sleep(1.0)
  child.signal(number)
  started = time.monotonic()
  done = child.wait().expect(4, f'stopped at step {step}, which is saved')
  assert time.monotonic() - started < 10, f'{time.monotonic() - started:.1f} s'
  assert max(evidence.saved(workdir)) == step, done.tail()
  world.finish(workdir, **options)
  world.check(workdir, world.straight(**options))


def _sigterm_in_evaluation(world: World, _: Straight) -> None:
  """SIGTERM in the evaluation of a saved step"""
  _stopped_in(world, signal.SIGTERM, SLOW, AT)


def _sigterm_in_last(world: World, _: Straight) -> None:
  """SIGTERM in the evaluation of the last step"""
  _stopped_in(world, signal.SIGTERM, SLOW, STEPS)


def _hangup_between_saves(world: World, _: Straight) -> None:
  """SIGHUP in the evaluation of a step that is not saved"""
  _stopped_in(world, signal.SIGHUP, SLOW | dict(checkpoint__every=STEPS), AT)


def _sigterm_before(world: World, straight: Straight) -> None:
  """SIGTERM at a step before its evaluation"""
  for step in (EVALUATED, STEPS):
    workdir = world.path('stopped')
    fault = {'do': 'term', 'at': 'step', 'step': step}
    world.train(workdir, fault=fault).wait().expect(4)
    assert step in evidence.saved(workdir)
    assert step not in dict(evidence.losses(workdir, 'heldout'))
    world.finish(workdir)
    world.check(workdir, straight)


EVALUATED = 6  # A step that is evaluated and not saved.


def _killed_in(world: World, straight: Straight) -> None:
  """kill -9 in an evaluation"""
  for step in (AT, STEPS):
    workdir = world.path('killed')
    faults = [{'do': 'kill', 'at': 'evaluating', 'step': step}]
    # Until the save that the evaluation follows is committed.
    faults = [{'do': 'sleep', 'at': 'evaluating', 'step': step, 'seconds': 3}, *faults]
    world.train(workdir, fault=faults).wait().expect(-signal.SIGKILL)
    assert step in evidence.saved(workdir), evidence.saved(workdir)
    world.finish(workdir)
    world.check(workdir, straight)
  # The last step is still there.
  text = (evidence.committed(workdir, step) / 'manifest.json').read_text()
  loss = dict(evidence.losses(workdir, 'heldout'))[step]
  assert json.loads(text)['about']['heldout_loss'] == loss


def _two_stopped_in(world: World, _: Straight) -> None:
  """SIGTERM to one of two processes in an evaluation"""
  workdir, options = world.path('stopped'), SLOW | PAIR
  here = {'do': 'sleep', 'at': 'evaluating', 'step': AT, 'seconds': 0.0}
  children = world.group(workdir, faults={0: [here, REST], 1: [PLAIN, REST]}, **SLOW)
  assert children[0].until(lambda: 'fault: sleep at evaluating' in children[0].err)
  children[1].signal(signal.SIGTERM)
  for child in children:
    child.wait().expect(4)
  assert max(evidence.saved(workdir)) == AT
  world.finish(workdir, **options)
  world.check(workdir, world.straight(**options))


def _suspended(world: World, straight: Straight) -> None:
  """SIGSTOP for longer than twice stuck_after"""
  workdir = world.path('suspended')
  rest = {'do': 'sleep', 'at': 'step', 'step': AT, 'seconds': 2.0}
  child = world.train(workdir, fault=rest, stability__stuck_after=8)
  assert child.until(lambda: 'fault: sleep at step' in child.err), child.err
  child.signal(signal.SIGSTOP)
  time.sleep(18.0)
  child.signal(signal.SIGCONT)
  child.wait().expect(0)
  world.check(workdir, straight)


def _held(world: World, straight: Straight) -> None:
  """a main thread that holds the GIL, with stuck_after=8"""
  workdir = world.path('held')
  fault = {'do': 'hold', 'at': 'step', 'step': AT + 1}
  done = world.train(workdir, fault=fault, stability__stuck_after=8).wait(90)
  done.expect(-signal.SIGABRT, 'File "')
  world.finish(workdir)
  world.check(workdir, straight)


def _never(world: World, straight: Straight) -> None:
  """stuck_after=1e300"""
  workdir = world.path('never')
  world.finish(workdir, stability__stuck_after=1e300)
  world.check(workdir, straight)


LIVENESS = (
  _sigterm_in_evaluation,
  _killed_in,
  _evaluation_outlasts,
  _sigterm_in_last,
  _hangup_between_saves,
  _sigterm_before,
  _two_stopped_in,
  _suspended,
  _held,
  _never,
)

# 41


def blame(world: World, times: int) -> Outcome:
  return _done(Tally(), BLAME[:times], world, world.straight())


def _one_line(done: Done, code: int, *messages: str) -> None:
  """AssertionError unless a program reported its error in one line."""
  assert 'Traceback' not in done.err, done.err[-3000:]
  done.expect(code, *messages)


def _worker_killed(world: World, straight: Straight) -> None:
  """kill -9 of a data worker: the last step is saved"""
  workdir = world.path('worker')
  child = world.train(workdir, fault=_paced(6), data__workers=2, data__prefetch=1)
  child.until(lambda: evidence.last_step(workdir) >= 6)
  os.kill(_workers(child)[0], signal.SIGKILL)
  _one_line(child.wait(), FAULT, 'config.data.workers=2', 'killed', 'last saved step is')
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
  _one_line(done, FAULT, 'No space left on device')
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
    _one_line(done, 1, 'config.data.mixture', 'last saved step is')
    assert evidence.last_step(workdir) == max(evidence.saved(workdir)), done.tail()
    again = world.train(workdir, data__mixture=folder).wait()
    _one_line(again, 2, 'config.data.mixture', 'array_record')


PLACES = {
  'tensorboard': dict(log__tensorboard=True),
  'samples': dict(log__samples=4),
  'profile': dict(log__profile_first=2, log__profile_last=3),
  'checkpoints': {},
}


def _file_in_place(world: World, _: Straight) -> None:
  """a file in place of a folder, which --dry_run notices"""
  for name, knobs in PLACES.items():
    workdir = world.path('places')
    workdir.mkdir(parents=True)
    (workdir / name).write_text('in the way\n')
    for flags in (['--dry_run'], []):
      done = world.train(workdir, flags=flags, **knobs).wait()
      _one_line(done, 2, f'{workdir / name} is not a writable folder')


def _folder_in_place(world: World, _: Straight) -> None:
  """a folder or device in place of a file, which --dry_run notices"""
  for name in ('metrics.jsonl', 'run.json', 'spikes.jsonl', 'lock.json', 'outcome.json'):
    workdir = world.path('places')
    (workdir / name).mkdir(parents=True)
    done = world.train(workdir, flags=['--dry_run']).wait()
    _one_line(done, 2, f'{workdir / name} is not a writable file')
  for target in ('/dev/null', '/nowhere/metrics.jsonl'):
    workdir = world.path('places')
    workdir.mkdir(parents=True)
    (workdir / 'metrics.jsonl').symlink_to(target)
    done = world.train(workdir, flags=['--dry_run']).wait()
    _one_line(done, 2, 'metrics.jsonl is not a writable file')


def _broken_link(world: World, _: Straight) -> None:
  """the workdir is a link that leads nowhere"""
  workdir = world.path('link')
  workdir.parent.mkdir(parents=True, exist_ok=True)
  workdir.symlink_to(world.path('nowhere'))
  done = world.train(workdir, flags=['--dry_run']).wait()
  _one_line(done, 2, '--workdir', 'not a writable folder')


ABSURD = {
  'stability__window': 1 << 40,
  'stability__peer_timeout': 1 << 40,
  'data__prefetch': 1 << 40,
  'data__workers': 1 << 20,
  'steps': 1 << 40,
  'batch': 1 << 40,
  'accum': 1 << 40,
  'data__length': 1 << 40,
  'model__width': 1 << 40,
  'seed': 1 << 70,
}


def _absurd(world: World, _: Straight) -> None:
  """absurd numbers in knobs"""
  for knob, value in ABSURD.items():
    name = f'config.{knob.replace("__", ".")}'
    done = world.train(world.path('absurd'), flags=['--dry_run'], **{knob: value}).wait()
    _one_line(done, 2, name)


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
    _one_line(_prepared(world, out, domain), 2, '--out')
  _one_line(_prepared(world, world.path('out'), '--domain=a=/nowhere'), 2, '/nowhere')
  _one_line(_prepared(world, world.path('out'), domain, '--heldout=2'), 2, '--heldout')


def _preparation_full(world: World, _: Straight) -> None:
  """a disk that is full, for prepare_data: 9, and the same command goes on"""
  domain = _input(world)
  out = world.path('out')
  with _tmpfs(out, 4096 * 8):
    filler = out / 'filler'
    with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
      while file.write(bytes(4096)):
        pass
    _one_line(_prepared(world, out, domain), FAULT, 'No space left', str(out))
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

# 42


def waits(world: World, times: int) -> Outcome:
  return _done(Tally(), WAITS[:times], world, world.straight())


def _yardsticks(world: World, straight: Straight) -> None:
  """eval.py without yardsticks, with one of them, and with a wrong one"""
  copy = world.path('copy')
  shutil.copytree(straight.workdir, copy)
  command = ['eval.py', f'--workdir={copy}', '--rows=8', '--bigram_rows=64']
  for flag, keys in {'none': set(), 'xz': {'xz'}, 'bigram,xz': {'bigram', 'xz'}}.items():
    done = world.spawn([*command, f'--yardsticks={flag}']).wait().expect(0)
    report = json.loads(done.out.splitlines()[-1])
    for summary in report['domains'].values():
      names = (name for name in summary if name.endswith('_bits_per_byte'))
      assert {name.partition('_')[0] for name in names} == keys, summary
  wrong = world.spawn([*command, '--yardsticks=zip']).wait()
  _one_line(wrong, 2, '--yardsticks=zip', 'bigram')


def _building(world: World, _: Straight) -> None:
  """SIGTERM and SIGHUP while the embedded corpus is built leave nothing of it"""
  for number in (signal.SIGTERM, signal.SIGHUP):
    cache = world.path('cache')
    flags = ['--dry_run', f'--config.data.cache={cache}']
    child = world.train(world.path('run'), flags=flags)
    begun = lambda child=child: 'building the embedded corpus' in child.err
    assert child.until(begun), child.err
    time.sleep(1.5)
    child.signal(number)
    done = child.wait(30)
    assert done.code == 128 + number, f'exit code {done.code}: {done.tail()}'
    assert 'Traceback' not in done.err, done.err[-2000:]
    left = {path.name: path.stat().st_size for path in cache.rglob('*')}
    assert not any(left.values()) and len(left) <= 1, f'left in the cache: {left}'


WAITS = (_yardsticks, _building)

# 43

SAME = {
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  'JAX_LOG_COMPILES': '0',
  'JAX_TRACEBACK_FILTERING': 'off',
  'XLA_FLAGS': '--xla_force_host_platform_device_count=1 --xla_dump_hlo_as_text',
  'NCCL_DEBUG': 'WARN',
}
OTHER = {
  'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
  'XLA_FLAGS': (
    '--xla_force_host_platform_device_count=1 --xla_cpu_enable_fast_min_max=true'
  ),
  'NVIDIA_TF32_OVERRIDE': '0',
}


def environments(world: World, times: int) -> Outcome:
  """Two runs with other variables are comparable, unless one can change numbers."""
  straight, tally = world.straight(), Tally()
  compare = ['scripts/sweep.py', 'compare', straight.workdir]
  for code, variables in ((0, SAME), (3, OTHER)):
    for name, value in list(variables.items())[:times]:
      with tally.one(f'{name}={value}'):
        workdir = world.path('other')
        world.finish(workdir, env={name: value})
        done = world.spawn([*compare, workdir]).wait()
        assert done.code == code, f'{done.code}: {done.out[-600:]}{done.tail()}'
        shown = value.split()[-1].partition('=')[0] if name == 'XLA_FLAGS' else name
        assert shown in done.out, done.out
  return tally.outcome()


ROWS_E = [
  Row('40', 'long evaluations, signals in them, suspension', liveness, 10, 1),
  Row('41', 'faults of a machine, wrong places, absurd numbers', blame, 10, 2),
  Row('42', 'long waits that are watched, shortened, ended', waits, 2, 0),
  Row('43', 'environments of two runs that are compared', environments, 9, 0),
]
