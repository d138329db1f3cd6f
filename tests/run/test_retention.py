"""The steps that a run keeps, and the best one: only equal evaluations compare."""

import logging

from test_checkpoint import tiny_state

from gated.run import checkpoint
from gated.run.checkpoint import retention


def about(loss, *, rows=64, length=128, data='f'):
  knobs = {'eval': {'rows': rows}, 'data': {'length': length}}
  return {'config': knobs, 'data': {'sha256': data}, 'heldout_loss': loss}


def steps(*losses, **differs):
  """Losses -> steps 1, 2, ... measured alike; `differs` is for all of them."""
  abouts = (about(loss, **differs) for loss in losses)
  return {i: retention.measured(a) for i, a in enumerate(abouts, 1)}


def test_the_best_step_has_the_lowest_loss_and_the_first_of_equals_wins():
  assert retention.best(steps(3.0, 1.0, 2.0, 1.0)) == 2
  assert retention.best(steps(None, 4.0, None)) == 2
  assert retention.best(steps(None, None)) is None
  assert retention.best({}) is None


def test_only_losses_of_the_same_evaluation_compare():
  for differs in (dict(rows=1), dict(length=64), dict(data='g')):
    both = steps(1.0, 3.0) | {
      9 + i: m for i, m in steps(5.0, 4.0, None, **differs).items()
    }
    assert retention.best(both) == 11, differs
    assert retention.kept(both, keep=1, keep_every=0) == {1, 11, 12}, differs


def test_the_kept_steps_are_the_last_the_best_and_the_multiples():
  losses = steps(5.0, 4.0, 1.0, 3.0, 2.0, 2.5)
  assert retention.kept(losses, keep=2, keep_every=4) == {3, 4, 5, 6}
  assert retention.kept(losses, keep=1, keep_every=0) == {3, 6}


def test_a_step_with_other_fields_is_never_compared():
  old = {'config': {}, 'data': {'sha256': ['odd']}, 'heldout_loss': 1.0}
  both = {1: retention.measured(old)} | {2: retention.measured(about(2.0))}
  assert retention.best(both) == 2


def test_a_run_keeps_and_picks_the_best_of_its_newest_evaluation(tmp_path, caplog):
  saves = (
    (1, about(2.0)),
    (2, about(3.0)),
    (3, about(9.0, rows=1)),
    (4, about(9.5, rows=1)),
  )
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    for number, record in saves:
      out.save(number, tiny_state(float(number)), record)
  with caplog.at_level(logging.WARNING), checkpoint.Reader(tmp_path) as source:
    assert source.steps() == [1, 3, 4]
    assert source.pick('best', '--step') == 3
  assert 'the best step is 3, but the loss of 1 was measured on other' in caplog.text
