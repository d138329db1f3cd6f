"""Parity with the logits of transformers (golden/make_hf.py), and round trips."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from golden import make_greedy
from safetensors.numpy import load_file, save_file

import gated
from configs import base
from gated import config, hf, model, plan
from gated.data import prepare
from gated.devices import mesh, trees
from gated.hf import files
from gated.run import checkpoint
from scripts import convert_hf

FOLDER = Path(__file__).parents[1] / 'golden'
MODELS = (
  'qwen3',
  'qwen3_yarn',
  'qwen3_moe',
  'qwen3_moe_fused',
  'qwen3_next',
  'authors_elementwise',
  'authors_headwise',
)
GATED = ('qwen3_next', 'authors_elementwise', 'authors_headwise')
H, G, K = 4, 2, 8  # golden models with a gate


def golden(name):
  return FOLDER / f'hf_{name}'


@functools.cache
def expected():
  return dict(np.load(FOLDER / 'hf_logits.npz'))


def load(folder, dtype=None, compute=None):
  """The model of a folder, in other dtypes if they are given."""
  cfg = hf.config(folder)
  kept = cfg.numerics
  compute = compute or dtype or kept.compute
  numerics = dataclasses.replace(kept, weights=dtype or kept.weights, compute=compute)
  return hf.read(folder, model.abstract(dataclasses.replace(cfg, numerics=numerics)))


def logits(params):
  return np.asarray(jax.jit(lambda m, t: m(t))(params, expected()['tokens']))


def distance(params, name):
  """Max absolute difference to the logits that transformers computed."""
  return np.abs(logits(params) - expected()[name]).max()


def same(a, b):
  return trees.digest(a) == trees.digest(b)


@pytest.fixture
def copy(tmp_path):
  """copy(name, change of config.json, change of tensors) -> a mutated golden folder."""

  def make(name, changes=None, tensors=None):
    target = tmp_path / f'{name}-{len(list(tmp_path.iterdir()))}'
    shutil.copytree(golden(name), target)
    if changes:
      content = json.loads((target / files.CONFIG).read_text()) | changes
      content = {key: value for key, value in content.items() if value is not ...}
      (target / files.CONFIG).write_text(json.dumps(content))
    if tensors:
      held = load_file(target / files.SINGLE)
      save_file(held | tensors(held), target / files.SINGLE)
    return target

  return make


# Parity.


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_logits_are_those_of_transformers(name):
  assert distance(load(golden(name), dtype='float32'), name) < 1e-4


@pytest.mark.slow
def test_yarn_has_the_logits_of_transformers_in_all_its_forms(copy):
  """Factors of 1, 2, 4 and 8, also after a round trip through our config.json."""
  rope = json.loads((golden('qwen3_yarn') / files.CONFIG).read_text())['rope_parameters']
  plain = hf.config(golden('qwen3_yarn'))
  given = dict(np.load(FOLDER / 'hf_yarn.npz'))
  factors = set()
  for text, theirs in given.items():
    change = json.loads(text)
    factors.add(change['factor'])
    folder = copy('qwen3_yarn', dict(rope_parameters=rope | change))
    params = load(folder, dtype='float32')
    with jax.disable_jit():  # Compiling each form would take longer.
      ours = np.asarray(params(expected()['tokens']))[0, -len(theirs) :]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    kept = hf.knobs.write(params.cfg, 'grouped', 'float32', {})[0]
    assert kept['max_position_embeddings'] == 16 * change['factor']
    assert kept['rope_scaling']['original_max_position_embeddings'] == 16
    again = copy('qwen3_yarn', kept | dict(rope_parameters=...))
    assert hf.config(again).attn.yarn == params.cfg.attn.yarn
    # Evaluation makes the same change of the model without it.
    names = dict(attention_factor='attention')
    parts = [f'{names.get(k, k)}={v}' for k, v in change.items() if k != 'factor']
    spec = ','.join([f'{change["factor"]:g}', *parts])
    assert plain.attn.yarn.changed(spec) == params.cfg.attn.yarn
  assert factors == {1, 2, 4, 8} and len(given) == 13


def test_weights_are_kept_as_in_the_files_and_computed_with_in_kind():
  numerics = hf.config(golden('qwen3_yarn')).numerics
  assert (numerics.weights, numerics.compute) == ('bfloat16', 'bfloat16')
  params = load(golden('qwen3_yarn'), compute='float32')
  for name, leaf in trees.flatten(params).items():
    vector = name.endswith(('.scale', '.bias'))
    assert leaf.dtype == ('float32' if vector else 'bfloat16')
  assert distance(params, 'qwen3_yarn') < 1e-4


def test_norms_of_qwen3_next_lose_nothing_in_bfloat16(copy, tmp_path):
  """In the files they are w, and the model scales by 1 + w."""
  rng = np.random.default_rng(0)

  def halved(held):
    drawn = lambda v: 0.03 * rng.standard_normal(v.shape) if v.ndim == 1 else v
    return {name: drawn(v).astype('bfloat16') for name, v in held.items()}

  folder = copy('qwen3_next', tensors=halved)
  theirs = load_file(folder / files.SINGLE)
  norms = {name: w for name, w in theirs.items() if w.ndim == 1}
  params = load(folder)
  numerics = params.cfg.numerics
  assert (numerics.weights, numerics.compute) == ('bfloat16', 'bfloat16')
  leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
  for i in range(params.cfg.depth):
    for name, ours in (
      ('input_layernorm', 'attn_norm'),
      ('post_attention_layernorm', 'ffn_norm'),
      ('self_attn.q_norm', 'attn.query_norm'),
      ('self_attn.k_norm', 'attn.key_norm'),
    ):
      w = norms[f'model.layers.{i}.{name}.weight'].astype(np.float32)
      np.testing.assert_array_equal(leaves[f'blocks.{ours}.scale'][i], 1 + w)
  w = norms['model.norm.weight'].astype(np.float32)
  np.testing.assert_array_equal(leaves['norm.scale'], 1 + w)
  assert len(norms) == 4 * params.cfg.depth + 1

  hf.save(params, tmp_path / 'out', packing='per_head', dtype='bfloat16')
  again = load_file(tmp_path / 'out' / files.SINGLE)
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(again[name], tensor)
  assert same(load(tmp_path / 'out'), params)


def rows(held, change):
  """Tensors with each q_proj changed."""
  return {k: change(v) for k, v in held.items() if k.endswith('q_proj.weight')}


def swapped(name):
  """A change of q_proj: the gates of two query heads change places."""
  each = 1 if name == 'authors_headwise' else K
  # Where the gates of heads 0 and 1 begin: both in the first KV head's block, or not.
  first, second = (H // G * K, H // G * K + each) if name != 'qwen3_next' else (K, 3 * K)

  def change(w):
    w = w.copy()
    a, b = slice(first, first + each), slice(second, second + each)
    w[a], w[b] = w[b].copy(), w[a].copy()
    return w

  return change


@pytest.mark.parametrize('name', GATED)
def test_two_heads_of_a_gate_swapped_do_not_pass(name, copy):
  folder = copy(name, tensors=lambda held: rows(held, swapped(name)))
  assert distance(load(folder), name) > 1e-2


@pytest.mark.parametrize(
  'name, changes',
  [
    (
      'authors_elementwise',
      dict(elementwise_attn_output_gate=..., attn_output_gate=True),
    ),
    (
      'qwen3_next',
      dict(model_type='qwen3', elementwise_attn_output_gate=True, num_experts=...)
      | {key: ... for key in ('num_experts_per_tok', 'norm_topk_prob')}
      | {key: ... for key in ('moe_intermediate_size', 'shared_expert_intermediate_size')}
      | {key: ... for key in ('decoder_sparse_step', 'router_aux_loss_coef')}
      | {f'linear_{k}': ... for k in ('conv_kernel_dim', 'key_head_dim')}
      | {f'linear_{k}': ... for k in ('value_head_dim', 'num_key_heads')}
      | {'linear_num_value_heads': ...},
    ),
  ],
)
def test_the_other_packing_does_not_pass(name, changes, copy):
  uncentred = lambda held: {k: v + 1 for k, v in held.items() if v.ndim == 1}
  folder = copy(name, changes, uncentred if name == 'qwen3_next' else None)
  assert distance(load(folder), name) > 1e-2
  if name == 'qwen3_next':
    # Only the packing is to blame.
    changes = changes | dict(elementwise_attn_output_gate=..., attn_output_gate=True)
    assert distance(load(copy(name, changes, uncentred)), name) < 1e-4


@pytest.mark.slow
def test_headwise_is_elementwise_with_each_row_repeated():
  headwise = load(golden('authors_headwise'))
  gate = dataclasses.replace(headwise.cfg.attn.gate, granularity='elementwise')
  attn = dataclasses.replace(headwise.cfg.attn, gate=gate)
  like = model.abstract(dataclasses.replace(headwise.cfg, attn=attn))
  leaves = trees.flatten(headwise)
  leaves[hf.names.GATE] = np.repeat(leaves[hf.names.GATE][..., None], K, -1)
  elementwise = trees.unflatten(like, leaves)
  np.testing.assert_allclose(logits(elementwise), logits(headwise), atol=1e-5)
  assert distance(elementwise, 'authors_headwise') < 1e-4


def test_a_gate_of_qwen3_next_is_written_in_the_authors_layout(tmp_path):
  hf.save(load(golden('qwen3_next')), tmp_path / 'out')
  theirs = load_file(golden('qwen3_next') / files.SINGLE)
  ours = load_file(tmp_path / 'out' / files.SINGLE)
  name = 'model.layers.1.self_attn.q_proj.weight'
  per_head = theirs[name].reshape(G, H // G, 2, K, -1)
  grouped = per_head.transpose(0, 2, 1, 3, 4).reshape(2 * H * K, -1)
  np.testing.assert_array_equal(ours[name], grouped)
  assert distance(load(tmp_path / 'out'), 'qwen3_next') < 1e-4


# There and back.


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, packing',
  [(name, 'grouped') for name in MODELS]
  + [(name, 'per_head') for name in ('qwen3_next', 'authors_elementwise')],
)
def test_load_save_load_is_exact(name, packing, tmp_path):
  first = load(golden(name))
  hf.save(first, tmp_path / 'a', packing=packing, shard_bytes=16_000)
  second = load(tmp_path / 'a')
  assert second.cfg == first.cfg
  if packing == 'grouped':
    assert same(first, second)
  else:  # A scale less one, and one again, may differ in its last bit.
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  hf.save(second, tmp_path / 'b', packing=packing, shard_bytes=16_000)
  assert same(load(tmp_path / 'b'), second)
  names = sorted(path.name for path in (tmp_path / 'a').iterdir())
  assert len(names) > 3 and files.INDEX in names
  for file in names:
    assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()


@pytest.mark.parametrize('name', ['qwen3', 'qwen3_yarn', 'qwen3_moe'])
def test_a_checkpoint_of_transformers_is_written_unchanged(name, tmp_path):
  hf.save(load(golden(name)), tmp_path / 'out')
  theirs, ours = files.Tensors(golden(name)), files.Tensors(tmp_path / 'out')
  assert ours.headers == theirs.headers
  for tensor in theirs.headers:
    np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))


def test_experts_in_one_tensor_and_apart_are_the_same_model(copy):
  apart = load(copy('qwen3_moe', dict(norm_topk_prob=False)))
  fused = load(golden('qwen3_moe_fused'))
  assert fused.cfg == apart.cfg
  assert fused.blocks.ffn.experts.act.shape == apart.blocks.ffn.experts.act.shape


def test_a_checkpoint_is_written_in_another_dtype(tmp_path):
  first = load(golden('qwen3_moe'))
  hf.save(first, tmp_path / 'out', dtype='bfloat16')
  kinds = {tensor.dtype for tensor in files.Tensors(tmp_path / 'out').headers.values()}
  second = load(tmp_path / 'out')
  assert kinds == {'BF16'} and second.cfg.numerics.weights == 'bfloat16'
  for name, leaf in trees.flatten(second).items():
    wide = 'router' in name or name.endswith('.scale')
    assert leaf.dtype == ('float32' if wide else 'bfloat16')
    rounded = trees.flatten(first)[name].astype('bfloat16')
    np.testing.assert_array_equal(np.asarray(leaf, np.float32), rounded.astype('float32'))


@pytest.mark.parametrize('gate', base.GATES)
def test_our_model_with_biases_survives_a_round_trip(gate, tmp_path):
  """A gate of theirs has a bias beside the others'; ours has none, which is zero."""
  changes = {f'attn__gate__{k}': v for k, v in base.GATES[gate].items()}
  params = small.model_of(**changes, attn__bias=True, attn__out_bias=True)
  hf.save(params, tmp_path / 'out')
  assert same(load(tmp_path / 'out'), params)


def test_a_vector_is_written_in_float32_if_bfloat16_would_round_it(tmp_path):
  biases = dict(attn__bias=True, attn__out_bias=True)
  params = small.model_of(numerics__weights='bfloat16', **biases)
  hf.save(params, tmp_path / 'trained')
  kinds = {n: t.dtype for n, t in files.Tensors(tmp_path / 'trained').headers.items()}
  for name, kind in kinds.items():
    vector = name.endswith(('norm.weight', 'layernorm.weight', '.bias'))
    assert kind == ('F32' if vector else 'BF16'), name
  assert same(load(tmp_path / 'trained'), params)


@pytest.mark.slow
@pytest.mark.parametrize('granularity', ['headwise', 'elementwise'])
@pytest.mark.parametrize(
  'compute', ['bfloat16', pytest.param('float32', marks=pytest.mark.full)]
)
def test_twice_a_sigmoid_is_written_as_a_sigmoid_and_twice_the_projection(
  granularity, compute, tmp_path
):
  gate = dict(position='sdpa', granularity=granularity, activation='2sigmoid')
  changes = {f'attn__gate__{knob}': value for knob, value in gate.items()}
  params = small.model_of(**changes, numerics__compute=compute)
  hf.save(params, tmp_path / 'out')
  read = load(tmp_path / 'out', dtype='float32', compute=compute)
  assert read.cfg.attn.gate.activation == 'sigmoid'
  np.testing.assert_array_equal(logits(read), logits(params))
  out = 'blocks.attn.out.weight'
  ours, theirs = trees.flatten(params), trees.flatten(read)
  assert {n for n in ours if (ours[n] != theirs[n]).any()} == {out}


def test_a_model_in_fp8_is_written_and_continued_from_a_checkpoint(tmp_path):
  params = small.model_of(numerics__matmul='fp8')
  hf.save(params, tmp_path / 'out')
  assert hf.config(tmp_path / 'out').numerics.matmul == 'compute'
  read = trees.flatten(hf.read(tmp_path / 'out', model.abstract(params.cfg)))
  for name, leaf in trees.flatten(params).items():
    np.testing.assert_array_equal(read[name], leaf, err_msg=name)


def test_a_gates_bias_is_refused_unless_zero(tmp_path):
  params = small.model_of(
    attn__gate__position='sdpa', attn__bias=True, attn__out_bias=True
  )
  hf.save(params, tmp_path / 'out')
  file = tmp_path / 'out' / files.SINGLE
  held = load_file(file)
  held['model.layers.1.self_attn.q_proj.bias'][-1] = 0.5
  save_file(held, file)
  with pytest.raises(
    ValueError, match=r'layers\.1\.self_attn\.q_proj\.bias: the gate has'
  ):
    load(tmp_path / 'out')


@pytest.mark.parametrize('name', ['qwen3_moe', 'authors_headwise'])
def test_a_sharded_model_is_read_in_place(name):
  cfg = hf.config(golden(name))
  on = mesh.make(data=2, fsdp=2, expert=1, tensor=2, context=1)
  shapes = model.abstract(cfg)
  params = hf.read(golden(name), plan.placed(shapes, mesh.shardings(shapes, on)))
  assert len(params.blocks.attn.query.weight[...].sharding.device_set) == 8
  assert same(params, load(golden(name)))
  assert not params.embed.table[...].sharding.is_fully_replicated


@pytest.mark.slow
def test_a_trained_gated_model_is_continued_as_by_transformers_4_and_5():
  prompt = list(make_greedy.PROMPT)
  [ours] = gated.load(make_greedy.FOLDER).generate([prompt], max_tokens=32, temperature=0)
  theirs = json.loads(make_greedy.TOKENS.read_text())
  assert sorted(version[0] for version in theirs) == ['4', '5']
  for version in theirs.values():
    assert version['tokens'] == ours.tolist()
    assert version['text'] == 'closes. A token goes through the'
  # Made with today's code.
  name = f'{hf.knobs.CODE}.py'
  code = Path(hf.__file__).with_name(name).read_text()
  assert (make_greedy.FOLDER / name).read_text() == code


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_transformers_opens_a_saved_model(name, tmp_path):
  transformers, torch = map(pytest.importorskip, ('transformers', 'torch'))
  packing = 'per_head' if name == 'qwen3_next' else 'grouped'
  hf.save(load(golden(name)), tmp_path / 'out', packing=packing, shard_bytes=16_000)
  open_ = transformers.AutoModelForCausalLM.from_pretrained
  opened = open_(tmp_path / 'out', trust_remote_code=packing == 'grouped')
  with torch.no_grad():
    actual = opened.float()(torch.tensor(expected()['tokens']).long()).logits.numpy()
  np.testing.assert_allclose(actual, expected()[name], atol=1e-4)


# config.json.


def test_knobs_without_a_key_have_the_defaults_of_base():
  """But for what the tables say, and top_k, which must not exceed the experts."""
  default = config.flatten(base.model(), '')
  default = {knob.removeprefix('.'): value for knob, value in default.items()}
  differ = {k for k, value in hf.meaning.WITHOUT_KEY.items() if value != default[k]}
  assert differ == {'attn.gate.position', 'moe.top_k'}


def test_both_spellings_of_rope_mean_the_same(copy):
  new = hf.config(golden('qwen3_yarn'))
  content = json.loads((golden('qwen3_yarn') / files.CONFIG).read_text())
  rope = content['rope_parameters']
  old = dict(rope_parameters=..., rope_theta=rope.pop('rope_theta'), rope_scaling=rope)
  assert hf.config(copy('qwen3_yarn', old)) == new
  rope['type'] = rope.pop('rope_type')
  assert hf.config(copy('qwen3_yarn', old)) == new
  assert (new.attn.rope_base, new.attn.yarn.factor, new.attn.yarn.original) == (
    100,
    4,
    16,
  )
  # Without a length of its own, the context before YaRN is what the config states.
  del rope['original_max_position_embeddings']
  assert hf.config(copy('qwen3_yarn', old)).attn.yarn.original == 64


def test_missing_keys_have_the_defaults_of_transformers(copy):
  silent = ('attention_bias', 'hidden_act', 'rms_norm_eps', 'tie_word_embeddings')
  silent += ('rope_parameters', 'use_sliding_window', 'initializer_range', 'layer_types')
  folder = copy('qwen3', {key: ... for key in silent})
  assert hf.config(folder) == hf.config(golden('qwen3'))


YARN = dict(rope_type='yarn', factor=2.0, original_max_position_embeddings=64)
ORIGINAL = 'original_max_position_embeddings'
# 0.1 m ln(e) + 1 is 0.
NO_SCALE = dict(factor=math.e, mscale=1.0, mscale_all_dim=-10.0)
DEEP = functools.reduce(lambda inner, _: [inner], range(100), [])


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('qwen3', dict(model_type='llama'), "model_type='llama'"),
    ('qwen3', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('qwen3', dict(vocab_size=...), 'vocab_size is missing'),
    ('qwen3', dict(hidden_size='16'), "hidden_size='16', but a int"),
    ('qwen3', dict(num_hidden_layers=True), 'num_hidden_layers=True'),
    ('qwen3', dict(rms_norm_eps=float('nan')), 'rms_norm_eps=nan'),
    ('qwen3', dict(num_key_value_heads=3), 'kv_heads=3'),
    ('qwen3', dict(num_hidden_layers=0, layer_types=[]), 'depth=0'),
    ('qwen3', dict(num_hidden_layers=4000, layer_types=...), 'but there are 25 tensors'),
    ('qwen3', dict(num_hidden_layers=2**60, layer_types=...), 'depth=.* is the most'),
    ('qwen3_moe', dict(num_local_experts=4000), r'\d+ experts, but there are'),
    (
      'qwen3',
      dict(
        use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=...
      ),
      'use_sliding_window=True, sliding_window=8',
    ),
    ('qwen3', dict(layer_types=['full_attention', 'sliding_attention']), 'sliding_att'),
    ('qwen3_moe', dict(use_sliding_window=True, sliding_window=8), 'sliding_window=8'),
    ('qwen3_moe', dict(mlp_only_layers=[0]), r'mlp_only_layers=\[0\]'),
    ('qwen3_moe', dict(decoder_sparse_step=2), 'decoder_sparse_step=2'),
    ('qwen3_moe', dict(shared_expert_intermediate_size=8), 'shared_expert_intermediate'),
    ('qwen3_moe', dict(num_experts=8), 'num_local_experts=4, but num_experts=8'),
    ('qwen3_next', dict(num_experts=4), 'shared_expert_gate'),
    ('qwen3_next', dict(layer_types=...), 'layer_types is missing'),
    (
      'qwen3_next',
      dict(layer_types=['full_attention', 'linear_attention']),
      'linear_att',
    ),
    ('qwen3_next', dict(rope_parameters=...), r'partial_rotary_factor=0\.25'),
    ('qwen3_next', dict(attn_output_gate=False), 'attn_output_gate=False'),
    ('qwen3', dict(partial_rotary_factor=0.5), r'partial_rotary_factor=0\.5'),
    ('qwen3', dict(rope_scaling=dict(type='linear', factor=2.0)), "rope_type='linear'"),
    ('qwen3', dict(rope_scaling=YARN | dict(truncate=0)), 'truncate=0, but a bool'),
    ('qwen3', dict(rope_scaling=YARN | dict(attention_factor=0)), r'attention_factor=0'),
    ('qwen3', dict(rope_scaling=YARN | dict(low_freq=1.0)), r'low_freq=1\.0'),
    ('qwen3', dict(rope_scaling=YARN | dict(factor='2')), "rope_parameters.factor='2'"),
    ('qwen3', dict(quantization_config=dict(bits=4)), 'quantization_config='),
    ('qwen3', dict(final_logit_softcapping=30.0), 'final_logit_softcapping=30.0'),
    ('qwen3', dict(attention_sinks=True), 'attention_sinks=True'),
    ('qwen3', dict(logits_scale=0), 'logits_scale=0: not known'),
    ('qwen3', dict(logits_scale=0.0), r'logits_scale=0\.0: not known'),
    ('qwen3', dict(model_type=[]), r'model_type=\[\]'),
    ('qwen3', dict(model_type={}), r'model_type=\{\}'),
    ('qwen3', dict(rms_norm_eps=10**400), 'rms_norm_eps is a number of 401 digits'),
    ('qwen3', dict(hidden_size=10**400), 'hidden_size is a number of 401 digits'),
    ('qwen3', dict(some_list=DEEP), 'some_list nests deeper than 32 levels'),
    ('qwen3', dict(rope_scaling=YARN | {ORIGINAL: 0}), f'{ORIGINAL}=0'),
    ('qwen3', dict(rope_scaling=YARN | {ORIGINAL: 0, 'factor': None}), f'{ORIGINAL}=0'),
    ('qwen3', {'rope_scaling': YARN, ORIGINAL: 0}, f'{ORIGINAL}=0'),
    ('qwen3', {'rope_scaling': YARN, ORIGINAL: '64'}, f"{ORIGINAL}='64', but a int"),
    ('qwen3', {ORIGINAL: '64'}, f"{ORIGINAL}='64', but a int"),
    ('qwen3', dict(rope_scaling=YARN | NO_SCALE), r'attn\.yarn\.mscale=1\.0 and'),
    (
      'qwen3',
      dict(rope_scaling=YARN | dict(mscale=1e308, mscale_all_dim=-1e308, factor=1e300)),
      r'attn\.yarn\.mscale=1e\+308 and',
    ),
    (
      'qwen3',
      dict(rope_scaling=YARN | dict(factor=-2.0, mscale=1.0, mscale_all_dim=0.5)),
      r'rope_parameters\.factor=-2\.0',
    ),
    ('authors_headwise', dict(elementwise_attn_output_gate=True), 'are both on'),
  ],
)
def test_an_unsupported_key_is_refused_by_name(name, changes, message, copy):
  folder = copy(name, changes)
  with pytest.raises(ValueError, match=f'{files.CONFIG}.*{message}'):
    load(folder)


# Knob, value -> what the format has instead.
REFUSED = [
  ('norm', 'gated', 'Qwen3 has RMSNorm only'),
  ('branch_norm', 'rms', 'has no norm on the output'),
  ('branch_clip', 300.0, 'does not clip'),
  ('logit_cap', 30.0, 'does not cap logits'),
  ('attn__normalizer', 'sink_logit', 'has a plain softmax'),
  ('attn__normalizer', 'off_by_one', 'has a plain softmax'),
  ('attn__sink_tokens', 1, 'has no learned keys'),
  ('attn__logit_cap', 50.0, 'does not cap attention scores'),
  ('attn__gates', 'value', 'has one gate'),
  ('attn__window', 8, 'is written without windows'),
  ('attn__output', 'rms_norm', 'has no function of the heads'),
  ('attn__value_scale', 'learned', 'does not scale its values'),
  ('attn__switch__where', 'value', 'has no experts in attention'),
  ('attn__qk_norm', False, 'has QK-norm unless'),
  ('attn__gate__position', 'value', 'on the SDPA output'),
  ('attn__gate__position', 'out', 'on the SDPA output'),
  ('attn__gate__heads', 'shared', 'has a gate for each head'),
  ('attn__gate__form', 'add', 'multiplies by its gate'),
  ('attn__gate__activation', 'ns_sigmoid', 'has a sigmoid gate'),
  ('attn__gate__source', 'parameter', 'from the input of the layer'),
  ('attn__gate__inputs', 'first:4', 'from the whole input'),
  ('attn__gate__layers', '1', 'has a gate in every layer'),
  ('attn__gate__bias', True, 'without a bias of the gate'),
  ('moe__shared', 1, 'has no shared expert'),
  ('moe__dispatch', 'capacity', 'drop no token'),
]


def exported(packing='grouped', **changes):
  """The config of an export of a small model; ValueError if it is refused."""
  if any('gate__' in knob for knob in changes):
    changes = dict(attn__gate__position='sdpa') | changes
  if any('moe' in knob for knob in changes):
    changes |= dict(moe__experts=4, moe__top_k=2)
  return hf.knobs.write(small.model_config(**changes), packing, 'float32', {})


@pytest.mark.parametrize('knob, value, lack', REFUSED)
def test_a_refused_knob_says_what_the_format_lacks_and_what_can_be_done(
  knob, value, lack
):
  with pytest.raises(ValueError) as error:
    exported(**{knob: value})
  short = knob.replace('__', '.')
  name = f'config.model.{short}'
  text = str(error.value)
  assert text.startswith(f'Hugging Face format: {name}={value!r}, but Qwen3 ')
  assert lack in text and 'gated.load and eval.py open it as it is' in text
  # Continued training can leave it out.
  plain = {'moe.dispatch': 'dropless', 'attn.window': 0}
  without = f'--{name}={plain.get(short, 0.0)} --allow_change={name})'
  assert (without in text) == (short in hf.knobs.DROPPED)


def test_every_knob_that_a_format_fixes_has_a_message():
  knobs = hf.knobs
  fixed = {*knobs.FIXED, *knobs.FIXED_BY_GATE, *knobs.FIXED_BY_EXPERTS}
  assert {*knobs.LACKS} == {*fixed, 'attn.qk_norm'}
  assert {*knobs.LACKS_OF_NEXT} == {*knobs.FIXED_BY_NEXT}
  # But for one whose effect is that of another knob.
  assert {knob.replace('__', '.') for knob, *_ in REFUSED} == (
    {*knobs.LACKS} - {'attn.differential'}
  )


@pytest.mark.parametrize(
  'changes, lack',
  [
    (
      dict(attn__gate__granularity='headwise'),
      "'headwise', but Qwen3-Next has a gate for",
    ),
    (dict(moe__norm_topk=True), '=4, but Qwen3-Next has a shared expert'),
    (dict(attn__qk_norm=False), '=False, but Qwen3-Next has QK-norm'),
    ({}, "'none', but Qwen3-Next has a gate in every layer"),
  ],
)
def test_a_model_that_the_other_packing_writes_is_sent_there(changes, lack):
  with pytest.raises(ValueError) as error:
    exported('per_head', **changes)
  assert f'{lack}' in str(error.value)
  assert '; --packing=grouped may write it' in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('bias, out_bias', [(True, False), (False, True)])
def test_biases_of_some_projections_are_zero_in_the_others(bias, out_bias, tmp_path):
  """Qwen3 has one switch for the biases of all four projections."""
  gate = dict(attn__gate__position='sdpa')
  params = small.model_of(**gate, attn__bias=bias, attn__out_bias=out_bias)
  hf.save(params, tmp_path / 'out')
  read = load(tmp_path / 'out')
  assert (read.cfg.attn.bias, read.cfg.attn.out_bias) == (True, True)
  ours, theirs = trees.flatten(params), trees.flatten(read)
  for name in theirs.keys() - ours.keys():
    assert name.endswith('.bias') and not theirs[name].any()
  np.testing.assert_array_equal(logits(read), logits(params))


# Tensors.


def test_every_fault_of_a_checkpoint_is_named_before_a_tensor_is_read(copy, monkeypatch):
  def spoil(held):
    name = 'model.layers.{}.self_attn.{}_proj.weight'
    held['model.norm.bias'] = held.pop('model.norm.weight')
    held['lm_head.weight'] = held['lm_head.weight'][:-1]
    held[name.format(0, 'q')] = held[name.format(0, 'q')].astype(np.float16)
    return {name.format(1, 'k'): held[name.format(1, 'k')].T.copy()[:, :8]}

  folder = copy('qwen3', tensors=spoil)
  monkeypatch.setattr(files.Tensors, 'read', lambda *_: pytest.fail('a tensor was read'))
  with pytest.raises(ValueError) as error:
    hf.check(folder, model.abstract(hf.config(folder)))
  for message in (
    'model.norm.weight is missing',
    'model.norm.bias is not expected',
    'lm_head.weight has shape (39, 16), but (40, 16) is expected',
    'model.layers.0.self_attn.q_proj.weight has dtype F16',
    'model.layers.1.self_attn.k_proj.weight has shape (16, 8), but (16, 16) is expected',
  ):
    assert message in str(error.value)
  with pytest.raises(ValueError, match='5 faults'):
    load(folder)


def test_an_unembedding_beside_tied_embeddings_must_be_the_embedding(copy):
  tie = lambda held: {'lm_head.weight': held['model.embed_tokens.weight'].copy()}
  plain = load(golden('qwen3_yarn'))
  assert same(load(copy('qwen3_yarn', tensors=tie)), plain)
  other = lambda held: {'lm_head.weight': held['model.embed_tokens.weight'][::-1].copy()}
  with pytest.raises(ValueError, match=r'lm_head\.weight is not expected'):
    load(copy('qwen3_yarn', tensors=other))


@pytest.mark.parametrize('place', ['../out.safetensors', '/x.safetensors', 'a.bin', 3])
def test_an_index_may_only_name_files_in_its_folder(place, copy):
  folder = copy('qwen3_moe')
  (folder.parent / 'out.safetensors').write_bytes(b'')
  index = json.loads((folder / files.INDEX).read_text())
  index['weight_map']['model.norm.weight'] = place
  (folder / files.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r'the file of model\.norm\.weight is '):
    load(folder)


@pytest.mark.parametrize('damage', ['cut', 'long header', 'no header', 'lost', 'swapped'])
def test_a_damaged_file_is_named(damage, copy):
  folder = copy('qwen3_moe')
  path = sorted(folder.glob('*.safetensors'))[0]
  content = path.read_bytes()
  path.unlink()
  if damage == 'cut':
    path.write_bytes(content[:-4])
  elif damage == 'long header':
    path.write_bytes((2**40).to_bytes(8, 'little') + content[8:])
  elif damage == 'no header':
    path.write_bytes(b'\x80\x04pickle')
  elif damage == 'swapped':
    shutil.copy(sorted(folder.glob('*.safetensors'))[0], path)
  with pytest.raises(ValueError, match=path.name):
    load(folder)


def test_only_links_of_the_hubs_cache_may_leave_a_folder(copy, tmp_path):
  hub, folder = tmp_path / 'models--qwen', copy('qwen3')
  (hub / 'blobs').mkdir(parents=True)
  for place, read in (('snapshots/abc', True), ('other/abc', False)):
    (hub / place).mkdir(parents=True)
    for file in folder.iterdir():
      shutil.copy(file, hub / 'blobs' / f'hash-{file.name}')
      (hub / place / file.name).symlink_to(f'../../blobs/hash-{file.name}')
    if read:
      assert same(load(hub / place), load(golden('qwen3')))
    else:
      with pytest.raises(ValueError, match='is a link out of the folder'):
        load(hub / place)


def test_pickles_and_broken_json_are_refused(copy, tmp_path):
  folder = copy('qwen3')
  assert hf.is_checkpoint(folder)
  (folder / files.SINGLE).rename(folder / 'pytorch_model.bin')
  assert not hf.is_checkpoint(folder)
  with pytest.raises(
    ValueError, match=r'holds 0 \*\.safetensors files .* such as pickles'
  ):
    load(folder)
  folder = copy('qwen3')
  for content in ('{', '[]', '{"a": ' + '[' * 100_000 + ']' * 100_000 + '}'):
    (folder / files.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r'config\.json (is not|nests)'):
      load(folder)
  with pytest.raises(ValueError, match=r'nothing holds 0'):
    load(tmp_path / 'nothing')


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / 'notes').touch()
  with pytest.raises(ValueError, match='not an empty folder'):
    hf.save(load(golden('qwen3')), tmp_path)


# A gate for a checkpoint without one.


def ready(**gate):
  """The config of the dense checkpoint, with a gate that starts at one."""
  cfg = hf.config(golden('qwen3'))
  gate = dict(position='sdpa', activation='2sigmoid', init='zero') | gate
  gate = dataclasses.replace(cfg.attn.gate, **gate)
  return dataclasses.replace(cfg, attn=dataclasses.replace(cfg.attn, gate=gate))


@pytest.mark.slow
@pytest.mark.parametrize('granularity', ['headwise', 'elementwise'])
def test_a_gate_can_be_added_and_changes_nothing_at_first(granularity):
  start = small.transformer(ready(granularity=granularity))
  like = model.abstract(start.cfg)
  hf.check(golden('qwen3'), like, fresh=True)
  params = hf.read(golden('qwen3'), like, start)
  assert params.cfg == start.cfg
  assert same(params.blocks.attn.gate, start.blocks.attn.gate)
  assert distance(params, 'qwen3') < 1e-4
  with pytest.raises(ValueError, match=r'config\.model\.attn\.gate\.position'):
    hf.check(golden('qwen3'), like)


def test_a_gate_in_the_checkpoint_is_not_initialized():
  cfg = ready(granularity='headwise')
  with pytest.raises(ValueError, match=r'gate\.activation.*2sigmoid'):
    hf.check(golden('authors_headwise'), model.abstract(cfg), fresh=True)
  plain = model.abstract(hf.config(golden('qwen3')))
  with pytest.raises(ValueError, match=r'gate\.position'):
    hf.check(golden('authors_headwise'), plain)


def test_all_knobs_that_differ_are_named():
  cfg = hf.config(golden('qwen3'))
  attn = dataclasses.replace(cfg.attn, normalizer='off_by_one')
  other = dataclasses.replace(cfg, attn=attn, width=32)
  with pytest.raises(ValueError) as error:
    hf.check(golden('qwen3'), model.abstract(other))
  for message in (
    "normalizer='off_by_one', but the checkpoint has 'softmax'",
    'width=32, but the checkpoint has 16',
  ):
    assert message in str(error.value)


# The script.


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir with a checkpoint at step 3, and its model."""
  c = small.recipe(model__attn__gate__position='sdpa', mesh__fsdp=8, data__length=24)
  built = plan.Plan(config.build(plan.Config, c, 'config'))
  state, folder = built.init(), tmp_path_factory.mktemp('run')
  about = {'config': c, 'data': {'tokenizer': 'x', 'sha256': 'x'}, 'heldout_loss': None}
  about |= {'stability': {'rollbacks': []}}
  with checkpoint.Checkpoints(folder / 'checkpoints', keep=2, keep_every=0) as saved:
    saved.save(3, state, about)
  return folder, state.model


def convert(*args):
  return convert_hf.main([f'--{key}={value}' for key, value in args])


@pytest.mark.parametrize(
  'step',
  ['', *(pytest.param(s, marks=pytest.mark.full) for s in (':3', ':latest', '--step=3'))],
)
def test_a_run_is_converted(step, workdir, tmp_path):
  source, params = workdir
  to = tmp_path / 'out'
  path, flag = (source, [('step', 3)]) if step[:2] == '--' else (f'{source}{step}', [])
  assert convert(('from', path), *flag, ('to', to), ('shard_gib', 1e-5)) == 0
  read = load(to, compute=params.cfg.numerics.compute)
  assert same(read, params)
  assert json.loads((to / files.CONFIG).read_text())['max_position_embeddings'] == 24


def test_a_checkpoint_is_converted_and_brings_its_tokenizer(copy, tmp_path):
  source, to = copy('authors_elementwise', dict(eos_token_id=7)), tmp_path / 'out'
  (source / 'tokenizer.json').write_text('{}')
  args = ('from', source), ('to', to), ('packing', 'per_head'), ('dtype', 'bfloat16')
  assert convert(*args) == 0
  assert (to / 'tokenizer.json').read_text() == '{}'
  content = json.loads((to / files.CONFIG).read_text())
  assert (content['model_type'], content['eos_token_id']) == ('qwen3_next', 7)
  actual = logits(load(to, dtype='float32'))
  np.testing.assert_allclose(actual, expected()['authors_elementwise'], atol=0.1)


def test_a_tokenizer_that_is_a_link_elsewhere_is_not_copied(copy, tmp_path, capsys):
  source, secret = copy('qwen3'), tmp_path / 'secret'
  secret.write_text('secret')
  (source / 'tokenizer.json').symlink_to(secret)
  assert convert(('from', source), ('to', tmp_path / 'out')) == convert_hf.REFUSED
  assert 'link out of the folder' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_yarn_sets_the_length_instead_of_the_source(copy, tmp_path):
  source, to = copy('qwen3_yarn', dict(max_position_embeddings=40)), tmp_path / 'out'
  assert convert(('from', source), ('to', to)) == 0
  assert json.loads((to / files.CONFIG).read_text())['max_position_embeddings'] == 64


def test_an_export_with_yarn_has_both_lengths(copy, tmp_path, capsys):
  source, to = copy('qwen3', dict(max_position_embeddings=40)), tmp_path / 'out'
  args = ('from', source), ('to', to)
  assert convert(*args, ('yarn', '0.5')) == convert_hf.REFUSED
  assert '--yarn=0.5: config.model.attn.yarn.factor=0.5' in capsys.readouterr().err
  assert convert(*args, ('yarn', '4,truncate=False')) == 0
  content = json.loads((to / files.CONFIG).read_text())
  assert content['max_position_embeddings'] == 160
  scaling = content['rope_scaling']
  assert scaling['original_max_position_embeddings'] == 40 and not scaling['truncate']
  yarn = hf.config(to).attn.yarn
  assert (yarn.factor, yarn.original, yarn.truncate) == (4, 40, False)


def test_the_script_refuses_in_one_line(workdir, tmp_path, capsys):
  source, _ = workdir
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'notes').touch()
  to = ('to', tmp_path / 'out')
  for message, *args in (
    ('nothing: found neither checkpoints', ('from', tmp_path / 'nothing'), to),
    ('full: found neither checkpoints', ('from', tmp_path / 'full'), to),
    ('has the steps 3', ('from', f'{source}:4'), to),
    ("has no step '4'", ('from', f'{golden("qwen3")}:4'), to),
    ('names a step, and step 3 is given too', ('from', f'{source}:3'), ('step', 3), to),
    ('not an empty folder', ('from', source), ('to', tmp_path / 'full')),
    ('--shard_gib=0.0', ('from', source), to, ('shard_gib', 0)),
    ('--shard_gib=inf', ('from', source), to, ('shard_gib', 'inf')),
    ('--shard_gib=1e+308', ('from', source), to, ('shard_gib', '1e308')),
    ('--shard_gib=nan', ('from', source), to, ('shard_gib', 'nan')),
    (
      'notes is not a folder',
      ('from', source),
      ('to', tmp_path / 'full' / 'notes' / 'x' / 'y'),
    ),
    (
      'gate.granularity',
      ('from', golden('authors_headwise')),
      to,
      ('packing', 'per_head'),
    ),
  ):
    assert convert(*args) == convert_hf.REFUSED
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_a_read_only_folder_is_refused_before_weights_are_read(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(files.Tensors, 'read', lambda *_: pytest.fail('a tensor was read'))
  (tmp_path / 'shut').mkdir()
  # Root may write anywhere, whatever the mode.
  monkeypatch.setattr(files.os, 'access', lambda path, _: path != tmp_path / 'shut')
  args = ('from', golden('qwen3')), ('to', tmp_path / 'shut' / 'out')
  assert convert(*args) == convert_hf.REFUSED
  err = capsys.readouterr().err
  assert 'is not writable' in err and err.count('\n') == 1


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir whose data has a BPE, and the folder of the data."""
  home = tmp_path_factory.mktemp('trained')
  (home / 'a.txt').write_text('some words to learn and more words to read. ' * 90)
  options = prepare.Options(
    length=24, tokenizer='bpe:270', eos='', heldout=0, shard_rows=99, seed=0, bos=False,
    field='text', suffixes=(),
  )  # fmt: skip
  made = prepare.run(
    str(home / 'data'), {'d': [str(home / 'a.txt')]}, options, processes=1
  )
  c = small.recipe(data__mixture=str(home / 'data'), data__length=24, model__vocab=272)
  state = plan.Plan(config.build(plan.Config, c, 'config')).init()
  about = {'config': c, 'heldout_loss': None, 'stability': {'rollbacks': []}}
  ends = {'eos': 0, 'bos': 5}
  about['data'] = {'tokenizer': made.tokenizer.sha256, 'sha256': 'x', 'ends': ends}
  with checkpoint.Checkpoints(home / 'checkpoints', keep=2, keep_every=0) as saved:
    saved.save(3, state, about)
  return home


def test_an_export_has_what_transformers_needs_to_tokenize_alike(trained, tmp_path):
  to = tmp_path / 'out'
  assert convert(('from', trained), ('to', to)) == 0
  source, copied = trained / 'data' / 'tokenizer.json', to / 'tokenizer.json'
  assert copied.read_bytes() == source.read_bytes()
  # Without the class, transformers 5 builds another tokenizer from the model's type.
  assert json.loads((to / 'tokenizer_config.json').read_text()) == {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': '<|endoftext|>',
    'pad_token': '<|endoftext|>',
    'clean_up_tokenization_spaces': False,
  }
  assert json.loads((to / files.CONFIG).read_text())['eos_token_id'] == 0


def test_an_export_keeps_the_ends_of_text_when_its_data_has_moved(
  trained, tmp_path, capsys
):
  moved = (trained / 'data').rename(trained / 'moved')
  try:
    assert convert(('from', trained), ('to', tmp_path / 'out')) == 0
  finally:
    moved.rename(trained / 'data')
  told = capsys.readouterr().err
  assert 'no tokenizer: config.data.mixture=' in told and 'no such dataset' in told
  content = json.loads((tmp_path / 'out' / files.CONFIG).read_text())
  assert (content['eos_token_id'], content['bos_token_id']) == (0, 5)
  assert not (tmp_path / 'out' / 'tokenizer_config.json').exists()


def test_all_files_of_a_tokenizer_come_along(copy, tmp_path, capsys):
  source, to = copy('qwen3'), tmp_path / 'out'
  assert convert(('from', source), ('to', tmp_path / 'none')) == 0
  assert 'no tokenizer: ' in capsys.readouterr().err
  names = ('tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json')
  for name in names:
    (source / name).write_text(name)
  (source / 'pytorch_model.bin').write_text('no tokenizer')
  assert convert(('from', source), ('to', to)) == 0
  assert not capsys.readouterr().err
  for name in names:
    assert (to / name).read_text() == name
  assert not (to / 'pytorch_model.bin').exists()
