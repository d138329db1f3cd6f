"""A run that starts from a Hugging Face folder: its shapes, and what it may change."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import small
from absl import flags
from ml_collections import config_flags

import gated
from configs import base
from gated import config, data, hf, model, plan
from gated.devices import mesh
from gated.hf import files
from gated.plan import command
from gated.run import weights

FOLDER = Path(__file__).parents[1] / 'golden'
CORPUS = types.SimpleNamespace()
ROPE = 'config.model.attn.rope_base'


@pytest.fixture
def theta(tmp_path):
  """A checkpoint whose rope_theta is 1,000,000."""
  folder = shutil.copytree(FOLDER / 'hf_qwen3', tmp_path / 'theta')
  content = json.loads((folder / files.CONFIG).read_text())
  content['rope_parameters']['rope_theta'] = 1e6
  (folder / files.CONFIG).write_text(json.dumps(content))
  return folder


def with_base(folder, base):
  cfg = hf.config(folder)
  return dataclasses.replace(cfg, attn=dataclasses.replace(cfg.attn, rope_base=base))


def test_another_function_is_refused_unless_it_is_allowed(theta, caplog):
  like = model.abstract(with_base(theta, 1e4))
  with pytest.raises(ValueError) as error:
    weights.find(str(theta), like, CORPUS)
  for message in (
    f'config.init_from={str(theta)!r}: {theta}: {ROPE}=10000.0, but the checkpoint has '
    '1000000.0',
    f'--config.model_from={theta}',
    f'--allow_change={ROPE}',
  ):
    assert message in str(error.value)
  with caplog.at_level('INFO', logger='gated'):
    for allowed in (ROPE, 'config.model.attn', 'config.model.'):
      source = weights.find(str(theta), like, CORPUS, [allowed])
      assert source.differs == {ROPE: (1e6, 1e4)}
  assert f'{ROPE} is 10000.0, but was 1000000.0 for the weights' in caplog.text
  read, _ = weights.read(source, like, like)
  assert read.cfg.attn.rope_base == 1e4
  same = weights.find(str(theta), model.abstract(hf.config(theta)), CORPUS, [])
  assert same.differs == {}


@pytest.mark.parametrize(
  ('knob', 'value'),
  [('norm_eps', 1e-5), ('rope', None), ('top_k', 1), ('norm_topk', False), ('heads', 2)],
)
def test_every_knob_that_changes_the_function_is_a_difference(knob, value, theta):
  """Also those that change no shape of their tensors, such as the number of heads."""
  folder = FOLDER / 'hf_qwen3_moe'
  cfg, attn = hf.config(folder), hf.config(folder).attn
  changed = {
    'norm_eps': lambda: dict(numerics=dataclasses.replace(cfg.numerics, norm_eps=value)),
    'rope': lambda: dict(
      attn=dataclasses.replace(attn, yarn=dataclasses.replace(attn.yarn, factor=2.0))
    ),
    'heads': lambda: dict(attn=dataclasses.replace(attn, heads=2, head_dim=16)),
  }.get(knob, lambda: dict(moe=dataclasses.replace(cfg.moe, **{knob: value})))()
  like = model.abstract(dataclasses.replace(cfg, **changed))
  with pytest.raises(ValueError, match=r'config\.model\..*but the checkpoint has'):
    hf.check(folder, like, fresh=True)


def test_an_added_gate_is_reported_and_needs_no_permission():
  cfg = hf.config(FOLDER / 'hf_qwen3')
  gate = dataclasses.replace(cfg.attn.gate, position='sdpa')
  attn = dataclasses.replace(cfg.attn, gate=gate)
  like = model.abstract(dataclasses.replace(cfg, attn=attn))
  source = weights.find(str(FOLDER / 'hf_qwen3'), like, CORPUS)
  assert source.differs == {'config.model.attn.gate.position': ('none', 'sdpa')}


def resolve(*words):
  """The arguments of train.py -> the recipe."""
  recipe = Path(base.__file__).with_name('tiny.py')
  argv = ['train.py', f'--config={recipe}', *words]
  values = flags.FlagValues()
  options = dict(lock_config=True, flag_values=values, sys_argv=argv)
  config_flags.DEFINE_config_file('config', None, '', **options)
  command.parse(argv, values, base, None)
  return values['config'].value.to_dict()


def test_the_shapes_of_a_model_are_taken_from_its_config(theta):
  c = resolve(f'--config.model_from={theta}', '--config.model.attn.gate.position=value')
  cfg = config.build(plan.Config, c, 'config').model
  theirs = hf.config(theta)
  assert (cfg.width, cfg.depth, cfg.vocab, cfg.attn.rope_base) == (16, 2, 40, 1e6)
  # What a config.json does not give is the recipe's, and the command line comes first.
  plain = config.build(plan.Config, resolve(), 'config').model
  gate = dataclasses.replace(plain.attn.gate, position='value')
  keyless = dict(gate=gate, max_segments=plain.attn.max_segments)
  attn = dataclasses.replace(theirs.attn, **keyless)
  execution = {name: getattr(plain, name) for name in ('layers', 'remat', 'moe')}
  kept = dict(weights=plain.numerics.weights, compute=plain.numerics.compute)
  numerics = dataclasses.replace(theirs.numerics, **kept)
  expected = dataclasses.replace(theirs, attn=attn, numerics=numerics, **execution)
  assert cfg == expected
  c = resolve('--config.model.width=64', f'--config.model_from={theta}')
  assert (c['model']['width'], c['model']['depth']) == (64, 2)


def test_the_gate_of_a_config_is_taken_too():
  c = resolve(f'--config.model_from={FOLDER}/hf_authors_headwise')
  gate = c['model']['attn']['gate']
  assert (gate['position'], gate['granularity']) == ('sdpa', 'headwise')


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config\.model_from='.*': .*config\.json is not"):
    resolve(f'--config.model_from={tmp_path}')
  (tmp_path / files.CONFIG).write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match=r"model_from=.*model_type='llama'"):
    resolve(f'--config.model_from={tmp_path}')


def started(*words):
  """The arguments of train.py -> the source of its weights, as when it is prepared."""
  c = resolve(*words)
  cfg = config.build(plan.Config, c, 'config')
  return weights.find(cfg.init_from, model.abstract(cfg.model), CORPUS, [])


@pytest.mark.slow
def test_wrong_pairs_of_weights_and_model_are_refused_by_their_knobs(theta):
  shapes, start = f'--config.model_from={theta}', f'--config.init_from={theta}'
  none = '--config.model.attn.gate.position=none'
  assert started(shapes, start, none).differs == {}
  message = r'width=192, but the checkpoint has 16.*--config\.model_from=.*theta'
  with pytest.raises(ValueError, match=rf'config\.init_from=.*{message}'):
    started(start)
  with pytest.raises(ValueError, match=rf'{ROPE}=50\.0, but .* --allow_change={ROPE}$'):
    started(shapes, start, none, f'--{ROPE}=50')
  moe = f'--config.model_from={FOLDER}/hf_qwen3_moe'
  with pytest.raises(ValueError, match=r'config\.init_from=.*moe\.experts=\d+, but the'):
    started(moe, start, none)


@pytest.mark.full
def test_the_first_loss_is_that_of_the_weights_whose_knobs_are_taken(
  tmp_path, run_python
):
  """train.py on the embedded corpus, with the folder alone on its command line."""
  folder, run = FOLDER / 'hf_trained', tmp_path / 'run'
  knobs = dict(init_from=folder, model_from=folder, steps=1, batch=8)
  knobs |= {'data.length': 64, 'eval.rows': 1, 'optim.warmup': 0}
  knobs |= {'model.numerics.compute': 'float32', 'log.tensorboard': False}
  flags = [f'--config.{knob}={value}' for knob, value in knobs.items()]
  recipe = '--config=configs/tiny.py:gate=none'
  done = run_python(['train.py', recipe, f'--workdir={run}', *flags])
  assert done.returncode == 0, done.stderr[-2000:]
  c = json.loads((run / 'run.json').read_text())['config']
  gate = c['model']['attn']['gate']
  assert (c['model']['width'], gate['granularity']) == (32, 'headwise')
  records = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  [loss] = [record['loss'] for record in records if record.get('kind') == 'train']

  loaded = gated.load(folder)
  numerics = dataclasses.replace(loaded.cfg.numerics, compute='float32')
  loaded.cfg = dataclasses.replace(loaded.cfg, numerics=numerics)
  corpus = data.open(
    config.build(data.Config, c['data'], 'config.data'),
    vocab=257, batch=8, seed=c['seed'], max_segments=0,
  )  # fmt: skip
  batch = next(corpus.train(0, mesh.rows(loaded.mesh, 8)))
  nats_B, weight_B = loaded.fit(corpus.max_segments).evaluate(
    mesh.place(batch, loaded.mesh, 8)
  )
  np.testing.assert_allclose(loss, nats_B.sum() / weight_B.sum(), rtol=1e-5)


def test_old_recipes_have_no_model_from():
  c = small.recipe()
  del c['model_from']
  assert config.build(plan.Config, c, 'config').model_from == ''
