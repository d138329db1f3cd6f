"""Checkpoints are restored bit for bit, or refused with the name of the leaf."""

import dataclasses
import json
import shutil
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import model, plan, storage
from gated.devices import mesh, trees
from gated.run import checkpoint
from gated.train import optim, step

ONES = dict(data=1, fsdp=1, expert=1, tensor=1, context=1)
CFG = small.model_config(attn__gate__position='value')
ABOUT = dict(config={'a': [1, 2.5, 'x', None]}, data={'sha256': 'f'}, heldout_loss=2.5)


def shapes(**changes):
  cfg = small.model_config(**dict(attn__gate__position='value') | changes)
  tx = optim.make(small.optim_config(), steps=5, multipliers={})
  return jax.eval_shape(lambda: step.init(lambda key: model.Transformer(cfg, key), tx, 0))


def place(state, **sizes):
  """Shapes or arrays of a state -> its shapes, placed on a mesh."""
  abstract = jax.eval_shape(lambda: state)
  return plan.placed(abstract, mesh.shardings(abstract, mesh.make(**(ONES | sizes))))


@pytest.fixture(scope='module')
def state():
  """A state of random bits, split over eight devices."""
  filled = small.filled(shapes(), seed=3)
  count = lambda n: jnp.asarray(n, jnp.int32)
  filled = dataclasses.replace(filled, step=count(7), data_step=count(9))
  return jax.device_put(
    filled, jax.tree.map(lambda s: s.sharding, place(filled, fsdp=4, tensor=2))
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory, state):
  """A folder with one saved step."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with checkpoint.Checkpoints(directory, keep=1, keep_every=0) as out:
    out.save(7, state, ABOUT)
  return directory


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, context=2)]
)
def test_a_state_is_restored_bit_for_bit_on_any_mesh(sizes, saved, state):
  like = place(state, **sizes)
  with checkpoint.Reader(saved) as source:
    back = source.restore(7, like)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  assert trees.digest(back) == trees.digest(state)
  for leaf, expected in zip(jax.tree.leaves(back), jax.tree.leaves(like)):
    assert leaf.sharding == expected.sharding


def test_the_model_is_restored_alone_on_one_device(saved, state):
  like = jax.eval_shape(lambda: state.model)
  one = mesh.make(**ONES, devices=jax.devices()[:1])
  with checkpoint.Reader(saved) as source:
    back = source.restore_model(7, plan.placed(like, mesh.shardings(like, one)))
  assert trees.digest(back) == trees.digest(state.model)
  assert back.embed.table[...].devices() == {jax.devices()[0]}


def test_the_record_of_a_step_is_read_as_saved(saved):
  with checkpoint.Reader(saved) as source:
    assert source.about(7) == ABOUT


def test_bfloat16_weights_are_restored_exactly(tmp_path):
  net = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.bfloat16)}
  zero = jnp.zeros((), jnp.int32)
  small_state = step.State(zero, zero, net, {'m': jnp.ones(())})
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    out.save(1, small_state, ABOUT)
    out.wait()
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state
    )
    assert trees.digest(out.restore(1, like)) == trees.digest(small_state)


@pytest.mark.slow
def test_vectors_that_were_saved_in_bfloat16_are_read_in_float32(tmp_path):
  """Earlier versions kept norm scales and biases in config.model.numerics.weights."""
  old = small.filled(
    jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), shapes().model)
  )
  zero = jnp.zeros((), jnp.int32)
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    out.save(1, step.State(zero, zero, old, {'m': jnp.ones(())}), ABOUT)
    out.wait()
    new = place(shapes(numerics__weights='bfloat16').model, fsdp=8)
    out.check_model(1, new)
    read, saved = map(trees.flatten, (out.restore_model(1, new), old))
  for name, leaf in trees.flatten(new).items():
    assert leaf.dtype == ('float32' if name.endswith('.scale') else 'bfloat16')
    assert read[name].dtype == leaf.dtype
    np.testing.assert_array_equal(
      read[name].astype('float32'), saved[name].astype('float32')
    )


def test_a_save_holds_the_old_state_even_if_the_next_step_reuses_its_memory(tmp_path):
  tiny = tiny_state(0.0)
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    out.save(1, tiny, ABOUT)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(3):
      tiny = overwrite(tiny)
    jax.block_until_ready(tiny)
    out.wait()
    assert float(out.restore(1, like(tiny)).model['w'].max()) == 0


def tiny_state(value):
  zero = lambda: jnp.zeros((), jnp.int32)
  return step.State(
    zero(), zero(), {'w': jnp.full((1 << 12,), value)}, {'m': jnp.ones(2)}
  )


def like(state):
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(struct, state)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      dict(vocab=48),
      r'model: embed\.table is float32\(40, 16\) there, but float32\(48, 16\) is',
    ),
    (
      dict(numerics__weights='bfloat16'),
      r'is float32\(.*\) there, but bfloat16\(.*\) is expected',
    ),
    (dict(attn__gate__position='none'), r'model: blocks\.attn\.gate\.weight is in the'),
    (dict(tied=False), r'model: head\.table is not in the checkpoint'),
  ],
)
def test_a_leaf_of_the_model_that_does_not_fit_is_named(changes, message, saved):
  expected = place(shapes(**changes), fsdp=8)
  with checkpoint.Reader(saved) as source, pytest.raises(ValueError, match=message):
    source.restore(7, expected)


def test_a_leaf_of_the_rest_that_does_not_fit_is_named(saved, state):
  expected = place(state, fsdp=8)
  bad = dataclasses.replace(expected, step=jax.ShapeDtypeStruct((), jnp.int16))
  with (
    checkpoint.Reader(saved) as source,
    pytest.raises(ValueError, match=r'rest: step .*int32.*int16'),
  ):
    source.restore(7, bad)


@pytest.fixture(scope='module')
def history(tmp_path_factory):
  """Six saves, the third the best; the last two and every fourth are kept."""
  directory = tmp_path_factory.mktemp('history')
  losses = {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: 2.0, 6: 2.5}
  with checkpoint.Checkpoints(directory, keep=2, keep_every=4) as out:
    for number, loss in losses.items():
      out.save(number, tiny_state(float(number)), ABOUT | {'heldout_loss': loss})
  return directory


def test_the_last_the_best_and_every_nth_step_are_kept(history):
  with checkpoint.Reader(history) as source:
    assert source.steps() == [3, 4, 5, 6]
    assert (source.latest(), source.best()) == (6, 3)
    for number in (3, 6):
      back = source.restore(number, like(tiny_state(0.0)))
      assert float(back.model['w'][0]) == number


def test_steps_of_an_earlier_session_are_kept_by_the_same_rules(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 4.0, 4: 5.0, 5: 6.0, 6: 7.0}
  for session in ([1, 2, 3], [4, 5, 6]):
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=0) as out:
      for number in session:
        about = ABOUT | {'heldout_loss': losses[number]}
        out.save(number, tiny_state(float(number)), about)
  with checkpoint.Reader(tmp_path) as source:
    assert source.steps() == [2, 5, 6]


def test_a_step_without_a_held_out_loss_is_saved_and_never_the_best(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=3, keep_every=0) as out:
    for number, loss in ((1, None), (2, 2.0), (3, None)):
      out.save(number, tiny_state(0.0), ABOUT | {'heldout_loss': loss})
  with checkpoint.Reader(tmp_path) as source:
    assert (source.latest(), source.best()) == (3, 2)


def test_a_reader_does_not_touch_an_unfinished_save(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    out.save(1, tiny_state(0.0), ABOUT)
  unfinished = tmp_path / '2.orbax-checkpoint-tmp'
  unfinished.mkdir()
  with checkpoint.Reader(tmp_path) as source:
    assert source.steps() == [1]
  assert unfinished.is_dir()


def test_pick_takes_latest_best_or_a_step_on_disk(history):
  with checkpoint.Reader(history) as source:
    picked = [source.pick(which, '--step') for which in ('latest', 'best', '4')]
    assert picked == [6, 3, 4]
    with pytest.raises(ValueError, match=r"--step='2': .* has the steps 3, 4, 5, 6"):
      source.pick('2', '--step')
    for which in ('last', '-1', '4.0', ''):
      with pytest.raises(
        ValueError, match=r'--step=.*allowed are latest, best, or a step'
      ):
        source.pick(which, '--step')


def test_pick_reports_a_folder_without_checkpoints(tmp_path):
  with (
    checkpoint.Reader(tmp_path) as source,
    pytest.raises(ValueError, match=r"--step='latest': .* holds no checkpoint"),
  ):
    source.pick('latest', '--step')


def test_best_is_the_latest_when_no_step_has_a_loss(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=3, keep_every=0) as out:
    for number in (1, 2):
      out.save(number, tiny_state(0.0), ABOUT | {'heldout_loss': None})
    out.wait()
    assert out.best() == 2


def interrupt(directory, number):
  """Creates the files that a process killed during a save leaves."""
  unfinished = directory / f'{number}.orbax-checkpoint-tmp'
  (unfinished / 'model').mkdir(parents=True)
  (unfinished / 'model' / 'manifest.ocdbt').write_bytes(b'half a ')
  return unfinished


def test_an_interrupted_save_is_ignored_and_can_be_repeated(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=0) as out:
    out.save(1, tiny_state(1.0), ABOUT)
  interrupt(tmp_path, 2)
  unfinished = interrupt(tmp_path, 3)
  with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=0) as out:
    assert out.steps() == [1]
    assert out.latest() == 1
    out.save(2, tiny_state(2.0), ABOUT)
    out.wait()
    assert float(out.restore(2, like(tiny_state(0.0))).model['w'][0]) == 2
  assert not unfinished.exists()


def test_a_step_holds_only_arrays_and_json(saved):
  """Reading runs no code, so a step must hold none."""
  written = json.loads((saved / '7' / 'manifest.json').read_text())
  assert written['about'] == ABOUT
  assert not [p for p in saved.rglob('*') if p.suffix in ('.pkl', '.pickle', '.npy')]


# Damaged steps.


@pytest.fixture
def three(tmp_path):
  """A folder with the valid steps 1, 2 and 3."""
  with checkpoint.Checkpoints(tmp_path, keep=3, keep_every=0) as out:
    for number in (1, 2, 3):
      out.save(number, tiny_state(float(number)), ABOUT)
  return tmp_path


def newest(directory):
  with checkpoint.Reader(directory) as source:
    step = source.newest_good()
    back = source.restore(step, like(tiny_state(0.0)))
  assert float(back.model['w'].max()) == float(back.model['w'].min()) == step
  return step


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b'')


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
  'damage',
  [truncate, flip]
  + [
    pytest.param(d, marks=pytest.mark.full) for d in (empty, lambda path: path.unlink())
  ],
)
def test_a_step_with_any_damaged_file_is_skipped_with_the_reason(damage, three, caplog):
  files = [path for path in (three / '3').rglob('*') if path.is_file()]
  assert len(files) > 10
  for path in files:
    before = path.read_bytes()
    if damage is truncate and len(before) < 2:
      continue
    if damage is empty and not before:
      continue
    caplog.clear()
    damage(path)
    assert newest(three) == 2
    assert str(path) in caplog.text and 'using step 2' in caplog.text
    path.write_bytes(before)
  assert newest(three) == 3


def test_a_run_never_starts_from_scratch_over_damaged_steps(three):
  for number in (1, 2, 3):
    files = [p for p in (three / str(number)).rglob('*') if p.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size))
  with (
    checkpoint.Reader(three) as source,
    pytest.raises(ValueError, match=r'no valid checkpoint is left.*3.*2.*1.*delete it'),
  ):
    source.newest_good()


def test_a_saved_step_without_its_manifest_is_an_error(three):
  """A fresh start needs a folder without any committed step."""
  for number in (1, 2, 3):
    (three / str(number) / 'manifest.json').unlink()
  with (
    checkpoint.Reader(three) as source,
    pytest.raises(ValueError, match=r'3/manifest.json is missing, but the step was'),
  ):
    source.newest_good()
  (three / 'head.json').unlink()
  with checkpoint.Reader(three) as source:
    assert source.newest_good() is None


@pytest.mark.parametrize(
  'content', ['', 'null', '[]', '{"step": -1}', '{"step": 2}', '[' * 10**5]
)
def test_a_damaged_head_is_ignored(content, three):
  (three / 'head.json').write_text(content)
  assert newest(three) == 3


ODD = [
  *("""it's "a" b""", 'new\nline', '-x', '{a}', 'a;b&c|d', '$HOME', 'caf\xe9', ' '),
  *('%20#:,=', 'b]', 'x' * 255, '~', '\x1b', '\t', 'trailing ', '...'),
]


@pytest.mark.slow
@pytest.mark.parametrize('name', ODD, ids=ascii)
def test_checkpoints_below_an_odd_name_are_read_back(name, tmp_path):
  home = tmp_path / name
  with checkpoint.Checkpoints(home / 'checkpoints', keep=1, keep_every=0) as out:
    out.save(1, tiny_state(1.0), ABOUT)
  assert newest(home / 'checkpoints') == 1


def test_a_step_without_merged_arrays_is_not_committed(tmp_path):
  """Orbax takes the name for a pattern, and merges nothing."""
  home = tmp_path / 'a[b]'
  with (
    pytest.raises(checkpoint.SaveFailed, match=r'manifest\.ocdbt was not written'),
    checkpoint.Checkpoints(home, keep=1, keep_every=0) as out,
  ):
    out.save(1, tiny_state(1.0), ABOUT)
  with checkpoint.Reader(home) as source:
    assert source.steps() == []


def test_pick_never_replaces_a_step_by_another(three):
  flip(three / '2' / 'manifest.json')
  with checkpoint.Reader(three) as source:
    assert [source.pick(which, '--step') for which in ('1', 'latest')] == [1, 3]
    with pytest.raises(ValueError, match=r"--step='2': .*2/manifest.json cannot be used"):
      source.pick('2', '--step')


@pytest.mark.parametrize(('which', 'chosen'), [('latest', 5), ('best', 5)])
def test_a_step_that_its_run_removes_meanwhile_is_chosen_again(
  which, chosen, three, monkeypatch
):
  """The run saves steps 4 and 5, and removes the others, while a reader verifies."""
  verify, saved = checkpoint.Reader.verify, []

  def late(reader, step):
    if not saved:
      saved.append(step)
      with checkpoint.Checkpoints(three, keep=1, keep_every=0) as out:
        for number in (4, 5):
          out.save(number, tiny_state(float(number)), ABOUT | {'heldout_loss': -number})
    verify(reader, step)

  monkeypatch.setattr(checkpoint.Reader, 'verify', late)
  with checkpoint.Reader(three) as source:
    assert source.pick(which, '--step') == chosen
  assert saved == [3] if which == 'latest' else saved == [1]


def test_a_return_to_a_step_discards_the_later_steps(three):
  with checkpoint.Checkpoints(three, keep=3, keep_every=0) as out:
    assert out.go_back(1, data_step=7) == 7
    assert out.steps() == [1]
  with checkpoint.Checkpoints(three, keep=3, keep_every=0) as out:
    # From the same step, the data continues past the bad batch again.
    assert out.go_back(1) == 7
    assert {p.name for p in three.iterdir()} >= {'1', '2', '3'}
    out.save(2, tiny_state(2.5), ABOUT)
    out.wait()
    assert out.steps() == [1, 2]
    assert not (three / '3').exists()
    back = out.restore(2, like(tiny_state(0.0)))
    assert float(back.model['w'][0]) == 2.5
    assert out.go_back(2) is None


def test_a_kill_while_a_discarded_step_is_removed_loses_nothing(three):
  """The folder is removed, but head.json still lists the step as discarded."""
  with checkpoint.Checkpoints(three, keep=3, keep_every=0) as out:
    out.go_back(1)
  shutil.rmtree(three / '3')
  with checkpoint.Checkpoints(three, keep=3, keep_every=0) as out:
    out.save(3, tiny_state(3.5), ABOUT)
    out.wait()
    assert out.steps() == [1, 3]
  with checkpoint.Reader(three) as source:
    back = source.restore(3, like(tiny_state(0.0)))
  assert float(back.model['w'][0]) == 3.5


def test_old_steps_are_removed_only_after_a_newer_one_is_committed(tmp_path, monkeypatch):
  seen = []
  write = checkpoint.manifest.write

  def watch(folder, manifest):
    seen.append(sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()))
    write(folder, manifest)

  monkeypatch.setattr(checkpoint.manifest, 'write', watch)
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=0) as out:
    for number in (1, 2, 3):
      about = ABOUT | {'heldout_loss': -float(number)}
      out.save(number, tiny_state(float(number)), about)
    out.wait()
    assert out.steps() == [3]
  assert seen == [['1'], ['1', '2'], ['2', '3']]


@pytest.mark.parametrize('where', ['write', 'survey'])
def test_check_reports_a_failed_save(where, three, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  with checkpoint.Checkpoints(three, keep=1, keep_every=0) as out:
    monkeypatch.setattr(checkpoint.manifest, where, full)
    out.save(4, tiny_state(4.0), ABOUT)
    futures.wait(out._commits.values())
    with pytest.raises(checkpoint.SaveFailed, match=r'step 4 .*No space left.* is 3'):
      out.check()
    monkeypatch.undo()
    assert out.steps() == [1, 2, 3]
    # The same step can be saved later.
    out.save(4, tiny_state(4.0), ABOUT)
  assert newest(three) == 4


def test_leaving_the_context_reports_a_failed_save(three, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint.manifest, 'write', full)
  with (
    pytest.raises(checkpoint.SaveFailed, match='No space left'),
    checkpoint.Checkpoints(three, keep=1, keep_every=0) as out,
  ):
    out.save(4, tiny_state(4.0), ABOUT)


def test_foreign_names_are_not_steps(three):
  for name in ('007', '4', '5.removed', '٣', 'x', '-1', '3 '):
    (three / name).mkdir()
    (three / name / 'anything').write_text('x')
  with checkpoint.Reader(three) as source:
    assert source.steps() == [1, 2, 3]
  with checkpoint.Checkpoints(three, keep=3, keep_every=0) as out:
    assert out.steps() == [1, 2, 3]
  left = {p.name for p in three.iterdir()}
  assert '5.removed' not in left and left >= {'007', '4', 'x'}


def test_a_step_under_a_wrong_number_is_skipped(three):
  shutil.copytree(three / '2', three / '9')
  assert newest(three) == 3


@pytest.mark.slow
@pytest.mark.parametrize('store', ['s3', pytest.param('gs', marks=pytest.mark.full)])
def test_a_store_gives_the_same_guarantees_as_a_disk(store, request, tmp_path, caplog):
  where = storage.path(f'{request.getfixturevalue(store)}/{tmp_path.name}/checkpoints')
  with checkpoint.Checkpoints(where, keep=2, keep_every=0) as out:
    for number in (1, 2, 3):
      about = ABOUT | {'heldout_loss': -float(number)}
      out.save(number, tiny_state(float(number)), about)
  assert newest(where) == 3
  with checkpoint.Reader(where) as source:
    assert source.steps() == [2, 3] and source.about(3) == about
  size, name = max((n, name) for name, n in storage.sizes(where / '3').items())
  whole = storage.read(where / '3' / name, size)
  for damage in (whole[:-1], whole[: size // 2] + b'x' + whole[size // 2 + 1 :], None):
    caplog.clear()
    if damage is None:
      storage.remove(where / '3' / name)
    else:
      storage.write(where / '3' / name, damage)
    assert newest(where) == 2
    assert name in caplog.text
  storage.write(where / '3' / name, whole)
  assert newest(where) == 3
