"""Rows of the fault table: liveness."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from faults import evidence
from faults.rows_b import PAIR, PLAIN
from faults.world import STEPS, Outcome, Row, Straight, Tally, World

AT = 12  # A step that is saved and evaluated.
REST = {'rest': 1.0}  # Seconds of a batch: an evaluation has 16 batches.
SLOW: dict[str, Any] = dict(eval__rows=64, eval__every=AT, checkpoint__every=AT)


def each(world: World, cases: Sequence[Callable[[World, Straight], None]]) -> Outcome:
  """Runs cases, each with its docstring as the name of its fault."""
  tally, straight = Tally(), world.straight()
  for case in cases:
    with tally.one(str(case.__doc__)):
      case(world, straight)
  return tally.outcome()


# 40


def liveness(world: World, times: int) -> Outcome:
  return each(world, LIVENESS[:times])


def _evaluation_outlasts(world: World, _: Straight) -> None:
  """an evaluation takes longer than stuck_after"""
  workdir = world.path('slow')
  child = world.train(workdir, fault=REST, stability__stuck_after=10, **SLOW)
  child.wait().expect(0)
  world.check(workdir, world.straight(**SLOW))


def _stopped_in(world: World, number: int, options: dict[str, Any], step: int) -> None:
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
  workdir = world.path('stopped')
  options: dict[str, Any] = SLOW | PAIR
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

ROWS_E = [
  Row('40', 'long evaluations, signals in them, suspension', liveness, 10, 0),
]
