"""Rows of the fault table: several processes, and changes of their number or mesh.

All runs use faulty.py, mostly without a fault: JAX caches only the compilations of
process 0, and hooks.py caches those of the others.
"""

import functools
import re
import signal
import time
from pathlib import Path

from faults import evidence
from faults.process import Child
from faults.world import STEPS, Outcome, Row, Straight, Tally, World

PLAIN = {'tell': 'restored'}  # No fault, but run by faulty.py.
PAIR = dict(processes=2, faults={0: PLAIN, 1: PLAIN})
PEER_TIMEOUT = 10
LOST, STUCK = (5, -signal.SIGABRT, 134), 6


def slowly(seconds: float = 0.2, last: int = STEPS) -> list[dict]:
  """Makes every step take `seconds`: JAX checks for a signal once a second."""
  rest = dict(do='sleep', at='step', seconds=seconds)
  return [PLAIN, *(rest | {'step': step} for step in range(1, last + 1))]


# 4


def one_of_two_preempted(world: World, times: int) -> Outcome:
  straight, tally = world.straight(**PAIR), Tally()
  while (left := times - (count := tally.outcome().injected)) > 0:
    steps = [world.random.randrange(1, 6), world.random.randrange(11, 16)][:left]
    processes = [(count + i) % 2 for i in range(len(steps))]
    with tally.one(
      f'SIGTERM to process {processes} from step {steps} on', times=len(steps)
    ):
      workdir = world.path('preempted')
      for step, process in zip(steps, processes):
        _preempt(world, workdir, step, process)
      world.finish(workdir, **PAIR)
      world.check(workdir, straight)
  return tally.outcome()


def _preempt(world: World, workdir: Path, step: int, process: int, twice=False) -> None:
  """SIGTERM to one of two processes, once or twice: both stop, and the step is saved."""
  resting = slowly()
  if twice:
    sleep = dict(do='sleep', at='renaming', seconds=1.5)
    resting += [sleep | {'step': n} for n in range(1, STEPS + 1) if n % 4]
  children = world.group(workdir, faults={0: resting, 1: PLAIN})
  children[process].until(lambda: evidence.last_step(workdir) >= step)
  children[process].signal(signal.SIGTERM)
  if twice:
    # A regular save does not sleep; then the second signal comes after the stop.
    texts = ('fault: sleep at renaming', 'SIGTERM: stopped')
    assert children[0].until(lambda: any(text in children[0].err for text in texts))
    for child in children:
      child.signal(signal.SIGTERM)
  ended = [child.wait().expect(4) for child in children]
  at = evidence.last_step(workdir)
  assert f'SIGTERM: stopped at step {at}, which is saved' in ended[0].err, ended[0].tail()
  assert at == max(evidence.saved(workdir)), f'stopped at {at}, which is not saved'


# 5b


def second_sigterm_of_two(world: World, times: int) -> Outcome:
  straight, tally = world.straight(**PAIR), Tally()
  for i in range(times):
    step = world.random.randrange(1, 14)
    with tally.one(
      f'a second SIGTERM during the save of process {i % 2}, from step {step} on'
    ):
      workdir = world.path('preempted')
      _preempt(world, workdir, step, i % 2, twice=True)
      world.finish(workdir, **PAIR)
      world.check(workdir, straight)
  return tally.outcome()


# 12

MESHES = (
  dict(devices=8, mesh__fsdp=8),
  dict(devices=8, mesh__fsdp=4, mesh__tensor=2),
  dict(devices=8, mesh__data=2, mesh__fsdp=2, mesh__context=2),
  dict(devices=1),
  dict(devices=4, mesh__fsdp=1, mesh__tensor=2, mesh__context=2),
  dict(devices=2, mesh__fsdp=2),
)


def other_meshes(world: World, times: int) -> Outcome:
  tally, workdir = Tally(), world.path('meshes')
  meshes, digest = MESHES[: times + 1], ''
  for i, mesh in enumerate(meshes):
    at = 4 * (i + 1) if mesh is not meshes[-1] else STEPS
    term = {'do': 'term', 'at': 'step', 'step': at}
    child = world.train(workdir, fault=[PLAIN, term] if at < STEPS else PLAIN, **mesh)
    done = child.wait().expect(4 if at < STEPS else 0)
    if i:
      with tally.one(f'{meshes[i - 1]} -> {mesh}'):
        _restored(done.err, 4 * i, digest)
        if at == STEPS:
          _check_losses(workdir, world.straight())
    digest = world.digest(workdir, at)
  return tally.outcome()


def _restored(err: str, step: int, digest: str) -> None:
  """AssertionError unless the process restored exactly these bits."""
  restored = re.findall(r'restored: step (\d+) is (\w+)', err)
  assert restored == [(str(step), digest)], f'restored {restored}, not {step}: {digest}'


def _check_losses(workdir: Path, straight: Straight) -> None:
  """AssertionError unless all steps have the losses of the undisturbed run, to 1e-5."""
  for kind, expected in (('train', straight.losses), ('heldout', straight.heldout)):
    actual = evidence.losses(workdir, kind)
    assert [step for step, _ in actual] == [step for step, _ in expected], (
      f'{kind}: {actual}'
    )
    off = max(abs(a - b) for (_, a), (_, b) in zip(actual, expected))
    assert off < 1e-5, f'{kind}: losses differ by {off}'


# 13


def other_numbers_of_processes(world: World, times: int) -> Outcome:
  tally = Tally()
  for counts in ((1, 2, 1), (2, 1, 2))[: (times + 1) // 2]:
    workdir, digest, before = world.path('processes'), '', 0
    for i, count in enumerate(counts):
      errs = _some_steps(world, workdir, count, before, last=i == len(counts) - 1)
      if i:
        with tally.one(f'{counts[i - 1]} -> {count} processes'):
          for err in errs:
            _restored(err, before, digest)
          if i == len(counts) - 1:
            _check_losses(workdir, world.straight())
      before = max(evidence.saved(workdir))
      digest = world.digest(workdir, before)
  return tally.outcome()


def _some_steps(
  world: World, workdir: Path, count: int, step: int, *, last: bool
) -> list[str]:
  """Resumes with `count` processes, for some steps or to the end -> their stderr."""
  term = {'do': 'term', 'at': 'step', 'step': step + 3}
  faults = slowly() if count > 1 and not last else [PLAIN]
  faults += [] if last else [term]
  if count == 1:
    children = [world.train(workdir, fault=faults)]
  else:
    children = world.group(workdir, faults={0: faults, 1: PLAIN})
  return [child.wait().expect(0 if last else 4).err for child in children]


# 18


def peers(world: World, times: int) -> Outcome:
  cases = [
    functools.partial(_alone_stuck, world),
    *(
      functools.partial(_peer, world, do, who)
      for do in ('kill', 'stop')
      for who in (0, 1)
    ),
    functools.partial(_peer_stuck, world),
  ]
  tally = Tally()
  for case in cases[:times]:
    arguments = [str(part) for part in case.args if part is not world]
    with tally.one(' '.join([case.func.__name__[1:], *arguments])):
      case()
  return tally.outcome()


def _peer(world: World, do: str, who: int) -> None:
  """One process is killed or stopped: the other exits in time, and names it."""
  workdir, straight = world.path('peer'), world.straight(**PAIR)
  step = world.random.randrange(6, STEPS)
  fault = [PLAIN, {'do': do, 'at': 'step', 'step': step}]
  children = world.group(
    workdir,
    faults={who: fault, 1 - who: PLAIN},
    stability__peer_timeout=PEER_TIMEOUT,
  )
  lost, left = children[who], children[1 - who]
  lost.until(lambda: f'fault: {do} at step' in lost.err)
  started = time.monotonic()
  done = left.wait(4 * PEER_TIMEOUT)
  seconds = time.monotonic() - started
  lost.kill()
  assert done.code in LOST, f'exit code {done.code}: {done.tail()}'
  assert seconds < 2.5 * PEER_TIMEOUT, f'it took {seconds:.0f} s'
  # JAX names process 0 by its service, the coordination service.
  pattern = 'oordination.?[sS]ervice' if who == 0 else r'unhealthy[^\n]*\n\s*1\n'
  assert re.search(pattern, done.err), f'no process is named: {done.err[:1500]}'
  world.finish(workdir, **PAIR)
  world.check(workdir, straight)


def _stuck(children: list[Child], workdir: Path, world: World) -> None:
  for child in children:
    done = child.wait(60).expect(STUCK, 'config.stability.stuck_after=8', 'File "')
    assert 'no progress for' in done.err, done.tail()


def _alone_stuck(world: World) -> None:
  workdir, straight = world.path('stuck'), world.straight()
  fault = {'do': 'stall', 'at': 'step', 'step': world.random.randrange(2, STEPS)}
  child = world.train(workdir, fault=fault, stability__stuck_after=8.0)
  _stuck([child], workdir, world)
  world.finish(workdir)
  world.check(workdir, straight)


def _peer_stuck(world: World) -> None:
  """One of two processes waits forever, with heartbeats: no runtime would end it."""
  workdir, straight = world.path('stuck'), world.straight(**PAIR)
  fault = {'do': 'stall', 'at': 'step', 'step': world.random.randrange(8, STEPS)}
  children = world.group(
    workdir, faults={0: PLAIN, 1: [PLAIN, fault]}, stability__stuck_after=8.0
  )
  _stuck(children, workdir, world)
  world.finish(workdir, **PAIR)
  world.check(workdir, straight)


ROWS_B = [
  Row('4', 'SIGTERM to one of two processes', one_of_two_preempted, 10, 0),
  Row(
    '5b', 'a second SIGTERM during a save of two processes', second_sigterm_of_two, 2, 0
  ),
  Row('12', 'a different mesh on resumption', other_meshes, 5, 0),
  Row('13', 'a different number of processes', other_numbers_of_processes, 4, 0),
  Row('18', 'a process is killed, stopped or stuck', peers, 6, 0),
]
