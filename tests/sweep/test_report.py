"""A report says what its points say: in tables, in figures, and on one page."""

import csv
import dataclasses
import html.parser
import importlib
import io
import json
import math
import statistics

import numpy as np
import pytest

from configs import axes, base, table2
from gated import storage, sweep
from gated.run.metrics import records
from gated.sweep import judge, report
from gated.sweep.report import lines, points, published, tables, text

RULE = judge.Rule(multiple=1.5, rise=0.5, tail=0.05)
STEPS, INIT = 200, 6.0
RATES = (1e-3, 4e-3, 8e-3)
EVIL = '<script>a|b</script> ![x](http://example.org/x.png) $1$ _so_'


def losses(kind: str, level: float, seed: int) -> np.ndarray:
  """A training curve that falls from INIT to about `level`."""
  n = {'partial': 60, 'failed': 20, 'broken': 120}.get(kind, STEPS)
  step = np.arange(n)
  noise = np.random.default_rng(seed).normal(0, 0.005, n)
  loss = level + (INIT - level) * np.exp(-step / 10) + noise
  loss[0] = INIT
  if kind == 'spiky':
    for at, height in ((80, 0.9), (140, 0.4)):
      loss[at : at + 6] += height * np.exp(-np.arange(6) / 2)
  if kind in ('lost', 'broken'):
    loss[90:] = 5.5 + noise[90:]
  if kind == 'broken':
    loss[-1] = math.nan
  return loss


def run(workdir: storage.Path, kind: str, level: float, seed: int, *, heldout: bool):
  """Writes what train.py would leave in a workdir."""
  if kind == 'absent':
    return
  lines = []
  loss = losses(kind, level, seed)
  for i, value in enumerate(loss):
    wild = kind in ('lost', 'broken') and i > 85
    norm = 30.0 if wild else 1.0 + 0.1 * math.sin(i)
    train = {'loss': float(value), 'grad_norm': norm, 'param_norm': 10.0}
    train |= {'update_norm': 0.01, 'lr': 1e-3, 'tokens': 256.0, 'skipped': 0.0}
    train |= {'spikes': 0.0, 'verdict': 0.0 if math.isfinite(value) else 1.0}
    train |= {'step_seconds': 0.5, 'tokens_per_second': 512.0}
    lines.append({'step': i + 1, 'kind': 'train', 'time': 1e9 + i} | train)
    if i % 20 == 19:
      seen = {'attention_logit': 300.0 if wild else 6.0, 'output_logit': 1.0 + i / 100}
      seen |= {
        'residual_rms_first': 1.0,
        'residual_rms_last': 3.0,
        'residual_growth': 3.0,
      }
      lines.append({'step': i + 1, 'kind': 'indicators', 'time': 1e9 + i} | seen)
  if heldout and len(loss) == STEPS:
    held = {'loss': float(loss[-1]) + 0.05}
    lines.append({'step': STEPS, 'kind': 'heldout', 'time': 1e9} | held)
  storage.write(workdir / 'metrics.jsonl', b''.join(map(records.line, lines)))
  session = {'devices': 2, 'device_kind': 'cpu'}
  storage.write_json(
    workdir / 'run.json',
    {'config': {}, 'data': {'sha256': '0a1b'}, 'sessions': [session]},
  )
  code = {'broken': 3, 'failed': 1, 'partial': 4}.get(kind, 0)
  told = {'code': code, 'step': len(loss), 'told': f'{kind} | why', 'time': 1e9}
  storage.write_json(workdir / 'outcome.json', told)


def point(changes: dict, **labels: str) -> sweep.Point:
  """Labels and the knobs that they stand for -> a point."""
  c = base.get_config()
  c.update_from_flattened_dict({'steps': STEPS} | changes)
  name = '-'.join(labels.values()).replace('/', '_')
  return sweep.Point(
    name=f'{name}-0a1b2c',
    labels=labels,
    changes=changes,
    command=['train.py'],
    config=c.to_dict(),
  )


def grid(variants, rates=RATES, seeds=(0, 1, 2)) -> list[sweep.Point]:
  return [
    point({'optim.lr': lr, 'seed': seed}, variant=v, lr=f'{lr:g}', seed=str(seed))
    for v in variants
    for lr in rates
    for seed in seeds
  ]


def fate(p: sweep.Point) -> tuple[str, float]:
  """Point -> the kind of run it is, and the loss it comes to."""
  lr, seed, baseline = (
    p.config['optim']['lr'],
    p.config['seed'],
    p.labels['variant'] == 'baseline',
  )
  level = (2.5 if baseline else 2.4) + 20 * abs(lr - 4e-3) + 0.003 * seed
  kind = 'spiky' if lr == 4e-3 and baseline else 'calm'
  if lr == 8e-3 and baseline:
    kind = ('lost', 'broken', 'calm')[seed]
  return kind, level


def trained(folder, grid, fate=fate, *, heldout=False) -> sweep.Sweep:
  """A sweep whose points have run."""
  swept = made(storage.path(folder), grid)
  for i, p in enumerate(grid):
    run(swept.workdir(p), *fate(p), i, heldout=heldout)
  return swept


def made(folder: storage.Path, grid: list[sweep.Point]) -> sweep.Sweep:
  return sweep.Sweep(
    folder=folder,
    name='lab',
    recipe='configs/lab.py',
    overrides=(),
    flags=(),
    points=tuple(grid),
    rule=RULE,
  )


def judged(swept):
  found = points.read(swept, RULE, {})
  return found, lines.gather(found)


def described(swept, rows=(), seen=None) -> str:
  """The Markdown of a sweep's report, without figures."""
  found, gathered = seen or judged(swept)
  return text.markdown(
    text.Report(
      name=swept.name,
      about={'recipe': swept.recipe},
      points=found,
      lines=gathered,
      rule=RULE,
      spikes={},
      published=rows,
      captions={},
    )
  )


def rows(table: tables.Table) -> list[dict[str, str]]:
  return list(csv.DictReader(io.StringIO(table.csv().decode())))


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """Two variants, three learning rates and three seeds, of which two runs diverge."""
  return trained(tmp_path_factory.mktemp('lab'), grid(['baseline', 'elementwise']))


@pytest.fixture(scope='module')
def seen(lab):
  """Its points, judged, and its lines."""
  return judged(lab)


def test_a_point_is_told_by_its_own_numbers(lab, seen):
  found, _ = seen
  for p, told in zip(lab.points, rows(tables.of_points(found)), strict=True):
    i = lab.points.index(p)
    loss = losses(*fate(p), i)
    final = np.mean(loss[-10:])
    assert told['point'] == p.name and told['variant'] == p.labels['variant']
    assert float(told['final_loss']) == pytest.approx(final, nan_ok=True)
    assert float(told['loss_at_init']) == INIT
    assert float(told['best_loss']) == np.nanmin(loss)
    assert float(told['seconds']) == pytest.approx(0.5 * len(loss))
    assert float(told['tokens_per_second']) == 512 and told['device'] == '2 x cpu'
    assert float(told['learning_rate']) == p.config['optim']['lr']
    if fate(p)[0] == 'spiky':
      assert told['spikes'] == '2' and float(told['max_spike']) == pytest.approx(
        0.9, abs=0.03
      )


def test_a_final_loss_is_the_held_out_one_where_the_last_step_has_it(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]), heldout=True)
  (p,), _ = judged(swept)
  assert p.log.final_of == 'heldout'
  assert p.log.final == losses(*fate(swept.points[0]), 0)[-1] + 0.05
  assert 'Final loss: the held-out loss at the last step.' in described(swept)


def test_seconds_are_of_all_steps_and_not_of_the_records(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]))
  path = swept.workdir(swept.points[0]) / 'metrics.jsonl'
  kept = [r for r in records.read(path) if r['step'] % 4 == 0]
  storage.write(path, b''.join(map(records.line, kept)))
  ((p,), _), said = judged(swept), described(swept)
  assert len(p.log.train.steps) == STEPS / 4 and p.log.seconds == 0.5 * STEPS
  # Without a record of step 1 nobody knows the loss at initialisation.
  assert p.init is None and 'Not available' in said


def test_a_summary_is_of_the_seeds_that_did_not_diverge(seen):
  found, gathered = seen
  for told in rows(tables.of_summary(gathered)):
    own = [
      p for p in found if p.line == told['line'] and p.lr == float(told['learning_rate'])
    ]
    finals = [p.log.final for p in own if not p.diverged]
    assert int(told['n']) == len(finals) == 3 - int(told['diverged'])
    assert float(told['mean']) == pytest.approx(statistics.mean(finals))
    if len(finals) > 1:
      assert float(told['std']) == pytest.approx(statistics.stdev(finals))
    assert float(told['least']) == min(finals) and float(told['largest']) == max(finals)


def test_sensitivity_is_that_of_each_seed_and_their_mean(seen):
  found, gathered = seen
  told = rows(tables.of_sensitivity(gathered))
  for name in ('baseline', 'elementwise'):
    each = []
    for seed in range(3):
      own = [p for p in found if p.line == name and p.seed == seed]
      capped = [
        min(INIT, p.log.final) if math.isfinite(p.log.final) else INIT for p in own
      ]
      each.append(statistics.mean(capped) - min(capped))
    of = [float(r['sensitivity']) for r in told if r['line'] == name]
    assert of == pytest.approx([*each, statistics.mean(each)])
  # Where two seeds diverged the sensitivity is larger by far.
  base, gated = (float(r['sensitivity']) for r in told if r['seed'] == 'mean')
  assert base > 0.5 > 5 * gated


def test_curves_keep_their_spikes_and_their_ends(seen):
  found, _ = seen
  for p in found:
    steps, values = p.log.train.thinned(40)
    assert len(steps) < 60 < len(p.log.train.steps)
    assert (steps[0], steps[-1]) == (p.log.train.steps[0], p.log.train.steps[-1])
    assert np.nanmax(values[5:]) == np.nanmax(p.log.train.values[steps[5] - 1 :])
    assert np.isnan(values).any() == np.isnan(p.log.train.values).any()
  told = rows(tables.of_curves(found))
  assert {r['point'] for r in told} == {p.name for p in found}
  first = next(r for r in told if r['point'] == found[0].name)
  assert first['step'] == '1' and float(first['loss']) == INIT


def test_a_point_that_diverged_is_said_to_everywhere(lab, seen):
  found, gathered = seen
  names = [p.name for p in found if p.diverged]
  assert names == ['baseline-0.008-0-0a1b2c', 'baseline-0.008-1-0a1b2c']
  told = {r['point']: r for r in rows(tables.of_points(found))}
  assert all(told[name]['state'] == 'diverged' for name in names)
  assert 'above 1.5 times the best' in told[names[0]]['diverged_because']
  assert 'stopped as unstable' in told[names[1]]['diverged_because']
  assert 'grad_norm from step 87' in told[names[0]]['warnings']
  assert [r['diverged'] for r in rows(tables.of_summary(gathered))] == [*'002000']
  said = described(lab, seen=seen)
  assert '18 points: 16 finished, 2 diverged.' in said and str(RULE) in said
  divergence = said.partition('## Divergence')[2].partition('\n## ')[0]
  assert all(name in divergence for name in names) and divergence.count('diverged: ') == 2
  assert 'diverged 2 of 3' in said.partition('## LR')[0]


def test_a_rate_that_is_too_small_is_not_passed_off_as_unstable(tmp_path):
  level = {1e-3: 4.5, 4e-3: 2.5, 8e-3: 4.5}
  kinds = {('baseline', 1e-3): 'calm', ('elementwise', 1e-3): 'lost'}
  swept = trained(
    tmp_path,
    grid(['baseline', 'elementwise'], seeds=[0]),
    lambda p: (
      kinds.get((p.labels['variant'], p.config['optim']['lr']), 'calm'),
      level[p.config['optim']['lr']],
    ),
  )
  found, _ = judged(swept)
  # The same loss is slow at a small rate, and diverged at a large one; what rose by a nat
  # and stayed there diverged at any rate.
  assert [p.diverged for p in found] == [False, False, True, True, False, True]
  assert [p.slow for p in found] == [True] + 5 * [False]
  assert f'counted as finished: {found[0].name}.' in described(swept)


def test_what_fails_at_every_rate_is_not_passed_off_as_slow(tmp_path):
  level = {1e-3: 5.4, 4e-3: 5.5, 8e-3: 5.3}
  swept = trained(
    tmp_path,
    grid(['baseline', 'stuck'], seeds=[0]),
    lambda p: (
      'calm',
      level[p.config['optim']['lr']] if p.labels['variant'] == 'stuck' else 2.5,
    ),
  )
  found, _ = judged(swept)
  assert [p.state for p in found] == 3 * ['finished'] + 3 * ['diverged']


def test_a_run_left_as_unstable_has_no_final_loss_whatever_it_had_before(tmp_path):
  broken = lambda p: p.config['optim']['lr'] == 8e-3
  swept = trained(tmp_path, grid(['baseline'], seeds=[0]), lambda p: ('calm', 2.5))
  last = swept.workdir(swept.points[-1])
  told = {'code': 3, 'step': STEPS - 1, 'told': '8 bad steps in a row', 'time': 1e9}
  storage.write_json(last / 'outcome.json', told)
  found, (line,) = judged(swept)
  assert [p.diverged for p in found] == [broken(p) for p in swept.points]
  assert math.isnan(found[-1].log.final) and found[-1].capped == INIT
  # Its last losses are as low as the others'; it counts as the loss at initialisation.
  assert line.sensitivities()[0] == pytest.approx((INIT - 2.5) / 3, abs=0.01)


def test_a_threshold_that_noise_raised_is_stated(tmp_path, lab, seen):
  assert 'Batch noise raises' not in described(lab, seen=seen)
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]), lambda p: ('calm', 2.5))
  path = swept.workdir(swept.points[0]) / 'metrics.jsonl'
  rng, noisy = np.random.default_rng(0), []
  for r in records.read(path):
    more = 0.1 * rng.normal() if 'lr' in r else 0.0
    noisy.append(r | {'loss': r.get('loss', 0.0) + more, 'spikes': float(r['step'] > 9)})
  storage.write(path, b''.join(map(records.line, noisy)))
  (p,), _ = judged(swept)
  assert p.spikes == [] and 0.3 < p.limit < 0.5
  said = described(swept)
  assert f'**Batch noise raises this threshold to as much as {p.limit:.2f} nats**' in said
  assert 'the guard counted during training: 1, in 1 of 1 runs' in said
  (told,) = rows(tables.of_points([p]))
  assert float(told['spike_limit']) == p.limit and told['spikes_noted'] == '1'


def test_crosses_stand_where_points_diverged(seen):
  figures = pytest.importorskip('gated.sweep.report.figures')
  _, gathered = seen
  figure, caption = figures.loss_against_rate(gathered)
  (ax,) = figure.axes
  crosses = [drawn for drawn in ax.lines if drawn.get_marker() == 'x']
  assert [float(drawn.get_xdata()[0]) for drawn in crosses] == [8e-3, 8e-3]
  # The others lie within 0.2 nats, which the loss at initialisation would flatten.
  assert {float(drawn.get_ydata()[0]) for drawn in crosses} == {ax.get_ylim()[1]}
  assert ax.get_ylim()[1] < 3 and '6.00, lies above the axis' in caption
  assert 'means over the seeds that did not diverge' in caption
  assert [t.get_text() for t in ax.get_xticklabels()] == ['1e-3', '4e-3', '8e-3']
  solid = next(drawn for drawn in ax.lines if drawn.get_marker() == 'o')
  assert solid.get_ydata() == pytest.approx([c.mean for c in gathered[0].cells()])


def test_an_unfinished_sweep_says_what_is_missing(tmp_path):
  kinds = ('calm', 'partial', 'absent', 'failed')
  swept = trained(
    tmp_path,
    grid(['baseline'], [1e-3, 4e-3], range(4)),
    lambda p: (
      kinds[p.config['seed']] if p.config['optim']['lr'] > 2e-3 else 'calm',
      2.5,
    ),
  )
  found, gathered = judged(swept)
  assert [p.state for p in found[4:]] == ['finished', 'partial', 'absent', 'failed']
  said = described(swept)
  assert '8 points: 5 finished, 1 partial, 1 failed, 1 absent.' in said
  assert '3 of 8 points have not ended' in said
  for p in found:
    why = '' if p.state == 'absent' else f'{p.state} \\| why'
    row = f'| {p.name} | {p.state} | {p.log.step} | 200 | {why} |'
    assert (row in said) == (not p.done)
  assert [len(c.finals) for c in gathered[0].cells()] == [4, 1]
  # A seed that is not done at one rate has no sensitivity.
  assert gathered[0].sensitivities().keys() == {0}


def test_one_seed_claims_no_ordering_and_three_have_a_noise_floor(lab, seen, tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], seeds=[0]))
  said = described(swept)
  assert 'claims no ordering of these lines' in said
  assert 'within the noise' not in said and '| lower |' not in said
  said = described(lab, seen=seen)
  assert '| lower |' in said and 'Noise floor' in said
  _, gathered = seen
  finals = [c.finals for line in gathered for c in line.cells() if not c.diverged]
  assert f'{judge.noise(finals).std:.4f}' in said


def test_lines_are_all_labels_but_rate_and_seed(tmp_path):
  names = {'peak': '0.001', 'draw': '3'}
  made = [
    point(
      {'optim.lr': lr, 'seed': seed}, gate=g, precision=f, peak=f'{lr:g}', draw=str(seed)
    )
    for g in ('none', 'sdpa')
    for f in ('float32', 'bfloat16')
    for lr in RATES[:2]
    for seed in (3, 4)
  ]
  swept = trained(tmp_path, made, lambda p: ('calm', 2.5))
  found, gathered = judged(swept)
  assert [line.name for line in gathered] == [
    *('none, float32', 'none, bfloat16', 'sdpa, float32', 'sdpa, bfloat16')
  ]
  assert all(line.lrs == [1e-3, 4e-3] and line.seeds == [3, 4] for line in gathered)
  assert found[0].point.labels.items() >= names.items()
  plain = [point({'steps': STEPS}, width=w) for w in ('64', '128')]
  swept = trained(tmp_path / 'plain', plain, lambda p: ('calm', 2.5))
  _, gathered = judged(swept)
  assert [line.name for line in gathered] == ['64', '128']
  assert 'Not available' in described(swept) and '|  | 1e-3 |' in described(swept)


def test_the_papers_numbers_are_ratios_of_perplexities(lab, seen):
  rows = [
    published.Published(setting, what, lr, table2.ROWS[f'48l_{rate}_{what}'][0])
    for setting in ('48 layers',)
    for rate, lr in (('4e-3', 4e-3), ('8e-3', 8e-3))
    for what in ('baseline', 'elementwise')
  ]
  # Of one learning rate, or of none that was measured, there is nothing to compare.
  rows.append(published.Published('28 layers', 'baseline', 4e-3, 7.499))
  rows.append(published.Published('28 layers', 'elementwise', 4e-3, 7.404))
  rows.append(published.Published('1T', 'baseline', 4e-3, None))
  _, gathered = seen
  ((name, table),) = published.by_rate(gathered, rows)
  by = {
    (row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows
  }
  assert name == '48 layers' and len(by) == 4
  assert by['baseline', '8e-3']['nats, paper'] == '+0.2143'
  assert by['elementwise', '4e-3']['nats, paper'] == f'{math.log(7.288 / 7.421):+.4f}'
  assert by['baseline', '8e-3']['nats, ours'] == 'diverged 2 of 3'
  base, gated = (line.cells() for line in gathered)
  ours = by['elementwise', '8e-3']['nats, ours']
  assert ours == f'{gated[2].mean - base[1].mean:+.4f}'
  # Beside the baseline at the same rate: one of ours diverged there.
  assert by['elementwise', '8e-3']['beside, paper'] == f'{math.log(7.325 / 9.195):+.4f}'
  assert by['elementwise', '8e-3']['beside, ours'] == '–'
  ours = by['elementwise', '4e-3']['beside, ours']
  assert ours == f'{gated[1].mean - base[1].mean:+.4f}'
  said = described(lab, rows, seen)
  assert 'only the signs and the ratios' in said and '| 9.195 | +0.2143 |' in said
  assert 'within the noise floor has no sign' in said


def test_what_the_papers_rates_have_no_run_at_is_no_column_of_dashes(tmp_path):
  rows = [
    published.Published('48 layers', what, lr, 7.4)
    for lr in (4e-3, 8e-3)
    for what in ('baseline', 'elementwise')
  ]
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], [3e-3, 1e-2], [0]))
  _, gathered = judged(swept)
  ((_, table),) = published.by_rate(gathered, rows)
  assert {'ours', 'nats, ours', 'beside, ours'} & set(table.columns) == set()
  assert table.columns[-3:] == ['our lr', 'ours there', 'nats there']
  assert 'the signs of our differences may be chance' in described(swept, rows)


def test_lines_with_other_rates_are_not_compared_silently(tmp_path):
  figures = pytest.importorskip('gated.sweep.report.figures')
  part = [*grid(['baseline'], seeds=[0]), *grid(['elementwise'], RATES[:2], [0])]
  swept = trained(tmp_path, part)
  _, gathered = judged(swept)
  said, (_, caption) = described(swept), figures.sensitivity(gathered)
  assert 'these numbers are not comparable' in said
  assert 'these bars are not comparable' in caption
  assert 'claims no ordering of them' in said and 'claim no ordering' in caption


def test_a_report_says_what_was_trained(lab, seen):
  said = described(lab, seen=seen)
  c = lab.points[0].config
  size = STEPS * c['batch'] * c['data']['length']
  assert f'- Each run: steps 200, batch {c["batch"]}, ' in said
  assert f'which is {size / 1e6:.3g}M tokens' in said
  assert 'any update (6.000 to 6.000)' in said
  assert '- Data with SHA-256: 0a1b.' in said and '- Devices: 2 x cpu.' in said


def test_a_point_that_is_a_row_of_the_paper_stands_beside_it(tmp_path):
  made = []
  for name in ('28l_4e-3_baseline', '28l_4e-3_elementwise'):
    config = table2.get_config(f'{name},scale=test').to_dict() | {'steps': STEPS}
    labels = {'row': name, 'seed': '0'}
    made.append(
      sweep.Point(name=name, labels=labels, changes={}, command=[], config=config)
    )
  level = {'28l_4e-3_baseline': 2.5, '28l_4e-3_elementwise': 2.4}
  swept = trained(tmp_path, made, lambda p: ('calm', level[p.name]))
  found, gathered = judged(swept)
  first, second = published.by_row(gathered).rows
  assert first[1:5] == ['28l_4e-3_baseline', '4e-3', '7.499', '+0.0000']
  assert second[4] == f'{math.log(7.404 / 7.499):+.4f}'
  assert second[6] == f'{found[1].log.final - found[0].log.final:+.4f}'


class Page(html.parser.HTMLParser):
  """What a page opens and closes, refers to, and says."""

  VOID = ('meta', 'img', 'br', 'hr')

  def __init__(self, content: str):
    super().__init__()
    self.open, self.tags, self.refers, self.said = [], [], [], ''
    self.feed(content)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.refers += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'action')]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.said += data


def test_a_page_refers_to_nothing_and_escapes_what_it_is_told(tmp_path):
  from gated.sweep.report.page import page

  swept = trained(tmp_path, grid([EVIL], [4e-3], [0]), lambda p: ('calm', 2.5))
  swept = dataclasses.replace(swept, name=EVIL)
  said = f'{described(swept)}\n![Figure 1](curves.svg)\n'
  found = Page(page(said, EVIL, {'curves.svg': b'<svg/>'}))
  assert not {'script', 'link', 'iframe', 'object', 'a'} & set(found.tags)
  assert found.refers == ['data:image/svg+xml;base64,PHN2Zy8+']
  # The title, the heading, the tables.
  assert found.said.count(EVIL) >= 4 and found.tags.count('img') == 1
  # And if a text were not escaped before.
  assert 'script' not in Page(page(EVIL.partition('!')[0], '', {})).tags


def test_a_report_without_its_packages_says_what_to_install(lab, tmp_path, monkeypatch):
  monkeypatch.setattr(report, '_installed', lambda module: module != 'matplotlib')
  with pytest.raises(ValueError, match=r'matplotlib.*requirements-report\.txt'):
    report.write(lab, tmp_path / 'out', rule=RULE)
  assert not (tmp_path / 'out').exists()


def test_a_part_of_a_sweep_is_judged_as_among_all_and_says_that_it_is_one(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(report, '_pictures', lambda lines: {})
  level = {1e-3: 2.5, 4e-3: 2.4, 8e-3: 4.5}
  swept = trained(
    tmp_path,
    grid(['baseline', 'elementwise'], seeds=[0]),
    lambda p: ('calm', level[p.config['optim']['lr']]),
  )
  out = storage.path(tmp_path / 'out')
  the = report.write(swept, out, only='variant=baseline,lr=0.001,lr=0.008')
  assert [p.name for p in the.points] == [swept.points[i].name for i in (0, 2)]
  # Above 1.5 times the best of the sweep, which is not of the part.
  assert [p.diverged for p in the.points] == [False, True]
  said = storage.read(out / 'report.md', 1 << 20).decode()
  assert said.splitlines()[2] == (
    '2 points: 1 finished, 1 diverged. Only a part: 2 of the 6 of its grid: '
    'variant=baseline,lr=0.001,lr=0.008.'
  )
  with pytest.raises(ValueError, match='--only=lr=1, but lr has the values'):
    report.write(swept, out, only='lr=1')


@pytest.mark.slow
def test_a_report_is_whole_and_the_same_each_time(lab, tmp_path):
  image = pytest.importorskip('matplotlib.image')
  outs = [storage.path(tmp_path / name) for name in ('first', 'second')]
  for out in outs:
    the = report.write(lab, out, rule=RULE)
  assert list(the.captions) == ['loss_vs_lr', 'sensitivity', 'curves', 'warnings']
  files = storage.names(outs[0])
  assert storage.names(outs[1]) == files and len(files) == 6 + 3 * 4
  for name in files:
    first, second = (storage.read(out / name, 1 << 24) for out in outs)
    assert first == second, name
  for name in the.captions:
    pixels = image.imread(outs[0] / f'{name}.png')
    assert min(pixels.shape[:2]) > 200
    # More than paper and ink: a tenth of the rows and columns have something in them.
    inked = (pixels[..., :3] < 0.9).any(-1)
    assert inked.any(0).mean() > 0.5 and inked.any(1).mean() > 0.3
    assert b'<path' in storage.read(outs[0] / f'{name}.svg', 1 << 24)
    assert f'![Figure {list(the.captions).index(name) + 1}]({name}.svg)' in (
      storage.read(outs[0] / 'report.md', 1 << 24).decode()
    )
  found = Page(storage.read(outs[0] / 'index.html', 1 << 24).decode())
  assert found.tags.count('img') == 4
  assert all(at.startswith('data:image/svg+xml;base64,') for at in found.refers)
  for p in the.points:
    assert not p.diverged or found.said.count(p.name) == 1
  told = json.dumps(the.captions)
  assert 'Crosses' in told and 'Triangles' in told


@pytest.mark.slow
def test_the_command_reports_a_sweep_by_its_folder_alone(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  script = importlib.import_module('scripts.sweep')
  gates = {'baseline': {}, 'elementwise': {'model.attn.gate.position': 'sdpa'}}
  planned = sweep.plan(
    'configs/tiny.py:gate=none',
    axes.product(
      axes.choice('variant', **gates), axes.axis('optim.lr', RATES), axes.seeds(1)
    ),
    resolve=script.resolve,
    overrides=[f'--config.steps={STEPS}'],
    folder=str(tmp_path / 'lab'),
    rule=RULE,
  )
  swept = sweep.write(planned)
  for i, p in enumerate(swept.points):
    run(swept.workdir(p), *fate(p), i, heldout=True)
  assert script.main(['report', str(swept.folder)]) == 0
  assert '6 points: 5 finished, 1 diverged' in capsys.readouterr().out
  # What never recovered, but went on to its end, is known to the report alone.
  assert script.main(['status', str(swept.folder)]) == 0
  told = capsys.readouterr().out
  assert '6 finished' in told and '`report` judges the losses as well' in told
  said = (swept.folder / 'report/report.md').read_text()
  # The paper's own, of the same variants and learning rates; and what the sweep is of.
  assert '**48 layers, 400B tokens**' in said and '| 9.195 | +0.2143 |' in said
  assert f'configs/tiny.py:gate=none --config.steps={STEPS}' in said
  assert swept.made['sha256'] in said and 'no ordering of these lines' in said
  out = tmp_path / 'other'
  lax = ['--multiple=5', '--rise=9', '--threshold=0.6', f'--out={out}']
  assert script.main(['report', str(swept.folder), *lax]) == 0
  assert '6 points: 6 finished' in capsys.readouterr().out
  said = (out / 'report.md').read_text()
  assert 'above 5 times the best' in said and 'more than 0.6 nats' in said
  assert script.main(['report', str(swept.folder), '--multiple=0.5']) == 2
  assert 'multiple=0.5' in capsys.readouterr().err
  assert script.main(['report', str(tmp_path)]) == 2
  assert 'is not a sweep' in capsys.readouterr().err
