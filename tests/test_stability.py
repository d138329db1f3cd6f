"""A bad step leaves no trace but in the counters; a run that hangs ends by itself."""

import functools
import math
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gated import mesh, stability, trees

NAN, INF = math.nan, math.inf
KNOBS = dict(
  on_spike='skip',
  threshold=6.0,
  window=8,
  max_bad_steps=5,
  max_rollbacks=2,
  stuck_after=0.0,
  peer_timeout=60,
)

rng = np.random.default_rng(0)
# A zero with a sign: what is added to it must be one too.
PARAMS = {
  'embed': {'table': rng.normal(size=(8, 4))},
  'norm': {'scale': np.array([1.0, -0.0, 0.0])},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
TX = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.scale_by_adam(0.9, 0.95, 1e-8),
  optax.add_decayed_weights(0.1),
  optax.scale_by_learning_rate(optax.linear_schedule(0.0, 1e-2, 20)),
)


def knobs(**changes):
  return stability.Config(**KNOBS | changes)


def gradient(params):
  return jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, params)


def one_step(tx, params, state, loss, times):
  """A step whose gradient is multiplied by `times` in the first row of the table."""
  grads = gradient(params)
  grads['embed']['table'] = grads['embed']['table'].at[0].multiply(times)
  updates, state = tx.update(grads, state, params, loss=loss)
  return optax.apply_updates(params, updates), state, updates


@functools.cache
def stepper(**changes):
  """(params, state, loss, times) -> (params, state, updates), guarded and compiled."""
  tx = stability.guard(TX, knobs(**changes))
  return tx, small.jit(functools.partial(one_step, tx))


def run(losses, times=None, **changes):
  """Losses, and what multiplies the gradient -> (params, state, updates) of each."""
  tx, step = stepper(**changes)
  params, state, after = PARAMS, tx.init(PARAMS), []
  for loss, time_ in zip(losses, times or [1.0] * len(losses)):
    params, state, updates = step(params, state, jnp.float32(loss), jnp.float32(time_))
    after.append((params, state, updates))
  assert step._cache_size() == 1, 'a step was compiled again'
  return after


def steady(count, level=3.0):
  """Losses that waver about a level."""
  return [level + 0.02 * math.sin(5 * i) for i in range(count)]


def verdicts(after):
  return [int(state.verdict) for _, state, _ in after]


def told(state):
  return {name: float(value) for name, value in stability.report(state).items()}


def assert_finite(state):
  for name, leaf in trees.flatten(state).items():
    assert 'zscore' in name or np.isfinite(leaf).all(), name


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(on_spike='stop'), "on_spike='stop'.*'none', 'skip', 'rollback'"),
    (dict(threshold=0.0), 'threshold=0.0'),
    (dict(threshold=NAN), 'threshold=nan'),
    (dict(window=3), 'window=3'),
    (dict(max_bad_steps=0), 'max_bad_steps=0'),
    (dict(max_rollbacks=-1), 'max_rollbacks=-1'),
    (dict(stuck_after=-1.0), 'stuck_after=-1.0'),
    (dict(stuck_after=NAN), 'stuck_after=nan'),
    (dict(stuck_after=INF), 'stuck_after=inf, but never is 0'),
    (dict(peer_timeout=0), 'peer_timeout=0'),
  ],
)
def test_a_bad_knob_is_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=r'config\.stability\.' + said):
    knobs(**changes)


# The guard, in the graph.


def test_where_nothing_is_bad_the_numbers_are_those_of_the_optimizer_alone():
  plain = optax.with_extra_args_support(TX)
  step = small.jit(functools.partial(one_step, plain))
  params, state = PARAMS, TX.init(PARAMS)
  for guarded_params, guarded, updates in run(steady(6)):
    params, state, bare = step(params, state, jnp.float32(3), jnp.float32(1))
    assert trees.digest(updates) == trees.digest(bare)
    assert trees.digest(guarded_params) == trees.digest(params)
    assert trees.digest(guarded.inner) == trees.digest(state)
    report = told(guarded)
    assert not any(report[k] for k in ('skipped', 'spikes', 'bad_in_row', 'verdict'))


@pytest.mark.parametrize('on_spike', stability.ON_SPIKE)
@pytest.mark.parametrize('first', [0, 2, 12], ids=['at once', 'warm-up', 'late'])
@pytest.mark.parametrize('row', [1, 5])
@pytest.mark.parametrize(
  ('loss', 'times'), [(NAN, 1), (INF, 1), (-INF, 1), (3, NAN), (3, INF), (3, 1e30)]
)
def test_a_step_that_is_not_finite_changes_no_bit(on_spike, first, row, loss, times):
  losses, scales = steady(first + row + 2), [1.0] * (first + row + 2)
  losses[first : first + row], scales[first : first + row] = [loss] * row, [times] * row
  after = run(losses, scales, on_spike=on_spike)
  good = run(losses[:first] + losses[first + row :], on_spike=on_spike)
  start = PARAMS, stepper(on_spike=on_spike)[0].init(PARAMS)
  before = (start, *((p, s) for p, s, _ in after))[first]
  for count, (params, state, updates) in enumerate(after[first : first + row], 1):
    assert trees.digest(params) == trees.digest(before[0])
    assert trees.digest(state.inner) == trees.digest(before[1].inner)
    assert trees.digest((state.losses, state.norms)) == trees.digest(
      (before[1].losses, before[1].norms)
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert_finite(state)
    report = told(state)
    assert report['bad_in_row'] == report['skipped'] == count
    assert (report['verdict'], report['spikes']) == (2, 0)
    assert (report['loss_zscore'] == INF) == (not math.isfinite(loss))
    assert (report['grad_norm_zscore'] == INF) == (times != 1)
  # What follows is what would have come without the bad steps.
  for (params, state, _), (expected, unhurt, _) in zip(
    after[first + row :], good[first:]
  ):
    assert trees.digest(params) == trees.digest(expected)
    assert trees.digest(state.losses) == trees.digest(unhurt.losses)
    assert told(state) | dict(skipped=0) == told(unhurt)
    assert int(state.skipped) == row


def test_an_update_that_is_not_finite_is_dropped_though_its_gradient_is():
  """Adam without an eps: 0 / 0 where there is no gradient."""
  tx = stability.guard(optax.adam(1e-2, eps=0.0), knobs())
  params = {'w': jnp.ones(3)}
  state = tx.init(params)
  for count in (1, 2):
    grads = {'w': jnp.asarray([0.0, 1.0, 2.0])}
    updates, state = tx.update(grads, state, params, loss=jnp.float32(3))
    assert trees.digest(optax.apply_updates(params, updates)) == trees.digest(params)
    assert_finite(state)
    assert told(state)['bad_in_row'] == told(state)['skipped'] == count
    assert int(state.verdict) == 2 and int(state.filled) == 0


def test_parameters_that_are_not_finite_stay_as_they_are():
  """Zero times infinity is NaN, and so is infinity less itself: only a choice is safe."""
  params = jax.tree.map(jnp.copy, PARAMS)
  params['norm']['scale'] = jnp.asarray([INF, -INF, NAN])
  tx, step = stepper()
  after, state, updates = step(params, tx.init(PARAMS), jnp.float32(3), jnp.float32(NAN))
  assert trees.digest(after) == trees.digest(params)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
  assert_finite(state)


def test_updates_keep_the_dtype_that_the_optimizer_gives_them():
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  tx = stability.guard(optax.sgd(0.1, momentum=0.9), knobs())
  for loss in (3.0, NAN):
    updates, state = tx.update(params, tx.init(params), params, loss=jnp.float32(loss))
    assert updates['w'].dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (tx.init(params), state))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('on_spike', stability.ON_SPIKE)
def test_a_finite_spike_is_seen_and_skipped_if_it_is_to_be(on_spike, where):
  losses, times = steady(14), [1.0] * 14
  if where == 'loss':
    losses[9] *= 100
  else:
    times[9] = 100.0
  after = run(losses, times, on_spike=on_spike)
  assert verdicts(after) == [0] * 9 + [1] + [0] * 4
  report = told(after[9][1])
  name = 'loss_zscore' if where == 'loss' else 'grad_norm_zscore'
  other = {'loss_zscore', 'grad_norm_zscore'} - {name}
  assert report[name] > 6 > report[other.pop()]
  assert report['spikes'] == 1
  same = trees.digest(after[9][0]) == trees.digest(after[8][0])
  kept = trees.digest(after[9][1].inner) == trees.digest(after[8][1].inner)
  skips = on_spike != 'none'
  assert same == kept == skips
  assert report['skipped'] == report['bad_in_row'] == int(skips)
  assert told(after[10][1])['bad_in_row'] == 0


def test_the_zscore_is_the_distance_from_the_last_window_of_losses():
  losses = steady(20)
  for i, (_, state, _) in enumerate(run(losses)):
    last = np.asarray(losses[max(0, i - 8) : i], np.float32)
    ready = len(last) >= 4
    expected = (losses[i] - last.mean()) / max(last.std(), 3e-3) if ready else 0.0
    np.testing.assert_allclose(state.loss_zscore, expected, atol=2e-3)


@pytest.mark.parametrize('at', range(7))
def test_nothing_is_a_spike_before_half_the_window(at):
  losses = steady(7)
  losses[at] *= 100
  after = run(losses)
  assert verdicts(after)[at] == int(at >= 4)
  assert (told(after[at][1])['loss_zscore'] > 6) == (at >= 4)


def test_constant_values_are_not_told_apart_by_their_rounding():
  losses = [3.0] * 8 + [3.0001, 3.0, 3.1]
  assert verdicts(run(losses)) == [0] * 10 + [1]


@pytest.mark.parametrize('factor', [100.0, 1e-3, 1e30])
def test_one_outlier_does_not_blind_the_window(factor):
  """Upwards it is a spike, downwards it is not; it enters clipped either way."""
  losses = steady(16)
  losses[9] *= factor
  losses[12] *= 100
  after = run(losses)
  assert verdicts(after)[9] == int(factor > 1)
  assert verdicts(after)[12] == 1
  assert np.abs(np.asarray(after[9][1].losses) - 3).max() < 0.2


def test_enormous_finite_values_in_warm_up_leave_statistics_that_work():
  after = run([3e38, -3e38, 3e38, *steady(20)])
  assert_finite(after[-1][1])
  assert all(np.isfinite(list(told(state).values())).all() for _, state, _ in after)
  assert verdicts(run([3e38, -3e38, *steady(12), 300.0]))[-1] == 1


def test_an_endless_threshold_makes_nothing_a_spike():
  after = run([*steady(8), 3e38, *steady(4)], threshold=INF)
  assert verdicts(after) == [0] * 13
  assert_finite(after[-1][1])
  assert all(np.isfinite(list(told(state).values())).all() for _, state, _ in after)


@pytest.mark.parametrize('level', [3.5, 30.0])
def test_a_lasting_shift_is_accepted_in_the_end(level):
  after = run(steady(10) + steady(40, level))
  seen = verdicts(after)
  assert seen[10] == 1
  accepted = seen.index(0, 10)
  assert accepted < 35
  assert seen[accepted:] == [0] * (50 - accepted)
  assert told(after[-1][1])['bad_in_row'] == 0


def test_sharded_over_eight_devices_is_single(no_transfers):
  with jax.transfer_guard('allow'):
    losses = steady(14)
    losses[3], losses[10] = NAN, 300.0
    single = jax.device_get([x[:2] for x in run(losses)])
    on = mesh.make(data=1, fsdp=8, expert=1, tensor=1, context=1)
    split = lambda x: NamedSharding(on, P('fsdp') if x.shape[:1] == (8,) else P())
    tx, _ = stepper()
    first = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    params, state = jax.device_put(first, jax.tree.map(split, first))
    step = small.jit(
      functools.partial(one_step, tx),
      donate_argnums=(0, 1),
      out_shardings=(*jax.tree.map(split, first), None),
    )
    whole = NamedSharding(on, P())
    values = jax.device_put([jnp.float32(x) for x in losses], whole)
    one = jax.device_put(jnp.float32(1), whole)
  after = []
  for loss in values:
    before = params
    params, state, _ = step(params, state, loss, one)
    assert before['embed']['table'].is_deleted(), 'nothing was donated'
    after.append(jax.device_get((params, state)))
  assert [int(s.verdict) for _, s in after] == [0] * 3 + [2] + [0] * 6 + [1] + [0] * 3
  for ours, exact in zip(after, single):
    for name, leaf in trees.flatten(ours).items():
      expected = trees.flatten(exact)[name]
      np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-4, err_msg=name)
  for bad in (3, 10):
    digests = {trees.digest((p, s.inner)) for p, s in after[bad - 1 : bad + 1]}
    assert len(digests) == 1


# The watchdog, on the host.

FINE = dict(
  loss=3.0,
  grad_norm=1.0,
  param_norm=50.0,
  verdict=0.0,
  bad_in_row=0.0,
  loss_zscore=0.3,
  grad_norm_zscore=-0.2,
)
SPIKE = FINE | dict(verdict=1.0, loss=812.34, loss_zscore=41.23)
BROKEN = FINE | dict(verdict=2.0, grad_norm=NAN, grad_norm_zscore=INF, bad_in_row=1.0)
LIMIT = r' \(config\.stability\.max_bad_steps=5\): '


@pytest.mark.parametrize(
  ('values', 'actions', 'why'),
  [
    (FINE, ('go', 'go', 'go'), ''),
    (
      SPIKE,
      ('note', 'note', 'rollback'),
      'the loss 812.3 is 41.2 standard deviations above its mean',
    ),
    (
      SPIKE | dict(grad_norm=99.0, grad_norm_zscore=7.0),
      ('note', 'note', 'rollback'),
      'the loss 812.3 is 41.2 .* mean and the gradient norm 99 is 7 .* above its mean',
    ),
    (BROKEN, ('note', 'note', 'note'), 'the gradient norm is NaN'),
    (
      BROKEN | dict(loss=INF, loss_zscore=INF),
      ('note', 'note', 'note'),
      'the loss is infinite and the gradient norm is NaN',
    ),
    (
      BROKEN | dict(grad_norm=1.0, grad_norm_zscore=0.1),
      ('note', 'note', 'note'),
      'the update is not finite',
    ),
    (BROKEN | dict(bad_in_row=4.0), ('note', 'note', 'note'), 'the gradient norm is NaN'),
    (
      BROKEN | dict(bad_in_row=5.0),
      ('stop', 'stop', 'rollback'),
      f'5 bad steps in a row{LIMIT}the gradient norm is NaN',
    ),
    (
      SPIKE | dict(bad_in_row=6.0),
      ('stop', 'stop', 'rollback'),
      f'6 bad steps in a row{LIMIT}the loss 812.3 is .*',
    ),
    (
      FINE | dict(param_norm=NAN),
      ('stop', 'stop', 'rollback'),
      'the parameter norm is NaN',
    ),
    (
      BROKEN | dict(param_norm=INF),
      ('stop', 'stop', 'rollback'),
      'the parameter norm is infinite',
    ),
  ],
)
def test_the_watchdog_says_what_to_do_and_why(values, actions, why):
  for on_spike, action in zip(stability.ON_SPIKE, actions):
    cfg = knobs(on_spike=on_spike)
    said, reason = stability.Watchdog(cfg, rollbacks=1).judge(values)
    assert said == action
    assert re.fullmatch(why, reason), reason
    # None is left: what would have gone back stops, and says so.
    said, reason = stability.Watchdog(cfg, rollbacks=2).judge(values)
    assert said == ('stop' if action == 'rollback' else action)
    spent = r'; no rollback is left \(config\.stability\.max_rollbacks=2\)'
    assert re.fullmatch(why + (spent if action == 'rollback' else ''), reason), reason


def test_the_watchdog_reads_what_the_guard_reports():
  losses = steady(12)
  losses[9] = 300.0
  norms = dict(grad_norm=1.0, param_norm=1.0)
  watchdog = stability.Watchdog(knobs(on_spike='rollback'), rollbacks=0)
  for i, (_, state, _) in enumerate(run(losses, on_spike='rollback')):
    action, _ = watchdog.judge(norms | dict(loss=losses[i]) | told(state))
    assert action == ('rollback' if i == 9 else 'go')


# The pulse, in a process of its own, since it ends it.

PULSE = """
import ctypes, os, sys, threading, time
from gated.stability.pulse import Pulse
def told():
  {told}
with Pulse({seconds}, code=6, told=told) as pulse:
  {body}
print('came to its end')
"""


@pytest.fixture
def pulsed(run_python):
  """What happens under a pulse, as Python -> CompletedProcess, and how long it took."""

  def pulsed(body, *, seconds=0.4, told="return 'process 1 is missing'"):
    start = time.monotonic()
    source = PULSE.format(body=body, seconds=seconds, told=told)
    return run_python(['-c', source], timeout=60), time.monotonic() - start

  return pulsed


def test_a_sleeping_main_thread_is_ended_with_all_stacks_and_the_code(pulsed):
  done, _ = pulsed('pulse.beat(41); pulse.beat(42); time.sleep(60)')
  assert done.returncode == 6
  assert 'no step was finished for 0.' in done.stderr
  assert 'config.stability.stuck_after=0.4' in done.stderr
  assert 'the last was 42.' in done.stderr
  assert 'process 1 is missing' in done.stderr
  # The main thread, where it sleeps, and the pulse's own.
  assert 'File "<string>", line 7 in <module>' in done.stderr
  assert done.stderr.count('hread 0x') >= 2
  assert 'came to its end' not in done.stdout


@pytest.mark.parametrize(
  ('told', 'said'),
  [("raise OSError('no answer')", "OSError('no answer')"), ('time.sleep(60)', '')],
  ids=['raises', 'hangs'],
)
def test_what_is_asked_on_the_way_out_may_raise_or_hang(pulsed, told, said):
  setup = 'import gated.stability.pulse as p; p._GRACE = 0.5; '
  done, seconds = pulsed(f'{setup}threading.Event().wait()', told=told)
  assert done.returncode == 6
  assert 'the last was none.' in done.stderr
  assert said in done.stderr
  assert seconds < 30


def test_a_main_thread_that_keeps_pythons_lock_is_ended_too(pulsed):
  done, _ = pulsed('ctypes.PyDLL(None).sleep(60)')
  assert done.returncode == 1
  assert 'File "<string>", line 7 in <module>' in done.stderr


@pytest.mark.slow
def test_beats_keep_a_process_alive(pulsed):
  body = """
  for step in range(20):
    time.sleep(0.1)
    pulse.beat(step)
time.sleep(1.0)"""
  done, _ = pulsed(body.lstrip(), seconds=0.8)
  assert (done.returncode, done.stdout) == (0, 'came to its end\n'), done.stderr
  assert done.stderr == ''


def test_a_pulse_of_no_seconds_does_nothing():
  before = threading.active_count()
  with stability.Pulse(0.0, code=6, told=str) as pulse:
    pulse.beat(1)
    assert threading.active_count() == before


def test_a_pulse_leaves_when_its_loop_does():
  before = threading.active_count()
  with (
    pytest.raises(ZeroDivisionError),
    stability.Pulse(600.0, code=6, told=str) as pulse,
  ):
    assert threading.active_count() == before + 1
    pulse.beat(1)
    1 / 0  # noqa: B018
  assert threading.active_count() == before


# Leaving. What ends a process is tried in one of its own.


def test_sigterm_is_an_answer_after_the_step_and_a_second_one_changes_nothing():
  before = signal.getsignal(signal.SIGTERM)
  try:
    with stability.Leaving() as leaving:
      assert not leaving.now(1)
      signal.raise_signal(signal.SIGTERM)
      assert leaving.now(2)
      signal.raise_signal(signal.SIGTERM)
      assert leaving.now(3)
    # The process is about to leave: a signal now does not cut that short.
    signal.raise_signal(signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)


def test_who_was_not_told_to_leave_gets_its_signal_handler_back():
  before = signal.getsignal(signal.SIGTERM)
  with stability.Leaving():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
  ('error', 'code', 'told'),
  [
    ("ValueError('UNKNOWN: Gloo all-reduce failed')", 5, 'process 0 of 1 lost another'),
    ("KeyError('loss')", 1, "KeyError: 'loss'"),
  ],
)
def test_one_of_several_processes_ends_by_its_error_at_once(
  error, code, told, run_python
):
  """Though a thread is left that waits."""
  source = f"""
import threading
from gated import stability
threading.Thread(target=threading.Event().wait).start()
stability.end({error}, lost=5, timeout=-10)
"""
  done = run_python(['-c', source], timeout=60)
  assert done.returncode == code
  assert told in done.stderr
  assert code == 1 or 'Traceback' not in done.stderr
