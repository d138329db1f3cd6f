"""Held-out loss by position, against NumPy in float64."""

import jax
import numpy as np
import pytest
import small

from gated.evals import positions
from gated.plan import evaluation
from gated.train import losses

BATCH = small.batch(8, 16)


def reference(net, batch, mask):
  """position -> (summed nats, summed weights), from the logits of whole rows."""
  run = jax.jit(lambda net, b: net(b.tokens, b.segments, b.positions))
  logit_BTV = np.asarray(run(net, batch), float)
  sums = {}
  for row in range(len(batch.tokens)):
    for t, target in enumerate(batch.targets[row]):
      logit_V, weight = logit_BTV[row, t], float(batch.weights[row, t])
      nats = np.log(np.exp(logit_V - logit_V.max()).sum()) + logit_V.max()
      place = batch.positions[row, t] if mask else t
      old = sums.get(int(place), (0, 0))
      sums[int(place)] = old[0] + weight * (nats - logit_V[target]), old[1] + weight
  return sums


@pytest.mark.parametrize('mask', [True, False])
def test_the_curve_is_that_of_numpy_over_several_batches(mask):
  net = small.model_of(mask_documents=mask)
  curve = positions.Curve()
  run = jax.jit(lambda net, b: positions.measure(net, b, chunk=16))
  for part in (
    jax.tree.map(lambda x: x[:4], BATCH),
    jax.tree.map(lambda x: x[4:], BATCH),
  ):
    curve.add(*run(net, part)[1])
  report = curve.report(net.cfg)
  assert report['position_in'] == ('document' if mask else 'row')
  expected = reference(net, BATCH, mask)
  last = max(place for place, (_, weight) in expected.items() if weight)
  assert len(report['nats_per_token']) == len(report['tokens']) == last + 1
  for place, (nats, tokens) in enumerate(zip(report['nats_per_token'], report['tokens'])):
    total, weight = expected.get(place, (0, 0))
    assert tokens == int(weight)
    assert nats == (pytest.approx(total / weight, rel=1e-5) if weight else None)


def test_a_position_without_targets_has_no_loss():
  curve = positions.Curve()
  curve.add([[3.0, 5.0, 7.0]], [[1.0, 0.0, 0.5]], [[2, 1, 2]])
  report = curve.report(small.model_config())
  assert report['nats_per_token'] == [None, None, pytest.approx((3 + 3.5) / 1.5)]


def test_rows_have_the_sums_of_an_evaluation_without_positions():
  net = small.model_of()
  sums, _ = jax.jit(lambda m, b: positions.measure(m, b, chunk=16))(net, BATCH)
  expected = jax.jit(lambda m, b: losses.per_row(m, b, chunk=16))(net, BATCH)
  np.testing.assert_array_equal(np.asarray(sums), np.asarray(expected))


def test_reports_of_other_models_stand_beside_the_first():
  reports = {'a': {'loss': 1.0}, 'b': {'loss': 2.0}}
  assert evaluation.joined(reports) == {'loss': 1.0, 'beside': {'b': {'loss': 2.0}}}
  assert evaluation.joined({'a': {'loss': 1.0}}) == {'loss': 1.0}
