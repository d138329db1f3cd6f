"""Rows of the fault table: odd environments, limits of a process, states of a workdir."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import evidence, process
from faults.rows_d_names import dry
from faults.world import Outcome, Row, Tally, World, arguments

# 57


def _shell(world: World, workdir: Path, before: str, python: str = '') -> process.Done:
  """Runs train.py after shell commands, such as `ulimit -n 64`."""
  words = sys.executable, *shlex.split(python), *map(str, arguments(workdir))
  program = shlex.join(words)
  env = process.environment(world.straight().workdir.parents[1] / 'xla', 1, exact=True)
  done = subprocess.run(
    ['bash', '-c', f'{before}\nexec {program}'],
    cwd=process.ROOT,
    env=env,
    timeout=300,
    check=False,
    capture_output=True,
    text=True,
    errors='replace',
  )
  return process.Done(done.returncode, done.stdout, done.stderr)


# What is done before -> the exit codes that are right. After 0, the bits are those of an
# undisturbed run; after another code, the same command without it goes on to them.
SHELLS: dict[str, tuple[str, tuple[int, ...]]] = {
  'PYTHONHASHSEED is set': ('export PYTHONHASHSEED=7', (0,)),
  'no HOME, no LANG, another TZ': (
    'unset HOME LANG LC_ALL; export TZ=Asia/Kathmandu LC_ALL=C PYTHONUTF8=0',
    (0,),
  ),
  'COLUMNS=0, TERM=dumb': ('export COLUMNS=0 LINES=x TERM=dumb', (0,)),
  'SIGCHLD is ignored': ("trap '' CHLD", (0,)),
  'SIGPIPE and SIGTERM are ignored': ("trap '' PIPE TERM", (0,)),
  'umask 0': ('umask 0', (0,)),
  '48 open files': ('ulimit -n 48', (0, 2, 7, 9)),
  'files of 64 kB': ('ulimit -f 64', (7,)),
  'no core, a small stack': ('ulimit -c 0 -s 1024', (0,)),
  'JAX_DEBUG_NANS=1': ('export JAX_DEBUG_NANS=1', (0, 2)),
  'JAX_PLATFORMS names no platform': ('export JAX_PLATFORMS=abacus', (2,)),
  'the compilation cache is a file': (
    'export JAX_COMPILATION_CACHE_DIR=$PWD/README.md',
    (0,),
  ),
  'TMPDIR is missing': ('export TMPDIR=/nonexistent/tmp', (0,)),
}


def environments(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for fault, (before, codes) in list(SHELLS.items())[:times]:
    with tally.one(fault):
      workdir = world.path('odd')
      done = _shell(world, workdir, before)
      assert done.code in codes, done.tail()
      if done.code:
        done.expect(done.code)
        world.finish(workdir)
      world.check(workdir, straight)
  with tally.one('python -OO'):
    workdir = world.path('optimized')
    _shell(world, workdir, '', '-OO').expect(0)
    world.check(workdir, straight)
  with tally.one('programs in the compilation cache are damaged'):
    cache, workdir = world.path('xla'), world.path('run')
    shutil.copytree(straight.workdir.parents[1] / 'xla', cache)
    for path in filter(Path.is_file, cache.rglob('*')):
      os.truncate(path, path.stat().st_size // 2)
    world.finish(workdir, env={'JAX_COMPILATION_CACHE_DIR': str(cache)})
    world.check(workdir, straight)
  return tally.outcome()


# 58


def _loop(workdir: Path) -> None:
  workdir.symlink_to(workdir.name)


def _dangling(workdir: Path) -> None:
  workdir.symlink_to('nowhere')


def _fifo(workdir: Path) -> None:
  (workdir / 'metrics.jsonl').unlink()
  os.mkfifo(workdir / 'metrics.jsonl')


def _crlf(workdir: Path) -> None:
  path = workdir / 'metrics.jsonl'
  path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))


def _mark(name: str) -> Callable[[Path], None]:
  def change(workdir: Path) -> None:
    path = workdir / name
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())

  return change


def _json(name: str, **fields: Any) -> Callable[[Path], None]:
  def change(workdir: Path) -> None:
    path = workdir / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))

  return change


def _nothing(workdir: Path) -> None:
  pass


# The state of a workdir -> its change, whether a run was there, exit code and message.
STATES: dict[str, tuple[Callable[[Path], None], bool, int, str]] = {
  'a symbolic link to itself': (_loop, False, 2, '--workdir='),
  'a symbolic link to nothing': (_dangling, False, 2, '--workdir='),
  'metrics.jsonl is a pipe': (_fifo, True, 2, 'metrics.jsonl is not a writable file'),
  'metrics.jsonl with the lines of Windows': (_crlf, True, 0, ''),
  'a byte order mark in metrics.jsonl': (_mark('metrics.jsonl'), True, 0, ''),
  'a byte order mark in run.json': (_mark('run.json'), True, 0, ''),
  'run.json without sessions': (_json('run.json', sessions=[]), True, 0, ''),
  'sessions of run.json are text': (
    _json('run.json', sessions='abc'),
    True,
    2,
    'damaged',
  ),
  'outcome.json of a later version': (_json('outcome.json', code=99), True, 0, ''),
  'outcome.json is no object': (
    lambda w: (w / 'outcome.json').write_text('[1]') and None,
    True,
    0,
    '',
  ),
  'nothing': (_nothing, True, 0, ''),
}


def states(world: World, times: int) -> Outcome:
  """A run, or its refusal, in a workdir that is odd."""
  tally, first = Tally(), world.path('first')
  world.finish(first)
  workdirs, cwd = [], world.path('cwd')
  for change, exists, *_ in list(STATES.values())[:times]:
    workdirs.append(world.path('state'))
    if exists:
      shutil.copytree(first, workdirs[-1])
    change(workdirs[-1])
  cwd.mkdir()
  done = world.many([dry(f'--workdir={w}') for w in workdirs], cwd=cwd)
  for (fault, (_, _, code, says)), end in zip(STATES.items(), done, strict=False):
    with tally.one(fault):
      end.expect(code, says)
      assert 'Traceback' not in end.err, end.tail()
  _in_place(world, tally, first)
  return tally.outcome()


def _in_place(world: World, tally: Tally, first: Path) -> None:
  with tally.one('the cache is a file'):
    path = world.path('file')
    path.write_text('in the way\n')
    [end] = world.many(
      [dry(f'--workdir={world.path()}')], env={'XDG_CACHE_HOME': str(path)}
    )
    end.expect(2, str(path))
  with tally.one('a second name of a workdir in use'):
    workdir, link = world.path('used'), world.path('link')
    child = world.train(workdir, fault={'do': 'stop', 'at': 'step', 'step': 5})
    assert child.until(lambda: 'fault: stop' in child.err), child.err
    link.symlink_to(workdir)
    world.train(link).wait().expect(2, 'is in use by process')
    child.kill()
    world.finish(link)
    world.check(workdir, world.straight())
  with tally.one('a workdir beyond a link and ..'):
    folder, workdir = world.path('folder'), world.path('beside') / 'run'
    (workdir.parent / 'deep').mkdir(parents=True)
    folder.mkdir()
    (folder / 'link').symlink_to(workdir.parent / 'deep')
    world.finish(folder / 'link' / '..' / 'run')
    world.check(workdir, world.straight())
    assert os.listdir(folder) == ['link'], os.listdir(folder)
  with tally.one('a workdir is renamed, and copied, between two sessions'):
    workdir, moved, copy = world.path('here'), world.path('there'), world.path('copy')
    term = {'do': 'term', 'at': 'step', 'step': 6}
    world.train(workdir, fault=term).wait().expect(4)
    workdir.rename(moved)
    shutil.copytree(moved, copy)
    for place, done in zip(
      (moved, copy), world.many([arguments(moved), arguments(copy)]), strict=True
    ):
      done.expect(0, 'resumed at step 6')
      world.check(place, world.straight())
    assert not workdir.exists(), list(workdir.rglob('*'))


# 59


def used_steps(world: World, times: int) -> Outcome:
  """Runs and evaluations of a run that keeps one step and saves at each."""
  tally, source = Tally(), world.path('source')
  knobs: dict[str, Any] = dict(checkpoint__every=1, checkpoint__keep=1, steps=9999)
  run = world.train(source, eval__every=9999, **knobs)
  assert run.until(lambda: evidence.saved(source)), run.err
  for _ in range(times):
    with tally.one('init_from a run that removes its steps'):
      before = max(evidence.saved(source))
      world.finish(world.path('heir'), init_from=source, steps=1)
      assert before not in evidence.saved(source), 'the step was not removed'
    for step in ('latest', 'best'):
      with tally.one(f'eval.py --step={step} of a run that removes its steps'):
        flags = ['--rows=2', '--yardsticks=none', f'--step={step}']
        done = world.spawn(['eval.py', f'--workdir={source}', *flags]).wait().expect(0)
        measured = json.loads(done.out.splitlines()[-1])['step']
        assert (source / 'eval' / f'{measured}.json').exists(), done.tail()
        assert measured not in evidence.saved(source), 'the step was not removed'
  run.signal(signal.SIGTERM)
  run.wait().expect(4)
  return tally.outcome()


ROWS_D = [
  Row('59', 'a step that init_from or eval.py uses is removed', used_steps, 1, 0),
  Row('57', 'odd environments and limits of a process', environments, len(SHELLS), 0),
  Row('58', 'odd states of a workdir', states, len(STATES), 0),
]
