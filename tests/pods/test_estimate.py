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
from gated.pods.estimate import memory, roofline
from gated.pods.estimate.layout import Layout

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
def test_weights_and_moments_have_the_plans_bytes(split, weights, optimizer):
  axes = {f'mesh__{axis}': n for axis, n in sizes(**split).items()}
  numerics = {'numerics__weights': weights}
  cfg = recipe(WIDE, EXPERTS, numerics, optim__name=optimizer, **axes)
  state = plan.Plan(cfg).state
  held = lambda tree: sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
  memory = estimate.Estimate(cfg, sizes(**split), CPU).memory
  assert memory['weights'] == held(state.model)
  # The optimizer also keeps a few scalars.
  assert memory['optimizer'] == pytest.approx(held(state.opt), abs=2000)


@pytest.mark.parametrize('arg', ['none', 'headwise', 'elementwise'])
def test_flops_are_those_of_the_model_and_of_recomputation(arg):
  cfg = large(moe_15b, f'gate={arg}', accum=1, model__remat='none')
  e = estimate.Estimate(cfg, sizes(fsdp=64), V5P)
  per_token = model.flops_per_token(cfg.model, cfg.data.length)
  assert e.model_flops == per_token * 1024 * 4096 / 64
  assert sum(e.flops.values()) == pytest.approx(e.model_flops, rel=1e-9)
  remat = large(moe_15b, f'gate={arg}', accum=1, model__remat='full')
  head = 6 * cfg.model.vocab * cfg.model.width * 1024 * 4096 / 64
  layers = e.model_flops - head
  full = estimate.Estimate(remat, sizes(fsdp=64), V5P)
  assert sum(full.flops.values()) == pytest.approx(head + layers * 4 / 3, rel=1e-9)


def test_fsdp_gathers_each_weight_twice_in_each_micro_batch():
  """In bfloat16, without the chip's own part; and the gradients are scattered once."""
  cfg = large(dense_1b7, '28l', accum=4)
  traffic = estimate.Estimate(cfg, sizes(fsdp=16), V5E).traffic
  layers = sum(
    leaf.size
    for leaf in jax.tree.leaves(model.abstract(cfg.model).blocks)
    if leaf.ndim > 2
  )
  sent = {t.purpose: t for t in traffic if t.purpose in ('weights', 'gradients')}
  gathered = layers * 2 * 15 / 16
  assert sent['weights'].bytes == pytest.approx(4 * 2 * gathered, rel=1e-3)
  reduced = [t for t in traffic if t.kind == 'reduce-scatter' and t.hidden]
  assert sum(t.bytes for t in reduced) == pytest.approx(4 * gathered, rel=1e-3)


def test_only_a_chips_own_part_crosses_the_network():
  cfg = large(dense_1b7, '28l', accum=1)
  one = estimate.Estimate(cfg, sizes(data=2, fsdp=16), V5E)
  two = estimate.Estimate(cfg, sizes(data=2, fsdp=16), V5E, slices=2)
  assert all(t.network == 'links' for t in one.traffic)
  crossing = {t.axis for t in two.traffic if t.network == 'network'}
  assert crossing == {'data'}
  total = lambda e: sum(t.bytes for t in e.traffic if t.axis == 'data')
  assert total(two) == pytest.approx(total(one))
  # If fsdp crosses, each of the 16 chips of a slice sends a sixteenth.
  wide = estimate.Estimate(cfg, sizes(fsdp=32), V5E, slices=2)
  links, network = (t.bytes for t in wide.traffic if t.purpose == 'weights')
  assert network == pytest.approx(links / 15 * 16 / 16 / 2)


def test_an_axis_that_may_not_cross_slices_is_refused():
  with pytest.raises(ValueError, match='multiple of the 2 slices'):
    estimate.Estimate(recipe(WIDE), sizes(tensor=8), V5E, slices=2)


def test_time_is_the_slowest_term_and_the_exposed_traffic():
  t = lambda hidden, size: roofline.Traffic(
    axis='fsdp', network='links', bytes=size, share=1.0, hidden=hidden
  )
  run = lambda *sent: roofline.roofline(
    flops={'matmul': V5E.flops}, moved=0.0, sent=sent, chip=V5E
  )
  compute = 1 / roofline.assumed('matmul')
  second = V5E.link_bandwidth * roofline.assumed('link')
  alone = run()
  assert alone.step == pytest.approx(compute) and alone.bound == 'compute'
  assert run(t(False, second)).step == pytest.approx(compute + 1)
  some = 1 - roofline.assumed('overlap')
  assert run(t(True, second)).step == pytest.approx(compute + some)
  slow = run(t(True, 10 * second))
  assert slow.step == pytest.approx(10) and slow.bound == 'fsdp (links)'


def test_the_axes_share_the_links():
  assert roofline.share(256, 256, V5E) == 1.0
  assert roofline.share(16, 256, V5E) == 0.5
  assert roofline.share(4, 256, V5E) == 0.5
  assert roofline.share(16, 16, V5E) == 0.5  # no rings in a small slice
  assert roofline.share(4, 64, V5P) == pytest.approx(1 / 3)
  assert roofline.share(2, 8, chips.CHIPS['h100']) == 1.0


@pytest.mark.parametrize('count', [1, 6, 8, 12])
def test_every_mesh_divides_the_recipe(count):
  cfg = recipe(WIDE, EXPERTS, batch=48, mesh__choice='auto')
  meshes = estimate.meshes(cfg, count, CPU)
  assert meshes
  for e in meshes:
    assert math.prod(e.sizes.values()) == count
    plan.check_mesh(cfg, Layout(cfg, e.sizes).on)
  splits = [tuple(e.sizes.values()) for e in meshes]
  assert len(set(splits)) == len(splits)
  seconds = [e.time.step for e in meshes]
  assert seconds == pytest.approx(sorted(seconds), rel=0.02)


def test_auto_takes_the_best_mesh_and_logs_the_reason(caplog):
  cfg = recipe(WIDE, EXPERTS, mesh__choice='auto')
  with caplog.at_level('INFO', 'gated'):
    layout = plan.Plan(cfg, choose=estimate.sizes)
  best = estimate.meshes(cfg, 8, CPU)[0]
  assert dict(layout.mesh.shape) == best.sizes
  (line,) = [r.message for r in caplog.records if r.message.startswith('mesh ')]
  assert estimate.named(best.sizes) in line and 'next best' in line


def test_auto_keeps_the_axes_that_a_recipe_sets():
  cfg = recipe(WIDE, EXPERTS, mesh__choice='auto', mesh__tensor=4)
  chosen, _ = estimate.sizes(cfg, 8, CPU)
  assert chosen['tensor'] == 4 and math.prod(chosen.values()) == 8


def test_hand_takes_the_sizes_of_the_recipe():
  cfg = recipe(WIDE, mesh__tensor=2)
  assert estimate.sizes(cfg, 8, CPU) == (sizes(fsdp=4, tensor=2), '')
  with pytest.raises(ValueError, match=r"config\.mesh\.choice='by hand'"):
    recipe(mesh__choice='by hand')


def test_ties_go_to_the_simplest_mesh():
  """Replicas would be equally fast, but fsdp=16 is a single axis."""
  cfg = large(dense_1b7, '28l', mesh__choice='auto', accum=16, model__remat='full')
  chosen, reason = estimate.sizes(cfg, 16, V5E)
  assert chosen == sizes(fsdp=16), reason


def with_flags(cfg, flags: str):
  """A recipe and flags of a suggestion -> the changed recipe, and the mesh's sizes."""
  changes = dict(flag.removeprefix('--config.').split('=') for flag in flags.split())
  accum = int(changes.pop('accum', cfg.accum))
  remat = changes.pop('model.remat', cfg.model.remat)
  changes.pop('mesh.choice', None)
  split = {axis.removeprefix('mesh.'): int(n) for axis, n in changes.items()}
  return estimate.changed(cfg, remat, accum), cfg.mesh.sizes | split


def test_a_recipe_that_does_not_fit_is_refused_with_flags_that_would():
  cfg = large(dense_1b7, '28l', mesh__choice='auto', accum=1)
  with pytest.raises(ValueError, match=r'fsdp=16, needs .* GiB more than fit') as error:
    estimate.sizes(cfg, 16, V5E)
  flags = str(error.value).split('16 devices are enough with ')[1].split(' (')[0]
  changed, split = with_flags(cfg, flags)
  assert estimate.Estimate(changed, split, V5E).fits


def test_a_recipe_that_no_mesh_divides_is_refused_by_knob():
  with pytest.raises(ValueError, match=r'config\.batch=8 must be a multiple'):
    estimate.sizes(recipe(mesh__choice='auto'), 7, CPU)


def test_suggestions_fit_and_the_first_is_the_fastest():
  cfg = large(dense_1b7, '28l')
  suggestions = estimate.suggest(cfg, V5E, 16)
  assert suggestions and all(e.fits for e in suggestions)
  best = suggestions[0]
  assert best.time.step <= 1.01 * min(e.time.step for e in suggestions)
  flags = estimate.flags(cfg, best)
  assert flags.startswith('--config.mesh.')
  assert with_flags(cfg, flags) == (best.cfg, best.sizes)


def test_a_suggestion_without_changes_has_no_flags():
  cfg = large(dense_1b7, '28l', mesh__fsdp=16)
  assert estimate.flags(cfg, estimate.Estimate(cfg, sizes(fsdp=16), V5E)) == ''


def test_more_remat_keeps_less():
  cfg = recipe(WIDE, EXPERTS)
  kept = [memory.kept(Layout(cfg, sizes(fsdp=8)), r) for r in ('full', 'dots', 'none')]
  assert kept == sorted(kept) and kept[0] < kept[-1]


def test_memory_and_time_are_near_the_measurements_on_a_gpu():
  """On an H200: dense 28l, 8 rows of 4096, unrolled, without recomputation."""
  cfg = large(dense_1b7, '28l', batch=8)
  e = estimate.Estimate(cfg, sizes(), chips.CHIPS['h200'])
  assert e.bytes / GIB == pytest.approx(89, rel=0.25)
  assert e.time.step == pytest.approx(0.730, rel=0.25)


@pytest.mark.parametrize(
  ('changes', 'gib'),
  [
    (dict(model__depth=8, batch=8, loss__chunk=1024), 48.8),
    (dict(model__depth=4, batch=32), 74.8),
    (dict(model__depth=4, batch=32, accum=4, loss__chunk=1024), 39.8),
    (
      dict(model__depth=8, batch=32, accum=4, loss__chunk=1024, model__layers='scan'),
      63.3,
    ),
  ],
)
def test_memory_is_near_that_of_programs_compiled_for_two_gpus(changes, gib):
  """H200, jax 0.11.2: arguments and temporaries of layers of the 15B model."""
  cfg = large(moe_15b, 'gate=elementwise,cards=2', **changes)
  e = estimate.Estimate(cfg, sizes(fsdp=2), chips.CHIPS['h200'])
  assert e.bytes / GIB == pytest.approx(gib, rel=0.07)


@pytest.mark.parametrize(
  ('changes', 'gib'),
  [
    (dict(batch=8), 127.5),  # The peak of the run.
    (dict(model__attn__mean_segments=3.0), 132.65),  # XLA's plan.
  ],
)
def test_memory_of_the_15b_model_is_near_that_of_its_runs_on_two_gpus(changes, gib):
  changes |= dict(model__attn__max_segments=14)
  cfg = large(moe_15b, 'gate=elementwise,cards=2', **changes)
  e = estimate.Estimate(cfg, sizes(fsdp=2), chips.CHIPS['h200'])
  assert e.bytes / GIB == pytest.approx(gib, rel=0.03)


def test_memory_of_packed_rows_on_a_gpu_grows_with_the_documents_of_a_row():
  """cuDNN's workspace of 16 rows in XLA's program: 34,494,022,400 bytes."""

  def needs(**changes):
    changes |= dict(batch=32, optim__moments='float32')
    cfg = large(moe_15b, 'gate=elementwise,cards=2', **changes)
    return estimate.Estimate(cfg, sizes(fsdp=2), chips.CHIPS['h200']).bytes

  whole = needs(model__mask_documents=False)
  assert needs(model__attn__max_segments=1) == whole
  workspace = needs(model__attn__max_segments=16) - whole
  assert workspace == pytest.approx(34_494_022_400, rel=1e-3)
  # Room for 2.5 (1 + 4 / sqrt(16)) = 5 documents a row.
  known = needs(model__attn__max_segments=16, model__attn__mean_segments=2.5) - whole
  assert known == pytest.approx(workspace * 5 / 16, rel=1e-3)


# This Python has no pytest, so the recipes are its argument.
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


@pytest.mark.parametrize('cards', [2, 4, 8])
def test_the_papers_experts_fit_into_few_cards(cards):
  """With a twentieth to spare; on two cards, not with AdamW's moments in float32."""
  arg, split = f'gate=elementwise,cards={cards}', sizes(fsdp=cards)
  h200 = chips.CHIPS['h200']
  needs = lambda **changes: (
    estimate.Estimate(large(moe_15b, arg, **changes), split, h200).bytes
  )
  card = h200.memory
  assert needs() < 0.95 * card
  assert (needs(optim__moments='float32') > 0.95 * card) == (cards == 2)


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
def test_memory_is_near_that_of_a_program_compiled_for_tpus(run_for_tpu):
  if os.environ.get('GATED_PREFLIGHT') != 'all':
    pytest.skip('takes minutes: set GATED_PREFLIGHT=all')
  recipes = {kind: dataclasses.asdict(compiled(kind)[0]) for kind in COMPILED}
  process = run_for_tpu(['-c', _COMPILE, json.dumps(recipes)], timeout=900)
  assert process.returncode == 0, process.stderr[-2000:]
  totals = list(map(json.loads, process.stdout.splitlines()))
  assert [kind for kind, _ in totals] == list(COMPILED)
  for kind, total in totals:
    cfg, split = compiled(kind)
    assert estimate.Estimate(cfg, split, V5E).bytes == pytest.approx(total, rel=0.25), (
      kind
    )
