"""Estimates by arithmetic agree with the model, with the mesh and with a compiler."""

import dataclasses
import json
import math
import os

import jax
import pytest
import small

from configs import dense_1b7, moe_15b
from gated import config, model, plan
from gated.devices import chips, mesh
from gated.devices.chips import GIB
from gated.pods import estimate
from gated.pods.estimate import memory
from gated.pods.estimate.layout import Layout
from gated.pods.estimate.roofline import share

V5E, V5P, CPU = (chips.CHIPS[name] for name in ('v5e', 'v5p', 'cpu'))
WIDE = dict(attn__heads=8, attn__kv_heads=8, attn__head_dim=4)
EXPERTS = dict(moe__experts=8, moe__top_k=2)
MESHES = [
  dict(fsdp=8),
  dict(data=2, fsdp=2, tensor=2),
  dict(fsdp=2, expert=4),
  dict(expert=2, tensor=2, context=2),
]


def sizes(**split):
  return dict.fromkeys(mesh.AXES, 1) | split


def recipe(*changes, **knobs):
  shape = {k: v for change in changes for k, v in change.items()}
  return small.whole(**{f'model__{k}': v for k, v in shape.items()}, **knobs)


def large(module, arg='', **changes):
  c = module.get_config(arg)
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return config.build(plan.Config, c.to_dict(), 'config')


@pytest.mark.parametrize('split', MESHES)
@pytest.mark.parametrize(
  ('weights', 'optimizer'), [('float32', 'adamw'), ('bfloat16', 'muon')]
)
def test_bytes_of_weights_and_moments_are_those_of_the_plan(split, weights, optimizer):
  axes = {f'mesh__{axis}': n for axis, n in sizes(**split).items()}
  numerics = {'numerics__weights': weights}
  cfg = recipe(WIDE, EXPERTS, numerics, optim__name=optimizer, **axes)
  state = plan.Plan(cfg).state
  held = lambda tree: sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
  found = estimate.of(cfg, sizes(**split), CPU)
  assert found.memory['weights'] == held(state.model)
  # Beside the moments the optimizer keeps a few scalars.
  assert found.memory['optimizer'] == pytest.approx(held(state.opt), abs=2000)


@pytest.mark.parametrize('arg', ['none', 'headwise', 'elementwise'])
def test_flops_are_the_models_and_what_is_computed_again(arg):
  cfg = large(moe_15b, f'gate={arg}', accum=1, model__remat='none')
  found = estimate.of(cfg, sizes(fsdp=64), V5P)
  per_token = model.flops_per_token(cfg.model, cfg.data.length)
  assert found.model_flops == per_token * 1024 * 4096 / 64
  assert sum(found.flops.values()) == pytest.approx(found.model_flops, rel=1e-9)
  again = large(moe_15b, f'gate={arg}', accum=1, model__remat='full')
  head = 6 * cfg.model.vocab * cfg.model.width * 1024 * 4096 / 64
  layers = found.model_flops - head
  full = estimate.of(again, sizes(fsdp=64), V5P)
  assert sum(full.flops.values()) == pytest.approx(head + layers * 4 / 3, rel=1e-9)


def test_fsdp_gathers_each_weight_twice_in_each_micro_batch():
  """All but the chip's own part, in bfloat16; and the gradients leave once."""
  cfg = large(dense_1b7, '28l', accum=4)
  found = estimate.of(cfg, sizes(fsdp=16), V5E)
  layers = sum(
    leaf.size
    for leaf in jax.tree.leaves(model.abstract(cfg.model).blocks)
    if leaf.ndim > 2
  )
  sent = {t.what: t for t in found.traffic if t.what in ('weights', 'gradients')}
  gathered = layers * 2 * 15 / 16
  assert sent['weights'].link == pytest.approx(4 * 2 * gathered, rel=1e-3)
  reduced = [t for t in found.traffic if t.kind == 'reduce-scatter' and t.hidden]
  assert sum(t.link for t in reduced) == pytest.approx(4 * gathered, rel=1e-3)


def test_only_a_chips_own_part_crosses_the_network():
  cfg = large(dense_1b7, '28l', accum=1)
  one = estimate.of(cfg, sizes(data=2, fsdp=16), V5E)
  two = estimate.of(cfg, sizes(data=2, fsdp=16), V5E, slices=2)
  assert not any(t.network for t in one.traffic)
  crossing = {t.axis for t in two.traffic if t.network}
  assert crossing == {'data'}
  total = lambda e, where: sum(getattr(t, where) for t in e.traffic if t.axis == 'data')
  assert total(two, 'network') == pytest.approx(total(one, 'link'))
  # Where fsdp crosses, each of the 16 chips of a slice sends its sixteenth.
  wide = estimate.of(cfg, sizes(fsdp=32), V5E, slices=2)
  weights = next(t for t in wide.traffic if t.what == 'weights')
  assert weights.network == pytest.approx(weights.link / 15 * 16 / 16 / 2)


def test_an_axis_that_may_not_cross_slices_is_refused():
  with pytest.raises(ValueError, match='multiple of the 2 slices'):
    estimate.of(recipe(WIDE), sizes(tensor=8), V5E, slices=2)


def test_time_is_the_slowest_term_and_what_cannot_hide():
  t = lambda hidden, link: estimate.Traffic(
    what='x',
    kind='all-gather',
    axis='fsdp',
    link=link,
    network=0.0,
    share=1.0,
    hidden=hidden,
  )
  run = lambda *sent: estimate.roofline(
    flops={'matmul': V5E.flops}, moved=0.0, sent=sent, chip=V5E
  )
  compute = 1 / estimate.assumed('matmul')
  second = V5E.link_bandwidth * estimate.assumed('link')
  alone = run()
  assert alone.step == pytest.approx(compute) and alone.bound == 'compute'
  assert run(t(False, second)).step == pytest.approx(compute + 1)
  some = 1 - estimate.assumed('overlap')
  assert run(t(True, second)).step == pytest.approx(compute + some)
  slow = run(t(True, 10 * second))
  assert slow.step == pytest.approx(10) and slow.bound == 'fsdp (links)'


def test_links_are_dealt_out_to_the_axes():
  assert share(256, 256, V5E) == 1.0
  assert share(16, 256, V5E) == 0.5
  assert share(4, 256, V5E) == 0.5
  assert share(16, 16, V5E) == 0.5  # no rings in a small slice
  assert share(4, 64, V5P) == pytest.approx(1 / 3)
  assert share(2, 8, chips.CHIPS['h100']) == 1.0


@pytest.mark.parametrize('count', [1, 6, 8, 12])
def test_every_mesh_that_is_tried_divides_the_recipe(count):
  cfg = recipe(WIDE, EXPERTS, batch=48, mesh__choice='auto')
  found = estimate.meshes(cfg, count, CPU)
  assert found
  for e in found:
    assert math.prod(e.sizes.values()) == count
    plan.check_mesh(cfg, Layout(cfg, e.sizes).on)
  seen = [tuple(e.sizes.values()) for e in found]
  assert len(set(seen)) == len(seen)
  assert [e.time.step for e in found] == pytest.approx(
    sorted(e.time.step for e in found), rel=0.02
  )


def test_auto_takes_the_first_mesh_and_says_why(caplog):
  cfg = recipe(WIDE, EXPERTS, mesh__choice='auto')
  with caplog.at_level('INFO', 'gated'):
    what = plan.Plan(cfg, choose=estimate.sizes)
  best = estimate.meshes(cfg, 8, CPU)[0]
  assert dict(what.mesh.shape) == best.sizes
  (line,) = [r.message for r in caplog.records if r.message.startswith('mesh ')]
  assert estimate.named(best.sizes) in line and 'next best' in line


def test_auto_leaves_what_is_set_by_hand():
  cfg = recipe(WIDE, EXPERTS, mesh__choice='auto', mesh__tensor=4)
  found, _ = estimate.sizes(cfg, 8, CPU)
  assert found['tensor'] == 4 and math.prod(found.values()) == 8


def test_by_hand_nothing_is_chosen():
  cfg = recipe(WIDE, mesh__tensor=2)
  assert estimate.sizes(cfg, 8, CPU) == (sizes(fsdp=4, tensor=2), '')
  with pytest.raises(ValueError, match=r"config\.mesh\.choice='by hand'"):
    recipe(mesh__choice='by hand')


def test_ties_go_to_the_simplest_mesh():
  """Replicas would be as fast, and fsdp=16 is one axis."""
  cfg = large(dense_1b7, '28l', mesh__choice='auto', accum=16, model__remat='full')
  found, reason = estimate.sizes(cfg, 16, V5E)
  assert found == sizes(fsdp=16), reason


def test_a_recipe_that_fits_nowhere_is_told_by_how_much_and_what_would():
  cfg = large(dense_1b7, '28l', mesh__choice='auto', accum=1)
  with pytest.raises(ValueError) as caught:
    estimate.sizes(cfg, 16, V5E)
  said = str(caught.value)
  assert 'GiB more than fit' in said and 'fsdp=16' in said
  knobs = said.split('What would: ')[1].split(' (')[0]
  changes = dict(k.removeprefix('--').split('=') for k in knobs.split())
  model_of = dataclasses.replace(
    cfg.model, remat=changes.get('config.model.remat', 'none')
  )
  better = dataclasses.replace(cfg, accum=int(changes['config.accum']), model=model_of)
  split = {
    axis: int(changes.get(f'config.mesh.{axis}', getattr(cfg.mesh, axis)))
    for axis in mesh.AXES
  }
  assert estimate.of(better, split, V5E).fits


def test_a_recipe_that_nothing_divides_is_told_which_knob():
  with pytest.raises(ValueError, match=r'config\.batch=8 must be a multiple'):
    estimate.sizes(recipe(mesh__choice='auto'), 7, CPU)


def test_what_is_suggested_fits_and_the_first_is_fastest():
  cfg = large(dense_1b7, '28l')
  found = estimate.suggest(cfg, V5E, 16)
  assert found and all(e.fits for _, e in found)
  assert found[0][1].time.step <= 1.01 * min(e.time.step for _, e in found)
  knobs, best = found[0]
  assert estimate.tail(knobs).startswith('--config.mesh.')
  again = [getattr(cfg.mesh, axis) for axis in mesh.AXES]
  assert [best.sizes[a] for a in mesh.AXES] == [
    knobs.get(f'config.mesh.{axis}', n) for axis, n in zip(mesh.AXES, again)
  ]


def test_more_remat_keeps_less():
  cfg = recipe(WIDE, EXPERTS)
  kept = [memory.kept(Layout(cfg, sizes(fsdp=8)), r) for r in ('full', 'dots', 'none')]
  assert kept == sorted(kept) and kept[0] < kept[-1]


def test_memory_is_near_to_what_a_gpu_was_seen_to_take():
  """Of an H200: dense 28l, 8 rows of 4096, unrolled, nothing made anew."""
  cfg = large(dense_1b7, '28l', batch=8)
  found = estimate.of(cfg, sizes(), chips.CHIPS['h200'])
  assert found.bytes / GIB == pytest.approx(89, rel=0.25)
  assert found.time.step == pytest.approx(0.730, rel=0.25)


# Its Python has no pytest: it is told the recipes.
_COMPILE = """
import json, sys
from jax.experimental import topologies
sys.path.insert(0, '.')
from gated import config, plan
devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
for kind, recipe in json.loads(sys.argv[1]).items():
  cfg = config.build(plan.Config, recipe, 'config')
  m = plan.Plan(cfg, devices=devices).train_step().compile().memory_analysis()
  held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
  print(json.dumps([kind, held + m.temp_size_in_bytes]), flush=True)
"""
COMPILED = ('dense', 'experts')


def compiled(kind):
  """A small model with large tensors -> (recipe, sizes) for 4 chips."""
  split = sizes(fsdp=4) if kind == 'dense' else sizes(fsdp=2, expert=2)
  module, arg = (dense_1b7, '28l') if kind == 'dense' else (moe_15b, '')
  changes = dict(
    batch=16,
    data__length=2048,
    loss__chunk=1024,
    model__vocab=32768,
    model__width=1024,
    model__depth=3,
    model__layers='scan',
    model__remat='full',
    model__ffn=3072 if kind == 'dense' else 512,
    model__attn__heads=8,
    model__attn__kv_heads=4,
  )
  if kind == 'experts':
    changes |= dict(model__moe__experts=16, model__moe__top_k=4)
  axes = {f'mesh__{axis}': n for axis, n in split.items()}
  return large(module, arg, **changes, **axes), split


@pytest.mark.slow
def test_memory_is_near_to_what_the_compiler_of_a_tpu_takes(run_for_tpu):
  if os.environ.get('GATED_PREFLIGHT') != 'all':
    pytest.skip('takes minutes: set GATED_PREFLIGHT=all')
  recipes = {kind: dataclasses.asdict(compiled(kind)[0]) for kind in COMPILED}
  done = run_for_tpu(['-c', _COMPILE, json.dumps(recipes)], timeout=900)
  assert done.returncode == 0, done.stderr[-2000:]
  found = list(map(json.loads, done.stdout.splitlines()))
  assert [kind for kind, _ in found] == list(COMPILED)
  for kind, total in found:
    cfg, split = compiled(kind)
    assert estimate.of(cfg, split, V5E).bytes == pytest.approx(total, rel=0.25), kind
