"""Rows of the fault table: non-finite numbers and spikes."""

import functools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from faults import evidence, history
from faults.world import STEPS, Outcome, Row, Tally, World

from gated.run.checkpoint import head

NEVER = [10**6, 10**6]  # Steps that never come.
TELL = {'tell': 'restored'}
UNSTABLE = 3

Faults = list[dict]
Case = tuple[int, Callable[[World], None]]  # The number of faults, and the function.


def bad(do: str, what: str, *spans: tuple[int, int], by: str = 'step') -> Faults:
  """Faults of the numbers at some steps; `do` is nan, inf or x100."""
  options = {'do': 'scale', 'factor': 100.0} if do == 'x100' else {'do': do}
  return [TELL, *(options | {'what': what, 'steps': list(s), 'by': by} for s in spans)]


def never(faults: Faults) -> Faults:
  """The same faults at steps that never come, for the same compiled program."""
  return [f | {'steps': NEVER} if 'steps' in f else f for f in faults]


def cases(every: Sequence[Case]) -> Callable[[World, int], Outcome]:
  """Cases -> a row's function, which runs them until `times` faults are injected."""

  def run(world: World, times: int) -> Outcome:
    tally = Tally()
    for count, case in every:
      if tally.outcome().injected >= times:
        break
      arguments = getattr(case, 'args', ())
      name = getattr(case, 'func', case).__name__.replace('_', ' ')
      with tally.one(' '.join(map(str, [name, *arguments])), times=count):
        case(world)
    return tally.outcome()

  return run


def case(run: Callable, *arguments, times: int = 1) -> Case:
  """A function with its first arguments -> a case of `times` faults."""
  return times, functools.partial(run, *arguments)


# 15. During the ten steps of warm-up and after them, alone and five in a row.

SPANS = ((2, 2), (4, 8), (14, 14), (16, 20))
WARM = dict(optim__warmup=10, checkpoint__keep=50)


def steps_of(spans: Sequence[tuple[int, int]]) -> list[int]:
  return [step for first, last in spans for step in range(first, last + 1)]


def skipped(what: str, do: str, world: World) -> None:
  faults, bad_steps = bad(do, what, *SPANS), steps_of(SPANS)
  workdir, reference = world.path('skipped'), world.path('reference')
  message = 'unstable steps: 12 bad steps, 12 skipped updates'
  world.train(workdir, fault=faults, **WARM).wait().expect(0, message)
  omitted = [*never(faults), {'omit': bad_steps}]
  world.finish(reference, fault=omitted, checkpoint__every=3, **WARM)
  # Saves are due at 4, 8, ..., and wait for the next good step.
  assert evidence.saved(workdir) == [9, 12, 21, 24], evidence.saved(workdir)
  _check_left_out(world, workdir, reference, bad_steps)


def _check_left_out(
  world: World, workdir: Path, reference: Path, bad_steps: list[int]
) -> None:
  """AssertionError unless the run continued as if those updates did not exist."""
  history.check_finite(world, workdir)
  for step in set(evidence.saved(workdir)) & set(evidence.saved(reference)):
    actual, expected = (history.trained(world, w, step) for w in (workdir, reference))
    assert actual == expected, (
      f'step {step} has different bits than without those updates'
    )
  results, expected = history.values(workdir), history.values(reference)
  assert list(results) == list(range(1, STEPS + 1)), list(results)
  in_row = 0
  for step, values in results.items():
    in_row = in_row + 1 if step in bad_steps else 0
    counters = values['bad_in_row'], values['skipped'], values['verdict']
    target = in_row, sum(s <= step for s in bad_steps), 2 if step in bad_steps else 0
    assert counters == target, (
      f'step {step}: (in a row, skipped, verdict) = {counters}, not {target}'
    )
    assert in_row or values['loss'] == expected[step]['loss'], (
      f'step {step}: other losses'
    )
  assert history.events(workdir) == [(step, step - 1, 'note') for step in bad_steps]
  data = history.corpus()
  for event in history.read_events(workdir):
    assert event['skipped']
    assert event['records'] == data.record_ids(event['data_step']), event


def poisoned(do: str, span: tuple[int, int], on_spike: str, world: World) -> None:
  faults, options = (
    bad(do, 'parameters', span),
    dict(stability__on_spike=on_spike, **WARM),
  )
  straight, workdir = (
    world.straight(fault=never(faults), **options),
    world.path('poisoned'),
  )
  message = (
    f'step {span[0]}: the parameter norm is',
    'the last saved step is',
  )
  world.train(workdir, fault=faults, **options).wait().expect(UNSTABLE, *message)
  assert evidence.saved(workdir) == list(range(4, span[0], 4)), evidence.saved(workdir)
  history.check_finite(world, workdir)
  assert history.events(workdir)[-1] == (span[0], span[0] - 1, 'stop')
  world.finish(workdir, fault=never(faults), **options)
  world.check(workdir, straight)
  assert history.events(workdir) == []


def poisoned_data(do: str, span: tuple[int, int], world: World) -> None:
  """A batch that poisons the parameters is rolled back and skipped."""
  faults = bad(do, 'parameters', span, by='data_step')
  good = (span[0] - 1) // 4 * 4
  events = [(span[0], span[0] - 1)]
  # The next batch is the first of the new session.
  events += [(good + 1, data_step) for data_step in range(span[0], span[1])]
  _check_rollback(world, faults, good, events)


def _check_rollback(
  world: World, faults: Faults, good: int, events: list[tuple[int, int]], **knobs
) -> Path:
  """AssertionError unless each event restores `good`, and the run ends correctly."""
  options = WARM | dict(stability__on_spike='rollback') | knobs
  straight, workdir = world.straight(fault=never(faults), **options), world.path('back')
  done = world.train(workdir, fault=faults, **options).wait()
  done.expect(0, f'{len(events)} rollbacks', f'rolling back to step {good}')
  back = f'restored: step {good} is {world.digest(straight.workdir, good)}'
  assert done.err.count(back) == len(events), f'no {back}: {done.tail()}'
  rollbacks = [e for e in history.events(workdir) if e[2] == 'rollback']
  assert rollbacks == [(*event, 'rollback') for event in events], rollbacks
  _check_continuation(world, workdir, straight.workdir, good, faults, **options)
  return workdir


def _check_continuation(
  world: World, workdir: Path, source: Path, good: int, faults: Faults, **options
) -> None:
  """AssertionError unless a run ended as one whose data step was set by hand."""
  data_step = history.events(workdir)[-1][1] + 1
  reference = history.continued_from(
    world, source, good, data_step, fault=never(faults), **options
  )
  assert world.digest(workdir, STEPS) == world.digest(reference, STEPS), 'different bits'
  results = [evidence.losses(w) for w in (workdir, reference)]
  assert results[0] == results[1], 'different losses than with that data'
  assert [step for step, _ in results[0]] == list(range(1, STEPS + 1))
  history.check_finite(world, workdir)


def too_many(world: World) -> None:
  faults, options = bad('nan', 'loss', (9, 30)), dict(stability__max_bad_steps=5, **WARM)
  straight, workdir = world.straight(fault=never(faults), **options), world.path('many')
  message = 'step 13: 5 bad steps in a row (config.stability.max_bad_steps=5)'
  world.train(workdir, fault=faults, **options).wait().expect(UNSTABLE, message)
  assert evidence.saved(workdir) == [4, 8]
  assert [e[2] for e in history.events(workdir)] == ['note'] * 4 + ['stop']
  world.finish(workdir, fault=never(faults), **options)
  world.check(workdir, straight)


def too_many_of_the_data(world: World) -> None:
  faults = bad('nan', 'loss', (9, 13), by='data_step')
  workdir = _check_rollback(world, faults, 8, [(13, 12)], stability__max_bad_steps=5)
  assert [e[2] for e in history.events(workdir)] == ['note'] * 4 + ['rollback']


def in_two_processes(world: World) -> None:
  faults = bad('nan', 'loss', (5, 5)) + bad('inf', 'gradients', (10, 14))[1:]
  bad_steps = [5, *range(10, 15)]
  workdir, reference = world.path('pair'), world.path('reference')
  omitted = [*never(faults), {'omit': bad_steps}]
  for where, both in ((workdir, faults), (reference, omitted)):
    options = dict(checkpoint__keep=50, checkpoint__every=4 if where is workdir else 3)
    world.finish(where, processes=2, faults={0: both, 1: both}, **options)
  assert evidence.saved(workdir) == [4, 8, 15, 16, 20, 24], evidence.saved(workdir)
  _check_left_out(world, workdir, reference, bad_steps)


NOT_FINITE = [
  *(
    case(skipped, what, do, times=len(SPANS))
    for what in ('loss', 'gradients')
    for do in ('nan', 'inf')
  ),
  *(
    case(poisoned, do, span, {'nan': 'none', 'inf': 'skip'}[do])
    for do in ('nan', 'inf')
    for span in ((2, 2), (2, 6), (14, 14), (14, 18))
  ),
  *(
    case(poisoned_data, do, span)
    for do, span in (
      ('nan', (2, 2)),
      ('inf', (2, 6)),
      ('inf', (14, 14)),
      ('nan', (14, 18)),
    )
  ),
  case(too_many),
  case(too_many_of_the_data),
  case(in_two_processes, times=2),
]


# 16

SPIKE = 14  # The bad batch, counted from 1.
WINDOW = dict(stability__window=8, stability__threshold=6.0, checkpoint__keep=50)
BACK = WINDOW | dict(stability__on_spike='rollback')


def spike(what: str = 'loss', *at: int, by: str = 'data_step') -> Faults:
  return bad('x100', what, *((n, n) for n in at or (SPIKE,)), by=by)


def spike_is_rolled_back(what: str, world: World) -> None:
  workdir = _check_rollback(world, spike(what), 12, [(SPIKE, SPIKE - 1)], **BACK)
  (event,) = history.read_events(workdir)
  z = max(event['loss_zscore'], event['grad_norm_zscore'])
  assert z > 6 and event['skipped'] and event['grad_norm'] > 1, event
  assert event['records'] == history.corpus().record_ids(SPIKE - 1), event
  path = evidence.committed(workdir, STEPS) / 'manifest.json'
  counts = json.loads(path.read_text())['about']['stability']
  assert counts == {'bad steps': 1, 'skipped updates': 1, 'rollbacks': 1}, counts


def no_step_is_a_spike_without_a_fault(world: World) -> None:
  """Without a fault, no step counts as a spike."""
  straight = world.straight(fault=never(spike()), **WARM | BACK)
  assert history.events(straight.workdir) == []


def killed_after_a_rollback(world: World) -> None:
  faults, options = spike(), WARM | BACK
  straight, workdir = world.straight(fault=never(faults), **options), world.path('killed')
  # Step 16 comes after the rollback to 12; the kill comes before its save.
  kill = {'do': 'kill', 'at': 'step', 'step': 16}
  world.train(workdir, fault=[*faults, kill], **options).wait().expect(-signal.SIGKILL)
  assert evidence.saved(workdir) == [0, 4, 8, 12], evidence.saved(workdir)
  position = head.read(workdir / 'checkpoints')
  assert (position.step, position.data_step) == (12, SPIKE), position
  world.finish(workdir, fault=faults, **options)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'rollback')]
  _check_continuation(world, workdir, straight.workdir, 12, faults, **options)


def spike_in_two_processes(world: World) -> None:
  faults, harmless = spike(), never(spike())
  options, both = WARM | BACK, lambda each: dict(processes=2, faults={0: each, 1: each})
  straight, workdir = world.straight(**both(harmless), **options), world.path('pair')
  done = world.finish(workdir, **both(faults), **options)
  done.expect(0, '1 rollbacks', 'rolling back to step 12')
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'rollback')]
  where = world, straight.workdir, 12, SPIKE
  reference = history.continued_from(*where, **both(harmless), **options)
  assert world.digest(workdir, STEPS) == world.digest(reference, STEPS), 'different bits'
  assert evidence.losses(workdir) == evidence.losses(reference), 'different losses'


def spike_before_any_save(world: World) -> None:
  _check_rollback(world, spike('loss', 7), 0, [(7, 6)], **BACK, checkpoint__every=100)


def spike_after_spike(world: World) -> None:
  """The batch after the bad one is bad as well."""
  _check_rollback(
    world, spike('loss', 14, 15, 19), 12, [(14, 13), (13, 14), (16, 18)], **BACK
  )


def too_many_rollbacks(world: World) -> None:
  faults, options = spike('loss', 14, 19), BACK | dict(stability__max_rollbacks=1)
  workdir = world.path('spent')
  message = 'no rollback is left (config.stability.max_rollbacks=1)'
  world.train(workdir, fault=faults, **options).wait().expect(UNSTABLE, message)
  assert [e[2] for e in history.events(workdir)] == ['rollback', 'stop']
  # A new session has no rollback either.
  world.train(workdir, fault=faults, **options).wait().expect(UNSTABLE, message)
  assert [e[2] for e in history.events(workdir)] == ['rollback', 'stop']


def spike_is_skipped(what: str, world: World) -> None:
  faults, options = spike(what, by='step'), WINDOW | dict(stability__on_spike='skip')
  workdir, reference = world.path('skip'), world.path('reference')
  message = 'unstable steps: 1 bad steps, 1 skipped updates'
  world.train(workdir, fault=faults, **options).wait().expect(0, message)
  world.finish(reference, fault=[*never(faults), {'omit': [SPIKE]}], **options)
  _check_same_training(world, workdir, reference)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'note')]


def spike_is_noted(world: World) -> None:
  """A run without spike detection trains the same."""
  faults, workdir, undetected = (
    spike(by='step'),
    world.path('none'),
    world.path('undetected'),
  )
  message = 'unstable steps: 1 bad steps (spikes.jsonl)'
  world.train(workdir, fault=faults, **WINDOW).wait().expect(0, message)
  options = WINDOW | dict(stability__threshold=1e9)
  done = world.train(undetected, fault=faults, **options).wait().expect(0)
  assert 'unstable steps' not in done.err
  _check_same_training(world, workdir, undetected)
  assert evidence.losses(workdir) == evidence.losses(undetected)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'note')]


def _check_same_training(world: World, workdir: Path, other: Path) -> None:
  for step in evidence.saved(workdir):
    actual, expected = (
      history.trained(world, w, step, rings=False) for w in (workdir, other)
    )
    assert actual == expected, f'step {step} has different bits'


SPIKES = [
  case(spike_is_rolled_back, 'loss'),
  case(spike_is_rolled_back, 'gradients'),
  case(no_step_is_a_spike_without_a_fault),
  case(killed_after_a_rollback),
  case(spike_in_two_processes),
  case(spike_before_any_save),
  case(spike_after_spike, times=3),
  case(too_many_rollbacks, times=2),
  case(spike_is_skipped, 'loss'),
  case(spike_is_skipped, 'gradients'),
  case(spike_is_noted),
]


ROWS_B = [
  Row('15', 'NaN or Inf in loss, gradients or parameters', cases(NOT_FINITE), 32, 4),
  Row('16', 'a spike of a hundred times the loss', cases(SPIKES), 14, 1),
]
