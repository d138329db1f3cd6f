"""Rows of the fault table: kills and SIGTERM."""

import functools
import signal
import time
from pathlib import Path

from faults import evidence
from faults.process import Child, Done
from faults.world import SAVES, STEPS, Outcome, Row, Straight, Tally, World

KILLS = 4  # The most kills of one run before it may run to its end.

# Places of a save in faulty.py, and whether the step is committed there. Old steps are
# removed from the third save on.
IN_A_SAVE = {
  'arrays': False,
  'renaming': False,
  'renamed': False,
  'draft': False,
  'committed': True,
}
PRUNING = ('pruning', 'aside', 'pruned')


def preempt(world: World, workdir: Path, at: int, *more: dict, **options) -> Done:
  """A run that gets SIGTERM at a step -> its end, with code 4 and that step saved."""
  fault = {'do': 'term', 'at': 'step', 'step': at}
  done = world.train(workdir, fault=[fault, *more], **options).wait().expect(4)
  assert at in evidence.saved(workdir), f'step {at} of the SIGTERM was not saved'
  return done


# 1


def killed_at_random(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for number in range(-(-times // KILLS)):
    kills = min(KILLS, times - number * KILLS)
    life, env = straight.seconds, {}
    if number % 5 == 4:  # An empty compilation cache: this run mostly compiles.
      life, env = life * 2.5, {'JAX_COMPILATION_CACHE_DIR': str(world.path('xla'))}
    with tally.one(f'run {number}, {kills} times', times=kills):
      _killed(world, kills, straight, life=life, env=env)
  return tally.outcome()


def _killed(
  world: World, kills: int, straight: Straight, *, life: float, env: dict[str, str]
) -> None:
  """Kills a run at a random moment of each session; a run that ends first is replaced."""
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
  """Waits for `seconds` -> whether the process still runs."""
  end = child.started + seconds
  while child.lives() and time.monotonic() < end:
    time.sleep(0.002)
  return child.lives()


# 2


def killed_in_a_save(world: World, times: int) -> Outcome:
  """Kills at each place in turn, in the first save and in a later one."""
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
  committed, saved = IN_A_SAVE.get(at, True), evidence.saved(workdir)
  assert (step in saved) == committed, f'committed steps: {saved}'
  _resumes(world, workdir, straight)


def _killed_while_writing(world: World, tally: Tally, straight: Straight) -> None:
  """Kills at a random moment while the temporary folder of a random save exists."""
  workdir = world.path('killed')
  step = world.random.randrange(SAVES, STEPS, SAVES)
  folder = workdir / 'checkpoints'
  writing = lambda: any(
    n.startswith(f'{step}.orbax-checkpoint-tmp') for n in evidence.names(folder)
  )
  child = world.train(workdir)
  if not child.until(writing):
    child.wait().expect(0)  # The save was too fast.
    return
  delay = world.random.uniform(0.0, 0.15)
  time.sleep(delay)
  child.kill()
  with tally.one(f'killed {delay:.3f} s into the writing of step {step}'):
    _resumes(world, workdir, straight)


def _resumes(world: World, workdir: Path, straight: Straight) -> None:
  """Checks that the same command resumes from the last committed step, and its end."""
  saved = evidence.saved(workdir)
  world.finish(workdir)
  world.check(workdir, straight)
  restored = evidence.sessions(workdir)[-1]['restored_step']
  assert restored == max(saved, default=-1), f'resumed from {restored}, saved: {saved}'


# 3


def preempted(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  while (left := times - tally.outcome().injected) > 0:
    steps = sorted(world.random.sample(range(1, STEPS), min(3, left)))
    with tally.one(f'SIGTERM from step {steps} on', times=len(steps)):
      _preempt_at(world, steps, straight)
  return tally.outcome()


def _preempt_at(world: World, steps: list[int], straight: Straight) -> None:
  workdir, at = world.path('preempted'), 0
  for step in steps:
    child = world.train(workdir)
    child.until(functools.partial(_reached, workdir, max(step, at + 1)))
    child.signal(signal.SIGTERM)
    done = child.wait()
    if done.expect(done.code if done.code == 0 else 4).code == 0:
      break  # The signal came at the last step.
    at = evidence.last_step(workdir)
    assert f'SIGTERM: stopped at step {at}, which is saved' in done.err, done.tail()
    assert at == max(evidence.saved(workdir)), f'stopped at {at}, which is not saved'
  world.finish(workdir)
  world.check(workdir, straight)


def _reached(workdir: Path, step: int) -> bool:
  return evidence.last_step(workdir) >= step


# 5


def second_sigterm(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  places = ('arrays', 'renaming', 'draft', 'committed')
  for i in range(times):
    at, step = places[i % len(places)], world.random.randrange(1, STEPS)
    with tally.one(f'a second SIGTERM at {at} of step {step}'):
      _second_sigterm(world, at, step, straight)
  return tally.outcome()


def _second_sigterm(world: World, at: str, step: int, straight: Straight) -> None:
  workdir = world.path('preempted')
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
  _resumes(world, workdir, straight)


ROWS_A = [
  Row('1', 'kill -9 at random moments of a run', killed_at_random, 40, 1),
  Row('2', 'kill -9 inside a save', killed_in_a_save, 22, 1),
  Row('3', 'SIGTERM at random steps', preempted, 10, 0),
  Row('5', 'a second SIGTERM during a save', second_sigterm, 4, 0),
]
