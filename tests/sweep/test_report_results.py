"""The answers of a report: its main table, baseline, paper rows, probes and curves."""

import importlib
import math
import statistics

import numpy as np
import pytest
import scipy.stats
from lab import (
  RATES,
  RULE,
  STEPS,
  described,
  grid,
  judged,
  losses,
  point,
  rows,
  run,
  trained,
)

from configs import table2, table4
from gated import config, model, plan, storage, sweep
from gated.probes.report import SCALARS
from gated.run.metrics import records
from gated.sweep import judge, report
from gated.sweep.report import published, results, tables

CALM = lambda p: ('calm', 2.5)
GATE = 'model.attn.gate.position'


def lines_of(*sweeps):
  return judged(*sweeps)[1]


def section(message: str, heading: str) -> str:
  return message.partition(f'## {heading}')[2].partition('\n## ')[0]


@pytest.mark.slow
def test_every_number_of_the_main_table_follows_from_points_csv(tmp_path):
  seeds = {'baseline': range(4), 'elementwise': range(3), 'stuck': (8, 9)}
  points = [p for v, own in seeds.items() for p in grid([v], seeds=own)]
  level = {'baseline': 2.5, 'elementwise': 2.4, 'stuck': 2.51}

  def noisy(p):
    lr, seed = p.config['optim']['lr'], p.config['seed']
    extra = 20 * abs(lr - (4e-3 if p.labels['variant'] == 'baseline' else 8e-3))
    own = 0.004 * math.sin(7 * seed + len(p.labels['variant']))
    lost = p.labels['variant'] == 'baseline' and lr == 8e-3
    return 'lost' if lost else 'calm', level[p.labels['variant']] + extra + own

  swept = trained(tmp_path, points, noisy, heldout=True)
  batch, lines = judged(swept)
  table = rows(tables.of_points(batch))
  compared = results.baseline(lines, '')
  finals = {}  # line: rate: seed: loss
  for row in table:
    if row['state'] == 'finished':
      own = finals.setdefault(row['line'], {}).setdefault(row['learning_rate'], {})
      own[row['train_seed']] = float(row['final_loss'])
  diverged = {
    (row['line'], row['learning_rate']) for row in table if row['state'] == 'diverged'
  }
  assert diverged == {('baseline', '0.008')}
  cells = [
    [*by_seed.values()]
    for line, rates in finals.items()
    for lr, by_seed in rates.items()
    if (line, lr) not in diverged
  ]
  dof = sum(len(c) - 1 for c in cells)
  pooled = math.sqrt(sum((len(c) - 1) * statistics.variance(c) for c in cells) / dof)
  t = scipy.stats.t.ppf(0.975, dof)
  best = {
    line: min(
      (lr for lr in rates if (line, lr) not in diverged),
      key=lambda lr: statistics.mean(rates[lr].values()),
    )
    for line, rates in finals.items()
  }
  base = finals['baseline'][best['baseline']]
  pairs = {  # The stuck line shares no seed with the baseline.
    'elementwise': [
      finals['elementwise'][best['elementwise']][seed] - base[seed] for seed in '012'
    ]
  }
  shown, paired = results.of_lines(
    lines, compared, judge.noise([c.finals for x in lines for c in x.stable])
  )
  assert paired.std == pytest.approx(statistics.stdev(pairs['elementwise']))
  main = {row['line']: row for row in rows(tables.of_results(shown))}
  sizes = {row['line']: int(row['parameters']) for row in table}
  for line, row in main.items():
    own = finals[line][best[line]]
    runs = [r for r in table if (r['line'], r['learning_rate']) == (line, best[line])]
    assert row['learning_rate'] == best[line] and int(row['seeds']) == len(own)
    assert float(row['loss']) == pytest.approx(statistics.mean(own.values()))
    assert float(row['loss_interval']) == pytest.approx(t * pooled / len(own) ** 0.5)
    assert int(row['parameters']) == sizes[line]
    assert int(row['added']) == sizes[line] - sizes['baseline']
    of_line = [r for r in table if r['line'] == line]
    assert int(row['ended']) == len(of_line)
    assert int(row['diverged']) == sum(r['state'] == 'diverged' for r in of_line)
    assert {row['flops_per_token']} == {r['flops_per_token'] for r in runs}
    speeds = [float(r['tokens_per_second']) for r in runs]
    assert float(row['tokens_per_second']) == statistics.median(speeds)
  assert main['baseline']['difference'] == main['baseline']['verdict'] == ''
  gated, stuck = main['elementwise'], main['stuck']
  each = pairs['elementwise']
  within = scipy.stats.t.ppf(0.975, 2) * statistics.stdev(each) / 3**0.5
  assert gated['pairs'] == '3' and float(gated['difference']) == pytest.approx(
    statistics.mean(each)
  )
  assert float(gated['difference_interval']) == pytest.approx(within)
  assert gated['verdict'] == 'lower' and abs(float(gated['difference'])) > within
  apart = statistics.mean(finals['stuck'][best['stuck']].values()) - statistics.mean(
    base.values()
  )
  within = t * pooled * math.sqrt(1 / 2 + 1 / 4)
  assert stuck['pairs'] == '0' and float(stuck['difference']) == pytest.approx(apart)
  assert float(stuck['difference_interval']) == pytest.approx(within)
  assert stuck['verdict'] == ('higher' if apart > within else 'within the noise')
  # The shown table has the same numbers, rounded.
  text = section(described(swept), 'Results')
  assert f'| {float(gated["difference"]):+.4f} ± ' in text and '| held-out loss |' in text
  assert f'| {int(gated["added"]):+,} |' in text and '| 3 pairs |' in text


def test_parameters_and_flops_are_those_of_the_model(tmp_path):
  swept = trained(tmp_path, grid(['elementwise'], [4e-3], [0]))
  (row,) = rows(tables.of_points(judged(swept)[0]))
  cfg = config.build(plan.Config, swept.points[0].config, 'config')
  assert int(row['parameters']) == model.parts(cfg.model)['total']
  flops = model.flops_per_token(cfg.model, cfg.data.length)
  assert float(row['flops_per_token']) == flops


def test_points_of_different_models_never_share_a_mean(tmp_path):
  # Two folders with equal labels: only their recipes tell them apart.
  ours = [
    trained(
      tmp_path / gate,
      [point({'seed': s, GATE: gate}, seed=str(s)) for s in (0, 1)],
      lambda p: ('calm', 2.5 if p.config['seed'] else 2.4),
    )
    for gate in ('none', 'sdpa')
  ]
  lines = lines_of(*ours)
  assert [(len(x.points), x.seeds) for x in lines] == [(2, [0, 1])] * 2
  assert [x.name for x in lines] == [
    f'base, model.attn.gate.position={gate}' for gate in ('none', 'sdpa')
  ]


def test_knobs_of_the_optimizer_that_follow_the_rate_stay_in_its_line(tmp_path):
  tied = [point({'optim.lr': lr, 'optim.floor': lr / 10}, lr=f'{lr:g}') for lr in RATES]
  (line,) = lines_of(trained(tmp_path / 'tied', tied, CALM))
  assert line.lrs == [*RATES]
  free = [
    point({'optim.lr': lr, 'optim.floor': x}, lr=f'{lr:g}', floor=f'{x:g}')
    for lr in RATES
    for x in (0.0, 1e-4)
  ]
  names = [x.name for x in lines_of(trained(tmp_path / 'free', free, CALM))]
  assert names == ['floor=0', 'floor=0.0001']


def test_one_point_without_a_held_out_loss_makes_all_final_losses_training_losses(
  tmp_path,
):
  points = grid(['baseline'], [4e-3], [0, 1])
  swept = trained(tmp_path, points, CALM, heldout=True)
  assert {p.final_of for p in judged(swept)[0]} == {'heldout'}
  path = swept.workdir(points[1]) / 'metrics.jsonl'
  kept = [r for r in records.read(path) if r['kind'] != 'heldout']
  storage.write(path, b''.join(map(records.line, kept)))
  batch, _ = judged(swept)
  assert {p.final_of for p in batch} == {'train'}
  assert batch[0].final == pytest.approx(np.mean(losses('calm', 2.5, 0)[-10:]))
  message = described(swept)
  assert 'final training loss' in message and '| training loss |' in message
  assert 'held-out' not in message


def test_the_default_baseline_is_the_first_line_without_a_gate(tmp_path):
  swept = trained(tmp_path, grid(['elementwise', 'baseline', 'stuck'], [4e-3], [0]), CALM)
  lines = lines_of(swept)
  assert results.baseline(lines, '').name == 'baseline'
  assert results.baseline(lines, 'variant=elementwise').name == 'elementwise'
  assert results.baseline(lines, 'stuck').name == 'stuck'
  assert 'Differences are to **stuck**' in described(swept, baseline='stuck')
  with pytest.raises(ValueError, match=r'--baseline=best is not a line.*\n  elementwise'):
    results.baseline(lines, 'best')


def test_a_baseline_that_fits_several_lines_is_refused(tmp_path):
  points = [
    point({'model.attn.qk_norm': on, GATE: gate}, qk_norm=str(on), gate=gate)
    for on in (True, False)
    for gate in ('none', 'sdpa')
  ]
  lines = lines_of(trained(tmp_path, points, CALM))
  name = 'qk_norm=False, gate=none'
  assert results.baseline(lines, name).name == name
  with pytest.raises(ValueError, match=r'fits several lines:\n  qk_norm=True, gate=none'):
    results.baseline(lines, 'gate=none')


def test_one_seed_gives_a_difference_but_no_verdict(tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], [4e-3], [0]))
  lines = lines_of(swept)
  shown, _ = results.of_lines(lines, lines[0], judge.noise([]))
  difference = shown[1].difference
  assert difference and difference.verdict == 'noise unknown'
  text = section(described(swept), 'Results')
  assert '± ' not in text and 'claims no ordering' in text


ROWS = ('baseline', 'g1_elementwise', 'g1_headwise', 'g2_elementwise')
# Our gate score, F-Attn and M-Act of these rows.
MEASURED = {
  'baseline': (None, 0.30, 60.0),
  'g1_elementwise': (0.40, 0.10, 20.0),
  'g1_headwise': (0.45, 0.12, 18.0),
  'g2_elementwise': (0.50, 0.20, 40.0),
}


def recipe(word: str):
  """'--config=configs/table4.py:baseline,scale=test' -> its recipe."""
  name, _, arg = word.removeprefix('--config=configs/').partition(':')
  return {'table4.py': table4, 'table2.py': table2}[name].get_config(arg)


def resolve(words):
  return recipe(*words).to_dict()


def row(spec: str, changes=None, **labels: str) -> sweep.Point:
  """'table4.py:baseline,scale=test' -> its point, with changed knobs."""
  command = ('train.py', f'--config=configs/{spec}')
  c = recipe(command[1])
  c.update_from_flattened_dict({'steps': STEPS} | (changes or {}))
  return sweep.Point(
    '-'.join(labels.values()), labels, changes or {}, command, c.to_dict()
  )


def table4_rows(folder, **options) -> sweep.Sweep:
  points = [
    row(f'table4.py:{name},scale=test', {'seed': s}, row=name, seed=str(s))
    for name in ROWS
    for s in (0, 1)
  ]
  level = {name: 2.5 - 0.1 * i for i, name in enumerate(ROWS)}
  names = ('gate_mean', 'first_token_attention', 'm_act')
  measured = lambda p: {
    k: x + 0.02 * p.config['seed']
    for k, x in zip(names, MEASURED[p.labels['row']], strict=True)
    if x is not None
  }
  fate = lambda p: ('calm', level[p.labels['row']])
  return trained(folder, points, fate, probes=measured, **options)


def paper_rows(swept, **more):
  return published.rows(lines_of(swept), resolve)


def by_row(found) -> dict[str, dict[str, str]]:
  return {row['row']: row for row in rows(published.table(found))}


def test_rows_of_table_4_stand_beside_the_papers_numbers(tmp_path):
  swept = table4_rows(tmp_path, heldout=True)
  table = by_row(paper_rows(swept))
  assert list(table) == list(ROWS)
  for name, (gate, first, largest) in MEASURED.items():
    own, (_, _, *printed) = table[name], table4.ROWS[name]
    score, m_act, f_attn, ppl, *_ = printed
    assert own['gate score, paper'] == (f'{score:.3f}' if score else '')
    # The mean of both seeds, at the last probed step.
    assert own['gate score, ours'] == (f'{gate + 0.01:.3f}' if gate else '')
    assert own['F-Attn, paper'] == f'{f_attn:.3f}'
    assert own['F-Attn, ours'] == f'{first + 0.01:.3f}'
    assert own['M-Act, paper'] == f'{m_act:.4g}'
    assert own['M-Act, ours'] == f'{largest + 0.01:.4g}'
    assert own['nats, paper'] == f'{math.log(ppl / 6.026):+.4f}'
  batch, _ = judged(swept)
  mean = lambda name: statistics.mean(p.final for p in batch if p.line == name)
  apart = mean('g2_elementwise') - mean('baseline')
  assert table['g2_elementwise']['nats, ours'] == f'{apart:+.4f}'
  message = described(swept, resolve=resolve)
  assert 'scale=test: 2 layers of width 32' in section(message, 'Comparison')
  # The main table ends with the divergence and the probes of all lines, gated or not.
  main = section(message, 'Results')
  assert '| verdict | diverged | F-Attn | M-Act |' in main and 'sink rate' not in main
  for name, (_, first, largest) in MEASURED.items():
    assert f'| 0 of 2 | {first + 0.01:.4f} | {largest + 0.01:.4g} |\n' in main, name


def test_a_changed_model_is_no_row_of_the_paper(tmp_path):
  name = 'table4.py:baseline,scale=test'
  points = [row(name, {GATE: g}, position=g) for g in ('none', 'sdpa')]
  points += [row(name, {'model.width': 48}, width='48')]
  points += [row(name, {'model.remat': 'full'}, remat='full')]
  # A label does not make a row, and a lost entry of config.paper unmakes it.
  points += [row(name, {'paper.row': 'g1_elementwise'}, row='g1_elementwise')]
  found = paper_rows(trained(tmp_path, points, CALM))
  assert [x.line.name for x in found] == ['position=none', 'remat=full']
  assert {x.cell.points[0].point.config['model']['width'] for x in found} == {32}


def test_a_row_of_table_2_has_its_learning_rate_and_its_ffn(tmp_path):
  spec = 'table2.py:48l_8e-3_elementwise,scale=test'
  points = [row(spec, match='exact'), row(f'{spec},match=none', match='whole')]
  points += [row(spec, {'optim.lr': 4e-3}, lr='0.004')]
  base = '48l_8e-3_baseline'
  points += [row(f'table2.py:{base},scale=test', row=base)]
  found = paper_rows(trained(tmp_path, points, CALM))
  assert len(found) == 3 and {x.cell.lr for x in found} == {8e-3}
  assert by_row(found)[base]['nats, paper'] == '+0.0000'


def test_a_variants_name_is_no_row_of_the_paper(tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise']))
  assert paper_rows(swept) == []
  assert 'Comparison with the paper' not in described(swept, resolve=resolve)


def test_probes_have_columns_and_a_rank_correlation(tmp_path):
  swept = table4_rows(tmp_path)
  table = rows(tables.of_points(judged(swept)[0]))
  assert float(table[2]['probe_gate_mean']) == MEASURED['g1_elementwise'][0]
  assert table[0]['probe_gate_mean'] == '' and float(table[0]['probe_m_act']) == 60
  assert {k for k in table[0] if k.startswith('probe_')} <= {
    f'probe_{name}' for name in SCALARS
  }
  text = section(described(swept), 'Probes')
  assert f'of step {STEPS - 2}.' in text
  assert '| g1_headwise | 0.460 | 0.1300 | 18.01 |' in text
  gated = [MEASURED[name] for name in ROWS[1:]]
  for i, title in ((1, 'F-Attn'), (2, 'M-Act')):
    rho = scipy.stats.spearmanr([x[0] for x in gated], [x[i] for x in gated]).statistic
    assert f'with {title}: {rho:+.2f} (n = 3)' in text


def test_a_sweep_without_probes_has_no_section_on_them(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]))
  assert '## Probes' not in described(swept)
  assert 'probe_' not in ','.join(tables.of_points(judged(swept)[0]).columns)


def pair(tmp_path, first, second, **options):
  return [
    trained(tmp_path / name, points, CALM, name=name, **options)
    for name, points in {'a': first, 'b': second}.items()
  ]


@pytest.mark.slow
def test_several_sweeps_stand_in_one_report(tmp_path, monkeypatch):
  figures = pytest.importorskip('gated.sweep.report.figures')
  monkeypatch.setattr(figures, 'draw', lambda pictures, lines, out: {})
  a, b = pair(tmp_path, grid(['baseline', 'stuck']), grid(['baseline', 'elementwise']))
  written = report.write(tmp_path / 'out', [a, b])
  # The baseline ran in both folders and counts once.
  assert [x.name for x in written.lines] == ['baseline', 'stuck', 'elementwise']
  assert [len(x.points) for x in written.lines] == [9, 9, 9]
  assert written.points[0].name.startswith('a/') and 'recipe of b' in written.about
  part = report.write(tmp_path / 'out', [a, b], only='variant=elementwise')
  assert [x.name for x in part.lines] == ['elementwise']


def test_of_a_run_in_two_folders_the_one_that_ended_counts(tmp_path):
  points = grid(['baseline'], [4e-3], [0])
  a = trained(tmp_path / 'a', points, lambda p: ('partial', 2.5))
  b = trained(tmp_path / 'b', points, CALM)
  (p,), _ = judged(a, b)
  assert p.name.startswith('b/') and p.state == 'finished'


@pytest.mark.parametrize(
  ('knob', 'value', 'named'),
  [
    ('steps', 2 * STEPS, r'config\.steps: 200 in .*/a; 400 in .*/b'),
    ('data.length', 128, r'config\.data\.length: 256 in .*; 128 in'),
    ('eval.rows', 8, r'config\.eval\.rows: 64 in .*; 8 in'),
  ],
)
def test_sweeps_with_another_measure_are_refused(tmp_path, knob, value, named):
  a, b = pair(tmp_path, [point({}, x='1')], [point({knob: value}, x='2')])
  b.points[0].changes.pop(knob)  # Of the recipe, not of the grid.
  with pytest.raises(ValueError, match=f'not comparable.*\n  {named}'):
    report.write(tmp_path / 'out', [a, b])


def test_an_axis_of_a_grid_may_change_the_measure(tmp_path):
  from gated.sweep.report import together

  a, b = pair(tmp_path, [point({'batch': 8}, batch='8')], [point({}, x='2')])
  together.check([a, b], judged(a, b)[0], ())


def test_sweeps_on_other_data_are_refused_and_on_a_copy_are_not(tmp_path):
  from gated.sweep.report import together

  mixture = lambda place: [point({'data.mixture': place}, x=place)]
  a, b = pair(tmp_path, mixture('/here'), mixture('/there'))
  for swept in (a, b):
    swept.points[0].changes.clear()
  together.check([a, b], judged(a, b)[0], ())
  c = trained(tmp_path / 'c', mixture('/here'), CALM, data=lambda p: 'ffff')
  with pytest.raises(ValueError, match=r'data \(SHA-256\): 0a1b in .*/a; ffff in .*/c'):
    together.check([a, c], judged(a, c)[0], ())


def overlay():
  return pytest.importorskip('gated.sweep.report.overlay')


def test_curves_are_drawn_along_steps_tokens_or_hours(tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], [4e-3]), heldout=True)
  lines = lines_of(swept)
  # 256 tokens and half a second a step.
  ends = {'step': STEPS, 'tokens': 256 * STEPS, 'hours': STEPS / 2 / 60}
  for by, end in ends.items():
    figure, _ = overlay().of_lines(lines, baseline=lines[0], by=by)
    above, below = figure.axes
    assert max(x.get_xdata()[-1] for x in above.lines) == pytest.approx(end)
    label = {'hours': 'minutes of training'}.get(by, by)
    assert below.get_xlabel() == label
    (marks,) = [x for x in below.lines if x.get_ls() == 'None']
    last = marks.get_ydata()[-1]
    finals = [np.array([p.final for p in line.points]) for line in lines]
    assert last == pytest.approx((finals[1] - finals[0]).mean())


def test_a_difference_over_training_is_taken_seed_by_seed(tmp_path):
  overlaid = overlay()
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], [4e-3], [0, 1]), CALM)
  lines = lines_of(swept)
  series = [overlaid.Series(x.name, {p.seed: p.log for p in x.points}) for x in lines]
  train, held = overlaid._difference(series[1], series[0], 'step')
  assert held == [] and [len(c.steps) for c in train] == [STEPS, STEPS]
  for seed, curve in enumerate(train):
    own, base = (losses('calm', 2.5, 2 * i + seed) for i in (1, 0))
    np.testing.assert_allclose(curve.values, own - base)


@pytest.mark.full
def test_the_report_of_a_table_draws_its_probes(tmp_path):
  pytest.importorskip('matplotlib')
  swept = table4_rows(tmp_path / 'swept')
  out = storage.path(tmp_path / 'out')
  written = report.write(out, [swept], resolve=resolve, by='tokens')
  assert 'Circles' in written.captions['probes']
  message = (tmp_path / 'out/report.md').read_text()
  assert '![Figure 2](probes.svg)' in message and '| 0.116 | 0.410 |' in message


@pytest.mark.full
def test_the_command_takes_a_baseline_and_an_axis(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  script = importlib.import_module('scripts.sweep')
  planned = sweep.plan(
    'configs/tiny.py:gate=none',
    [
      ({'variant': v}, {GATE: g}, '')
      for v, g in {'plain': 'none', 'mine': 'sdpa'}.items()
    ],
    resolve=script.resolve,
    overrides=[f'--config.steps={STEPS}'],
    folder=str(tmp_path / 'lab'),
    rule=RULE,
  )
  swept = sweep.write(planned)
  for i, p in enumerate(swept.points):
    run(swept.workdir(p), 'calm', 2.5, i)
  words = ['report', str(swept.folder), '--baseline=mine', '--by=hours']
  assert script.main(words) == 0
  message = (swept.folder / 'report/report.md').read_text()
  assert 'Differences are to **mine**' in message
  assert script.main(['report', str(swept.folder), '--baseline=yours']) == 2
  assert '--baseline=yours is not a line' in capsys.readouterr().err


def test_evaluations_of_points_stand_in_the_report(tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], [4e-3], [0, 1]))
  assert '## Evaluations' not in described(swept)
  lengths = {'64': {'mean': {'score': None, 'loss': 1.5}}, '128': None}
  tasks = {'cloze': {'alias': 'cloze', 'acc,none': 0.25, 'acc_stderr,none': 0.125}}
  tasks['cloze'] |= {
    'f1,none': 'NaN',
    'em,strict': 0.5,
    'em_stderr,strict': 'N/A',
    'samples': 3,
  }
  domain = {'nats_per_token': 2.0, 'nats_per_token_stderr': 0.5, 'tokens': 9}
  copying = {'distances': {'32': {'gain': 0.75, 'gain_stderr': 0.25}}}
  for k, own in enumerate(swept.points[:3]):
    folder = swept.workdir(own) / 'evals'
    moved = domain | {'nats_per_token': 2.0 + k}
    long = {
      'domains': {'code': moved},
      'copying': copying,
      'beside': {'x': {'domains': {'code': domain}}},
    }
    storage.write_json(folder / '20-long-f00d.json', long)
    yarn = {
      f'{folder.parent.name} yarn=4': {'lengths': lengths},
      'other yarn=4': {'lengths': lengths},
    }
    ruler = {'lengths': {'64': None, '128': None}, 'beside': yarn}
    storage.write_json(folder / '20-ruler-64.json', ruler)
    streamed = {'label': f'{folder.parent.name} 4+60', 'domains': {'code': domain}}
    storage.write_json(folder / '20-streaming.json', streamed)
    storage.write_json(folder / '20-cloze.json', {'results': tasks, 'n-shot': {}})
  text = section(described(swept), 'Evaluations')
  assert '| 20-long-f00d | code nats per token | baseline | 2.5000 ± 0.7071 | 2 |' in text
  assert '| 20-long-f00d | code nats per token | elementwise | 4.0000 | 1 |' in text
  assert (
    '| 20-ruler-64 | RULER at 64, mean loss yarn=4 | baseline | 1.5000 ± 0.0000 | 2 |'
    in text
  )
  assert 'score' not in text and '128' not in text and 'samples' not in text
  table = rows(tables.of_evaluations(judged(swept)[0]))
  first = [r for r in table if r['point'] == swept.points[0].name]
  assert [[*r.values()][4:] for r in first] == [
    ['20-cloze', 'cloze acc', '0.25', '0.125'],
    ['20-cloze', 'cloze f1', 'nan', ''],
    ['20-cloze', 'cloze em', '0.5', ''],
    ['20-long-f00d', 'code nats per token', '2.0', '0.5'],
    ['20-long-f00d', 'copy gain at 32', '0.75', '0.25'],
    ['20-ruler-64', 'RULER at 64, mean loss yarn=4', '1.5', ''],
    ['20-streaming', 'code nats per token 4+60', '2.0', '0.5'],
  ]
  storage.write(swept.workdir(swept.points[3]) / 'evals/a.json', b'[1]')
  with pytest.raises(ValueError, match=r'evals/a\.json is not a report of eval\.py'):
    judged(swept)
