"""A recipe that cannot run is refused by its knobs, before anything is compiled."""

import importlib
import types

import crafted
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import data, storage
from gated import plan as plans
from gated.devices import mesh, trees
from gated.train import losses

COMPILED = []
EVENT = '/jax/core/compile/backend_compile_duration'
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: COMPILED.append(event) if event == EVENT else None
)


@pytest.fixture
def nothing_compiled():
  before = len(COMPILED)
  yield
  assert len(COMPILED) == before


def test_the_count_of_compilations_counts():
  before = len(COMPILED)
  jax.jit(lambda x: x * 3 + 17.25)(jnp.ones(3)).block_until_ready()
  assert len(COMPILED) > before


REFUSED = [
  (
    dict(mesh__fsdp=3),
    r'8 devices are available, but config\.mesh\.fsdp=3 needs exactly 3',
  ),
  (dict(mesh__fsdp=-1, mesh__data=-1), r'config\.mesh\.data and \.fsdp are -1'),
  (dict(mesh__tensor=0), r'config\.mesh\.tensor=0'),
  (dict(batch=12), r'config\.batch=12 .*config\.accum=1 \* .*config\.mesh\.fsdp=8'),
  (
    dict(batch=8, accum=2),
    r'config\.batch=8 .*config\.accum=2 \* .*config\.mesh\.fsdp=8',
  ),
  (dict(batch=8, accum=3), r'config\.batch=8 must be a multiple of config\.accum=3'),
  (dict(batch=0), r'config\.batch=0'),
  (dict(accum=0), r'config\.accum=0'),
  (dict(steps=0), r'config\.steps=0'),
  (dict(seed=-1), r'config\.seed=-1'),
  (
    dict(mesh__context=8, mesh__fsdp=1, data__length=20),
    r'config\.data\.length=20 .*config\.mesh\.context=8',
  ),
  (
    dict(mesh__tensor=8, mesh__fsdp=1),
    r'config\.model\.attn\.heads=4 .*config\.mesh\.tensor=8',
  ),
  (
    dict(mesh__tensor=4, mesh__fsdp=2),
    r'config\.model\.attn\.kv_heads=2 .*config\.mesh\.tensor=4',
  ),
  (
    dict(mesh__tensor=2, mesh__fsdp=4, model__ffn=25),
    r'config\.model\.ffn=25 .*config\.mesh\.tensor=2',
  ),
  (
    dict(mesh__tensor=2, mesh__fsdp=4, model__vocab=41),
    r'config\.model\.vocab=41 .*config\.mesh\.tensor=2',
  ),
  (dict(model__width=20), r'config\.model\.width=20 .*config\.mesh\.fsdp=8'),
  (
    dict(optim__schedule='wsd', optim__decay=4),
    r'config\.optim\.decay=4, .* within config\.steps=5',
  ),
  (dict(loss__z=-1.0), r'config\.loss\.z=-1\.0'),
  (dict(loss__chunk=0), r'config\.loss\.chunk=0'),
  (dict(eval__every=0), r'config\.eval\.every=0'),
  (dict(eval__rows=-1), r'config\.eval\.rows=-1'),
  (dict(checkpoint__every=0), r'config\.checkpoint\.every=0'),
  (dict(checkpoint__keep=0), r'config\.checkpoint\.keep=0'),
  (dict(checkpoint__keep_every=-1), r'config\.checkpoint\.keep_every=-1'),
  (dict(log__every=0), r'config\.log\.every=0'),
  (
    dict(log__profile_first=5, log__profile_last=4),
    r'config\.log\.profile_last=4 .*config\.log\.profile_first=5',
  ),
  (dict(log__profile_first=5), r'config\.log\.profile_last=-1 .*profile_first=5'),
  (dict(name=''), r"config\.name=''"),
  (dict(name='a/b'), r"config\.name='a/b'"),
]


@pytest.mark.usefixtures('nothing_compiled')
@pytest.mark.parametrize(('changes', 'message'), REFUSED, ids=lambda v: str(v)[:40])
def test_an_impossible_run_is_refused_by_its_knobs(changes, message):
  with pytest.raises(ValueError, match=message):
    plans.Plan(small.whole(**changes))


@pytest.mark.usefixtures('nothing_compiled')
def test_a_plan_describes_a_run_without_running_it():
  plan = plans.Plan(small.whole(accum=2, batch=16, model__attn__gate__position='sdpa'))
  assert dict(plan.mesh.shape) == dict(data=1, fsdp=8, expert=1, tensor=1, context=1)
  assert (plan.tokens_per_step, plan.micro) == (256, 8)
  ungated = plans.Plan(small.whole()).parameters
  assert plan.parameters - ungated == 2 * 16 * 4 * 8
  assert plan.parameters == sum(x.size for x in jax.tree.leaves(plan.state.model))
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(plan.state))
  table = trees.flatten(plan.state)
  # Adam's moments lie beside their weights.
  spec = jax.P(None, 'fsdp', None, None)
  assert table['model.blocks.attn.gate.weight'].sharding.spec == spec
  assert table['opt.inner.1.nu.blocks.attn.gate.weight'].sharding.spec == spec
  assert table['step'].sharding.spec == jax.P()


@pytest.mark.slow
@pytest.mark.usefixtures('nothing_compiled')
def test_the_train_step_is_lowered_and_not_compiled():
  plan = plans.Plan(small.whole())
  lowered = plan.train_step()
  out, expected = trees.flatten(lowered.out_info[0]), trees.flatten(plan.state)
  assert {name: leaf.shape for name, leaf in out.items()} == {
    name: leaf.shape for name, leaf in expected.items()
  }


@pytest.mark.usefixtures('nothing_compiled')
def test_a_row_too_long_for_any_backend_is_refused_as_the_step_is_lowered():
  if jax.default_backend() == 'cpu':
    # Softmax has blocks in plain XLA; what takes its place has the reference alone.
    knobs = dict(data__length=4104, model__attn__normalizer='sigmoid')
    plan = plans.Plan(small.whole(**knobs))
    with pytest.raises(
      NotImplementedError, match=r"config\.model\.attn\.backend='reference'"
    ):
      plan.train_step()


def test_batch_shapes_are_those_of_a_placed_batch():
  plan = plans.Plan(small.whole(mesh__fsdp=4, mesh__context=2))
  placed = mesh.place(small.batch(8, 16), plan.mesh, 8)
  for name, shape, array in zip(data.Batch._fields, plan.batch_shapes(8), placed):
    assert (shape.shape, shape.dtype) == (array.shape, array.dtype), name
    assert shape.sharding == array.sharding


@pytest.mark.slow
def test_the_first_state_is_made_where_it_lives_and_is_the_same_on_any_mesh():
  plan = plans.Plan(small.whole(mesh__fsdp=2, mesh__tensor=2, mesh__context=2))
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    state = plan.init()
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
  shapes, single = (
    trees.flatten(plan.state),
    trees.flatten(small.transformer(plan.cfg.model)),
  )
  for name, leaf in trees.flatten(state).items():
    assert leaf.sharding == shapes[name].sharding, name
  for name, leaf in trees.flatten(state.model).items():
    np.testing.assert_allclose(leaf, single[name], rtol=1e-6, atol=1e-8, err_msg=name)
  moments = jax.tree.leaves((state.opt, state.step, state.data_step))
  assert not any(np.any(leaf) for leaf in moments)
  # Nothing is held twice, or a donated state could not be given up.
  buffers = [
    x.addressable_data(0).unsafe_buffer_pointer() for x in jax.tree.leaves(state)
  ]
  assert len(set(buffers)) == len(buffers)


@pytest.mark.slow
def test_the_evaluation_step_is_the_same_on_any_mesh():
  cfg = small.whole(model__attn__gate__position='sdpa')
  net, batch = small.model_of(attn__gate__position='sdpa'), small.batch(8, 16)
  exact = jax.jit(lambda m, b: losses.per_row(m, b, chunk=16))(net, batch)
  plan = plans.Plan(small.whole(mesh__fsdp=2, mesh__tensor=2, mesh__context=2))
  placed = jax.device_put(net, mesh.shardings(net, plan.mesh))
  evaluate = plans.evaluate_step(cfg.model, plan.mesh, 16)
  ours = evaluate(placed, mesh.place(batch, plan.mesh, 8))
  for a, b in zip(ours, exact):
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert a.sharding.is_fully_replicated


def test_on_gpus_attention_has_room_for_the_documents_that_rows_have(
  tmp_path, monkeypatch
):
  """cuDNN's backward pass takes memory and time for each document that it allows."""
  crafted.make_dataset(tmp_path / 'data')
  c = small.recipe(model__vocab=300, data__mixture=str(tmp_path / 'data'))
  module = importlib.import_module('gated.plan.prepare')
  monkeypatch.setattr(plans.Plan, 'train_step', lambda self: None)

  def limit(platform):
    monkeypatch.setattr(module, 'mesh', types.SimpleNamespace(platform=lambda: platform))
    opts = dict(allowed=(), restore_step='', choose=None)
    run = module.prepare(c, storage.path(tmp_path / platform), **opts)
    assert run.config['model']['attn']['max_segments'] == 16
    assert run.corpus.max_segments < 16
    return run.plan.cfg.model.attn, run.corpus

  attn, corpus = limit('gpu')
  assert attn.max_segments == corpus.max_segments > 1
  assert 1 < attn.mean_segments == corpus.mean_segments
  attn, _ = limit('cpu')
  assert (attn.max_segments, attn.mean_segments) == (16, 0.0)
