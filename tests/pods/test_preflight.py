"""Preflights: by arithmetic, for the devices here, and for TPUs if libtpu is installed.

GATED_PREFLIGHT=all compiles every golden case, which takes ten minutes.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
import small
from golden import make_preflight

from gated import model, plan
from gated.devices import chips
from gated.pods import estimate, preflight
from gated.pods.preflight import table

ROOT = Path(__file__).resolve().parents[2]
CASES = make_preflight.CASES
GIB = 2**30


def run(run_python, *flags, **opts):
  return run_python(['scripts/preflight.py', *flags], **opts)


def last(process) -> dict:
  """The report in the last line of a process's output."""
  return json.loads(process.stdout.splitlines()[-1])


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
def test_a_topology_names_a_chip_and_a_count(topology, slices, name, count, groups):
  target = machine(topology, slices)
  assert (target.chip.name, target.count, target.slices) == (name, count, groups)
  assert target.compiles == bool(chips.topologies(name))


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v5e:2x3', r'v5e:2x3, but slices of v5e are 2x2 2x4 4x4'),
    ('v5p:8', 'slices of v5p are 2x2x1'),
    ('h100', 'it must be h100:COUNT'),
    ('cpu:0', 'it must be cpu:COUNT'),
    ('v9:2x2', 'but chips are v4, v5e'),
  ],
)
def test_an_unknown_topology_is_refused_with_the_known_ones(topology, message):
  with pytest.raises(ValueError, match=message):
    machine(topology)
  with pytest.raises(ValueError, match='--slices=0'):
    machine('v5e:2x2', 0)


def test_a_report_without_a_compiler_is_marked_as_an_estimate():
  cfg = small.whole(mesh__fsdp=-1)
  report = preflight.by_arithmetic(cfg, machine('h100:8'))
  text = '\n'.join(table.lines(report))
  assert report['source'] == 'estimate' and 'an estimate by arithmetic' in text
  same = estimate.Estimate(cfg, report['mesh'], chips.CHIPS['h100'])
  assert report['memory']['total'] == same.bytes
  assert report['flops']['model'] == same.model_flops
  assert 'assumed: ' in text and 'MFU' in text
  json.dumps(report)


def test_a_report_of_a_misfit_has_the_excess_and_advice():
  cfg = small.whole(
    batch=16,
    mesh__fsdp=-1,
    model__width=8192,
    model__ffn=65536,
    model__vocab=40,
    model__depth=4,
  )
  report = preflight.by_arithmetic(cfg, machine('v5e:2x2'))
  assert not report['fits']
  assert report['over'] == report['memory']['total'] - 15.75 * GIB > 0
  best = report['advice'][0]
  # It needs more chips, and fits them.
  assert best['chips'] > 4 and best['memory'] <= 0.95 * 15.75 * GIB
  text = '\n'.join(table.lines(report))
  assert f'DOES NOT FIT: {report["over"] / GIB:.2f} GiB over' in text
  assert f'would fit: {best["chips"]} chips' in text and best['flags'] in text


@pytest.mark.parametrize(
  ('message', 'over'),
  [
    ('Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.', 4.5),
    (
      'the total memory required for HLO temporaries (17.75G) exceeds available HBM '
      '(15.75G).',
      2.0,
    ),
  ],
)
def test_the_compilers_error_for_too_large_a_program_is_read(message, over):
  arguments = {'weights': 3 * GIB, 'batch': GIB}
  memory, limit = preflight._too_large(f'RESOURCE_EXHAUSTED: {message}', arguments)
  held = 4 * GIB if 'temporaries' in message else 0
  assert memory['total'] - limit == over * GIB + held
  assert memory['weights'] == 3 * GIB and limit == 15.75 * GIB


def test_arguments_have_the_bytes_of_a_chips_shards():
  layout = plan.Plan(small.whole(mesh__fsdp=8))
  parts = preflight.parts(layout)
  whole = model.count(layout.state.model)
  assert whole * 4 / 8 <= parts['weights'] < whole * 4 / 8 * 1.2
  assert 2 * parts['weights'] <= parts['optimizer'] < 2 * parts['weights'] + 2048
  assert parts['batch'] == 5 * 4 * 8 * 16 / 8


def test_balanced_routers_fill_a_share_of_the_buffers():
  assert preflight.assumed(plan.Plan(small.whole())) == {}
  moe = dict(model__moe__experts=8, model__moe__top_k=2)
  split = preflight.assumed(plan.Plan(small.whole(mesh__expert=4, **moe)))
  # A row has 16 tokens with 2 experts each; the buffer has half as many rows more.
  assert split['fill'] == 32 / 48
  assert split['idle']
  assert preflight.assumed(plan.Plan(small.whole(**moe))) == {}


@pytest.fixture(scope='module')
def compiled_here():
  cfg = small.whole(mesh__fsdp=4, mesh__data=2, data__length=48)
  return preflight.compiled_for(cfg, preflight.machine('here', 1))


@pytest.mark.full
def test_here_compiles_the_real_step(compiled_here):
  report = compiled_here
  assert report['source'] == 'compiled' and report['chips'] == jax.device_count()
  parts = {k: v for k, v in report['memory'].items() if k != 'total'}
  assert report['memory']['total'] == sum(parts.values())
  assert {t['axis'] for t in report['collectives']} <= {'data', 'fsdp', 'data+fsdp', ''}
  assert any(t['kind'] == 'all-gather' for t in report['collectives'])
  assert len(report['buffers']) == 10
  text = '\n'.join(table.lines(report))
  assert 'compiled by XLA' in text and 'largest buffers' in text
  json.dumps(report)


@pytest.mark.full
def test_the_square_arrays_of_the_reference_attention_are_reported(compiled_here):
  assert any('tokens by tokens' in text for text in compiled_here['offences'])
  assert '! an array of tokens by tokens' in '\n'.join(table.lines(compiled_here))


def report(**changes) -> dict:
  """A report that passes its golden case, with changes."""
  fields = {
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
  return fields | changes


def faults(**changes) -> list[str]:
  needs = {'spare': 0.05, 'counted': True}
  case = {'flags': [], 'needs': needs, 'found': make_preflight.kept(report())}
  return make_preflight.faults(case, report(**changes))


def test_a_golden_case_may_grow_by_5_percent():
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


def test_a_golden_case_needs_free_memory_and_complete_counts():
  assert 'free, not 5%' in faults(spare=0.04)[0]
  assert 'not counted' in faults(uncounted={'mystery': 3})[0]
  assert faults(offences=['an all-gather of all']) == ['an all-gather of all']
  wrong = {'counted': 100.0, 'model': 90.0, 'expected': {'matmul': 110.0}}
  assert '0.9091 of the expected FLOPs' in faults(flops=wrong)[0]
  empty = {'flags': [], 'needs': {'spare': 0, 'counted': True}, 'found': None}
  assert 'no result yet' in make_preflight.faults(empty, report())[0]
  lost = {'memory': {'total': 2000}}
  assert 'does not fit any more' in make_preflight.faults(empty, lost)[0]


def test_every_golden_case_has_its_flags():
  for name, path in CASES.items():
    case = json.loads(path.read_text())
    assert set(case) == {'flags', 'needs', 'found'}, name
    assert any(flag.startswith('--topology=v') for flag in case['flags']), name


def test_an_unknown_golden_case_is_refused_before_any_is_compiled(run_python):
  done = run_python(['tests/golden/make_preflight.py', 'small', 'nothing'])
  assert done.returncode == 2 and 'small: ' not in done.stdout
  assert f"'nothing' is no case of {', '.join(CASES)}" in done.stderr


def check(run_for_tpu, name: str, timeout: int) -> None:
  process = run_for_tpu(['tests/golden/make_preflight.py', name], timeout=timeout)
  assert process.returncode == 0, process.stdout + process.stderr[-2000:]
  assert f'{name}: ' in process.stdout


@pytest.mark.full
def test_a_small_step_compiled_for_tpus_passes_its_golden_case(run_for_tpu):
  check(run_for_tpu, 'small', 600)


@pytest.mark.parametrize('name', sorted(set(CASES) - {'small'}))
@pytest.mark.full
def test_a_step_compiled_for_tpus_passes_its_golden_case(name, run_for_tpu):
  if os.environ.get('GATED_PREFLIGHT') != 'all':
    pytest.skip('takes minutes: set GATED_PREFLIGHT=all')
  check(run_for_tpu, name, 7200)


@pytest.mark.slow
def test_the_script_prints_an_estimate_as_text_and_as_json(run_python, tmp_path):
  file = tmp_path / 'report.json'
  flags = ('--config=configs/moe_15b.py', '--topology=h100:64', f'--json={file}')
  process = run(run_python, *flags)
  assert process.returncode == 0, process.stderr
  assert last(process) == json.loads(file.read_text())
  assert last(process)['source'] == 'estimate' and last(process)['chips'] == 64
  assert 'an estimate by arithmetic' in process.stdout


@pytest.mark.slow
def test_the_script_suggests_fits_best_first(run_python):
  flags = ('--config=configs/dense_1b7.py:28l', '--topology=v5e:4x4', '--suggest')
  process = run(run_python, *flags)
  assert process.returncode == 0, process.stderr
  suggestions = last(process)['suggestions']
  assert all(s['memory'] <= 0.95 * 15.75 * GIB for s in suggestions)
  best = suggestions[0]
  assert best['seconds'] <= 1.02 * min(s['seconds'] for s in suggestions)
  assert (
    f'{len(suggestions)} ways fit' in process.stdout and best['flags'] in process.stdout
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5e:3x3'], 'slices of v5e are 2x2 2x4'),
    (['--topology=h100:8', '--config.mesh.tensor=8'], 'config.model.attn.heads=4 must'),
    (['--topology=h100:8', '--config.batch=12'], 'config.batch=12 must be a multiple'),
    (
      ['--topology=h100:8', '--config.mesh.fsdp=3'],
      '8 devices are available, but config.mesh.fsdp=3 needs',
    ),
  ],
)
@pytest.mark.full
def test_the_script_refuses_in_one_line(flags, message, run_python):
  process = run(run_python, '--config=configs/base.py', *flags)
  assert (process.returncode, len(process.stderr.splitlines())) == (2, 1), process.stderr
  assert message in process.stderr


@pytest.mark.full
def test_the_script_names_the_command_that_installs_libtpu(run_python):
  if importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is installed')
  process = run(run_python, '--config=configs/base.py', '--topology=v5e:2x2')
  assert process.returncode == 2
  assert 'pip install -r requirements-tpu.txt' in process.stderr
  assert len(process.stderr.splitlines()) == 1


@pytest.mark.full
def test_the_script_exits_with_1_if_the_recipe_does_not_fit(run_python):
  flags = ('--config=configs/moe_15b.py', '--topology=v5e:2x2', '--estimate')
  process = run(run_python, *flags)
  assert process.returncode == 1, process.stderr
  assert 'DOES NOT FIT' in process.stdout and 'would fit: ' in process.stdout
  assert last(process)['over'] > 0
