"""Initial weights from another run or a Hugging Face folder."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import data, hf, model, storage
from gated.devices import trees
from gated.run import checkpoint, weights
from gated.train import optim, step

GATE = {f'attn__gate__{k}': v for k, v in dict(position='sdpa', init='zero').items()}
CORPUS = types.SimpleNamespace(fingerprint={'tokenizer': 'ours'})


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Step 3 of an ungated run."""
  folder = tmp_path_factory.mktemp('run')
  net = small.model_of()
  tx = optim.make(small.optim_config(), steps=5, multipliers={})
  state = step.State(jnp.int32(3), jnp.int32(3), net, tx.init(net))
  about = dict(config=small.recipe(), data={'tokenizer': 'ours'}, heldout_loss=1.0)
  with checkpoint.Checkpoints(folder / 'checkpoints', keep=1, keep_every=0) as saved:
    saved.save(3, state, about)
  return folder


def placed(**changes):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = model.abstract(small.model_config(**changes))
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
  return jax.tree.map(place, shapes)


def test_weights_of_a_run_are_found_and_read(workdir):
  like = placed()
  source = weights.find(f'{workdir}:3', like, CORPUS)
  assert (str(source), source.differs) == (f'{workdir}:3', {})
  restored, taken = weights.read(source, like, small.filled(like, seed=1))
  assert taken == source
  exact = trees.flatten(small.model_of())
  for name, leaf in trees.flatten(restored).items():
    np.testing.assert_array_equal(leaf, exact[name])


def test_a_gate_without_saved_weights_keeps_its_initial_values(workdir, caplog):
  like = placed(**GATE)
  source = weights.find(str(workdir), like, CORPUS)
  fresh = small.filled(like, seed=1)
  with caplog.at_level('INFO', logger='gated'):
    restored = trees.flatten(weights.read(source, like, fresh)[0])
  assert 'lacks blocks.attn.gate.weight: initialized' in caplog.text
  name = 'blocks.attn.gate.weight'
  np.testing.assert_array_equal(restored[name], trees.flatten(fresh)[name])
  assert len(restored) == len(trees.flatten(small.model_of())) + 1


CHANGES = dict(logit_cap=5.0, attn__rope_base=1e6, attn__normalizer='softpick')


def test_another_function_than_that_of_the_run_is_refused_unless_it_is_allowed(
  workdir, caplog
):
  like = placed(**CHANGES)
  with pytest.raises(ValueError) as error:
    weights.find(str(workdir), like, CORPUS, ['config.model.logit_cap'])
  knobs = 'config.model.attn.normalizer', 'config.model.attn.rope_base'
  assert str(error.value) == (
    f"config.init_from='{workdir}': {knobs[0]}='softpick', but its run has 'softmax'; "
    f'{knobs[1]}=1000000.0, but its run has 10000.0. Give these knobs the values of the '
    f'run, or allow another function with --allow_change={",".join(knobs)}'
  )
  with caplog.at_level('INFO', logger='gated'):
    source = weights.find(
      str(workdir), like, CORPUS, ['config.model.logit_cap', 'config.model.attn.']
    )
  assert source.differs == {
    'config.model.attn.normalizer': ('softmax', 'softpick'),
    'config.model.attn.rope_base': (1e4, 1e6),
    'config.model.logit_cap': (0.0, 5.0),
  }
  assert "config.model.attn.normalizer is 'softpick', but was 'softmax'" in caplog.text


@pytest.mark.parametrize(
  ('knob', 'value'),
  [
    ('attn__yarn__factor', 2.0),
    ('attn__window', 8),
    ('attn__heads', 2),
    ('numerics__norm_eps', 1e-5),
    ('mask_documents', False),
  ],
)
def test_every_knob_that_changes_the_function_of_a_run_is_refused(knob, value, workdir):
  changes = {knob: value} | (dict(attn__head_dim=16) if knob == 'attn__heads' else {})
  name = knob.replace('__', '.')
  with pytest.raises(ValueError, match=rf'config\.model\.{name}={value}, but its run'):
    weights.find(str(workdir), placed(**changes), CORPUS)


def test_knobs_that_keep_the_function_of_a_run_need_no_permission(workdir):
  """How a step is computed, and initial values; gates are added."""
  changes = dict(remat='full', attn__backend='reference', attn__max_segments=4)
  changes |= dict(numerics__init_std=0.5, numerics__compute='bfloat16') | GATE
  source = weights.find(str(workdir), placed(**changes), CORPUS)
  assert source.differs.keys() >= {'config.model.remat', 'config.model.numerics.init_std'}


@pytest.mark.parametrize(
  ('init_from', 'changes', 'message'),
  [
    ('{}:4', {}, 'has the steps 3'),
    (
      '{}',
      dict(ffn=32),
      r'model\.ffn=32, but .*blocks\.ffn\.act\.weight is.*of the run$',
    ),
    ('{}', dict(tied=False), r'tied=False, but its run has True.*head\.table is not in'),
    ('{}/nowhere', {}, 'neither .*checkpoints nor a config.json'),
  ],
)
def test_weights_that_do_not_fit_are_refused(workdir, init_from, changes, message):
  with pytest.raises(ValueError, match=rf'config\.init_from=.*{message}'):
    weights.find(init_from.format(workdir), placed(**changes), CORPUS)


def test_weights_of_another_tokenizer_are_refused(workdir):
  other = types.SimpleNamespace(fingerprint={'tokenizer': 'other'})
  with pytest.raises(ValueError, match='has another tokenizer than'):
    weights.find(str(workdir), placed(), other)


@pytest.mark.slow
def test_the_tokenizer_of_imported_weights_must_be_that_of_the_data(tmp_path, caplog):
  folder = tmp_path / 'hf'
  hf.save(small.model_of(), folder)
  with caplog.at_level('INFO', logger='gated'):
    source = weights.find(str(folder), placed(), CORPUS)
  assert source == weights.Source(folder, None, {}, '')
  assert 'has no tokenizer.json' in caplog.text
  restored = trees.flatten(weights.read(source, placed(), small.model_of())[0])
  exact = trees.flatten(small.model_of())
  assert all((restored[name] == exact[name]).all() for name in exact)

  from gated.data import tokenizer

  tokenizer.train_bpe(['some text, and some more'], 260, str(folder / 'tokenizer.json'))
  bytes_corpus = types.SimpleNamespace(tokenizer=tokenizer.load('bytes'))
  bytes_corpus.check_tokenizer = lambda path: data.Corpus.check_tokenizer(
    bytes_corpus, path
  )
  with pytest.raises(ValueError, match=r"the data has the tokenizer 'bytes', not"):
    weights.find(str(folder), placed(), bytes_corpus)
  bytes_corpus.tokenizer = tokenizer.load(str(folder / 'tokenizer.json'))
  assert weights.find(str(folder), placed(), bytes_corpus).step is None


def test_a_step_that_its_run_removes_meanwhile_is_replaced_by_the_next(
  workdir, tmp_path, caplog
):
  """The step is chosen before the compilation, and read after it."""
  home = storage.path(shutil.copytree(workdir, tmp_path / 'run'))
  like, net = placed(), small.model_of()
  latest, exact = (weights.find(f'{home}{step}', like, CORPUS) for step in ('', ':3'))
  tx = optim.make(small.optim_config(), steps=5, multipliers={})
  state = step.State(jnp.int32(4), jnp.int32(4), net, tx.init(net))
  about = dict(config=small.recipe(), data={'tokenizer': 'ours'}, heldout_loss=0.5)
  with checkpoint.Checkpoints(home / 'checkpoints', keep=1, keep_every=0) as saved:
    saved.save(4, state, about)
  restored, taken = weights.read(latest, like, net)
  assert (str(latest), str(taken)) == (f'{home}:3', f'{home}:4')
  assert trees.digest(restored) == trees.digest(net)
  assert f'removed that step: using {home}:4' in caplog.text
  with pytest.raises(weights.Removed, match=f'has removed {home}:3 meanwhile'):
    weights.read(exact, like, net)


def test_a_damaged_step_that_is_still_there_is_not_replaced(workdir, tmp_path):
  home = storage.path(shutil.copytree(workdir, tmp_path / 'run'))
  source = weights.find(str(home), placed(), CORPUS)
  shutil.rmtree(home / 'checkpoints' / '3' / 'model')
  with pytest.raises((ValueError, OSError)) as error:
    weights.read(source, placed(), small.model_of())
  assert not isinstance(error.value, weights.Removed)
