"""Rows of the fault table: numbers that are not finite, and spikes."""

import functools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from faults import evidence, history
from faults.world import STEPS, Outcome, Row, Tally, World

from gated.run.checkpoint import head

NEVER = [10**6, 10**6]  # Steps that do not come.
TELL = {'tell': 'restored'}
UNSTABLE = 3

Faults = list[dict]
Case = tuple[int, Callable[[World], None]]  # How many faults it injects, and how.


def bad(do: str, what: str, *spans: tuple[int, int], by: str = 'step') -> Faults:
  """Numbers that go wrong at some steps; `do` is nan, inf or x100."""
  how = {'do': 'scale', 'factor': 100.0} if do == 'x100' else {'do': do}
  return [TELL, *(how | {'what': what, 'steps': list(s), 'by': by} for s in spans)]


def never(faults: Faults) -> Faults:
  """The same, compiled alike, at steps that do not come."""
  return [f | {'steps': NEVER} if 'steps' in f else f for f in faults]


def cases(every: Sequence[Case]) -> Callable[[World, int], Outcome]:
  """Cases in their order -> what runs them until so many faults are injected."""

  def run(world: World, times: int) -> Outcome:
    tally = Tally()
    for count, case in every:
      if tally.outcome().injected >= times:
        break
      given = getattr(case, 'args', ())
      name = getattr(case, 'func', case).__name__.replace('_', ' ')
      with tally.one(' '.join(map(str, [name, *given])), times=count):
        case(world)
    return tally.outcome()

  return run


def case(run: Callable, *given, times: int = 1) -> Case:
  """A function of what is given and a world -> a case of so many faults."""
  return times, functools.partial(run, *given)


# 15. Within the ten steps of warm-up and after them, alone and five in a row.

SPANS = ((2, 2), (4, 8), (14, 14), (16, 20))
WARM = dict(optim__warmup=10, checkpoint__keep=50)


def steps_of(spans: Sequence[tuple[int, int]]) -> list[int]:
  return [step for first, last in spans for step in range(first, last + 1)]


def skipped(what: str, do: str, world: World) -> None:
  faults, gone = bad(do, what, *SPANS), steps_of(SPANS)
  workdir, reference = world.path('skipped'), world.path('reference')
  told = 'unstable steps: 12 bad steps, 12 skipped updates'
  world.train(workdir, fault=faults, **WARM).wait().expect(0, told)
  left_out = [*never(faults), {'omit': gone}]
  world.finish(reference, fault=left_out, checkpoint__every=3, **WARM)
  # Saves are due at 4, 8, ..., and put off to the next step that is fine.
  assert evidence.saved(workdir) == [9, 12, 21, 24], evidence.saved(workdir)
  _left_out(world, workdir, reference, gone)


def _left_out(world: World, workdir: Path, reference: Path, gone: list[int]) -> None:
  """AssertionError unless all went on as if those updates had never been asked for."""
  history.check_finite(world, workdir)
  for step in set(evidence.saved(workdir)) & set(evidence.saved(reference)):
    ours, exact = (history.trained(world, w, step) for w in (workdir, reference))
    assert ours == exact, f'step {step} has other bits than without those updates'
  found, exact = history.values(workdir), history.values(reference)
  assert list(found) == list(range(1, STEPS + 1)), list(found)
  in_row = 0
  for step, values in found.items():
    in_row = in_row + 1 if step in gone else 0
    seen = values['bad_in_row'], values['skipped'], values['verdict']
    want = in_row, sum(s <= step for s in gone), 2 if step in gone else 0
    assert seen == want, f'step {step}: (in a row, skipped, verdict) = {seen}, not {want}'
    assert in_row or values['loss'] == exact[step]['loss'], f'step {step}: other losses'
  assert history.events(workdir) == [(step, step - 1, 'note') for step in gone]
  data = history.corpus()
  for event in history.read_events(workdir):
    assert event['skipped']
    assert event['records'] == data.record_ids(event['data_step']), event


def poisoned(do: str, span: tuple[int, int], on_spike: str, world: World) -> None:
  faults, how = bad(do, 'parameters', span), dict(stability__on_spike=on_spike, **WARM)
  straight, workdir = world.straight(fault=never(faults), **how), world.path('poisoned')
  told = (
    f'step {span[0]}: the parameter norm is',
    'it was not saved, the last saved step is',
  )
  world.train(workdir, fault=faults, **how).wait().expect(UNSTABLE, *told)
  assert evidence.saved(workdir) == list(range(4, span[0], 4)), evidence.saved(workdir)
  history.check_finite(world, workdir)
  assert history.events(workdir)[-1] == (span[0], span[0] - 1, 'stop')
  world.finish(workdir, fault=never(faults), **how)
  world.check(workdir, straight)
  assert history.events(workdir) == []


def poisoned_data(do: str, span: tuple[int, int], world: World) -> None:
  """What is poisoned by a batch goes back, and past it."""
  faults = bad(do, 'parameters', span, by='data_step')
  good = (span[0] - 1) // 4 * 4
  events = [(span[0], span[0] - 1)]
  # What is read next is the first batch of the session that starts.
  events += [(good + 1, data_step) for data_step in range(span[0], span[1])]
  _past_it(world, faults, good, events)


def _past_it(
  world: World, faults: Faults, good: int, events: list[tuple[int, int]], **knobs
) -> Path:
  """AssertionError unless the run goes back to `good` at each event, and ends well."""
  how = WARM | dict(stability__on_spike='rollback') | knobs
  straight, workdir = world.straight(fault=never(faults), **how), world.path('back')
  done = world.train(workdir, fault=faults, **how).wait()
  done.expect(0, f'{len(events)} rollbacks', f'rolling back to step {good}')
  back = f'restored: step {good} is {world.digest(straight.workdir, good)}'
  assert done.err.count(back) == len(events), f'not {back}: {done.tail()}'
  rollbacks = [e for e in history.events(workdir) if e[2] == 'rollback']
  assert rollbacks == [(*event, 'rollback') for event in events], rollbacks
  _as_from_there(world, workdir, straight.workdir, good, faults, **how)
  return workdir


def _as_from_there(
  world: World, workdir: Path, source: Path, good: int, faults: Faults, **how
) -> None:
  """AssertionError unless a run ended as one that was sent past its data by hand."""
  data_step = history.events(workdir)[-1][1] + 1
  reference = history.from_there(
    world, source, good, data_step, fault=never(faults), **how
  )
  assert world.digest(workdir, STEPS) == world.digest(reference, STEPS), 'other bits'
  found = [evidence.losses(w) for w in (workdir, reference)]
  assert found[0] == found[1], 'other losses than with that data'
  assert [step for step, _ in found[0]] == list(range(1, STEPS + 1))
  history.check_finite(world, workdir)


def too_many(world: World) -> None:
  faults, how = bad('nan', 'loss', (9, 30)), dict(stability__max_bad_steps=5, **WARM)
  straight, workdir = world.straight(fault=never(faults), **how), world.path('many')
  told = 'step 13: 5 bad steps in a row (config.stability.max_bad_steps=5)'
  world.train(workdir, fault=faults, **how).wait().expect(UNSTABLE, told)
  assert evidence.saved(workdir) == [4, 8]
  assert [e[2] for e in history.events(workdir)] == ['note'] * 4 + ['stop']
  world.finish(workdir, fault=never(faults), **how)
  world.check(workdir, straight)


def too_many_of_the_data(world: World) -> None:
  faults = bad('nan', 'loss', (9, 13), by='data_step')
  workdir = _past_it(world, faults, 8, [(13, 12)], stability__max_bad_steps=5)
  assert [e[2] for e in history.events(workdir)] == ['note'] * 4 + ['rollback']


def in_two_processes(world: World) -> None:
  faults = bad('nan', 'loss', (5, 5)) + bad('inf', 'gradients', (10, 14))[1:]
  gone = [5, *range(10, 15)]
  workdir, reference = world.path('pair'), world.path('reference')
  left_out = [*never(faults), {'omit': gone}]
  for where, both in ((workdir, faults), (reference, left_out)):
    how = dict(checkpoint__keep=50, checkpoint__every=4 if where is workdir else 3)
    world.finish(where, processes=2, faults={0: both, 1: both}, **how)
  assert evidence.saved(workdir) == [4, 8, 15, 16, 20, 24], evidence.saved(workdir)
  _left_out(world, workdir, reference, gone)


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

SPIKE = 14  # The batch, counted from 1, that does the harm.
WINDOW = dict(stability__window=8, stability__threshold=6.0, checkpoint__keep=50)
BACK = WINDOW | dict(stability__on_spike='rollback')


def spike(what: str = 'loss', *at: int, by: str = 'data_step') -> Faults:
  return bad('x100', what, *((n, n) for n in at or (SPIKE,)), by=by)


def spike_goes_back(what: str, world: World) -> None:
  workdir = _past_it(world, spike(what), 12, [(SPIKE, SPIKE - 1)], **BACK)
  (event,) = history.read_events(workdir)
  z = max(event['loss_zscore'], event['grad_norm_zscore'])
  assert z > 6 and event['skipped'] and event['grad_norm'] > 1, event
  assert event['records'] == history.corpus().record_ids(SPIKE - 1), event
  path = evidence.committed(workdir, STEPS) / 'manifest.json'
  counts = json.loads(path.read_text())['about']['stability']
  assert counts == {'bad steps': 1, 'skipped updates': 1, 'rollbacks': 1}, counts


def nothing_is_a_spike_by_itself(world: World) -> None:
  """Or what is injected below would not be what is detected."""
  straight = world.straight(fault=never(spike()), **WARM | BACK)
  assert history.events(straight.workdir) == []


def killed_after_it_went_back(world: World) -> None:
  faults, how = spike(), WARM | BACK
  straight, workdir = world.straight(fault=never(faults), **how), world.path('killed')
  # Step 16 is reached only after the rollback to 12, and is saved after this.
  kill = {'do': 'kill', 'at': 'step', 'step': 16}
  world.train(workdir, fault=[*faults, kill], **how).wait().expect(-signal.SIGKILL)
  assert evidence.saved(workdir) == [0, 4, 8, 12], evidence.saved(workdir)
  stands = head.read(workdir / 'checkpoints')
  assert (stands.step, stands.data_step) == (12, SPIKE), stands
  world.finish(workdir, fault=faults, **how)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'rollback')]
  _as_from_there(world, workdir, straight.workdir, 12, faults, **how)


def spike_in_two_processes(world: World) -> None:
  faults, calm = spike(), never(spike())
  how, both = WARM | BACK, lambda given: dict(processes=2, faults={0: given, 1: given})
  straight, workdir = world.straight(**both(calm), **how), world.path('pair')
  done = world.finish(workdir, **both(faults), **how)
  done.expect(0, '1 rollbacks', 'rolling back to step 12')
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'rollback')]
  where = world, straight.workdir, 12, SPIKE
  reference = history.from_there(*where, **both(calm), **how)
  assert world.digest(workdir, STEPS) == world.digest(reference, STEPS), 'other bits'
  assert evidence.losses(workdir) == evidence.losses(reference), 'other losses'


def spike_before_any_save(world: World) -> None:
  _past_it(world, spike('loss', 7), 0, [(7, 6)], **BACK, checkpoint__every=100)


def spike_after_spike(world: World) -> None:
  """The second batch comes right after the first one, and does the same."""
  _past_it(world, spike('loss', 14, 15, 19), 12, [(14, 13), (13, 14), (16, 18)], **BACK)


def no_rollback_is_left(world: World) -> None:
  faults, how = spike('loss', 14, 19), BACK | dict(stability__max_rollbacks=1)
  workdir = world.path('spent')
  told = 'no rollback is left (config.stability.max_rollbacks=1)'
  world.train(workdir, fault=faults, **how).wait().expect(UNSTABLE, told)
  assert [e[2] for e in history.events(workdir)] == ['rollback', 'stop']
  # Nor is one in a session that starts.
  world.train(workdir, fault=faults, **how).wait().expect(UNSTABLE, told)
  assert [e[2] for e in history.events(workdir)] == ['rollback', 'stop']


def spike_is_skipped(what: str, world: World) -> None:
  faults, how = spike(what, by='step'), WINDOW | dict(stability__on_spike='skip')
  workdir, reference = world.path('skip'), world.path('reference')
  told = 'unstable steps: 1 bad steps, 1 skipped updates'
  world.train(workdir, fault=faults, **how).wait().expect(0, told)
  world.finish(reference, fault=[*never(faults), {'omit': [SPIKE]}], **how)
  _trained_alike(world, workdir, reference)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'note')]


def spike_is_noted(world: World) -> None:
  """Where nothing counts as a spike the same spike has the same effect."""
  faults, workdir, deaf = spike(by='step'), world.path('none'), world.path('deaf')
  told = 'unstable steps: 1 bad steps (spikes.jsonl)'
  world.train(workdir, fault=faults, **WINDOW).wait().expect(0, told)
  how = WINDOW | dict(stability__threshold=1e9)
  done = world.train(deaf, fault=faults, **how).wait().expect(0)
  assert 'unstable steps' not in done.err
  _trained_alike(world, workdir, deaf)
  assert evidence.losses(workdir) == evidence.losses(deaf)
  assert history.events(workdir) == [(SPIKE, SPIKE - 1, 'note')]


def _trained_alike(world: World, workdir: Path, other: Path) -> None:
  for step in evidence.saved(workdir):
    ours, exact = (history.trained(world, w, step, rings=False) for w in (workdir, other))
    assert ours == exact, f'step {step} has other bits'


SPIKES = [
  case(spike_goes_back, 'loss'),
  case(spike_goes_back, 'gradients'),
  case(nothing_is_a_spike_by_itself),
  case(killed_after_it_went_back),
  case(spike_in_two_processes),
  case(spike_before_any_save),
  case(spike_after_spike, times=3),
  case(no_rollback_is_left, times=2),
  case(spike_is_skipped, 'loss'),
  case(spike_is_skipped, 'gradients'),
  case(spike_is_noted),
]


ROWS_B = [
  Row('15', 'NaN or Inf in loss, gradients or parameters', cases(NOT_FINITE), 32, 4),
  Row('16', 'a spike of a hundred times the loss', cases(SPIKES), 14, 1),
]
