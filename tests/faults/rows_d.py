"""Rows of the fault table: lost terminals, odd places, repeated commands, edits."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from faults import evidence, process
from faults.world import SAVES, STEPS, Outcome, Row, Tally, World, arguments

# 29

STREAMS = ('2>&1 | head -n 2', '2>/dev/full', '>/dev/full', '2>&-', '<&- >&- 2>&-')


def lost_terminals(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for streams in STREAMS[:times]:
    with tally.one(streams):
      workdir = world.path('deaf')
      program = shlex.join([sys.executable, *map(str, arguments(workdir))])
      run, bar, reader = streams.partition('|')
      code = world.path('code')
      command = f'({program} {run}; echo $? >{code}) {bar} {reader}'
      env = process.environment(straight.workdir.parents[1] / 'xla', 1, exact=True)
      subprocess.run(
        ['bash', '-c', command], cwd=process.ROOT, env=env, timeout=300, check=False
      )
      assert code.read_text() == '0\n', f'exit code {code.read_text()}'
      world.check(workdir, straight)
  return tally.outcome()


# 30

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def _reached(workdir: Path, step: int) -> int:
  """The last step of a run in progress; 0 before `step`."""
  last = evidence.last_step(workdir)
  return last if last >= step else 0


def other_signals(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for number in SIGNALS[:times]:
    with tally.one(number.name):
      workdir = world.path('stopped')
      child = world.train(workdir)
      at = child.until(lambda workdir=workdir: _reached(workdir, 3))
      child.signal(number)
      done = child.wait()
      if done.code or at < STEPS - 2:  # Else the signal came at the last step.
        done.expect(4, f'{number.name}: stopped at step')
        assert evidence.last_step(workdir) == max(evidence.saved(workdir))
      world.finish(workdir)
      world.check(workdir, straight)
  return tally.outcome()


def signals_to_all(world: World, times: int) -> Outcome:
  """A terminal or a scheduler sends the signal to the data workers as well."""
  tally, workers = Tally(), {'data.workers': 2}
  straight = world.straight(**workers)
  for number in SIGNALS[:times]:
    with tally.one(f'{number.name} to a run and its two data workers'):
      workdir = world.path('group')
      child = world.spawn(arguments(workdir, **workers), group=True)
      at = child.until(lambda workdir=workdir: _reached(workdir, 3))
      os.killpg(child.pid, number)
      done = child.wait()
      if done.code or at < STEPS - 2:
        done.expect(4, f'{number.name}: stopped at step')
      world.finish(workdir, **workers)
      world.check(workdir, straight)
  return tally.outcome()


# 31


def requeued(world: World, times: int) -> Outcome:
  """A scheduler repeats a command with --restore_step after each preemption."""
  tally = Tally()
  options: dict[str, Any] = dict(checkpoint__keep=9)
  straight = world.straight(**options)
  workdir, flags = world.path('requeued'), [f'--restore_step={SAVES}']
  shutil.copytree(straight.workdir, workdir)
  at = SAVES
  for _ in range(times):
    with tally.one(f'repeated at step {at}'):
      term = {'do': 'term', 'at': 'step', 'step': at + 3}
      child = world.train(workdir, fault=term, flags=flags, **options)
      child.wait().expect(4)
      assert evidence.sessions(workdir)[-1]['restored_step'] == at
      at += 3
      assert max(evidence.saved(workdir)) == at, evidence.saved(workdir)
  with tally.one('repeated to the end'):
    world.finish(workdir, flags=flags, **options)
    assert evidence.sessions(workdir)[-1]['restored_step'] == at
    assert evidence.losses(workdir) == straight.losses
    assert world.digest(workdir, STEPS) == straight.digest
  return tally.outcome()


# 32

NAMES = ('a[b]', 'a*b', 'a?', 'a\\b', 'x' * 256)
FINE = ("it's a {name}; $HOME", 'new\nline', '-x', 'x' * 255)


def odd_places(world: World, times: int) -> Outcome:
  """A place is refused before anything is written, or carries the whole run."""
  straight, tally = world.straight(), Tally()
  for name in NAMES[:times]:
    with tally.one(f'refused: {name:.9}'):
      folder = world.path('odd')
      world.train(folder / name).wait().expect(2, '--workdir=')
      assert not folder.exists(), list(folder.iterdir())
  for name in FINE[:times]:
    with tally.one(f'carried: {name:.9}'):
      workdir = world.path('odd') / name
      world.finish(workdir)
      world.check(workdir, straight)
  return tally.outcome()


# 33


def _eval(world: World, workdir: Path) -> dict:
  command = ['eval.py', f'--workdir={workdir}', '--rows=4', '--bigram_rows=16']
  done = world.spawn(command, env={'PYTHONIOENCODING': 'ascii'}).wait().expect(0)
  assert '+-' in done.out and '\N{PLUS-MINUS SIGN}' not in done.out
  if not (workdir / 'eval').is_dir():
    assert 'could not be stored' in done.err, done.tail()
  return json.loads(done.out.splitlines()[-1])


def unstored_results(world: World, times: int) -> Outcome:
  tally, workdir = Tally(), world.path('evaluated')
  shutil.copytree(world.straight().workdir, workdir)
  report = _eval(world, workdir)
  with tally.one('a file in place of eval/'):
    os.rename(workdir / 'eval', workdir / 'aside')
    (workdir / 'eval').write_text('in the way\n')
    assert _eval(world, workdir) == report
  return tally.outcome()


# 34


def changed_by_hand(world: World, times: int) -> Outcome:
  """Files of a run are removed or edited while it runs, or between two sessions."""
  straight, tally = world.straight(), Tally()
  for verb in ('removed', 'renamed')[:times]:
    with tally.one(f'metrics.jsonl is {verb}'):
      workdir = world.path('rotated')
      child = world.train(workdir)
      child.until(lambda workdir=workdir: evidence.last_step(workdir) >= 2)
      log = workdir / 'metrics.jsonl'
      log.unlink() if verb == 'removed' else log.rename(f'{log}.1')
      child.wait().expect(0)
      world.check(workdir, straight)
  with tally.one('run.json is edited'):
    workdir = world.path('edited')
    term = {'do': 'term', 'at': 'step', 'step': 7}
    world.train(workdir, fault=term).wait().expect(4)
    run = json.loads((workdir / 'run.json').read_text())
    run['config']['model']['attn']['rope_base'] = 500.0
    (workdir / 'run.json').write_text(json.dumps(run))
    child = world.train(workdir, model__attn__rope_base=500)
    child.wait().expect(2, 'rope_base: 10000.0 there, 500.0 here')
    world.finish(workdir)
    world.check(workdir, straight)
  return tally.outcome()


ROWS_D = [
  Row('29', 'standard output and error are closed, full, broken', lost_terminals, 5, 1),
  Row('30', 'Ctrl-C, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU', other_signals, len(SIGNALS), 0),
  Row('30b', 'the same signals, also to workers', signals_to_all, len(SIGNALS), 0),
  Row('31', 'a command with --restore_step is repeated', requeued, 3, 1),
  Row('32', 'workdirs with odd names', odd_places, 5, 1),
  Row('33', 'the result of eval.py cannot be stored', unstored_results, 1, 0),
  Row('34', 'metrics.jsonl and run.json are changed by hand', changed_by_hand, 2, 0),
]
