"""A bad step leaves no trace but in the counters; a run that hangs ends by itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guarded import (
  INF,
  NAN,
  PARAMS,
  TX,
  knobs,
  one_step,
  reported,
  run,
  steady,
  stepper,
  verdicts,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gated.devices import mesh, trees
from gated.train import guard


def assert_finite(state):
  for name, leaf in trees.flatten(state).items():
    assert 'zscore' in name or np.isfinite(leaf).all(), name


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(on_spike='stop'), "on_spike='stop'.*'none', 'skip', 'rollback'"),
    (dict(threshold=0.0), 'threshold=0.0'),
    (dict(threshold=NAN), 'threshold=nan'),
    (dict(window=3), 'window=3'),
    (dict(window=1 << 40), 'window=1099511627776, but 1048576 is the most'),
    (dict(max_bad_steps=0), 'max_bad_steps=0'),
    (dict(max_rollbacks=-1), 'max_rollbacks=-1'),
    (dict(stuck_after=-1.0), 'stuck_after=-1.0'),
    (dict(stuck_after=NAN), 'stuck_after=nan'),
    (dict(stuck_after=INF), 'stuck_after=inf, but 0 means never'),
    (dict(peer_timeout=0), 'peer_timeout=0'),
    (dict(peer_timeout=1 << 31), 'peer_timeout=2147483648'),
  ],
)
def test_a_bad_knob_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=r'config\.stability\.' + message):
    knobs(**changes)


# The guard, in the graph.


@pytest.mark.slow
def test_where_nothing_is_bad_the_numbers_are_those_of_the_optimizer_alone():
  """To the last bit, one operation at a time: a compiler may fuse two programs unlike."""
  tx, plain = guard.guard(TX, knobs()), optax.with_extra_args_support(TX)
  params, state = PARAMS, TX.init(PARAMS)
  guarded_params, guarded = PARAMS, tx.init(PARAMS)
  for loss in map(jnp.float32, steady(6)):
    with jax.disable_jit():
      guarded_params, guarded, updates = one_step(tx, guarded_params, guarded, loss, 1.0)
      params, state, bare = one_step(plain, params, state, loss, 1.0)
    assert trees.digest(updates) == trees.digest(bare)
    assert trees.digest(guarded_params) == trees.digest(params)
    assert trees.digest(guarded.inner) == trees.digest(state)
    report = reported(guarded)
    assert not any(report[k] for k in ('skipped', 'spikes', 'bad_in_row', 'verdict'))


@pytest.mark.slow
@pytest.mark.parametrize('on_spike', guard.ON_SPIKE)
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
    report = reported(state)
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
    assert reported(state) | dict(skipped=0) == reported(unhurt)
    assert int(state.skipped) == row


def test_a_promise_of_finite_updates_changes_no_number():
  """Finite steps, a spike, and losses and gradients that are not finite."""
  losses = [3.0, 3.0, 3.0, NAN, 3.0, 300.0, 3.0]
  scales = [1.0, 2.0, 1.0, 1.0, INF, 1.0, 1.0]
  txs = [guard.guard(TX, knobs(), finite_updates=promised) for promised in (False, True)]
  both = [(PARAMS, tx.init(PARAMS)) for tx in txs]
  with jax.disable_jit():
    for loss, scale in zip(map(jnp.float32, losses), scales):
      both = [one_step(tx, *kept, loss, scale)[:2] for tx, kept in zip(txs, both)]
      assert trees.digest(both[0]) == trees.digest(both[1])
  assert int(both[0][1].skipped) == 2


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_dropped_though_its_gradient_is():
  """Adam without an eps: 0 / 0 where there is no gradient."""
  tx = guard.guard(optax.adam(1e-2, eps=0.0), knobs())
  params = {'w': jnp.ones(3)}
  state = tx.init(params)
  for count in (1, 2):
    grads = {'w': jnp.asarray([0.0, 1.0, 2.0])}
    updates, state = tx.update(grads, state, params, loss=jnp.float32(3))
    assert trees.digest(optax.apply_updates(params, updates)) == trees.digest(params)
    assert_finite(state)
    assert reported(state)['bad_in_row'] == reported(state)['skipped'] == count
    assert int(state.verdict) == 2 and int(state.filled) == 0


def test_the_count_of_the_schedule_is_that_of_the_next_rate():
  """A finite gradient advances the schedule even if its update is dropped."""
  rates = jnp.asarray([INF, 2e-3, 3e-3, 4e-3])
  tx = guard.guard(optax.sgd(lambda count: rates[count]), knobs())
  params = {'w': jnp.ones(2)}
  state = tx.init(params)
  used = []
  for gradient, loss in ((1.0, 3.0), (1.0, 3.0), (NAN, NAN), (1.0, 3.0)):
    rate = float(rates[guard.scheduled(state)])
    grads = {'w': jnp.full(2, gradient)}
    updates, state = tx.update(grads, state, params, loss=jnp.float32(loss))
    used.append((rate, float(updates['w'][0])))
  expected = [(INF, 0), (2e-3, -2e-3), (3e-3, 0), (3e-3, -3e-3)]
  np.testing.assert_allclose(used, expected, rtol=1e-6)
  assert int(state.skipped) == 2


def test_the_count_of_an_optimizer_without_a_schedule_is_that_of_its_steps():
  tx = guard.guard(optax.sgd(0.1), knobs())
  state = tx.init(PARAMS)
  assert int(guard.scheduled(state._replace(filled=jnp.int32(4)))) == 4


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
  tx = guard.guard(optax.sgd(0.1, momentum=0.9), knobs())
  for loss in (3.0, NAN):
    updates, state = tx.update(params, tx.init(params), params, loss=jnp.float32(loss))
    assert updates['w'].dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (tx.init(params), state))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('on_spike', guard.ON_SPIKE)
def test_a_finite_spike_is_seen_and_skipped_if_it_is_to_be(on_spike, where):
  losses, times = steady(14), [1.0] * 14
  if where == 'loss':
    losses[9] *= 100
  else:
    times[9] = 100.0
  after = run(losses, times, on_spike=on_spike)
  assert verdicts(after) == [0] * 9 + [1] + [0] * 4
  report = reported(after[9][1])
  name = 'loss_zscore' if where == 'loss' else 'grad_norm_zscore'
  other = {'loss_zscore', 'grad_norm_zscore'} - {name}
  assert report[name] > 6 > report[other.pop()]
  assert report['spikes'] == 1
  same = trees.digest(after[9][0]) == trees.digest(after[8][0])
  kept = trees.digest(after[9][1].inner) == trees.digest(after[8][1].inner)
  skips = on_spike != 'none'
  assert same == kept == skips
  assert report['skipped'] == report['bad_in_row'] == int(skips)
  assert reported(after[10][1])['bad_in_row'] == 0


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
  assert (reported(after[at][1])['loss_zscore'] > 6) == (at >= 4)


def test_rounding_of_constant_values_is_no_spike():
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
  assert all(np.isfinite(list(reported(state).values())).all() for _, state, _ in after)
  assert verdicts(run([3e38, -3e38, *steady(12), 300.0]))[-1] == 1


def test_an_endless_threshold_makes_nothing_a_spike():
  after = run([*steady(8), 3e38, *steady(4)], threshold=INF)
  assert verdicts(after) == [0] * 13
  assert_finite(after[-1][1])
  assert all(np.isfinite(list(reported(state).values())).all() for _, state, _ in after)


@pytest.mark.parametrize('level', [3.5, 30.0])
def test_a_lasting_shift_is_accepted_in_the_end(level):
  after = run(steady(10) + steady(40, level))
  values = verdicts(after)
  assert values[10] == 1
  accepted = values.index(0, 10)
  assert accepted < 35
  assert values[accepted:] == [0] * (50 - accepted)
  assert reported(after[-1][1])['bad_in_row'] == 0


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
    step = jax.jit(
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
