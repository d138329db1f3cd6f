"""Rows of the fault table: a process is killed, or told to leave."""

import functools
import signal
import time
from pathlib import Path

from faults import evidence
from faults.process import Child, Done
from faults.world import SAVES, STEPS, Outcome, Row, Straight, Tally, World

KILLS = 4  # That one run bears, at most, before it is let go on to its end.

# Places of a save, by faulty.py, and whether the step is committed by then. Old steps are
# there to be removed from the third save on.
IN_A_SAVE = {
  'arrays': False,
  'renaming': False,
  'renamed': False,
  'draft': False,
  'committed': True,
}
PRUNING = ('pruning', 'aside', 'pruned')


def leave(world: World, workdir: Path, at: int, *more: dict, **how) -> Done:
  """A run that is told to leave at a step, which it saves -> its end, with code 4."""
  told = {'do': 'term', 'at': 'step', 'step': at}
  done = world.train(workdir, fault=[told, *more], **how).wait().expect(4)
  assert at in evidence.saved(workdir), f'step {at}, at which it left, was not saved'
  return done


# 1


def killed_at_random(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for number in range(-(-times // KILLS)):
    kills = min(KILLS, times - number * KILLS)
    life, env = straight.seconds, {}
    if number % 5 == 4:  # Nothing is compiled yet: that is most of this one's life.
      life, env = life * 2.5, {'JAX_COMPILATION_CACHE_DIR': str(world.path('xla'))}
    with tally.one(f'run {number}, {kills} times', times=kills):
      _killed(world, kills, straight, life=life, env=env)
  return tally.outcome()


def _killed(
  world: World, kills: int, straight: Straight, *, life: float, env: dict[str, str]
) -> None:
  """A run that is killed at some moment after each start; another, if it ends before."""
  workdir = world.path('killed')
  while kills:
    child = world.train(workdir, env=env)
    if _sleep(child, world.random.uniform(0.0, life)):
      child.kill()
      kills -= 1
    else:
      child.wait().expect(0)
      world.check(workdir, straight)
      workdir = world.path('killed')
  world.finish(workdir, env=env)
  world.check(workdir, straight)


def _sleep(child: Child, seconds: float) -> bool:
  """Whether the process lives so long."""
  end = child.begun + seconds
  while child.lives() and time.monotonic() < end:
    time.sleep(0.002)
  return child.lives()


# 2


def killed_in_a_save(world: World, times: int) -> Outcome:
  """Half of the times at each place in turn, at the first save and at a later one."""
  third = 3 * SAVES
  places = [
    *((at, SAVES) for at in IN_A_SAVE),
    *((at, third) for at in PRUNING),
    *((at, third) for at in IN_A_SAVE),
    *((at, 5 * SAVES) for at in PRUNING),
  ]
  straight, tally = world.straight(), Tally()
  for at, step in places if times >= len(places) else places[2 : 2 + times]:
    with tally.one(f'killed at {at} of step {step}'):
      _killed_at(world, at, step, straight)
  while tally.outcome().injected < times:
    _killed_while_writing(world, tally, straight)
  return tally.outcome()


def _killed_at(world: World, at: str, step: int, straight: Straight) -> None:
  workdir = world.path('killed')
  fault = {'do': 'kill', 'at': at, 'step': step}
  world.train(workdir, fault=fault).wait().expect(-signal.SIGKILL)
  committed, there = IN_A_SAVE.get(at, True), evidence.saved(workdir)
  assert (step in there) == committed, f'committed are {there}'
  _goes_on(world, workdir, straight)


def _killed_while_writing(world: World, tally: Tally, straight: Straight) -> None:
  """At any moment while Orbax's temporary folder is there, of a save drawn by lot."""
  workdir = world.path('killed')
  step = world.random.randrange(SAVES, STEPS, SAVES)
  folder = workdir / 'checkpoints'
  writing = lambda: any(
    n.startswith(f'{step}.orbax-checkpoint-tmp') for n in evidence.names(folder)
  )
  child = world.train(workdir)
  if not child.until(writing):
    child.wait().expect(0)  # Too fast to be seen.
    return
  later = world.random.uniform(0.0, 0.15)
  time.sleep(later)
  child.kill()
  with tally.one(f'killed {later:.3f} s into the writing of step {step}'):
    _goes_on(world, workdir, straight)


def _goes_on(world: World, workdir: Path, straight: Straight) -> None:
  """The same command goes on from the last committed step, and ends as it should."""
  there = evidence.saved(workdir)
  world.finish(workdir)
  world.check(workdir, straight)
  restored = evidence.sessions(workdir)[-1]['restored_step']
  assert restored == max(there, default=-1), f'went on from {restored}, not of {there}'


# 3


def told_to_leave(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  while (left := times - tally.outcome().injected) > 0:
    steps = sorted(world.random.sample(range(1, STEPS), min(3, left)))
    with tally.one(f'SIGTERM from step {steps} on', times=len(steps)):
      _told_at(world, steps, straight)
  return tally.outcome()


def _told_at(world: World, steps: list[int], straight: Straight) -> None:
  workdir, at = world.path('told'), 0
  for step in steps:
    child = world.train(workdir)
    child.until(functools.partial(_reached, workdir, max(step, at + 1)))
    child.signal(signal.SIGTERM)
    done = child.wait()
    if done.expect(done.code if done.code == 0 else 4).code == 0:
      break  # It was told at its very last step.
    at = evidence.last_step(workdir)
    assert f'SIGTERM: stopped at step {at}, which is saved' in done.err, done.tail()
    assert at == max(evidence.saved(workdir)), f'left at {at}, which is not saved'
  world.finish(workdir)
  world.check(workdir, straight)


def _reached(workdir: Path, step: int) -> bool:
  return evidence.last_step(workdir) >= step


# 5


def told_twice(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  places = ('arrays', 'renaming', 'draft', 'committed')
  for i in range(times):
    at, step = places[i % len(places)], world.random.randrange(1, STEPS)
    with tally.one(f'a second SIGTERM at {at} of step {step}'):
      _told_again(world, at, step, straight)
  return tally.outcome()


def _told_again(world: World, at: str, step: int, straight: Straight) -> None:
  workdir = world.path('told')
  faults = [
    {'do': 'term', 'at': 'step', 'step': step},
    {'do': 'sleep', 'at': at, 'step': step, 'seconds': 1.0},
  ]
  child = world.train(workdir, fault=faults)
  assert child.until(lambda: f'fault: sleep at {at}' in child.err), child.err
  child.signal(signal.SIGTERM)
  time.sleep(0.2)
  child.signal(signal.SIGTERM)
  child.wait().expect(4)
  assert step in evidence.saved(workdir), f'step {step} was not saved'
  _goes_on(world, workdir, straight)


ROWS_A = [
  Row('1', 'kill -9 at random moments of a life', killed_at_random, 40, 2),
  Row('2', 'kill -9 inside a save', killed_in_a_save, 22, 1),
  Row('3', 'SIGTERM at random steps', told_to_leave, 10, 0),
  Row('5', 'a second SIGTERM while it saves', told_twice, 4, 0),
]
