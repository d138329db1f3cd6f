"""The held-out loss of a saved step, which is known only after its save has begun."""

import types

import pytest
from test_checkpoint import tiny_state
from test_retention import about

from gated.plan.prepare import Run
from gated.run import checkpoint


def losses(directory):
  with checkpoint.Reader(directory) as reader:
    return {step: reader.about(step)['heldout_loss'] for step in reader.steps()}


def measured(saves, step, loss, **differs):
  """Saves a step without a loss, and then adds it."""
  saves.save(step, tiny_state(float(step)), about(None))
  later = about(loss, **differs)
  saves.measured(step, loss, later['config'], later['data'])


def test_a_loss_is_added_to_its_step_and_decides_what_is_kept(tmp_path):
  beats = []
  options: dict = dict(keep=1, keep_every=0, beat=beats.append)
  with checkpoint.Checkpoints(tmp_path, **options) as saves:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
      measured(saves, step, loss)
    saves.wait()
    assert losses(tmp_path) == {2: 1.0, 3: 2.0}
    measured(saves, 4, 0.5)
  # The old best step goes as soon as the new one is known.
  assert losses(tmp_path) == {4: 0.5}
  with checkpoint.Reader(tmp_path) as reader:
    reader.verify(4)
    assert reader.best() == 4
  assert beats[:3] == [
    'the arrays of step 1',
    'the digests of step 1',
    'the save of step 1',
  ]


def test_the_best_step_is_kept_while_the_loss_of_the_newest_is_unknown(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as saves:
    measured(saves, 1, 3.0)
    saves.save(2, tiny_state(2.0), about(None))
  assert losses(tmp_path) == {1: 3.0, 2: None}


def test_a_loss_on_other_rows_than_the_saved_recipe_names_is_not_added(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as saves:
    measured(saves, 1, 3.0, rows=1)
    saves.measured(7, 3.0, {}, {})  # This step is not saved.
  assert losses(tmp_path) == {1: None}


@pytest.mark.parametrize(
  ('step', 'owes'), [(0, False), (4, True), (6, False), (7, False), (9, True), (10, True)]
)
def test_an_evaluation_that_was_interrupted_is_due_after_the_restart(
  step, owes, tmp_path
):
  cfg = types.SimpleNamespace(
    steps=9,
    checkpoint=types.SimpleNamespace(every=4),
    eval=types.SimpleNamespace(every=5),
  )
  (tmp_path / 'metrics.jsonl').write_text(
    '{"step": 4, "kind": "train"}\n{"step": 6, "kind": "heldout"}\n'
    '{"step": 8, "kind": "heldout"}\n'
  )
  run: dict = dict.fromkeys(Run._fields)
  run |= dict(workdir=tmp_path, plan=types.SimpleNamespace(cfg=cfg))
  corpus = types.SimpleNamespace(domains=('code',))
  assert Run(**run | dict(corpus=corpus)).owes_evaluation(step) == owes
  empty = types.SimpleNamespace(domains=())
  assert not Run(**run | dict(corpus=empty)).owes_evaluation(step)
