"""Divergence, LR sensitivity, seed noise and early warnings from logs."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from gated.sweep import judge
from gated.sweep.judge import Rule, diverged, noise, sensitivity, spread, warnings

NAN, INF = math.nan, math.inf
RULE = Rule(multiple=1.5, rise=0.5, tail=0.05)


def verdict(losses, *, best=2.0, broken=False, rule=RULE, final=None):
  steps = np.arange(1, len(losses) + 1)
  return diverged(steps, losses, best=best, rule=rule, broken=broken, final=final)


def falling(count, *, seed=0, sigma=0.03):
  rng = np.random.default_rng(seed)
  steps = np.arange(count)
  return 2 + 3.5 * np.exp(-8 * steps / count) + sigma * rng.normal(size=count)


@pytest.mark.parametrize('count', [1, 2, 3, 20, 300, 5000])
def test_a_stable_run_of_any_length_has_not_diverged(count):
  for seed in range(5):
    losses = falling(count, seed=seed)
    assert verdict(losses, best=float(losses[-1])) == ''


@pytest.mark.parametrize('count', [20, 300, 5000])
def test_a_recovered_spike_is_no_divergence(count):
  losses = falling(count)
  losses[count // 2] = 12.0
  losses[count // 2 + 1] = NAN
  assert verdict(losses) == ''


@pytest.mark.parametrize('count', [20, 300, 5000])
def test_a_run_that_never_recovered_has_diverged(count):
  losses = falling(count)
  losses[count // 2 :] += 0.8
  why = verdict(losses, best=2.5)
  assert why.startswith('it never recovered: its final level, 2.')
  assert 'above its lowest level, 2' in why and '(about step ' in why
  assert verdict(losses, best=2.5, rule=Rule(multiple=1.5, rise=1.0, tail=0.05)) == ''


def test_non_finite_steps_do_not_hide_a_divergence():
  losses = falling(1000)
  losses[500:] += 0.8
  losses[np.random.default_rng(0).random(1000) < 0.2] = NAN
  losses[250:330] = NAN
  losses[-1] = losses[np.isfinite(losses)][-1]
  assert verdict(losses, best=2.5).startswith('it never recovered')
  losses[500:] -= 0.8
  assert verdict(losses) == ''


def test_the_final_level_is_the_median_of_the_tail():
  losses = falling(1000)
  losses[-10:] += 0.9
  assert verdict(losses, best=2.5) == ''
  assert verdict(losses, best=2.5, rule=Rule(multiple=1.5, rise=0.5, tail=0.01)) != ''


def test_one_high_loss_at_the_end_is_no_divergence():
  losses = falling(300)
  losses[-1] += 5
  assert verdict(losses) == ''


def test_a_final_loss_above_a_multiple_of_the_best_has_diverged():
  losses = np.full(50, 5.5)
  assert verdict(losses) == (
    'its final loss, 5.5, is above 1.5 times the best of the sweep, 2'
  )
  assert verdict(losses, best=4.0) == ''
  # A held-out loss takes precedence over the level of the training loss.
  assert verdict(losses, final=2.9) == ''
  assert verdict(falling(50), final=3.1).startswith('its final loss, 3.1, is above')
  # inf: no run of the sweep has a finite loss.
  assert verdict(losses, best=INF) == ''


def test_a_non_finite_loss_at_the_end_has_diverged():
  losses = falling(100)
  losses[-1] = NAN
  assert verdict(losses) == 'its loss is not finite at its end, step 100'
  losses[-6:], losses[-1] = INF, 2.0
  assert verdict(losses) == 'its loss is not finite at its end, step 100'
  assert verdict(falling(100), final=NAN) == 'its final loss is not finite'


def test_a_run_that_stopped_as_unstable_has_diverged():
  assert verdict(falling(30), broken=True) == 'it stopped as unstable at step 30'
  assert verdict([], broken=True) == 'it stopped as unstable'


def test_an_invalid_log_is_refused():
  with pytest.raises(ValueError, match='the log has no losses'):
    verdict([])
  with pytest.raises(ValueError, match='best=nan'):
    verdict([2.0], best=NAN)
  with pytest.raises(ValueError, match='the same length'):
    diverged([1, 2], [2.0], best=2.0, rule=RULE, broken=False)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('multiple', 1.0),
    ('multiple', NAN),
    ('rise', 0.0),
    ('rise', INF),
    ('tail', 0.0),
    ('tail', 0.6),
    ('tail', NAN),
  ],
)
def test_a_rule_out_of_range_is_refused_by_name(field, value):
  fields = dict(multiple=1.5, rise=0.5, tail=0.05) | {field: value}
  with pytest.raises(ValueError, match=f'{field}={value}, but'):
    Rule(**fields)


def test_a_rule_states_its_numbers():
  sentence = str(Rule(multiple=1.25, rise=0.4, tail=0.1))
  assert '1.25 times the best' in sentence
  assert 'the last 10% of' in sentence
  assert 'more than 0.4 nats' in sentence


def test_the_best_rate_of_a_line_is_0_if_every_rate_fails():
  rate = lambda *runs, best=2.0: judge.best_rate(runs, best=best, rule=RULE)
  assert rate((1e-4, 4.0), (1e-3, 2.2), (1e-2, 2.4), (1e-1, 3.5)) == 1e-3
  # The loss at 1e-1 is lowest by chance only: the line is stuck at every rate.
  assert rate((1e-4, 7.02), (1e-2, 7.01), (1e-1, 7.0)) == 0
  assert rate() == rate((1e-3, NAN)) == 0
  assert 'that run learned slowly' in str(RULE)


def test_sensitivity_is_the_mean_excess_loss_over_the_rates():
  # 3.0 -> 0.5 above the best, 2.5 is the best, 9.0 and NaN count as 5.5 and 5.6.
  finals, inits = [3.0, 2.5, 9.0, NAN], [5.4, 5.5, 5.5, 5.6]
  assert sensitivity(finals, inits) == pytest.approx((0.5 + 0 + 3.0 + 3.1) / 4)
  assert sensitivity([2.5, INF], [5.5, 5.5]) == sensitivity([2.5, 70.0], [5.5, 5.5])


def test_sensitivity_is_invariant_to_order_and_shift_and_never_negative():
  rng = np.random.default_rng(0)
  for _ in range(50):
    finals, inits = rng.uniform(2, 8, 6), rng.uniform(5, 6, 6)
    finals[rng.random(6) < 0.3] = NAN
    value = sensitivity(finals, inits)
    if not np.isfinite(finals).any():
      assert math.isnan(value)
      continue
    assert 0 <= value <= inits.max() - 2
    order = rng.permutation(6)
    assert sensitivity(finals[order], inits[order]) == pytest.approx(value)
    assert sensitivity(finals + 1, inits + 1) == pytest.approx(value)


def test_sensitivity_without_a_finite_loss_is_nan():
  assert math.isnan(sensitivity([NAN, INF], [5.5, 5.5]))


def test_sensitivity_refuses_invalid_losses():
  with pytest.raises(ValueError, match='one of each for every learning rate'):
    sensitivity([2.0, 3.0], [5.5])
  with pytest.raises(ValueError, match='one of each for every learning rate'):
    sensitivity([], [])
  with pytest.raises(ValueError, match='but all must be finite'):
    sensitivity([2.0], [NAN])


def test_a_spread_counts_finite_losses_only():
  mean, std, n = spread([2.0, 2.2, NAN, 2.4])
  assert (mean, std, n) == (pytest.approx(2.2), pytest.approx(0.2), 3)
  assert spread([2.0])[0] == 2.0
  assert math.isnan(spread([2.0]).std)
  assert math.isnan(spread([]).mean)


def test_for_two_cells_the_noise_floor_is_students_t_test():
  rng = np.random.default_rng(0)
  for _ in range(30):
    a, b = rng.normal(2, 0.02, 3), rng.normal(2.03, 0.02, 4)
    floor = noise([a, b])
    assert (floor.dof, floor.cells) == (5, 2)
    p = scipy.stats.ttest_ind(a, b).pvalue
    assert (abs(a.mean() - b.mean()) > floor.beyond(3, 4)) == (p < 1 - judge.seeds.LEVEL)


def test_noise_alone_differs_at_the_stated_rate():
  """Eight cells of three seeds, all from one distribution."""
  rng = np.random.default_rng(0)
  claims = []
  for _ in range(400):
    cells = rng.normal(3, 0.05, (8, 3))
    apart = abs(cells[0].mean() - cells[1].mean())
    claims.append(apart > noise(cells).beyond(3, 3))
  assert 0.02 < np.mean(claims) < 0.09


def test_the_noise_floor_is_stated_in_nats():
  floor = noise([[2.0, 2.02], [3.0, 3.02, NAN], [4.0]])
  assert (floor.dof, floor.cells) == (2, 2)
  assert floor.std == pytest.approx(0.02 / math.sqrt(2))
  t = scipy.stats.t.ppf(0.975, 2)
  assert floor.beyond(3, 2) == pytest.approx(t * floor.std * math.sqrt(1 / 3 + 1 / 2))
  assert floor.within(3) == pytest.approx(t * floor.std / math.sqrt(3))
  assert f'{floor.beyond(2, 2):.4f} (n=2)' in str(floor)
  assert '0.0141' in str(floor)


@pytest.mark.parametrize('cells', [[], [[2.0], [3.0]], [[2.0, NAN]], [[]]])
def test_one_seed_per_cell_claims_no_ordering(cells):
  floor = noise(cells)
  assert (floor.dof, floor.cells) == (0, 0)
  assert math.isnan(floor.std)
  assert floor.beyond(1, 1) == INF
  assert floor.within(1) == INF
  assert 'claims no ordering' in str(floor)


def train(step, **values):
  usual = dict(loss=2.0, grad_norm=0.5, param_norm=40.0, update_norm=0.02)
  usual |= dict(skipped=0, verdict=0)
  return {'step': step, 'kind': 'train'} | usual | values


def indicators(step, **values):
  usual = dict(attention_logit=8.0, output_logit=1.5, residual_growth=3.0)
  return {'step': step, 'kind': 'indicators'} | usual | values


def test_large_norms_during_warmup_are_no_warning():
  records = [train(s, grad_norm=20.0 if s < 100 else 0.5) for s in range(1, 1001)]
  records += [indicators(s) for s in range(50, 1001, 50)]
  summary = warnings(records)
  assert [name for name, v in summary.items() if name.endswith('_left') and v] == []
  assert (summary['grad_norm_max'], summary['grad_norm_last']) == (20.0, 0.5)
  assert summary['update_ratio_last'] == pytest.approx(0.0005)
  assert (summary['skipped'], summary['not_finite']) == (0, 0)


@pytest.mark.parametrize('start', [200, 700])
def test_a_growing_indicator_records_when_it_left_its_range(start):
  """It leaves at a fifth of the run, or late."""
  records = [train(s) for s in range(1, 1001, 10)]
  for step in range(50, 1001, 50):
    grown = 8.0 * (1 + max(0, step - start) / 50)
    records.append(indicators(step, attention_logit=grown))
  summary = warnings(itertools.chain(records))
  usual = np.median([r['attention_logit'] for r in records[100:110]])
  first = next(r['step'] for r in records[100:] if r['attention_logit'] > 5 * usual)
  assert summary['attention_logit_left'] == first > start
  assert summary['attention_logit_max'] == records[-1]['attention_logit']
  assert summary['output_logit_left'] is None


def test_skipped_and_non_finite_steps_are_fractions_of_all_steps():
  """The log has every tenth step, and every bad one."""
  records = [train(s, skipped=int(s > 503) + int(s > 701)) for s in range(10, 1001, 10)]
  records.append(train(503, skipped=1, verdict=2, grad_norm=NAN, loss=NAN))
  records.append(train(701, skipped=2, verdict=1, grad_norm=60.0))
  records.sort(key=lambda r: r['step'])
  summary = warnings(records)
  assert (summary['skipped'], summary['not_finite']) == (0.002, 0.001)
  assert summary['grad_norm_left'] == 503
  assert math.isnan(summary['grad_norm_max'])


def test_an_indicator_that_was_not_logged_is_none():
  summary = warnings([])
  assert set(summary.values()) == {None}
  logged = warnings([train(1), {'step': 1, 'kind': 'heldout', 'loss': 2.0}])
  assert logged.keys() == summary.keys()
  assert (logged['grad_norm_max'], logged['attention_logit_max']) == (0.5, None)
