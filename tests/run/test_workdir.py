"""Only the run that owns a workdir resumes in it."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small

from gated import config, storage
from gated.run import checkpoint, exit_codes, lock, metrics, outcome, workdir
from gated.train import step

DATA = {'sha256': 'd' * 64}
STEPS = (2, 4)


def about(c, **more):
  return dict(config=c, data=DATA, heldout_loss=None) | more


def state(value):
  zero = lambda: jnp.zeros((), jnp.int32)
  return step.State(zero(), zero(), {'w': jnp.full((8,), value)}, {'m': jnp.ones(2)})


def place(tree):
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(struct, tree)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir of a run with two saved steps; the first has the lower loss."""
  home = tmp_path_factory.mktemp('saved') / 'run'
  with checkpoint.Checkpoints(home / 'checkpoints', keep=2, keep_every=0) as out:
    for number in STEPS:
      out.save(number, state(number), about(small.recipe(), heldout_loss=float(number)))
  (home / 'run.json').write_text(json.dumps(about(small.recipe(), sessions=[])))
  return home


@pytest.fixture
def run(saved, tmp_path):
  """A copy of `saved` that a test may change."""
  return storage.path(shutil.copytree(saved, tmp_path / 'run'))


def check(home, *, allowed=(), restore_step='', data=DATA, like=None, **changes):
  c = small.recipe(**changes)
  like = like or place(state(0))
  options = dict(like=like, allowed=allowed, restore_step=restore_step)
  return workdir.check(home, c, data, **options)


def refused(home, message, **options):
  with pytest.raises(ValueError, match=message):
    check(home, **options)


def files(home):
  return {path: path.read_bytes() for path in Path(home).rglob('*') if path.is_file()}


def test_a_missing_workdir_is_a_fresh_start_and_is_not_created(tmp_path):
  assert check(tmp_path / 'a' / 'b') == (None, [], {})
  assert list(tmp_path.iterdir()) == []


def test_a_run_resumes_in_its_workdir_and_check_changes_nothing(run):
  before = files(run)
  assert check(run) == (4, [2, 4], {})
  assert files(run) == before


def test_without_run_json_the_checkpoint_identifies_the_run(run):
  (run / 'run.json').unlink()
  assert check(run) == (4, [2, 4], {})
  refused(run, r'config\.seed: 0 there, 1 here', seed=1)


def test_a_copy_without_its_checkpoints_does_not_start_from_scratch(run):
  """A run that was killed before its first save does."""
  shutil.rmtree(run / 'checkpoints')
  write = lambda *steps: (run / 'run.json').write_text(
    json.dumps(about(small.recipe(), sessions=[{'restored_step': s} for s in steps]))
  )
  write(-1)
  assert check(run).step is None
  outcome.write(run, outcome.Outcome(exit_codes.UNSTABLE, 3))
  assert check(run).step is None
  for code in (exit_codes.FINISHED, exit_codes.PREEMPTED):
    outcome.write(run, outcome.Outcome(code, 4))
    with pytest.raises(ValueError, match='has no checkpoints, but its run has saved'):
      check(run)
  (run / outcome.NAME).unlink()
  write(-1, 2)
  with pytest.raises(ValueError, match='has no checkpoints, but its run has saved'):
    check(run)


def test_metrics_without_a_run_json_are_not_overwritten(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  refused(tmp_path, 'has a metrics.jsonl but no run.json')


MAY = {
  'name': 'other',
  'model_from': 'DIR',
  'steps': 9,
  'mesh.fsdp': 2,
  'eval.rows': 1,
  'checkpoint.keep': 7,
  'log.every': 3,
  'paper.row': 'x',
  'data.workers': 2,
  'accum': 2,
  'loss.chunk': 8,
  'model.layers': 'unroll',
  'model.remat': 'full',
  'model.attn.backend': 'reference',
  'model.attn.max_segments': 32,
  'model.attn.mean_segments': 2.5,
  'model.moe.backend': 'ragged',
  'stability.on_spike': 'skip',
  'stability.max_bad_steps': 3,
  'stability.max_rollbacks': 3,
  'stability.stuck_after': 9.0,
  'stability.peer_timeout': 9,
}


@pytest.mark.parametrize('knob', MAY)
def test_knobs_that_do_not_change_the_training_may_differ(knob, run):
  result = check(run, **{knob: MAY[knob]})
  assert list(result.changed) == [f'config.{knob}']
  assert result.changed[f'config.{knob}'][1] == MAY[knob]


def test_the_cases_cover_every_name_in_may_change(run):
  knobs = [f'config.{knob}' for knob in MAY]
  assert all(any(k.startswith(name) for k in knobs) for name in workdir.MAY_CHANGE)


MAY_NOT = {
  'seed': 1,
  'batch': 16,
  'data.length': 32,
  'model.width': 32,
  'model.attn.gate.position': 'sdpa',
  'optim.lr': 1.0,
  'loss.z': 1e-4,
  'stability.threshold': 7.0,
  'stability.window': 64,
}


@pytest.mark.slow
@pytest.mark.parametrize('knob', MAY_NOT)
@pytest.mark.parametrize('by', ['knob', 'group', 'group.', 'config'])
def test_knobs_that_change_the_training_are_refused_unless_allowed(knob, by, run, caplog):
  value, name = MAY_NOT[knob], f'config.{knob}'
  refused(run, rf'{name}: .* there, {value!r} here', **{knob: value})
  refused(run, f'--allow_change={name}, which run.json records', **{knob: value})
  group = name.rpartition('.')[0]
  allowed = {'knob': name, 'group': group, 'group.': f'{group}.', 'config': 'config'}[by]
  result = check(run, allowed=[allowed], **{knob: value})
  assert list(result.changed) == [name]
  assert f'{name}: ' in caplog.text and '(--allow_change)' in caplog.text


def test_only_refused_knobs_are_listed(run):
  with pytest.raises(ValueError) as caught:
    check(run, allowed=['config.optim'], optim__lr=1.0, optim__warmup=1, seed=3, steps=9)
  message = str(caught.value)
  assert 'config.seed: 0 there, 3 here' in message
  assert '--allow_change=config.seed,' in message
  assert 'config.optim' not in message and 'config.steps' not in message


def test_an_unknown_knob_is_refused_with_the_nearest_one(run):
  for name, nearest in (
    ('config.optim.lrr', r'did you mean config\.optim\.lr\?'),
    ('config.optin.lr', r'did you mean config\.optim\.lr\?'),
    ('optim.lr', 'config.optim.lr'),
    ('config.opt', 'config.optim'),
    ('dat', 'data'),
  ):
    refused(run, f'--allow_change={name} is not a knob; .*{nearest}', allowed=[name])


def test_allow_change_is_neither_accepted_nor_offered_for_a_state_of_other_shapes(
  run, caplog
):
  wide = place(state(0))
  wide.model['w'] = jax.ShapeDtypeStruct((9,), 'int32')
  for allowed in [(), ['config.model']]:
    options = dict(allowed=allowed, like=wide, model__width=32)
    with pytest.raises(ValueError) as caught:
      check(run, **options)
    message = str(caught.value)
    assert 'config.model.width: 16 there, 32 here' in message
    reason = r'--allow_change cannot help: .*/4/model: w is int32\(8,\) there, but '
    assert re.search(reason, message)
    assert '--allow_change=' not in message and not caplog.messages
  refused(run, r'^--workdir=.*/4/model: w is int32', like=wide)


def test_other_data_are_refused_unless_allowed(run):
  other = {'sha256': 'e' * 64}
  refused(run, "data: 'dddddddddddd' there, 'eeeeeeeeeeee' here", data=other)
  refused(run, 'data: ', data=other, allowed=['config.data'])
  result = check(run, data=other, allowed=['data'])
  assert result.changed == {'data': ('d' * 12, 'e' * 12)}


def test_accum_may_not_change_if_routers_balance_within_micro_batches(run):
  experts = dict(model__moe__experts=4, model__moe__top_k=2)
  for over, message in (('global', ''), ('micro', r'config\.accum: 1 there, 2 here')):
    c = small.recipe(loss__balance_over=over, **experts)
    changed = config.differences(small.recipe(), c)
    sessions = [{'changed': changed}]
    (run / 'run.json').write_text(json.dumps(about(c, sessions=sessions)))
    options = dict(accum=2, loss__balance_over=over, **experts)
    if message:
      refused(run, message, **options)
    else:
      assert list(check(run, **options).changed) == ['config.accum']


@pytest.mark.parametrize(
  'content',
  [
    '',
    '{"config": {}',
    '[]',
    'null',
    '{"config": {}}',
    '{"config": 3, "data": {}}',
    '{"config": {}, "data": "x"}',
    '[' * 10**5,
    '{"config": {}, "data": {}}' + ' ' * (1 << 12),
  ],
  ids=['empty', 'torn', 'list', 'null', 'no data', 'number', 'text', 'deep', 'large'],
)
def test_a_damaged_run_json_is_refused_and_not_changed(content, run, monkeypatch):
  monkeypatch.setattr(workdir, 'LIMIT', 1 << 10 if content.endswith(' ') else 1 << 26)
  (run / 'run.json').write_text(content)
  refused(run, r'--workdir=.*run\.json is damaged')
  assert (run / 'run.json').read_text() == content


def test_a_step_stands_in_the_path_or_beside_it():
  for path, beside in (('a:7', ''), ('a', '7')):
    assert workdir.split_step(path, beside) == ('a', '7')
  assert workdir.split_step('gs://b/a:best') == ('gs://b/a', 'best')
  assert workdir.split_step('s3://b/a', 'latest') == ('s3://b/a', 'latest')
  assert workdir.split_step('a:b') == ('a:b', '')
  with pytest.raises(ValueError, match='a:7 names a step, and step best is given too'):
    workdir.split_step('a:7', 'best')


def test_restore_step_is_a_number_latest_or_best(run):
  steps = {'': 4, 'latest': 4, '4': 4, '2': 2, 'best': 2}
  results = {which: check(run, restore_step=which) for which in steps}
  assert {which: result.step for which, result in results.items()} == steps
  assert all(result.steps == [2, 4] for result in results.values())
  refused(run, r"--restore_step='3': .* has the steps 2, 4", restore_step='3')
  refused(run, "--restore_step='first', but allowed are latest", restore_step='first')


def go_on(home, asked, *steps):
  """A session that follows --restore_step, and saves these steps."""
  with checkpoint.Checkpoints(home / 'checkpoints', keep=2, keep_every=0) as out:
    out.go_back(check(home, restore_step=asked).step, asked=asked)
    for number in steps:
      out.save(number, state(number), about(small.recipe()))


def test_a_restore_step_is_followed_once_and_then_the_same_command_resumes(run, caplog):
  caplog.set_level('INFO')
  assert check(run, restore_step='2').step == 2
  go_on(run, '2')  # A kill before its next save.
  assert check(run, restore_step='2').step == 2
  go_on(run, '2', 3)
  caplog.clear()
  assert check(run, restore_step='2').step == 3
  assert '--restore_step=2 was followed before: resuming from step 3' in caplog.text
  go_on(run, '2', 4)
  assert check(run, restore_step='2').step == 4
  # Another step, or another training, is another command.
  assert check(run, restore_step='3').step == 3
  changes = dict(seed=1, allowed=['config.seed'])
  assert check(run, restore_step='3', **changes).step == 3
  # After a session without the flag, it is followed again.
  go_on(run, '')
  assert check(run, restore_step='3').step == 3


def test_a_change_of_the_training_follows_the_restore_step_again(run):
  go_on(run, '2', 3)
  assert check(run, restore_step='2', steps=9).step == 3
  with checkpoint.Checkpoints(run / 'checkpoints', keep=3, keep_every=0) as out:
    out.save(4, state(4), about(small.recipe()))
  changed = dict(seed=1, allowed=['config.seed'])
  assert check(run, restore_step='3').step == 3
  go_on(run, '3', 4)
  assert check(run, restore_step='3').step == 4
  assert check(run, restore_step='3', **changed).step == 3


def rewrite(home, **changes):
  """Writes run.json as by hand, with other values of knobs."""
  path = home / 'run.json'
  run = json.loads(path.read_text())
  path.write_text(json.dumps(run | {'config': small.recipe(**changes)}))


def test_a_run_json_that_was_edited_does_not_change_the_model(run, caplog):
  rewrite(run, model__attn__rope_base=500.0)
  edit = dict(model__attn__rope_base=500.0)
  refused(run, r'config\.model\.attn\.rope_base: 10000.0 there, 500.0 here', **edit)
  assert check(run) == (4, [2, 4], {})
  assert 'run.json was edited: config.model.attn.rope_base is as in the' in caplog.text
  knob = 'config.model.attn.rope_base'
  assert check(run, allowed=[knob], **edit).changed == {knob: (10000.0, 500.0)}


def test_a_change_that_a_session_made_before_the_next_save_is_no_edit(run, caplog):
  knob, edit = 'config.model.attn.rope_base', dict(model__attn__rope_base=500.0)
  rewrite(run, **edit)
  content = json.loads((run / 'run.json').read_text())
  content['sessions'] = [{'changed': {knob: [10000.0, 500.0]}}]
  (run / 'run.json').write_text(json.dumps(content))
  assert check(run, **edit) == (4, [2, 4], {})
  assert 'was edited' not in caplog.text
  refused(run, r'rope_base: 500.0 there, 10000.0 here')


def test_a_damaged_restore_step_is_not_replaced_by_another(run):
  os.truncate(run / 'checkpoints' / '2' / 'manifest.json', 9)
  refused(run, r"--restore_step='2': .*manifest\.json", restore_step='2')
  assert check(run).step == 4


def test_a_damaged_step_is_skipped_for_the_one_before(run, caplog):
  os.truncate(run / 'checkpoints' / '4' / 'manifest.json', 9)
  assert check(run).step == 2
  assert 'skipped: ' in caplog.text and 'checkpoints/4/manifest.json' in caplog.text


def test_a_run_with_only_damaged_steps_does_not_start_from_scratch(run):
  for number in STEPS:
    os.truncate(run / 'checkpoints' / str(number) / 'manifest.json', 9)
  refused(run, r'--workdir=.*: no valid checkpoint is left: .*/4/.*; .*/2/')


def test_a_run_beyond_its_last_step_is_refused(run):
  refused(run, r'config\.steps=3, but .* is at step 4', steps=3)
  assert check(run, steps=4).step == 4


def test_a_file_in_place_of_the_workdir_is_refused_with_the_flag(tmp_path):
  (tmp_path / 'file').write_bytes(b'')
  for home in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    refused(storage.path(home), 'file is not a writable folder')


@pytest.mark.parametrize(
  'name', ['a[b]', 'run[1]/x', 'a*', 'a?', 'a**b', 'a\\b', '\udcff'], ids=ascii
)
def test_a_place_where_orbax_cannot_save_is_refused(name, run, tmp_path, monkeypatch):
  refused(storage.path(tmp_path / name), 'Orbax cannot save below a path with')
  (tmp_path / name).mkdir(parents=True)
  run.rename(tmp_path / name / 'run')
  monkeypatch.chdir(tmp_path / name)
  refused(storage.path('run'), 'or a symbolic link to that folder')
  (tmp_path / 'link').symlink_to(tmp_path / name)
  assert check(storage.path(tmp_path / 'link' / 'run')).step == 4


def test_a_name_that_is_too_long_is_refused_with_the_flag(tmp_path):
  assert check(storage.path(tmp_path / ('a' * 255))).step is None
  refused(storage.path(tmp_path / ('a' * 256)), '--workdir=.*: File name too long')


@pytest.mark.parametrize('name', ['checkpoints', 'metrics.jsonl'])
def test_a_place_inside_a_workdir_of_the_wrong_kind_is_refused(name, tmp_path):
  """metrics.jsonl may be linked to a device, which keeps no record."""
  (tmp_path / name).symlink_to('/dev/null')
  refused(storage.path(tmp_path), f'{name} is not a writable')


def test_a_denied_permission_is_not_taken_for_damage(run, monkeypatch):
  """A step that is passed over would be replaced later."""
  read = storage.read

  def denied(path, limit):
    if os.fspath(path).endswith('4/manifest.json'):
      raise PermissionError(errno.EACCES, 'Permission denied', os.fspath(path))
    return read(path, limit)

  monkeypatch.setattr(storage, 'read', denied)
  refused(run, '--workdir=.*Permission denied: .*4/manifest.json')


@pytest.mark.skipif(os.getuid() == 0, reason='root may write anywhere')
def test_an_unwritable_folder_is_refused_with_the_flag(tmp_path):
  (tmp_path / 'theirs').mkdir(mode=0o500)
  refused(tmp_path / 'theirs' / 'run', 'theirs is not a writable folder')


def take_over(home):
  """Replaces the lock by one of another machine."""
  path = home / 'lock.json'
  note = json.loads(path.read_text()) | dict(host='far', machine='far', token='theirs')
  path.write_text(json.dumps(note | dict(beat=time.time())))


def test_only_one_run_at_a_time_holds_a_workdir(tmp_path):
  with workdir.held(tmp_path) as mine:
    workdir.check_held(mine, now=False)
    message = rf'--workdir=.* is in use by process {os.getpid()} on .* since '
    with pytest.raises(workdir.InUse, match=message), workdir.held(tmp_path):
      pytest.fail('two runs hold it')
    assert (tmp_path / 'lock.json').exists()
  assert list(tmp_path.iterdir()) == []
  assert issubclass(workdir.InUse, ValueError)


def test_the_outcome_is_removed_only_when_the_next_session_begins(tmp_path):
  workdir.conclude(tmp_path, 3, 'not finite')
  with workdir.held(tmp_path):
    pass  # For example, it was refused because the run had saved another step.
  assert outcome.read(tmp_path).code == 3
  workdir.begin(tmp_path, workdir.Resume(None, [], {}), [])
  assert outcome.read(tmp_path) is None


def test_skipped_updates_are_in_the_outcome(tmp_path):
  for number, skipped in ((5, 4), (6, 5)):
    record = {'step': number, 'kind': 'train', 'skipped': skipped}
    metrics.append(tmp_path / 'metrics.jsonl', record)
  metrics.append(tmp_path / 'metrics.jsonl', {'step': 7, 'kind': 'heldout'})
  workdir.conclude(tmp_path, 0, 'finished')
  ended = outcome.read(tmp_path)
  assert ended.told == 'finished; 5 of 6 updates were skipped' and ended.step == 7
  metrics.append(tmp_path / 'metrics.jsonl', {'step': 8, 'kind': 'train', 'skipped': []})
  workdir.conclude(tmp_path, 0, 'finished')  # Only warns.


def test_an_error_releases_the_workdir(tmp_path):
  with pytest.raises(ZeroDivisionError), workdir.held(tmp_path):
    1 / 0  # noqa: B018
  assert list(tmp_path.iterdir()) == []


def test_a_run_notices_a_takeover_of_its_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'MAX_PERIOD', 0.02)
  with workdir.held(tmp_path) as mine:
    take_over(tmp_path)
    until = time.monotonic() + 10
    while not mine.lost and time.monotonic() < until:
      time.sleep(0.01)
    with pytest.raises(workdir.TakenOver, match=r'was taken over by process .* on far'):
      workdir.check_held(mine, now=False)
  assert json.loads((tmp_path / 'lock.json').read_text())['token'] == 'theirs'
