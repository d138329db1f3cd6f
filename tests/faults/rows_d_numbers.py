"""Rows of the fault table: what logged numbers and the best step mean, and Ctrl-C."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import evidence
from faults.process import Done
from faults.world import SAVES, SMALL, STEPS, Outcome, Row, Tally, World, arguments

from gated.run import checkpoint, metrics, outcome

# 53


def other_evaluations(world: World, times: int) -> Outcome:
  """config.eval.rows changes on resumption: only equal evaluations compare."""
  tally, first = Tally(), world.path('evaluated')
  knobs: dict[str, Any] = dict(optim__schedule='constant', checkpoint__keep=1)
  world.finish(first, eval__rows=8, steps=16, **knobs)
  before = evidence.saved(first)
  copies = {rows: world.path(f'rows-{rows}') for rows in (1, 2, 0)[:times]}
  for copy in copies.values():
    shutil.copytree(first, copy)
  commands = [arguments(w, eval__rows=rows, **knobs) for rows, w in copies.items()]
  for (rows, workdir), done in zip(copies.items(), world.many(commands), strict=True):
    losses = dict(evidence.losses(workdir, 'heldout'))
    with tally.one(f'--step=best after eval.rows=8 became {rows}'):
      done.expect(0)
      with checkpoint.Reader(workdir / 'checkpoints') as saved:
        steps, best = saved.steps(), saved.pick('best', '--step')
      assert best == min((s for s in losses if s > 16), key=lambda s: losses[s]), best
    with tally.one(f'the steps that are kept after eval.rows={rows}'):
      old = min(before, key=lambda s: losses[s])
      assert steps == sorted({old, best, STEPS}), (steps, losses)
  return tally.outcome()


# 54


def _train(workdir: Path) -> list[dict]:
  records = metrics.read(workdir / 'metrics.jsonl')
  return [record for record in records if record['kind'] == 'train']


def _run(world: World, workdir: Path, **knobs) -> Done:
  [done] = world.many([arguments(workdir, **knobs)])
  return done.expect(0)


def _skipped(world: World) -> None:
  """Updates that are not finite, though the loss and the gradient are."""
  workdir, rate = world.path('skipped'), 1e30
  knobs: dict[str, Any] = dict(optim__lr=rate, optim__warmup=1, steps=6)
  knobs |= dict(optim__floor=4e-4, checkpoint__every=6)
  _run(world, workdir, **knobs)
  last = _train(workdir)[-1]
  assert last['skipped'] >= 3, last
  assert math.isclose(last['lr'], 4e-4, rel_tol=1e-5), last['lr']
  told = outcome.read(workdir)
  assert told and f'; {last["skipped"]:.0f} of 6 updates were skipped' in told.told, told


def _accepted(world: World) -> None:
  """Skipped spikes do not advance the schedule, and the logged rate neither."""
  workdir = world.path('spikes')
  fault = {'do': 'nan', 'what': 'gradients', 'steps': [9, 12]}
  world.finish(workdir, fault=fault)
  usual = {record['step']: record['lr'] for record in _train(world.straight().workdir)}
  rates = {record['step']: record['lr'] for record in _train(workdir)}
  skipped = {step: 0 if step < 9 else min(step - 9, 4) for step in rates}
  for step, lr in rates.items():
    expected = usual[step - skipped[step]]
    assert math.isclose(lr, expected, rel_tol=1e-5), (step, lr, expected)


def _warm(world: World) -> None:
  workdir = world.path('warm')
  done = _run(world, workdir, optim__warmup=60)
  done.expect(0, 'config.optim.warmup=60 does not end before config.steps=24: ')
  last = _train(workdir)[-1]['lr']
  assert math.isclose(last, 0.4 * SMALL['optim.lr'], rel_tol=1e-5)
  assert f'ends at {last:.3g} and does not reach its peak' in done.err, done.err


def _coarse(world: World) -> None:
  knobs: dict[str, Any] = dict(optim__lr=3e-5, optim__floor=3e-6)
  workdir = world.path('coarse')
  done = _run(world, workdir, model__numerics__weights='bfloat16', **knobs)
  done.expect(0, 'weights=bfloat16: the smallest step of a weight of', 'optim.lr=3e-05')


def _empty(world: World) -> None:
  """Held-out text without a byte: no infinite bits a byte."""
  folder, made = world.path('texts'), world.path('set')
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.txt').write_text(chr(97 + i % 26))
  command = ['scripts/prepare_data.py', f'--out={made}', '--length=1', '--processes=1']
  command += ['--tokenizer=bytes', f'--domain=a={folder}', '--heldout=0.4']
  command += ['--dedup=none']
  [done] = world.many([command])
  done.expect(0)
  workdir = world.path('empty')
  _run(world, workdir, data__mixture=made, data__length=1, loss__chunk=1)
  assert 'inf' not in (workdir / 'metrics.jsonl').read_text().lower()


NUMBERS: dict[str, Callable[[World], None]] = {
  'updates that are not finite': _skipped,
  'updates that are skipped': _accepted,
  'a warm-up longer than the run': _warm,
  'weights too coarse for the rate': _coarse,
  'held-out text without a byte': _empty,
}


def numbers(world: World, times: int) -> Outcome:
  world.straight()
  tally = Tally()
  for fault, run in list(NUMBERS.items())[:times]:
    with tally.one(fault):
      run(world)
  return tally.outcome()


# 55


def _interrupted(world: World, child, ready: Callable[[], Any], number: int) -> Done:
  """Sends a signal once `ready` is true -> the ended process."""
  child.until(ready)
  time.sleep(0.5)
  child.signal(number)
  return child.wait()


def _building(world: World, number: int) -> None:
  """While the embedded corpus is built, in a fresh cache with an odd name."""
  cache = world.path("it's a {cache} [b]*")
  child = world.train(world.path(), env={'XDG_CACHE_HOME': str(cache)})
  done = _interrupted(world, child, lambda: list(cache.rglob('work')), number)
  assert done.code in (128 + number, -number, 4), done.tail()
  assert 'Traceback' not in done.err, done.tail()
  if number == signal.SIGINT:
    assert done.err.count('\n') - done.err.count('building the embedded') <= 3, done.err
  left = [p.name for p in cache.rglob('*') if not p.name.endswith('.lock')]
  assert left == ['gated'], left
  if number == signal.SIGINT:  # The same command succeeds, in this cache.
    world.finish(world.path(), env={'XDG_CACHE_HOME': str(cache)}, steps=1)


def _preparing(world: World, number: int) -> None:
  """prepare_data, with its workers, as a terminal sends it: to the whole group."""
  folder, made = world.path('texts'), world.path('set')
  folder.mkdir()
  for i in range(300):
    text = '\n'.join(f'a line {i * j % 9977} of text' for j in range(9000))
    (folder / f'{i}.txt').write_text(text)
  command = ['scripts/prepare_data.py', f'--out={made}', '--length=128']
  command += ['--tokenizer=bpe:1000', f'--domain=a={folder}', '--processes=2']
  child = world.spawn(command, group=True)
  assert child.until(lambda: list(made.rglob('*.unit'))), child.err
  os.killpg(child.pid, number)
  done = child.wait()
  assert done.code == 128 + number, done.tail()
  assert 'Traceback' not in done.err, done.err[-2000:]
  assert done.err.rstrip().endswith('prepare_data.py: stopped by Ctrl-C'), done.err


def _compiling(world: World, number: int) -> None:
  """While the step is compiled: one line, and the step that follows is saved."""
  workdir = world.path('compiling')
  child = world.train(workdir, model__depth=3, data__length=64)  # No cached program.
  ready = lambda: (workdir / 'lock.json').exists()
  done = _interrupted(world, child, ready, number)
  done.expect(4, 'stopped at step 1, which is saved')
  assert not (workdir / 'lock.json').exists()
  assert evidence.saved(workdir) == [1]


def _impatient(world: World) -> None:
  """Ctrl-C is answered while XLA compiles, and a second one ends the process at once."""
  workdir = world.path('impatient')
  slow: dict[str, Any] = dict(model__depth=24, model__layers='unroll', data__length=64)
  child = world.train(workdir, **slow)
  ready = lambda: (workdir / 'lock.json').exists()
  child.until(ready)
  time.sleep(0.5)
  child.signal(signal.SIGINT)
  assert child.until(lambda: 'again: at once' in child.err, 5), child.err
  child.signal(signal.SIGINT)
  started = time.monotonic()
  child.wait().expect(128 + signal.SIGINT)
  assert time.monotonic() - started < 3, f'{time.monotonic() - started:.1f} s'
  assert not (workdir / 'metrics.jsonl').exists(), 'the compilation had ended'


def interrupted(world: World, times: int) -> Outcome:
  """Ctrl-C and SIGTERM before the first step."""
  tally = Tally()
  for number in (signal.SIGINT, signal.SIGTERM)[:times]:
    with tally.one(f'{number.name} while the corpus is built'):
      _building(world, number)
    with tally.one(f'{number.name} while the step is compiled'):
      _compiling(world, number)
  with tally.one('Ctrl-C twice while the step is compiled'):
    _impatient(world)
  with tally.one('Ctrl-C in prepare_data and its workers'):
    _preparing(world, signal.SIGINT)
  return tally.outcome()


# 56


def _cut(workdir: Path) -> None:
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(True)
  path.write_bytes(b''.join(x for x in lines if json.loads(x)['step'] <= 4))


def _emptied(workdir: Path) -> None:
  (workdir / 'metrics.jsonl').write_bytes(b'')


def _removed(workdir: Path) -> None:
  (workdir / 'metrics.jsonl').unlink()


def _rotated(workdir: Path) -> None:
  (workdir / 'metrics.jsonl').rename(workdir / 'metrics.jsonl.1')


def _edited(workdir: Path) -> None:
  path = workdir / 'run.json'
  run = json.loads(path.read_text())
  run['config']['optim']['b2'] = 0.5
  run['config']['seed'] = 9
  path.write_text(json.dumps(run))


def _gone(workdir: Path) -> None:
  (workdir / 'run.json').unlink()


def _noise(workdir: Path) -> None:
  """Files of other programs beside those of the run."""
  for name in ('.DS_Store', 'metrics.jsonl~', 'run.json.swp', 'checkpoints/Thumbs.db'):
    (workdir / name).write_text('not ours\n')
  (workdir / 'checkpoints' / '.nfs0001').write_bytes(b'')


def _moved(workdir: Path) -> None:
  """The steps lie on another disk, behind a symbolic link."""
  shutil.move(workdir / 'checkpoints', f'{workdir}-steps')
  (workdir / 'checkpoints').symlink_to(f'{workdir}-steps')


GAP = 'metrics.jsonl has no record of steps'
HANDS: dict[str, tuple] = {
  'metrics.jsonl is cut at step 4': (_cut, f'{GAP} 5 to 7'),
  'metrics.jsonl is emptied': (_emptied, f'{GAP} 1 to 7'),
  'metrics.jsonl is removed': (_removed, f'{GAP} 1 to 7'),
  'metrics.jsonl is renamed': (_rotated, f'{GAP} 1 to 7'),
  'optimizer and seed in run.json are edited': (
    _edited,
    'run.json was edited: config.optim.b2 is as in the checkpoint',
    'run.json was edited: config.seed is as in the checkpoint',
  ),
  'run.json is removed': (_gone,),
  'files of other programs': (_noise,),
  'checkpoints/ is a link to another disk': (_moved,),
}


def _unlocked(world: World, place: str) -> None:
  """lock.json is removed while a run lives, and a second run starts."""
  straight, workdir = world.straight(), world.path('unlocked')
  stop = {'do': 'stop', 'at': place, 'step': SAVES}
  first = world.train(workdir, fault=stop)
  assert first.until(lambda: 'fault: stop' in first.err), first.err
  time.sleep(1)
  (workdir / 'lock.json').unlink()
  world.finish(workdir)
  bits = world.digest(workdir, STEPS)
  first.signal(signal.SIGCONT)
  first.wait().expect(8, 'lock.json is missing')
  assert bits == world.digest(workdir, STEPS) == straight.digest


def by_hand(world: World, times: int) -> Outcome:
  """Files of a stopped run are changed before the same command goes on."""
  tally, straight, stopped = Tally(), world.straight(), world.path('stopped')
  term = {'do': 'term', 'at': 'step', 'step': 7}
  world.train(stopped, fault=term).wait().expect(4)
  cases = dict(list(HANDS.items())[:times])
  copies = [world.path('changed') for _ in cases]
  for copy, (change, *_) in zip(copies, cases.values(), strict=True):
    shutil.copytree(stopped, copy)
    change(copy)
  results = world.many([arguments(copy) for copy in copies])
  for fault, copy, done in zip(cases, copies, results, strict=True):
    with tally.one(fault):
      done.expect(0, *cases[fault][1:])
      assert evidence.losses(copy)[-10:] == straight.losses[-10:]
      assert world.digest(copy, STEPS) == straight.digest
  for place in ('step', 'renamed'):
    with tally.one(f'lock.json is removed at {place}, and a second run starts'):
      _unlocked(world, place)
  return tally.outcome()


ROWS_D = [
  Row('53', 'eval.rows changes on resumption: the best step', other_evaluations, 3, 0),
  Row('54', 'numbers that are logged, and that acted', numbers, len(NUMBERS), 1),
  Row('55', 'Ctrl-C and SIGTERM before the first step', interrupted, 2, 0),
  Row('56', 'files of a stopped run are changed by hand', by_hand, len(HANDS), 0),
]
