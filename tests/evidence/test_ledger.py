"""The ledger: which results are compared, and what they decide."""

import importlib
import math

import numpy as np
import pytest
from made import ARMS, OWN, SHARED, get, grid, made, probes, put, recipe, row
from scipy import stats

from configs import table1, table2, table3, table4, table6
from gated import config
from gated.evidence import arms, contrast, ledger
from gated.evidence.claims import CLAIMS
from gated.evidence.result import PLACES

script = importlib.import_module('scripts.claims')

MATCHED = dict(knobs={'model__ffn': 1408}, parameters=62_000_000)
PAIRED = [-(2 * own) for own in OWN]  # elementwise minus baseline, beside their means


def gate(**more):
  return grid('elementwise', **{'loss': 1.36, **MATCHED, **more})


# --- Which models are compared ---


def tampered(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  return [*value, 'x'] if isinstance(value, (list, tuple)) else f'{value}x'


def kept_apart(knob, arm):
  """Whether a change of one knob gives another setting or another arm."""
  old, new = recipe(arm), recipe(arm)
  put(new, knob, tampered(get(new, knob)))
  return config.digest(arms.split(old)) != config.digest(arms.split(new))


def test_two_different_models_never_share_an_arm():
  knobs = [k.removeprefix('config.') for k in config.flatten(recipe('elementwise'))]
  merged = {k for k in knobs if not kept_apart(k, 'elementwise')}
  places = {k for k in knobs if any(f'{k}.'.startswith(f'{p}.') for p in PLACES)}
  unused = {'attn.gate.mean', 'attn.gate.place', 'attn.sink_values', 'norm_rank'}
  unused |= {'attn.switch.experts', 'attn.switch.top_k', 'attn.clip_gamma'}
  unused |= {'attn.clip_zeta', 'attn.elastic_tau', 'norm_alpha'}
  assert merged - places == {
    *('optim.lr', 'optim.weight_decay', 'seed'),
    *(f'model.{k}' for k in unused),
  }


@pytest.mark.parametrize(
  ('knob', 'arm'),
  [
    ('attn.gate.mean', 'shared'),
    ('attn.gate.place', 'g3'),
    ('attn.gate.place', 'g4'),
    ('attn.sink_values', 'sink_token'),
    ('attn.switch.experts', 'switch_v_1top1'),
    ('attn.switch.top_k', 'switch_v_4top4'),
    ('attn.elastic_tau', 'elastic'),
    ('norm_alpha', 'dyt'),
  ],
)
def test_a_knob_that_a_model_uses_makes_another_arm(knob, arm):
  assert kept_apart(f'model.{knob}', arm)
  if 'gate' in knob:
    assert not kept_apart(f'model.{knob}', 'baseline')


TABLES = {
  table1: {
    'baseline': 'baseline',
    'k8': 'kv_heads_x2',
    'q48': 'heads_x1.5',
    'plus4_experts': 'experts_plus_4',
    'g1_elementwise': 'elementwise',
    'g2_elementwise': 'g2',
    'g3_elementwise': 'g3',
    'g4_elementwise': 'g4',
    'g5_elementwise': 'g5',
    'g1_headwise': 'headwise',
    'g1_shared': 'shared',
    'g1_additive': 'additive_silu',
    'g1_silu': 'multiplicative_silu',
    'g2_headwise': None,
  },
  table3: {
    'sdpa_rmsnorm': 'sdpa_rmsnorm',
    'sdpa_silu': 'sdpa_silu',
    'g1_additive_identity': 'additive_identity',
  },
  table4: {'input_independent': 'input_independent', 'ns_sigmoid': 'ns_sigmoid'},
  table6: {
    'switch_v_1top1': 'switch_v_1top1',
    'switch_v_4top4': 'switch_v_4top4',
    'switch_v_8top2': 'switch_v_8top2',
    'switch_kv_4top4': None,
  },
  table2: {
    '48l_8e-3_baseline': 'baseline',
    '48l_8e-3_elementwise': 'elementwise',  # Its FFN is narrower.
    '48l_4e-3_headwise': 'headwise',
    '48l_8e-3_sandwich': 'sandwich',
    '48l_8e-3_clip300': 'clip300',
    '48l_8e-3_clip100': 'clip100',
  },
}


@pytest.mark.parametrize('table', TABLES, ids=lambda table: table.__name__)
def test_each_row_of_the_papers_tables_is_its_arm_and_no_other(table):
  at = lambda name: table.get_config(f'{name},scale=proxy').to_dict()
  base = at('48l_8e-3_baseline' if table is table2 else 'baseline')
  for name, expected in TABLES[table].items():
    results = [made(), made(seed=1)]
    results[0].config.clear()
    results[0].config.update(base)
    results[1].config.clear()
    results[1].config.update(at(name))
    [place] = arms.settings([r for r in results if r.config])
    plain, other = place.arms[0], place.arms[-1]
    assert [a for a in ARMS if other.like(a, plain)] == ([expected] if expected else [])


def test_a_baseline_with_a_narrow_ffn_is_no_baseline_of_larger_models():
  results = [made(), made(knobs={'model__ffn': 1408}), made('kv_heads_x2')]
  [place] = arms.settings(results)
  chosen = place.choose(['kv_heads_x2'])
  assert chosen['baseline'].sizes['ffn'] == 1536 and 'kv_heads_x2' in chosen


def test_arms_of_another_setting_are_not_compared():
  for knobs in ({'model__depth': 17}, {'steps': 17}, {'model__attn__qk_norm': False}):
    other = gate(knobs=MATCHED['knobs'] | knobs)
    assert row('C1', grid() + other).reason == 'no results of elementwise'
  other = row('C1', grid() + gate(data='beef'))
  assert (other.status, other.reason) == ('open', 'no results of elementwise')


def test_of_two_models_of_an_arm_the_nearest_in_parameters_is_compared():
  wide = gate(loss=1.0, knobs={}, parameters=65_700_000)
  [verdict] = row('C1', grid() + wide + gate()).verdicts
  assert verdict.estimate.value == pytest.approx(-0.04)


def test_a_gate_with_more_parameters_leaves_the_claim_of_equal_parameters_open():
  ledger_row = row('C1', grid() + gate(knobs={}, parameters=65_700_000))
  assert ledger_row.status == 'open' and '+7.7% parameters' in ledger_row.reason


def test_knobs_added_since_have_their_defaults():
  old = gate()
  for r in old:
    del r.config['model']['attn']['window'], r.config['optim']['qk_clip']
  assert row('C1', grid() + old).status == 'supported'


# --- Statuses ---


def test_a_lower_loss_beyond_the_noise_supports_the_claim():
  ledger_row = row('C1', grid() + gate())
  [verdict] = ledger_row.verdicts
  differences = np.array(PAIRED) - 0.04
  expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
  assert ledger_row.status == 'supported' and ledger_row.reason == ''
  assert verdict.estimate == pytest.approx((-0.04, *expected))
  assert verdict.seeds == (3, 3)


def test_a_higher_loss_contradicts_the_claim():
  assert row('C1', grid() + gate(loss=1.48)).status == 'contradicted'


def test_a_difference_within_the_noise_floor_is_undecided_though_its_interval_is_not():
  ledger_row = row('C1', grid() + gate(loss=1.38))
  [verdict] = ledger_row.verdicts
  # The seeds' shared noise cancels in the pairs, and stays in the floor.
  both = [np.array(SHARED) + s * np.array(OWN) for s in (1, -1)]
  std = math.sqrt(np.mean([x.var(ddof=1) for x in both]))
  assert verdict.floor == pytest.approx(stats.t.ppf(0.975, 4) * std * math.sqrt(2 / 3))
  assert verdict.estimate.high < 0 and 0.02 < verdict.floor < 0.05
  assert (ledger_row.status, ledger_row.reason) == ('undecided', 'within the noise floor')


def test_an_interval_that_holds_the_bound_is_undecided():
  assert contrast.decide((-0.1, -0.3, 0.1), '<', 0.0, floor=0.01) == 'undecided'
  assert contrast.decide((-0.1, -0.15, -0.05), '<', 0.0, floor=0.01) == 'supported'
  assert contrast.decide((-0.1, -0.15, -0.05), '>', 0.0, floor=0.01) == 'contradicted'
  assert contrast.decide((-0.1, -0.15, -0.05), '<', 0.0, floor=0.2) == 'undecided'


def test_no_change_is_supported_only_where_a_change_would_have_shown():
  assert contrast.decide((0.001, -0.004, 0.006), '=', 0.01, floor=0.005) == 'supported'
  assert contrast.decide((0.001, -0.004, 0.006), '=', 0.01, floor=0.02) == 'undecided'
  assert contrast.decide((0.001, -0.004, 0.012), '=', 0.01, floor=0.005) == 'undecided'
  assert contrast.decide((0.03, 0.02, 0.04), '=', 0.01, floor=0.005) == 'contradicted'
  assert contrast.decide((-0.03, -0.04, -0.02), '=', 0.01, floor=0.005) == 'contradicted'


@pytest.mark.parametrize('loss', [1.2, 1.6])
@pytest.mark.parametrize('seeds', [(0,), (0, 1)])
def test_fewer_than_three_seeds_decide_nothing(seeds, loss):
  ledger_row = row('C1', grid() + gate(loss=loss, seeds=seeds))
  assert ledger_row.status == 'open' and f'{len(seeds)} of 3 seeds' in ledger_row.reason
  assert ledger_row.verdicts[0].estimate.value == pytest.approx(loss - 1.4, abs=0.003)
  assert row('C1', grid(seeds=seeds) + gate(loss=loss)).status == 'open'


def test_the_same_run_in_two_experiments_is_one_seed():
  twice = [gate(seeds=(0, 1), experiment=name) for name in ('made', 'again')]
  serves = {'made': ('C1',), 'again': ('C1',)}
  assert '2 of 3 seeds' in row('C1', grid() + twice[0] + twice[1], serves).reason


@pytest.mark.parametrize(
  ('dropped', 'words'), [('lr', 'learning rates'), ('weight_decay', 'weight decays')]
)
def test_an_arm_that_was_not_tuned_decides_nothing(dropped, words):
  best = {'lr': 4e-3, 'weight_decay': 0.5}[dropped]
  untuned = [r for r in gate() if r.config['optim'][dropped] == best]
  ledger_row = row('C1', grid() + untuned)
  assert ledger_row.status == 'open'
  assert ledger_row.reason == f'elementwise is not tuned: fewer than 2 {words}'


def test_results_of_test_scale_and_of_other_experiments_never_count():
  for fields in ({'scale': 'test'}, {'experiment': 'other'}):
    ledger_row = row('C1', grid(**fields) + gate(**fields))
    assert (ledger_row.status, ledger_row.reason) == ('open', 'no results')
  assert row('C1', grid() + gate(), {'made': ('C2',)}).reason == 'no results'


def test_an_experiment_that_serves_an_unknown_claim_is_refused():
  with pytest.raises(ValueError, match=r"experiments/made has 'C26'.*C1 to C25"):
    ledger.rows([], {'made': ('C26',)})


# --- Best cells, diverged runs, and pairs ---


def test_each_arm_is_compared_at_its_own_best_rate_and_decay():
  ledger_row = row('C1', grid(best=(2e-3, 0.1)) + gate(best=(4e-3, 0.5)))
  [verdict] = ledger_row.verdicts
  best = {name: arm.best for name, arm in verdict.arms.items()}
  assert best == {'baseline': (2e-3, 0.1), 'elementwise': (4e-3, 0.5)}
  assert verdict.estimate.value == pytest.approx(-0.04)
  # At the gate's best cell alone the difference would be -0.09.
  assert ledger_row.status == 'supported'


def test_cells_are_ranked_on_the_seeds_that_all_of_them_have():
  results = [made(lr=2e-3, loss=1.40), made(lr=4e-3, loss=1.39)]
  results += [made(lr=4e-3, loss=1.45, seed=1), made(lr=4e-3, loss=1.46, seed=2)]
  [place] = arms.settings(results)
  assert place.arms[0].best == (4e-3, 0.5)


def test_a_cell_with_a_diverged_seed_is_not_the_best():
  broken = [r for r in gate() if r.config['seed'] != 2]
  broken.append(made('elementwise', seed=2, loss=math.nan, **MATCHED))
  broken.append(made('elementwise', lr=2e-3, decay=0.3, loss=1.37, **MATCHED))
  [verdict] = row('C1', grid() + broken).verdicts
  assert verdict.arms['elementwise'].best == (2e-3, 0.3)
  assert 'diverged' in ledger.page([row('C1', grid() + broken)])


def test_an_arm_that_diverged_everywhere_leaves_the_claim_open():
  ledger_row = row('C1', grid(loss=math.nan) + gate())
  assert ledger_row.status == 'open'
  assert ledger_row.reason == 'baseline: diverged at every learning rate that was tried'


def test_arms_without_common_seeds_have_welchs_interval():
  x = {0: 1.40, 1: 1.42, 2: 1.38}
  y = {3: 1.30, 4: 1.35, 5: 1.31, 6: 1.33}
  means = contrast.Means({'x': x, 'y': y})
  test = stats.ttest_ind([*x.values()], [*y.values()], equal_var=False)
  expected = test.confidence_interval(0.95)
  assert not means.paired
  assert means.sum({'x': 1, 'y': -1})[1:] == pytest.approx((expected.low, expected.high))


def test_arms_with_common_seeds_are_paired_and_other_seeds_are_left_out():
  x, y = {0: 1.0, 1: 2.0, 2: 4.0, 9: 50.0}, {2: 3.5, 1: 1.8, 0: 0.9}
  expected = stats.ttest_rel([1.0, 2.0, 4.0], [0.9, 1.8, 3.5]).confidence_interval(0.95)
  sum_ = contrast.Means({'x': x, 'y': y}).sum({'x': 1, 'y': -1})
  assert sum_[1:] == pytest.approx((expected.low, expected.high))


def test_fiellers_interval_ends_where_the_sum_of_both_may_be_zero():
  samples = {'a': {0: 1.0, 1: 1.1, 2: 0.8, 3: 1.2}, 'b': {0: 2.1, 1: 2.0, 2: 1.9, 3: 2.4}}
  means = contrast.Means(samples)
  value, low, high = means.ratio({'a': 1}, {'b': 1})
  assert value == pytest.approx(4.1 / 8.4) and low < value < high
  for r, end in ((low, 'low'), (high, 'high')):
    assert getattr(means.sum({'a': 1, 'b': -r}), end) == pytest.approx(0, abs=1e-9)
  unknown = contrast.Means({'a': samples['a'], 'b': {0: -1.0, 1: 1.0, 2: 0.5, 3: 0.1}})
  assert unknown.ratio({'a': 1}, {'b': 1})[1:] == (-math.inf, math.inf)


# --- Claims ---


def test_a_share_of_the_gain_is_a_ratio_of_differences():
  ledger_row = row('C3', grid() + gate(loss=1.1) + grid('headwise', loss=1.16))
  assert ledger_row.status == 'supported'
  assert ledger_row.verdicts[0].estimate.value == pytest.approx(0.8)
  less = row('C3', grid() + gate(loss=1.1) + grid('headwise', loss=1.34))
  assert less.status == 'contradicted'


def test_without_a_gain_beyond_the_noise_there_is_nothing_to_share():
  ledger_row = row('C3', grid() + gate(loss=1.40) + grid('headwise', loss=1.32))
  assert ledger_row.status == 'undecided'
  assert ledger_row.reason == 'the denominator is within its noise'
  ledger_row = row('C3', grid() + gate(loss=1.50) + grid('headwise', loss=1.32))
  assert ledger_row.status == 'open' and 'no gain to share' in ledger_row.reason


@pytest.mark.parametrize(
  ('baseline', 'knobs'),
  [
    (dict(sink=0.14), {}),
    (dict(f_attn=0.04), {}),
    ({}, {'data__length': 512}),
    # Without masks the sink is the row's first token, to which the probes give 0.02.
    ({}, {'model__mask_documents': False}),
  ],
)
def test_a_baseline_without_a_sink_leaves_the_claim_on_sinks_open(baseline, knobs):
  own = MATCHED['knobs'] | knobs
  gated = gate(knobs=own, probes=probes(f_attn=0.01, sink=0.01))
  ledger_row = row('C9', grid(knobs=knobs, probes=probes(**baseline)) + gated)
  assert ledger_row.status == 'open'
  assert 'the baseline has no sink' in ledger_row.reason


@pytest.mark.parametrize(
  ('f_attn', 'sink', 'status'),
  [
    (0.01, 0.0, 'supported'),
    (0.1, 0.0, 'contradicted'),
    (0.01, 0.2, 'contradicted'),
  ],
)
def test_the_claim_on_sinks_asks_for_both_measures(f_attn, sink, status):
  ledger_row = row('C9', grid() + gate(probes=probes(f_attn=f_attn, sink=sink)))
  assert ledger_row.status == status
  assert ledger_row.verdicts[0].estimate.value == pytest.approx(math.log(f_attn / 0.2))
  assert ledger_row.verdicts[0].figure.startswith(f'{f_attn / 0.2:.3g} [')


def test_results_without_probes_leave_the_claim_open():
  first, second = row('C10', grid() + gate(probes={})).reason.split('; ')
  assert first == 'elementwise: no result holds its M-Act'
  assert second.startswith('elementwise: no result holds its kurtosis')


def test_spikes_are_counted_at_the_baselines_best_cell():
  rest = dict(best=(2e-3, 0.1), spikes=5.0)
  at_cell = [
    made('elementwise', seed=s, loss=1.5, spikes=0.01, **MATCHED) for s in (1, 2)
  ]
  gated = [r for r in gate(**rest) if r.config['optim']['lr'] != 4e-3] + at_cell
  gated += [made('elementwise', seed=0, loss=1.5, spikes=0.01, **MATCHED)]
  ledger_row = row('C15', grid(spikes=2.0) + gated)
  assert ledger_row.status == 'supported'
  assert ledger_row.verdicts[0].estimate.value == pytest.approx(0.005)
  calm = row('C15', grid() + gated)
  assert calm.status == 'open' and 'no spike to remove' in calm.reason


def swept(arm, losses, **more):
  """Losses at 2e-3, 4e-3, 8e-3 and so on, for all seeds, and a worse weight decay."""
  rates = [2e-3 * 2**i for i in range(len(losses))]
  runs = [
    made(arm, lr=lr, seed=s, loss=loss + SHARED[s] / 100, **more)
    for lr, loss in zip(rates, losses)
    for s in range(3)
  ]
  return [*runs, made(arm, decay=0.1, loss=1.9, **more)]


def test_a_ratio_of_nothing_to_nothing_is_no_figure():
  [verdict] = row('C15', grid() + gate()).verdicts
  assert (verdict.status, verdict.figure) == ('open', '–')
  assert 'no spike to remove' in verdict.reason


def test_a_diverged_run_counts_as_uniform_predictions_in_sensitivity():
  losses = {'baseline': [1.5, 1.4, math.nan], 'elementwise': [1.5, 1.4, 1.41]}
  results = [r for arm, own in losses.items() for r in swept(arm, own)]
  ledger_row = row('C16', results)
  uniform = math.log(results[0].config['model']['vocab'])
  first, second = ledger_row.verdicts
  assert first.estimate.value == pytest.approx((uniform - 1.41) / 3, rel=1e-3)
  assert second.estimate.value == pytest.approx(uniform - 1.4 - 0.01, rel=1e-3)
  assert ledger_row.status == 'supported'


def test_sensitivity_needs_three_common_learning_rates():
  results = swept('baseline', [1.4, 1.5]) + swept('elementwise', [1.4, 1.41, 1.42])
  assert 'share 2 learning rates, and sensitivity needs 3' in row('C16', results).reason


def test_without_an_instability_there_is_nothing_that_clipping_could_remove():
  names = 'baseline', 'clip300', 'clip100'
  calm = [r for name in names for r in swept(name, [1.42, 1.4, 1.41])]
  assert 'nothing to stabilise' in row('C18', calm).reason
  wild = [r for name in names for r in swept(name, [1.42, 1.4, math.nan])]
  assert row('C18', wild).status == 'supported'


def test_the_gain_is_compared_between_settings_that_differ_in_one_knob():
  deep, own = {'model__depth': 36}, MATCHED['knobs']
  results = grid() + gate(loss=1.38)
  results += grid(loss=1.3, knobs=deep) + gate(loss=1.2, knobs=own | deep)
  first, second = row('C19', results).verdicts
  assert first.estimate.value == pytest.approx(-0.1 + 0.02) and first.seeds == (3,) * 4
  assert first.status == 'supported'
  assert second.reason == 'no two settings differ in steps alone'
  assert row('C19', results).status == 'open'


def test_onsets_of_sink_and_activations_are_compared_by_layer():
  [near] = row('C13', grid(probes=probes(onset=5))).verdicts
  assert near.status == 'supported' and near.estimate.value == 1
  apart = probes(onset=5)
  apart['points'] = probes(onset=10)['points']
  [far] = row('C13', grid(probes=apart)).verdicts
  assert far.status == 'contradicted' and far.estimate.value == 4


def test_a_gate_counts_as_attached_only_in_continued_training():
  results = grid() + grid('attached')
  assert row('C21', results).reason == 'no run continues another one'
  knobs = {'init_from': 'trained'}
  quiet = [r for name in ('baseline', 'attached') for r in swept(name, [1.5, 1.4, 1.6])]
  for r in quiet:
    r.config['init_from'] = 'trained'
  assert row('C21', quiet).status == 'supported'
  assert row('C1', quiet).reason == 'no results'
  assert row(
    'C21', grid(knobs=knobs) + grid('attached', loss=1.3, knobs=knobs)
  ).status == ('contradicted')


# A world like the paper's: the loss, gate score, F-Attn and M-Act of each arm.
WORLD = {
  'baseline': (1.400, None, 0.467, 1053),
  'elementwise': (1.355, 0.116, 0.048, 94),
  'headwise': (1.3604, 0.172, 0.073, 98),
  'shared': (1.38, 0.271, 0.301, 286),
  'g2': (1.365, 0.221, 0.297, 125),
  'g3': (1.398, 0.3, 0.4, 900),
  'g4': (1.3925, 0.3, 0.4, 900),
  'g5': (1.3985, 0.3, 0.4, 900),
  'input_independent': (1.382, 0.335, 0.364, 471),
  'ns_sigmoid': (1.38, 0.653, 0.451, 892),
  'switch_v_1top1': (1.3632, None, 0.3, 125),
  'switch_v_4top4': (1.3652, None, 0.3, 125),
  'switch_v_8top2': (1.3738, None, 0.3, 125),
}
REST = (1.385, None, 0.4, 900)
NO_GAIN = {'sandwich': 1.3998, 'attached': 1.4}


def world(indifferent=False):
  """All arms, in all settings that claims compare, with little noise."""
  settings = {}, {'model__depth': 36}, {'steps': 40_000}
  settings += ({'model__numerics__compute': 'float32'}, {'init_from': 'trained'})
  settings += ({'model__moe__experts': 16},)
  for arm in ARMS:
    for knobs in settings:
      loss, score, f_attn, m_act = WORLD.get(arm, REST)
      loss = NO_GAIN.get(arm, loss)
      if arm in ('elementwise', 'headwise') and (
        'steps' in knobs or 'model__depth' in knobs
      ):
        loss -= 0.05
      if arm == 'attached':
        f_attn, m_act = WORLD['baseline'][2:]
      calm = arm in ('elementwise', 'sandwich') or 'model__numerics__compute' in knobs
      if indifferent:
        loss, f_attn, m_act, calm, score = 1.4, 0.467, 1053, False, score and 0.5
      more = dict(probes=probes(f_attn, f_attn, m_act, score), knobs=knobs)
      more |= dict(spikes=2.0 if arm == 'baseline' or indifferent else 0.0)
      if indifferent and score:
        for limit in ('1e-2', '1e-3'):
          more['probes'][f'output_below_{limit}_scaled'] = {'value': 0.4}
      top = loss + (0.01 if calm else 1.0)
      yield from swept(arm, [loss + 0.02, loss, top], **more)


@pytest.mark.slow
def test_a_world_like_the_papers_supports_every_claim_that_can_be_measured():
  table = ledger.rows([*world()], {'made': [claim.name for claim in CLAIMS]})
  found = {r.claim.name: (r.status, r.reason) for r in table}
  unmeasured = {name for name, (_, reason) in found.items() if 'its measure' in reason}
  assert unmeasured == {'C20', 'C23'}
  rest = {name: status for name, status in found.items() if name not in unmeasured}
  assert rest == dict.fromkeys(rest, ('supported', ''))


@pytest.mark.slow
def test_in_a_world_where_arms_do_not_differ_only_claims_of_no_change_are_supported():
  table = ledger.rows([*world(indifferent=True)], {'made': [c.name for c in CLAIMS]})
  supported = {r.claim.name for r in table if r.status == 'supported'}
  # Clipping changes nothing; sink and activations still begin together.
  assert supported == {'C13', 'C18', 'C21'}
  statuses = {r.claim.name: r.status for r in table}
  assert {n for n, s in statuses.items() if s == 'contradicted'} >= {'C8', 'C9', 'C15'}
  assert statuses['C1'] == 'undecided'


# --- The page ---


def test_the_page_of_claims_is_up_to_date():
  assert script.PAGE.read_text() == ledger.page(script.rows()), 'stale: run `make claims`'


def test_twenty_five_rows_stand_and_are_open_without_results():
  table = ledger.rows([], {})
  assert [r.claim.name for r in table] == [f'C{i}' for i in range(1, 26)]
  assert {r.status for r in table} == {'open'}
  lines = [line for line in ledger.page(table).splitlines() if line.startswith('| C')]
  assert len(lines) == 25
  # Bars inside cells are escaped.
  assert {line.replace(r'\|', '').count('|') for line in lines} == {11}


def test_a_negative_result_stands_in_the_table_and_in_the_evidence():
  text = ledger.page([row('C1', grid() + gate(loss=1.48))])
  [line] = [line for line in text.splitlines() if line.startswith('| C1 ')]
  assert '**contradicted**' in line and '+0.0800 [+0.0750, +0.0850]' in line
  assert '| 3, 3 |' in line and 'campaign.py --minutes=25 made' in line
  assert '1 contradicted' in text and '0 supported' in text
  assert 'best at learning rate 0.004, weight decay 0.5 (seeds 0, 1, 2)' in text


def test_the_largest_decided_setting_stands_for_a_claim_and_all_are_shown():
  more, own = {'steps': 50_000}, MATCHED['knobs']
  results = grid() + gate()
  results += grid(knobs=more) + gate(loss=1.48, knobs=own | more)
  largest = row('C1', results)
  assert largest.status == 'contradicted'
  assert ledger.page([largest]).count('**supported**') == 1
  few = grid(knobs=more) + gate(loss=1.48, knobs=own | more, seeds=(0,))
  assert row('C1', grid() + gate() + few).status == 'supported'


def test_the_script_prints_a_line_for_each_claim(capsys):
  assert script.main(['--status']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == [c.name for c in CLAIMS]


def test_no_two_parts_have_the_same_measurable_form():
  forms = [part.form for claim in CLAIMS for part in claim.parts]
  assert len({*forms}) == len(forms)
