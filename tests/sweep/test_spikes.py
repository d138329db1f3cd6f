"""Spike detection finds each planted spike once, and no others."""

import math

import numpy as np
import pytest

from gated.sweep.judge import limit, spikes

PUBLISHED = dict(window=101, threshold=0.1, warmup=5000, gap=200)

# The shape of an excursion of w points, as a fraction of its height.
SHAPES = {
  'flat': np.ones,
  'tent': lambda w: 1 - np.abs(np.linspace(-1, 1, w + 2)[1:-1]),
  'decay': lambda w: np.exp(-4 * np.arange(w) / w),
  'ragged': lambda w: 1 - 0.4 * np.abs(np.sin(7.0 * np.arange(w))),
}


def loss(steps):
  """A loss curve like a language model's, down to about 2 nats."""
  return 1.9 + 22 * (steps + 300.0) ** -0.37


def log(rng, *, steps, fraction, sigma):
  """A noisy curve, logged at a random fraction of the steps."""
  count = round(steps * fraction)
  kept = np.sort(rng.choice(steps, count, replace=False)) + 1
  return kept, loss(kept) + sigma * rng.normal(size=count)


def plant(rng, steps, losses, *, shape, widths, spaces, heights=(0.25, 8)):
  """Adds excursions to the losses -> (first step, last step, height, a peak's step)."""
  at, planted = int(np.searchsorted(steps, 5001)) + int(rng.integers(1, 40)), []
  while at + max(widths) < len(steps):
    width = int(rng.choice(widths))
    form = SHAPES[shape](width)
    height = math.exp(rng.uniform(*np.log(heights)))
    losses[at : at + width] += height * form / form.max()
    last = at + width - 1
    planted.append((steps[at], steps[last], height, steps[at + form.argmax()]))
    at = last + 1 + int(rng.integers(*spaces))
    # Excursions closer than the gap count as one.
    at = max(at, int(np.searchsorted(steps, steps[last] + 260)))
  return planted


def check(planted, detected, *, sigma):
  """Every planted spike is detected once, with its height, and no others."""
  assert len(detected) == len(planted)
  for (first, last, height, _), spike in zip(planted, detected, strict=True):
    assert first <= spike.first <= spike.step <= spike.last <= last
    # The peak is the highest of up to 40 noisy points. Flanks below the threshold stay in
    # the median and raise it a little.
    assert abs(spike.height - height) < 5 * sigma + 0.04


CASES = {
  'single': dict(shape='flat', widths=[1], spaces=(30, 120)),
  'as wide as 40 points': dict(shape='flat', widths=[40], spaces=(62, 120)),
  'two and three in a window': dict(shape='flat', widths=[1, 5, 15], spaces=(12, 25)),
  'wide ones in a window': dict(shape='flat', widths=[25, 40], spaces=(12, 30)),
  'tents': dict(shape='tent', widths=[1, 9, 40], spaces=(12, 100)),
  'decaying': dict(shape='decay', widths=[3, 20, 40], spaces=(15, 100)),
  'ragged': dict(shape='ragged', widths=[2, 10, 40], spaces=(15, 100)),
}


@pytest.mark.parametrize('sigma', [0.005, 0.02])
@pytest.mark.parametrize('case', CASES)
def test_every_planted_spike_of_a_subsampled_log_is_found(case, sigma):
  for seed in range(2):
    rng = np.random.default_rng(seed)
    steps, losses = log(rng, steps=150_000, fraction=0.028, sigma=sigma)
    planted = plant(rng, steps, losses, **CASES[case])
    assert len(planted) > 25
    check(planted, spikes(steps, losses), sigma=sigma)


@pytest.mark.full
@pytest.mark.parametrize('fraction', [0.028, 0.055, 0.3])
@pytest.mark.parametrize('case', CASES)
def test_every_planted_spike_is_found_under_many_seeds(case, fraction):
  for seed in range(20):
    rng = np.random.default_rng(100 + seed)
    sigma = rng.choice([0.002, 0.01, 0.02])
    steps, losses = log(rng, steps=200_000, fraction=fraction, sigma=sigma)
    planted = plant(rng, steps, losses, **CASES[case])
    check(planted, spikes(steps, losses), sigma=sigma)


@pytest.mark.full
def test_noise_alone_is_no_spike():
  rng = np.random.default_rng(0)
  for _ in range(5):
    steps, losses = log(rng, steps=400_000, fraction=1, sigma=0.02)
    assert spikes(steps, losses) == []


def test_a_curve_like_the_published_ones_has_their_spike_counts():
  """Length and noise as in the released curves, which have 75 and 0 spikes."""
  rng = np.random.default_rng(0)
  steps, losses = log(rng, steps=360_145, fraction=10_000 / 360_145, sigma=0.0116)
  heights = np.concatenate(
    [[8.29, 7.0, 6.9, 6.4, 6.1, 5.7], rng.uniform(1, 2, 15), rng.uniform(0.15, 0.5, 54)]
  )
  for at, height in zip(np.linspace(200, 9900, 75).astype(int), heights, strict=True):
    losses[at] += height
    losses[at + 1] += 0.2 * min(height, 1)
  detected = spikes(steps, losses, **PUBLISHED)
  assert len(detected) == 75
  assert max(s.height for s in detected) == pytest.approx(8.29, abs=0.06)

  steps, losses = log(rng, steps=361_938, fraction=19_986 / 361_938, sigma=0.0106)
  assert spikes(steps, losses, **PUBLISHED) == []


def test_a_window_mostly_of_spikes_does_not_raise_the_median():
  """Three excursions of 40 points, 15 apart: 70 of 101 points about the middle one."""
  rng = np.random.default_rng(1)
  steps = np.arange(1, 3001) * 20
  losses = 2 + 0.02 * rng.normal(size=3000)
  for at in (1000, 1055, 1110):
    losses[at : at + 40] += 0.3
  detected = spikes(steps, losses)
  assert [s.first for s in detected] == [steps[i] for i in (1000, 1055, 1110)]
  assert [s.last for s in detected] == [steps[i + 39] for i in (1000, 1055, 1110)]
  for spike in detected:
    assert spike.height == pytest.approx(0.3 + 2 * 0.02, abs=0.05)


def test_an_excursion_across_a_gap_in_the_log_counts_once():
  """No logged point shows that the loss returned in between."""
  steps = np.arange(1, 2001) * 30
  steps[1010:] += 1000
  losses = np.full(2000, 2.0)
  losses[1000:1020] += 0.5
  assert [(s.first, s.last) for s in spikes(steps, losses)] == [(30030, 31600)]
  losses[1007:1013] = 2.0
  assert len(spikes(steps, losses)) == 2


def test_spikes_closer_than_the_gap_are_one_excursion():
  steps, losses = np.arange(1, 20_001), np.full(20_000, 2.0)
  losses[[9_999, 10_199]] = 2.5, 3.0
  assert [tuple(s) for s in spikes(steps, losses)] == [(10_200, 1.0, 10_000, 10_200)]
  assert [s.step for s in spikes(steps, losses, gap=199)] == [10_000, 10_200]


@pytest.mark.parametrize('warmup', [0, 100])
def test_a_steeply_falling_loss_has_no_spike(warmup):
  steps = np.arange(1, 2001)
  for losses in (loss(steps), 11 * np.exp(-steps / 30), np.linspace(11, 0, 2000)):
    for thinned in (1, 7, 100, 700):
      assert spikes(steps[::thinned], losses[::thinned], warmup=warmup) == []


@pytest.mark.parametrize('count', [20, 60, 101, 400])
def test_the_spike_of_a_short_log_is_found(count):
  steps = np.arange(1, count + 1)
  for seed in range(10):
    rng = np.random.default_rng(seed)
    losses = 1.5 + 4 * np.exp(-6 * steps / count) + 0.01 * rng.normal(size=count)
    assert spikes(steps, losses, warmup=0) == []
    at = int(rng.integers(4, count))
    losses[at] += 1
    (spike,) = spikes(steps, losses, warmup=0)
    assert spike.step == steps[at]
    assert spike.height == pytest.approx(1, abs=0.15)


def test_an_excursion_at_either_end_of_a_log_is_found():
  rng = np.random.default_rng(0)
  steps = np.arange(1, 1001)
  for first, end in ((2, 42), (10, 50), (960, 1000)):
    losses = 2 + 0.02 * rng.normal(size=1000)
    losses[first:end] += 1
    (spike,) = spikes(steps, losses, warmup=0)
    assert (spike.first, spike.last) == (first + 1, end)


def test_noise_above_the_threshold_is_no_spike():
  """Runs of tiny batches: 0.1 nats is one standard deviation of their noise."""
  rng = np.random.default_rng(0)
  steps, losses = log(rng, steps=5000, fraction=1, sigma=0.1)
  assert spikes(steps, losses, warmup=500) == []
  losses[3000] += 2
  assert [s.step for s in spikes(steps, losses, warmup=500)] == [3001]


def test_limit_returns_the_threshold_in_force():
  rng = np.random.default_rng(3)
  steps, quiet = log(rng, steps=10_000, fraction=1, sigma=0.015)
  how = dict(threshold=0.1, warmup=5000)
  assert limit(steps, quiet, **how) == 0.1
  losses = quiet + 0.1 * rng.normal(size=len(steps))
  assert limit(steps, losses, **how) == pytest.approx(4.6 * 0.1, rel=0.1)
  for at, times in ((7000, 0.5), (8000, 2)):
    losses[at] = loss(at) + times * limit(steps, losses, **how)
  assert [s.step for s in spikes(steps, losses)] == [8001]


def test_a_non_finite_loss_is_a_spike_and_does_not_change_the_median():
  rng = np.random.default_rng(0)
  steps = np.arange(1, 20_001)
  losses = 2 + 0.02 * rng.normal(size=20_000)
  losses[8_000], losses[8_001], losses[12_000:12_090] = np.nan, 9.0, np.inf
  losses[15_000] = 2.5
  detected = spikes(steps, losses)
  assert [(s.step, s.last) for s in detected] == [
    (8001, 8002),
    (12_001, 12_090),
    (15_001, 15_001),
  ]
  assert [s.height for s in detected[:2]] == [math.inf, math.inf]
  assert detected[2].height == pytest.approx(0.5, abs=0.08)


def test_a_lasting_change_of_level_is_no_spike():
  rng = np.random.default_rng(0)
  steps = np.arange(1, 4001) * 10
  losses = 2 + 0.02 * rng.normal(size=4000)
  losses[2000:] += 1
  assert spikes(steps, losses) == []


def test_a_slow_recovery_is_one_spike():
  steps = np.arange(1, 4001) * 10
  losses = np.full(4000, 2.0)
  losses[2000:] += 3 * np.exp(-np.arange(2000) / 60)
  (spike,) = spikes(steps, losses)
  assert spike.step == 20_010
  assert spike.height == pytest.approx(3, abs=0.05)


def test_spikes_do_not_depend_on_the_level_or_on_the_warmup():
  rng = np.random.default_rng(3)
  steps, losses = log(rng, steps=100_000, fraction=0.05, sigma=0.01)
  plant(rng, steps, losses, shape='decay', widths=[3, 20], spaces=(30, 90))
  detected = spikes(steps, losses)
  raised = spikes(steps, losses + 5)
  assert [s.step for s in raised] == [s.step for s in detected]
  np.testing.assert_allclose([s.height for s in raised], [s.height for s in detected])
  late = spikes(steps, losses, warmup=50_000)
  assert late == [s for s in detected if s.first > 50_000]


def test_empty_and_non_finite_logs_are_accepted():
  assert spikes([], []) == []
  assert spikes([7], [2.0], warmup=0) == []
  (spike,) = spikes([1, 2, 3], [np.nan] * 3, warmup=0)
  assert (spike.step, spike.height, spike.last) == (1, math.inf, 3)


@pytest.mark.parametrize(
  ('steps', 'losses', 'options', 'words'),
  [
    ([1, 2], [2.0], {}, 'the same length'),
    ([[1]], [[2.0]], {}, 'the same length'),
    ([1, 1], [2.0, 2.0], {}, 'must increase, but 1 is followed by 1'),
    ([1, 3, 2], [2.0] * 3, {}, 'must increase, but 3 is followed by 2'),
    (['a', 'b'], [2.0] * 2, {}, 'must be numbers'),
    ([1, 2], [2.0] * 2, {'window': 100}, 'window=100, but it must be an odd number'),
    ([1, 2], [2.0] * 2, {'window': 1}, 'window=1, but'),
    ([1, 2], [2.0] * 2, {'threshold': 0}, 'threshold=0, but it must be positive'),
    ([1, 2], [2.0] * 2, {'threshold': math.nan}, 'threshold=nan, but'),
    ([1, 2], [2.0] * 2, {'warmup': -1}, 'warmup=-1, but'),
    ([1, 2], [2.0] * 2, {'gap': -5}, 'gap=-5, but it must be a number of steps'),
  ],
)
def test_invalid_logs_and_parameters_are_refused(steps, losses, options, words):
  with pytest.raises(ValueError, match=words):
    spikes(steps, losses, **options)
