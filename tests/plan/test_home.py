"""The default workdir is named first, beside runs of nearly the same recipe."""

import pytest
import small

from gated import storage
from gated.plan import home, recipe


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch, caplog):
  monkeypatch.chdir(tmp_path)
  caplog.set_level('INFO', 'gated')


def default(c):
  return f'runs/{c["name"]}-{recipe.digest(c)}'


def make(saved=(), **changes):
  """A workdir of a run, with saved steps."""
  c = small.recipe(**changes)
  place = storage.path(default(c))
  storage.write_json(place / 'run.json', dict(config=c, data={}, sessions=[]))
  for step in saved:
    storage.make(place / 'checkpoints' / str(step))
  return str(place)


def choose(given='', allowed=(), **changes):
  return str(home.workdir(given, small.recipe(**changes), allowed=allowed))


def test_a_given_workdir_is_used_and_nothing_is_logged(caplog):
  make()
  assert choose('runs/mine', allowed=['config.optim.lr']) == 'runs/mine'
  assert not caplog.messages


def test_the_default_workdir_is_named_after_the_recipe_and_logged(caplog):
  c = small.recipe()
  assert choose() == default(c)
  assert caplog.messages == [f'workdir: {default(c)}']
  assert choose(seed=1) != choose()


def test_an_existing_default_workdir_resumes(caplog):
  place = make()
  make(steps=4)
  assert choose() == place
  assert caplog.messages == [f'workdir: {place} (resumes)']


def test_a_run_that_differs_in_a_free_knob_can_be_resumed(caplog):
  place = make(saved=[2, 4], steps=4)
  choose(steps=8)
  assert caplog.messages[1:] == [
    f'{place} has the same recipe with steps=4: --workdir={place} resumes it'
  ]


@pytest.mark.parametrize(
  ('there', 'here', 'text'),
  [
    (dict(optim__lr=0.5), {}, 'optim.lr=0.5'),  # Needs --allow_change.
    (dict(steps=8), dict(steps=7), 'steps=8'),  # Saved step 8 is too far.
  ],
)
def test_a_run_that_cannot_be_resumed_is_only_named(there, here, text, caplog):
  place = make(saved=[8], **there)
  choose(**here)
  assert caplog.messages[1:] == [f'{place} has the same recipe with {text}']


def test_runs_that_differ_in_more_or_less_are_not_named(caplog):
  make(steps=4, seed=1)
  make(paper__row='x')
  c = small.recipe()
  del c['log']['probes']  # An older run, without a new knob.
  storage.write_json('runs/old/run.json', dict(config=c))
  storage.write('runs/damaged/run.json', b'{')
  storage.write_json('runs/strange/run.json', dict(config=3))
  storage.write('runs/file', b'')
  choose()
  assert len(caplog.messages) == 1


def test_at_most_three_runs_are_named_and_those_that_resume_come_first(caplog):
  for seed in range(1, 5):
    make(seed=seed)
  place = make(steps=99)
  choose()
  assert len(caplog.messages) == 4 and place in caplog.messages[1]


def test_allow_change_without_a_workdir_is_refused_with_the_run_that_it_means():
  place = make(optim__lr=0.5)
  with pytest.raises(ValueError, match=rf'config\.optim\.lr needs --workdir={place}: '):
    choose(allowed=['config.optim.lr'])
  with pytest.raises(ValueError, match=r'config\.seed needs --workdir: the default'):
    choose(allowed=['data', 'config.seed'])
  # The name does not depend on the dataset's content or on the paper's numbers.
  assert choose(allowed=['data', 'config.paper.']) == default(small.recipe())
  # A fresh run may compute differently from the model of its weights.
  start = dict(init_from='weights')
  assert choose(allowed=['config.model'], **start) == default(small.recipe(**start))


def test_a_workdir_with_a_step_is_refused_with_the_flag_for_it():
  with pytest.raises(ValueError, match='--workdir=runs/a --restore_step=best'):
    choose('runs/a:best')
  assert choose('runs/a:b') == 'runs/a:b'
