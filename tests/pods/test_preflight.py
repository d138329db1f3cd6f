"""Preflights: by arithmetic, for what is here, and for TPUs where their compiler is.

GATED_PREFLIGHT=all compiles every kept case, which takes ten minutes.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
import small

from gated import model, plan
from gated.devices import chips
from gated.pods import estimate, preflight
from gated.pods.preflight import golden, table

ROOT = Path(__file__).resolve().parents[2]
CASES = {path.stem: path for path in (ROOT / 'tests/golden/preflight').glob('*.json')}
GIB = 2**30


def run(run_python, *flags, **opts):
  return run_python(['scripts/preflight.py', *flags], **opts)


def last(done) -> dict:
  return json.loads(done.stdout.splitlines()[-1])


def machine(topology: str, slices: int = 1) -> preflight.Machine:
  return preflight.machine(topology, slices)


@pytest.mark.parametrize(
  ('topology', 'slices', 'name', 'count', 'groups'),
  [
    ('v5p:4x4x4', 1, 'v5p', 64, 1),
    ('v5e:2x2', 2, 'v5e', 8, 2),
    ('h100:64', 1, 'h100', 64, 8),  # boards of 8
    ('h200:8', 1, 'h200', 8, 1),
    ('cpu:8', 1, 'cpu', 8, 1),
  ],
)
def test_a_topology_names_a_chip_and_how_many(topology, slices, name, count, groups):
  found = machine(topology, slices)
  assert (found.chip.name, found.count, found.slices) == (name, count, groups)
  assert found.compiles == bool(chips.topologies(name))


@pytest.mark.parametrize(
  ('topology', 'said'),
  [
    ('v5e:2x3', r'v5e:2x3, but slices of v5e are 2x2 2x4 4x4'),
    ('v5p:8', 'slices of v5p are 2x2x1'),
    ('h100', 'it must be h100:COUNT'),
    ('cpu:0', 'it must be cpu:COUNT'),
    ('v9:2x2', 'but chips are v4, v5e'),
  ],
)
def test_a_topology_that_does_not_exist_lists_those_that_do(topology, said):
  with pytest.raises(ValueError, match=said):
    machine(topology)
  with pytest.raises(ValueError, match='--slices=0'):
    machine('v5e:2x2', 0)


def test_without_a_compiler_the_table_is_marked_as_an_estimate():
  cfg = small.whole(mesh__fsdp=-1)
  found = preflight.by_arithmetic(cfg, machine('h100:8'))
  text = '\n'.join(table.lines(found))
  assert found['source'] == 'estimate' and 'an estimate by arithmetic' in text
  same = estimate.of(cfg, found['mesh'], chips.CHIPS['h100'])
  assert found['memory']['total'] == same.bytes
  assert found['flops']['model'] == same.model_flops
  assert 'assumed: ' in text and 'MFU' in text
  json.dumps(found)


def test_what_does_not_fit_says_by_how_much_and_what_would():
  cfg = small.whole(
    batch=16,
    mesh__fsdp=-1,
    model__width=8192,
    model__ffn=65536,
    model__vocab=40,
    model__depth=4,
  )
  found = preflight.by_arithmetic(cfg, machine('v5e:2x2'))
  assert not found['fits']
  assert found['over'] == found['memory']['total'] - 15.75 * GIB > 0
  best = found['advice'][0]
  # It takes more chips, and on those it fits.
  assert best['chips'] > 4 and best['memory'] <= 0.95 * 15.75 * GIB
  text = '\n'.join(table.lines(found))
  assert f'DOES NOT FIT: {found["over"] / GIB:.2f} GiB over' in text
  assert f'would fit: {best["chips"]} chips' in text and best['flags'] in text


@pytest.mark.parametrize(
  ('said', 'over'),
  [
    ('Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.', 4.5),
    (
      'the total memory required for HLO temporaries (17.75G) exceeds available HBM '
      '(15.75G).',
      2.0,
    ),
  ],
)
def test_what_the_compiler_says_of_too_large_a_program_is_read(said, over):
  what = plan.Plan(small.whole())
  found = preflight._too_large(f'RESOURCE_EXHAUSTED: {said}', what)
  held = sum(preflight.parts(what).values()) if 'temporaries' in said else 0
  assert found['over'] == over * GIB + held
  assert not found['fits']


def test_weights_and_optimizer_are_what_a_chip_holds_of_them():
  what = plan.Plan(small.whole(mesh__fsdp=8))
  found = preflight.parts(what)
  whole = model.count(what.state.model)
  assert whole * 4 / 8 <= found['weights'] < whole * 4 / 8 * 1.2
  assert 2 * found['weights'] <= found['optimizer'] < 2 * found['weights'] + 2048
  assert found['batch'] == 5 * 4 * 8 * 16 / 8


def test_balanced_routers_fill_their_share_of_the_buffers():
  dense = preflight.assumed(plan.Plan(small.whole()))
  assert (dense.fill, dense.idle) == (1.0, ())
  moe = dict(model__moe__experts=8, model__moe__top_k=2)
  split = preflight.assumed(plan.Plan(small.whole(mesh__expert=4, **moe)))
  # A row of 16 tokens, of which each goes to 2 experts, and half as many rows more.
  assert split.fill == 32 / 48
  assert split.idle
  assert preflight.assumed(plan.Plan(small.whole(**moe))).fill == 1.0


@pytest.fixture(scope='module')
def compiled_here():
  cfg = small.whole(mesh__fsdp=4, mesh__data=2, data__length=48)
  return preflight.compiled_for(cfg, preflight.machine('here', 1))


@pytest.mark.slow
def test_here_the_real_step_is_compiled(compiled_here):
  found = compiled_here
  assert found['source'] == 'compiled' and found['chips'] == jax.device_count()
  parts = {k: v for k, v in found['memory'].items() if k != 'total'}
  assert found['memory']['total'] == sum(parts.values())
  assert {t['axis'] for t in found['collectives']} <= {'data', 'fsdp', 'data+fsdp', ''}
  assert any(t['kind'] == 'all-gather' for t in found['collectives'])
  assert len(found['buffers']) == 10
  text = '\n'.join(table.lines(found))
  assert 'compiled by XLA' in text and 'largest buffers' in text
  json.dumps(found)


@pytest.mark.slow
def test_the_reference_attention_is_told_to_be_quadratic(compiled_here):
  found = compiled_here
  assert any('tokens by tokens' in text for text in found['offences'])
  assert '! an array of tokens by tokens' in '\n'.join(table.lines(found))


def report(**changes) -> dict:
  """One that meets what is kept of it."""
  found = {
    'jax': '0.10.2',
    'mesh': {'fsdp': 4},
    'memory': {'weights': 600, 'temporaries': 400, 'total': 1000},
    'spare': 0.5,
    'flops': {'counted': 100.0, 'model': 90.0, 'expected': {'matmul': 100.0}},
    'collectives': [{'kind': 'all-gather', 'network': 'links', 'bytes': 1e8}],
    'seconds': {'step': 1.0},
    'mfu': 0.5,
    'offences': [],
    'uncounted': {},
    'unknown_loops': [],
  }
  return found | changes


def faults(**changes) -> list[str]:
  needs = {'spare': 0.05, 'counted': True}
  case = {'flags': [], 'needs': needs, 'found': golden.kept(report())}
  return golden.faults(case, report(**changes))


def test_a_kept_case_may_grow_by_a_twentieth():
  sent = lambda kind, size: [{'kind': kind, 'network': 'links', 'bytes': size}]
  memory = lambda t: {'weights': 600, 'temporaries': t, 'total': 600 + t}
  flops = lambda n: {'counted': n, 'model': 90.0, 'expected': {'matmul': n}}
  assert faults() == []
  assert faults(memory=memory(415), collectives=sent('all-gather', 1.04e8)) == []
  assert 'memory.temporaries grew by 10.0%' in faults(memory=memory(440))[0]
  assert (
    'all-gather (links) grew by 6.0%' in faults(collectives=sent('all-gather', 1.06e8))[0]
  )
  assert (
    'all-to-all (links) grew from nothing'
    in faults(collectives=sent('all-to-all', 1e8))[0]
  )
  assert 'flops grew' in faults(flops=flops(120.0))[0]


def test_a_kept_case_has_memory_to_spare_and_counts_everything():
  assert 'to spare, not 5%' in faults(spare=0.04)[0]
  assert 'not counted' in faults(uncounted={'mystery': 3})[0]
  assert faults(offences=['an all-gather of all']) == ['an all-gather of all']
  wrong = {'counted': 100.0, 'model': 90.0, 'expected': {'matmul': 110.0}}
  assert '0.9091 of those by arithmetic' in faults(flops=wrong)[0]
  empty = {'flags': [], 'needs': {'spare': 0, 'counted': True}, 'found': None}
  assert 'nothing is kept yet' in golden.faults(empty, report())[0]
  lost = {'memory': {'total': 2000}}
  assert 'does not fit any more' in golden.faults(empty, lost)[0]


def test_every_kept_case_says_how_it_is_made():
  for name, path in CASES.items():
    case = json.loads(path.read_text())
    assert set(case) == {'flags', 'needs', 'found'}, name
    assert any(flag.startswith('--topology=v') for flag in case['flags']), name


def check(run_for_tpu, name: str, timeout: int) -> None:
  flags = ['--golden', f'--only={name}']
  done = run_for_tpu(['scripts/preflight.py', *flags], timeout=timeout)
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  assert f'{name}: ' in done.stdout


@pytest.mark.slow
def test_a_small_step_compiled_for_tpus_is_as_it_was(run_for_tpu):
  check(run_for_tpu, 'small', 600)


@pytest.mark.parametrize('name', sorted(set(CASES) - {'small'}))
@pytest.mark.slow
def test_a_step_compiled_for_tpus_is_as_it_was(name, run_for_tpu):
  if os.environ.get('GATED_PREFLIGHT') != 'all':
    pytest.skip('takes minutes: set GATED_PREFLIGHT=all')
  check(run_for_tpu, name, 7200)


def test_the_script_prints_an_estimate_and_the_same_as_json(run_python, tmp_path):
  file = tmp_path / 'report.json'
  flags = ('--config=configs/moe_15b.py', '--topology=h100:64', f'--json={file}')
  done = run(run_python, *flags)
  assert done.returncode == 0, done.stderr
  assert last(done) == json.loads(file.read_text())
  assert last(done)['source'] == 'estimate' and last(done)['chips'] == 64
  assert 'an estimate by arithmetic' in done.stdout


def test_the_script_suggests_what_fits_best_first(run_python):
  flags = ('--config=configs/dense_1b7.py:28l', '--topology=v5e:4x4', '--suggest')
  done = run(run_python, *flags)
  assert done.returncode == 0, done.stderr
  ways = last(done)['suggestions']
  assert all(way['memory'] <= 0.95 * 15.75 * GIB for way in ways)
  assert ways[0]['seconds'] <= 1.02 * min(way['seconds'] for way in ways)
  assert f'{len(ways)} ways fit' in done.stdout and ways[0]['flags'] in done.stdout


@pytest.mark.parametrize(
  ('flags', 'code', 'said'),
  [
    (['--topology=v5e:3x3'], 2, 'slices of v5e are 2x2 2x4'),
    (
      ['--topology=h100:8', '--config.mesh.tensor=8'],
      2,
      'config.model.attn.heads=4 must',
    ),
    (['--topology=h100:8', '--config.batch=12'], 2, 'config.batch=12 must be a multiple'),
    (['--topology=h100:8', '--config.mesh.fsdp=3'], 2, 'is not the 8 devices'),
    (['--golden', '--only=nothing'], 2, '--only=nothing, but cases are '),
  ],
)
@pytest.mark.slow
def test_the_script_refuses_in_one_line(flags, code, said, run_python):
  done = run(run_python, '--config=configs/base.py', *flags)
  assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
  assert said in done.stderr


@pytest.mark.slow
def test_the_script_says_how_to_get_the_compiler_for_tpus(run_python):
  if importlib.util.find_spec('libtpu'):
    pytest.skip('it is here')
  done = run(run_python, '--config=configs/base.py', '--topology=v5e:2x2')
  assert done.returncode == 2
  assert 'pip install -r requirements-tpu.txt' in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_script_leaves_with_1_where_nothing_fits(run_python):
  flags = ('--config=configs/moe_15b.py', '--topology=v5e:2x2', '--estimate')
  done = run(run_python, *flags)
  assert done.returncode == 1, done.stderr
  assert 'DOES NOT FIT' in done.stdout and 'would fit: ' in done.stdout
  assert last(done)['over'] > 0
