"""The watchdog on the host: its response to a step, and the reason."""

import re

import pytest
from guarded import INF, NAN, knobs, reported, run, steady

from gated.run.watchdog import Watchdog
from gated.train import guard

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
def test_the_watchdog_chooses_an_action_with_a_reason(values, actions, why):
  for on_spike, action in zip(guard.ON_SPIKE, actions):
    cfg = knobs(on_spike=on_spike)
    chosen, reason = Watchdog(cfg, rollbacks=1).judge(values)
    assert chosen == action
    assert re.fullmatch(why, reason), reason
    # No rollback is left: the run stops instead, and the reason says so.
    chosen, reason = Watchdog(cfg, rollbacks=2).judge(values)
    assert chosen == ('stop' if action == 'rollback' else action)
    spent = r'; no rollback is left \(config\.stability\.max_rollbacks=2\)'
    assert re.fullmatch(why + (spent if action == 'rollback' else ''), reason), reason


def test_the_watchdog_judges_the_reports_of_the_guard():
  losses = steady(12)
  losses[9] = 300.0
  norms = dict(grad_norm=1.0, param_norm=1.0)
  watchdog = Watchdog(knobs(on_spike='rollback'), rollbacks=0)
  for i, (_, state, _) in enumerate(run(losses, on_spike='rollback')):
    action, _ = watchdog.judge(norms | dict(loss=losses[i]) | reported(state))
    assert action == ('rollback' if i == 9 else 'go')
