"""Every row of the paper's tables is there, is sized as the paper says, and trains."""

import dataclasses
import importlib
import json
import math

import pytest
import rows as trained

from configs import base, dense_1b7, long_context, moe_15b, rows, table1, table2
from gated import config, model, plan

TABLES = trained.TABLES
ROWS = [f'{name}:{row}' for name, table in TABLES.items() for row in table.ROWS]

# Table 7's mixture of experts: layers, width, query and KV heads, their width, ffn.
L, D, H, G, K, F = 24, 2048, 32, 4, 128, 768

# Parameters over the baseline, as they follow from those shapes,
# beside what the paper prints, in millions. None: it prints nothing.
ADDED = {
  'table1:baseline': (0, 0),
  'table1:k8': (L * 2 * D * 4 * K, 50),
  'table1:q48': (L * 2 * D * 16 * K, 201),
  'table1:plus4_experts': (L * 4 * (3 * D * F + D), 400),  # with the router
  'table1:g1_elementwise': (L * D * H * K, 201),
  'table1:g2_elementwise': (L * D * G * K, 25),
  'table1:g3_elementwise': (L * D * G * K, 25),
  'table1:g4_elementwise': (L * D * H * K, 201),
  'table1:g5_elementwise': (L * D * D, 100),
  'table1:g1_headwise': (L * D * H, 1.6),
  'table1:g2_headwise': (L * D * G, 0.2),
  'table1:g1_shared': (L * D * H * K, 201),
  'table1:g2_shared': (L * D * G * K, 25),
  'table1:g1_additive': (L * D * H * K, 201),
  'table1:g1_silu': (L * D * H * K, 201),
  'table3:baseline': (0, None),
  'table3:g1_elementwise': (L * D * H * K, None),
  'table3:g2_elementwise': (L * D * G * K, None),
  'table3:g1_additive': (L * D * H * K, None),
  'table3:sdpa_rmsnorm': (L * H * K, None),
  'table3:sdpa_silu': (0, None),
  'table3:g1_additive_identity': (L * D * H * K, None),
  'table4:baseline': (0, None),
  'table4:g1_elementwise': (L * D * H * K, None),
  'table4:g1_headwise': (L * D * H, None),
  'table4:g1_shared': (L * D * H * K, None),
  'table4:g2_elementwise': (L * D * G * K, None),
  'table4:input_independent': (L * H * K, None),
  'table4:ns_sigmoid': (L * D * H * K, None),
  'table6:baseline': (0, None),
  # All experts but one, and a router; what the paper prints is far less.
  'table6:switch_kv_8top8': (L * 2 * (7 * D * G * K + D * G * 8), 38),
  'table6:switch_kv_4top4': (L * 2 * (3 * D * G * K + D * G * 4), 13),
  'table6:switch_v_4top4': (L * (3 * D * G * K + D * G * 4), 13),
  'table6:switch_v_8top2': (L * (7 * D * G * K + D * G * 8), 25),
  'table6:switch_v_1top1': (L * D * G, 3),
}


def recipe(row, scale='paper', **more):
  name, _, argument = row.partition(':')
  argument = ','.join(
    [argument, f'scale={scale}', *(f'{k}={v}' for k, v in more.items())]
  )
  return TABLES[name].get_config(argument).to_dict()


def build(c):
  return config.build(plan.Config, c, 'config')


def parameters(c):
  return model.count(model.abstract(build(c).model))


def test_every_row_of_every_table_is_there():
  sizes = {name: len(table.ROWS) for name, table in TABLES.items()}
  # Table 2 has 14, and appendix A.6 two more.
  assert sizes == {'table1': 15, 'table2': 16, 'table3': 7, 'table4': 7, 'table6': 6}


@pytest.mark.parametrize('scale', rows.SCALES)
@pytest.mark.parametrize('row', ROWS)
def test_a_row_builds_at_every_scale_and_says_which_it_is(row, scale):
  c = recipe(row, scale)
  cfg = build(c)
  name, _, which = row.partition(':')
  assert (cfg.paper.table, cfg.paper.row) == (name, which)
  assert cfg.paper.assumed
  assert math.prod((cfg.model.attn.heads, cfg.model.attn.head_dim)) >= cfg.model.width
  # The baseline is a recipe of the same scale, and its own baseline.
  file, _, argument = cfg.paper.baseline.partition('.py:')
  first = importlib.import_module(f'configs.{file}').get_config(argument)
  assert first.paper.baseline == cfg.paper.baseline
  assert argument.endswith(f'scale={scale}')
  if scale == 'paper' and name != 'table2':
    printed = ADDED[row][1]
    assert cfg.paper.added == (-1 if printed is None else printed)
  else:
    assert cfg.paper.added == -1


@pytest.mark.slow
@pytest.mark.parametrize('row', ADDED)
def test_a_row_adds_exactly_the_parameters_of_its_formula(row):
  name = row.partition(':')[0]
  added = parameters(recipe(row)) - parameters(recipe(f'{name}:baseline'))
  assert added == ADDED[row][0]


def test_the_formulas_are_the_papers_numbers_where_those_are_consistent():
  close = {row: printed for row, (_, printed) in ADDED.items() if printed}
  apart = {row for row in close if row.startswith('table6')} | {'table1:plus4_experts'}
  for row in close.keys() - apart:
    added, printed = ADDED[row]
    # The paper cuts off what comes after its last digit, or rounds it.
    assert abs(added / 1e6 - printed) < (1 if printed >= 10 else 0.05), row


def test_table_7_has_15_58_billion_parameters_of_which_a_token_meets_1_99():
  counts = model.parts(build(moe_15b.get_config().to_dict()).model)
  assert round(counts['total'] / 1e9, 2) == 15.58
  assert round(counts['active'] / 1e9, 2) == 1.99
  idle = L * 120 * 3 * D * F
  assert counts['total'] - counts['active'] == idle
  assert counts['embedding'] == 2 * 151_936 * D
  assert counts['gate'] == 0


@pytest.mark.parametrize('scale', rows.SCALES)
def test_the_mixture_keeps_table_7s_ratios_at_every_scale(scale):
  m = moe_15b.at(scale).model
  assert m.attn.heads * m.attn.head_dim == 2 * m.width
  assert m.attn.heads == 8 * m.attn.kv_heads
  assert m.ffn * 8 == 3 * m.width
  assert not m.tied


def test_rows_scale_with_the_model_they_change():
  for scale, k8, q48, experts in (
    ('paper', 8, 48, (132, 12)),
    ('proxy', 4, 24, (132, 12)),
    ('test', 4, 24, (20, 6)),
  ):
    assert recipe('table1:k8', scale)['model']['attn']['kv_heads'] == k8
    assert recipe('table1:q48', scale)['model']['attn']['heads'] == q48
    moe = recipe('table1:plus4_experts', scale)['model']['moe']
    assert (moe['experts'], moe['top_k']) == experts


@pytest.mark.parametrize(
  ('row', 'exact', 'rounded', 'kept'),
  [
    ('table2:28l_4e-3_elementwise', 5461, 5504, 6144),
    ('table2:48l_8e-3_elementwise', 3925, 3968, 4608),
    ('table2:48l_4e-3_headwise', 4603, 4608, 4608),
    ('table2:48l_8e-3_baseline', 4608, 4608, 4608),
  ],
)
def test_a_dense_gates_parameters_are_taken_from_the_ffn(row, exact, rounded, kept):
  sizes = {m: recipe(row, match=m)['model']['ffn'] for m in table2.MATCHES}
  assert sizes == {'exact': exact, '128': rounded, 'none': kept}
  setting = row.rpartition('_')[0]
  ours, baseline = parameters(recipe(row)), parameters(recipe(f'{setting}_baseline'))
  m = recipe(row)['model']
  # Half an FFN channel in each layer, at most.
  assert abs(ours - baseline) <= m['depth'] * 3 * m['width'] / 2


def test_table_2_trains_as_long_and_as_fast_as_the_paper():
  knobs = {
    row: (c['optim']['lr'], c['batch'], c['steps'])
    for row in ('28l_4e-3', '28l_3.5t_4.5e-3', '48l_8e-3', '48l_1t_5.3e-3')
    for c in [recipe(f'table2:{row}_baseline')]
  }
  assert knobs == {
    '28l_4e-3': (4e-3, 1024, 95_367),
    '28l_3.5t_4.5e-3': (4.5e-3, 2048, 417_233),
    '48l_8e-3': (8e-3, 1024, 95_367),
    '48l_1t_5.3e-3': (5.3e-3, 4096, 59_605),
  }
  # A smaller model has the same rates, and batches and steps in the same proportion.
  small = recipe('table2:48l_1t_5.3e-3_baseline', 'proxy')
  assert (small['optim']['lr'], small['batch'], small['steps']) == (5.3e-3, 32, 12_500)
  for row in table2.ROWS:
    assert (
      recipe(f'table2:{row}', 'test')['optim']['lr']
      == table2.SETTINGS[row.rpartition('_')[0]][1]
    )


@pytest.mark.parametrize(
  ('row', 'published'),
  [
    ('table1:g1_headwise', dict(ppl=5.792, mmlu=60.05, ceval=62.61)),
    ('table1:plus4_experts', dict(ppl=5.964, hellaswag=73.19, ceval=63.19)),
    ('table2:48l_8e-3_sandwich', dict(ppl=7.407, humaneval=30.49, max_lr=8e-3)),
    ('table2:48l_1t_8e-3_elementwise', dict(ppl=7.078, cmmlu=55.77)),
    ('table3:sdpa_rmsnorm', dict(ppl=5.847, gsm8k=53.75)),
    ('table4:input_independent', dict(gate_score=0.335, m_act=471, f_attn=0.364)),
    ('table4:baseline', dict(m_act=1053, f_attn=0.467, ppl=6.026)),
    ('table6:switch_v_8top2', dict(ppl=5.870, hellaswag=74.17)),
  ],
)
def test_a_row_holds_the_printed_results(row, published):
  printed = build(recipe(row)).paper.published
  assert printed | published == printed
  # Values that the paper does not print are absent.
  assert 'gate_score' not in build(recipe('table4:baseline')).paper.published
  assert set(build(recipe('table2:48l_1t_8e-3_baseline')).paper.published) == {'max_lr'}


def test_a_row_names_choices_that_the_paper_leaves_open():
  assumed = build(recipe('table1:plus4_experts')).paper.assumed
  assert any('inferred' in text for text in assumed)
  assert not any('inferred' in text for text in recipe('table1:k8')['paper']['assumed'])
  assert any(
    'sandwich' in t for t in recipe('table2:48l_8e-3_sandwich')['paper']['assumed']
  )
  assert any('ours' in t for t in recipe('table1:k8', 'proxy')['paper']['assumed'])


@pytest.mark.parametrize(
  ('get_config', 'argument', 'message'),
  [
    (
      table1.get_config,
      'g6',
      r"'g6': allowed are baseline, k8, .*, g1_silu, scale=paper",
    ),
    (table1.get_config, 'k8,scale=huge', 'scale=paper, scale=proxy, scale=test'),
    (table2.get_config, '48l', r'28l_4e-3_baseline, .*48l_8e-3_sandwich.*, match=none'),
    (moe_15b.get_config, 'g1', 'gate=none, gate=headwise, gate=elementwise, scale=paper'),
    (dense_1b7.get_config, '12l', '28l, 48l, gate=none'),
  ],
)
def test_a_row_that_does_not_exist_lists_those_that_do(get_config, argument, message):
  with pytest.raises(ValueError, match=message):
    get_config(argument)


def test_long_context_continues_the_model_that_it_starts():
  for scale in rows.SCALES:
    for variant in ('baseline', 'elementwise'):
      start, extended = (
        build(long_context.get_config(f'{variant},stage={s},scale={scale}').to_dict())
        for s in ('start', 'extend')
      )
      differ = config.differences(
        *({'model': dataclasses.asdict(c.model)} for c in (start, extended))
      )
      knobs = {'config.model.attn.rope_base': (1e4, 1e6)}
      assert {k: v for k, v in differ.items() if 'max_segments' not in k} == knobs
      assert extended.data.length >= 4 * start.data.length
      assert extended.paper.assumed[: len(start.paper.assumed)] == start.paper.assumed
  paper = long_context.get_config('elementwise,scale=paper')
  assert paper.steps * paper.batch * paper.data.length == pytest.approx(80e9, rel=1e-4)
  assert paper.model.ffn == table2.get_config('28l_3.5t_4.5e-3_elementwise').model.ffn


def test_an_unnamed_row_is_the_baseline():
  for table in TABLES.values():
    assert table.get_config().paper.row == next(iter(table.ROWS))
    assert table.get_config().name.endswith('baseline-paper')


def test_the_scales_are_the_same_everywhere():
  assert rows.SCALES.keys() == moe_15b.SCALES.keys() == dense_1b7.SCALES.keys()
  assert base.get_config().paper.table == ''


@pytest.mark.parametrize(
  'row',
  [
    'table1:plus4_experts',
    'table2:48l_8e-3_sandwich',
    'table3:sdpa_rmsnorm',
    'table6:switch_v_1top1',
  ],
)
@pytest.mark.full
def test_a_row_learns_and_resumes_exactly(row, tmp_path):
  result = trained.train(recipe(row, 'test'), tmp_path)
  assert result.drop >= trained.DROP, result.losses
  assert result.exact


def test_rows_are_chosen_by_table_or_by_name():
  assert len(trained.recipes([])) == len(ROWS)
  assert len(trained.recipes(['table6'])) == 6
  assert list(trained.recipes(['table1:k8'])) == ['table1:k8']
  with pytest.raises(ValueError, match=r'--only=table5 is neither .*did you mean table'):
    trained.recipes(['table5'])


def count(run_python, *flags):
  return run_python(['scripts/preflight.py', *flags])


@pytest.mark.slow
def test_preflight_counts_a_row_and_ends_in_json(run_python):
  row = '--config=configs/table1.py:g1_headwise'
  done = count(run_python, row, '--count')
  assert done.returncode == 0, done.stderr
  counts = json.loads(done.stdout.splitlines()[-1])
  assert set(counts) == {
    *('total', 'active', 'embedding', 'attention', 'gate', 'gates', 'experts'),
    *('added', 'paper_added', 'flops_per_token'),
  }
  assert counts['added'] == counts['gate'] == L * D * H
  assert counts['gates'] == {f'sdpa x {L}': L * D * H}
  assert counts['paper_added'] == 1_600_000
  assert counts['experts'] == L * 128 * 3 * D * F
  assert counts['total'] == parameters(recipe('table1:g1_headwise'))
  assert 'over table1.py:baseline,scale=paper' in done.stdout


@pytest.mark.slow
def test_preflight_takes_knobs_as_training_does(run_python):
  row = '--config=configs/table4.py:baseline,scale=test'
  done = count(run_python, row, '--config.model.depth=3', '--count')
  counts = json.loads(done.stdout.splitlines()[-1])
  assert counts['paper_added'] is None
  # Over the baseline as it stands in its file: a layer more.
  assert counts['added'] == counts['total'] - parameters(
    recipe('table4:baseline', 'test')
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config=configs/table1.py:k9', '--count'], "recipe argument 'k9': allowed are"),
    (['--config=configs/table5.py', '--count'], 'configs/table1.py'),
    (['--config=configs/table1.py', '--config.model.dept=3', '--count'], 'model.depth?'),
    (['--config=configs/table1.py'], '--count is missing'),
    (['--count'], '--config=configs/RECIPE.py is missing'),
  ],
)
@pytest.mark.full
def test_preflight_refuses_in_one_line(flags, message, run_python):
  done = count(run_python, *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
