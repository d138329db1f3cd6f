"""The report of a sweep: its numbers, tables, figures and page."""

import dataclasses
import html.parser
import importlib
import json
import math
import statistics
import sys

import numpy as np
import pytest
from lab import (
  INIT,
  RATES,
  RULE,
  STEPS,
  described,
  fate,
  grid,
  judged,
  losses,
  point,
  rows,
  run,
  trained,
)

from configs import axes
from gated import storage, sweep
from gated.run.metrics import records
from gated.sweep import judge, report
from gated.sweep.report import tables

EVIL = '<script>a|b</script> ![x](http://example.org/x.png) $1$ _so_'


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """Two variants, three learning rates and three seeds, of which two runs diverge."""
  return trained(tmp_path_factory.mktemp('lab'), grid(['baseline', 'elementwise']))


@pytest.fixture(scope='module')
def result(lab):
  """The judged points of `lab`, and their lines."""
  return judged(lab)


def test_points_csv_holds_the_numbers_of_each_point(lab, result):
  batch, _ = result
  for p, row in zip(lab.points, rows(tables.of_points(batch)), strict=True):
    i = lab.points.index(p)
    loss = losses(*fate(p), i)
    final = np.mean(loss[-10:])
    assert row['point'] == p.name and row['variant'] == p.labels['variant']
    assert float(row['final_loss']) == pytest.approx(final, nan_ok=True)
    assert float(row['loss_at_init']) == INIT
    assert float(row['best_loss']) == np.nanmin(loss)
    assert float(row['seconds']) == pytest.approx(0.5 * len(loss))
    assert float(row['tokens_per_second']) == 512 and row['device'] == '2 x cpu'
    assert float(row['learning_rate']) == p.config['optim']['lr']
    if fate(p)[0] == 'spiky':
      assert row['spikes'] == '2' and float(row['max_spike']) == pytest.approx(
        0.9, abs=0.03
      )


def test_the_final_loss_is_the_held_out_loss_of_the_last_step(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]), heldout=True)
  (p,), _ = judged(swept)
  assert p.final_of == 'heldout'
  assert p.final == losses(*fate(swept.points[0]), 0)[-1] + 0.05
  assert 'Final loss: the held-out loss at the last step.' in described(swept)


def test_seconds_count_all_steps_and_not_only_logged_ones(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]))
  path = swept.workdir(swept.points[0]) / 'metrics.jsonl'
  kept = [r for r in records.read(path) if r['step'] % 4 == 0]
  storage.write(path, b''.join(map(records.line, kept)))
  ((p,), _), message = judged(swept), described(swept)
  assert len(p.log.train.steps) == STEPS / 4 and p.log.seconds == 0.5 * STEPS
  # Without a record of step 1, the loss at initialisation is unknown.
  assert p.init is None and 'Not available' in message


def test_the_summary_averages_the_seeds_that_did_not_diverge(result):
  batch, lines = result
  for row in rows(tables.of_summary(lines)):
    lr = float(row['learning_rate'])
    own = [p for p in batch if p.line == row['line'] and p.lr == lr]
    finals = [p.final for p in own if not p.diverged]
    assert int(row['n']) == len(finals) == 3 - int(row['diverged'])
    assert float(row['mean']) == pytest.approx(statistics.mean(finals))
    if len(finals) > 1:
      assert float(row['std']) == pytest.approx(statistics.stdev(finals))
    assert float(row['least']) == min(finals) and float(row['largest']) == max(finals)


def test_sensitivity_is_given_for_each_seed_and_as_a_mean(result):
  batch, lines = result
  table = rows(tables.of_sensitivity(lines))
  for name in ('baseline', 'elementwise'):
    each = []
    for seed in range(3):
      finals = [p.final for p in batch if p.line == name and p.seed == seed]
      capped = [min(INIT, x) if math.isfinite(x) else INIT for x in finals]
      each.append(statistics.mean(capped) - min(capped))
    values = [float(row['sensitivity']) for row in table if row['line'] == name]
    assert values == pytest.approx([*each, statistics.mean(each)])
  # Two seeds of the baseline diverged.
  base, gated = (float(row['sensitivity']) for row in table if row['seed'] == 'mean')
  assert base > 0.5 > 5 * gated


def test_thinned_curves_keep_their_spikes_and_ends(result):
  batch, _ = result
  for p in batch:
    steps, values = p.log.train.thinned(40)
    assert len(steps) < 60 < len(p.log.train.steps)
    assert (steps[0], steps[-1]) == (p.log.train.steps[0], p.log.train.steps[-1])
    assert np.nanmax(values[5:]) == np.nanmax(p.log.train.values[steps[5] - 1 :])
    assert np.isnan(values).any() == np.isnan(p.log.train.values).any()
  table = rows(tables.of_curves(batch))
  assert {row['point'] for row in table} == {p.name for p in batch}
  first = next(row for row in table if row['point'] == batch[0].name)
  assert first['step'] == '1' and float(first['loss']) == INIT


def test_diverged_points_are_reported_in_every_section(lab, result):
  batch, lines = result
  names = [p.name for p in batch if p.diverged]
  assert names == ['baseline-0.008-0-0a1b2c', 'baseline-0.008-1-0a1b2c']
  table = {row['point']: row for row in rows(tables.of_points(batch))}
  assert all(table[name]['state'] == 'diverged' for name in names)
  assert 'above 1.5 times the best' in table[names[0]]['diverged_because']
  assert 'stopped as unstable' in table[names[1]]['diverged_because']
  assert 'grad_norm from step 87' in table[names[0]]['warnings']
  assert [row['diverged'] for row in rows(tables.of_summary(lines))] == [*'002000']
  message = described(lab, result=result)
  assert '18 points: 16 finished, 2 diverged.' in message and str(RULE) in message
  divergence = message.partition('## Divergence')[2].partition('\n## ')[0]
  assert all(name in divergence for name in names) and divergence.count('diverged: ') == 2
  assert 'diverged 2 of 3' in message.partition('## LR')[0]


def test_a_high_loss_at_a_low_rate_is_slow_learning_and_no_divergence(tmp_path):
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
  batch, _ = judged(swept)
  # The same loss is slow at a low rate and diverged at a high one. A loss that rose by a
  # nat and stayed there diverged at any rate.
  assert [p.diverged for p in batch] == [False, False, True, True, False, True]
  assert [p.slow for p in batch] == [True] + 5 * [False]
  assert f'counted as finished: {batch[0].name}.' in described(swept)


def test_a_variant_that_fails_at_every_rate_is_not_slow(tmp_path):
  level = {1e-3: 5.4, 4e-3: 5.5, 8e-3: 5.3}
  swept = trained(
    tmp_path,
    grid(['baseline', 'stuck'], seeds=[0]),
    lambda p: (
      'calm',
      level[p.config['optim']['lr']] if p.labels['variant'] == 'stuck' else 2.5,
    ),
  )
  batch, _ = judged(swept)
  assert [p.state for p in batch] == 3 * ['finished'] + 3 * ['diverged']


def test_a_run_that_stopped_as_unstable_has_no_final_loss(tmp_path):
  broken = lambda p: p.config['optim']['lr'] == 8e-3
  swept = trained(tmp_path, grid(['baseline'], seeds=[0]), lambda p: ('calm', 2.5))
  last = swept.workdir(swept.points[-1])
  end = {'code': 3, 'step': STEPS - 1, 'told': '8 bad steps in a row', 'time': 1e9}
  storage.write_json(last / 'outcome.json', end)
  batch, (line,) = judged(swept)
  assert [p.diverged for p in batch] == [broken(p) for p in swept.points]
  assert math.isnan(batch[-1].final) and batch[-1].capped == INIT
  # Its last losses are low, but it counts as the loss at initialisation.
  assert line.sensitivities[0] == pytest.approx((INIT - 2.5) / 3, abs=0.01)


def test_a_spike_threshold_raised_by_noise_is_stated(tmp_path, lab, result):
  assert 'Batch noise raises' not in described(lab, result=result)
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]), lambda p: ('calm', 2.5))
  path = swept.workdir(swept.points[0]) / 'metrics.jsonl'
  rng, noisy = np.random.default_rng(0), []
  for r in records.read(path):
    more = 0.1 * rng.normal() if 'lr' in r else 0.0
    noisy.append(r | {'loss': r.get('loss', 0.0) + more, 'spikes': float(r['step'] > 9)})
  storage.write(path, b''.join(map(records.line, noisy)))
  (p,), _ = judged(swept)
  assert p.spikes == [] and 0.3 < p.limit < 0.5
  message = described(swept)
  noise = f'**Batch noise raises this threshold to as much as {p.limit:.2f} nats**'
  assert noise in message
  assert 'the guard counted during training: 1, in 1 of 1 runs' in message
  (row,) = rows(tables.of_points([p]))
  assert float(row['spike_limit']) == p.limit and row['spikes_noted'] == '1'


def test_a_run_without_most_of_its_updates_is_named(tmp_path):
  swept = trained(tmp_path, grid(['baseline'], [4e-3], [0]), lambda p: ('calm', 2.5))
  assert 'updates were skipped' not in described(swept)
  path = swept.workdir(swept.points[0]) / 'metrics.jsonl'
  skipped = [r | {'skipped': 0.75 * r['step']} for r in records.read(path)]
  storage.write(path, b''.join(map(records.line, skipped)))
  message = described(swept)
  assert '**Most updates were skipped in 1 of 1 points**' in message
  assert '(75%)' in message


def test_crosses_mark_diverged_points(result):
  figures = pytest.importorskip('gated.sweep.report.figures')
  _, lines = result
  figure, caption = figures.loss_against_rate(lines)
  (ax,) = figure.axes
  crosses = [drawn for drawn in ax.lines if drawn.get_marker() == 'x']
  assert [float(drawn.get_xdata()[0]) for drawn in crosses] == [8e-3, 8e-3]
  # The axis shows only the stable losses, which lie within 0.2 nats.
  assert {float(drawn.get_ydata()[0]) for drawn in crosses} == {ax.get_ylim()[1]}
  assert ax.get_ylim()[1] < 3 and '6.00, lies above the axis' in caption
  assert 'means over the seeds that did not diverge' in caption
  assert [t.get_text() for t in ax.get_xticklabels()] == ['1e-3', '4e-3', '8e-3']
  solid = next(drawn for drawn in ax.lines if drawn.get_marker() == 'o')
  assert solid.get_ydata() == pytest.approx([c.mean for c in lines[0].cells])


def test_the_report_of_an_unfinished_sweep_lists_the_missing_points(tmp_path):
  kinds = ('calm', 'partial', 'absent', 'failed')
  swept = trained(
    tmp_path,
    grid(['baseline'], [1e-3, 4e-3], range(4)),
    lambda p: (
      kinds[p.config['seed']] if p.config['optim']['lr'] > 2e-3 else 'calm',
      2.5,
    ),
  )
  batch, lines = judged(swept)
  assert [p.state for p in batch[4:]] == ['finished', 'partial', 'absent', 'failed']
  message = described(swept)
  assert '8 points: 5 finished, 1 partial, 1 failed, 1 absent.' in message
  assert '3 of 8 points have not ended' in message
  for p in batch:
    why = '' if p.state == 'absent' else f'{p.state} \\| why'
    row = f'| {p.name} | {p.state} | {p.log.step} | 200 | {why} |'
    assert (row in message) == (not p.done)
  assert [len(c.finals) for c in lines[0].cells] == [4, 1]
  # A seed that has not ended at one rate has no sensitivity.
  assert lines[0].sensitivities.keys() == {0}


def test_one_seed_claims_no_ordering_and_three_have_a_noise_floor(lab, result, tmp_path):
  swept = trained(tmp_path, grid(['baseline', 'elementwise'], seeds=[0]))
  message = described(swept)
  assert 'claims no ordering of these lines' in message
  assert 'within the noise' not in message and '| lower |' not in message
  message = described(lab, result=result)
  assert '| lower |' in message and 'Noise floor' in message
  _, lines = result
  finals = [c.finals for line in lines for c in line.cells if not c.diverged]
  assert f'{judge.noise(finals).std:.4f}' in message


def test_lines_are_named_by_all_labels_except_rate_and_seed(tmp_path):
  names = {'peak': '0.001', 'draw': '3'}
  varied = [
    point(
      {
        'optim.lr': lr,
        'seed': seed,
        'model.attn.gate.position': g,
        'model.numerics.compute': f,
      },
      gate=g,
      precision=f,
      peak=f'{lr:g}',
      draw=str(seed),
    )
    for g in ('none', 'sdpa')
    for f in ('float32', 'bfloat16')
    for lr in RATES[:2]
    for seed in (3, 4)
  ]
  swept = trained(tmp_path, varied, lambda p: ('calm', 2.5))
  batch, lines = judged(swept)
  assert [line.name for line in lines] == [
    'gate=none, float32',
    'gate=none, bfloat16',
    'sdpa, float32',
    'sdpa, bfloat16',
  ]
  assert all(line.lrs == [1e-3, 4e-3] and line.seeds == [3, 4] for line in lines)
  assert batch[0].point.labels.items() >= names.items()


def test_a_line_of_an_axis_names_its_knob(tmp_path):
  plain = [point({'model.attn.qk_norm': on}, qk_norm=str(on)) for on in (True, False)]
  plain += [point({'model.branch_norm': 'rms'}, branch_norm='rms')]
  swept = trained(tmp_path, plain, lambda p: ('calm', 2.5))
  _, lines = judged(swept)
  names = ['qk_norm=True', 'qk_norm=False', 'branch_norm=rms']
  assert [line.name for line in lines] == names
  assert 'Not available' in described(swept) and '|  | 1e-3 |' in described(swept)


def test_a_comparison_of_lines_with_different_rates_is_flagged(tmp_path):
  figures = pytest.importorskip('gated.sweep.report.figures')
  part = [*grid(['baseline'], seeds=[0]), *grid(['elementwise'], RATES[:2], [0])]
  swept = trained(tmp_path, part)
  _, lines = judged(swept)
  message, (_, caption) = described(swept), figures.sensitivity(lines)
  assert 'these numbers are not comparable' in message
  assert 'these bars are not comparable' in caption
  assert 'claims no ordering of them' in message and 'claim no ordering' in caption


def test_the_report_describes_the_runs(lab, result):
  message = described(lab, result=result)
  c = lab.points[0].config
  size = STEPS * c['batch'] * c['data']['length']
  assert f'- Each run: steps 200, batch {c["batch"]}, ' in message
  assert f'which is {size / 1e6:.3g}M tokens' in message
  assert 'any update (6.000 to 6.000)' in message
  assert '- Data with SHA-256: 0a1b.' in message and '- Devices: 2 x cpu.' in message


class Page(html.parser.HTMLParser):
  """The tags, references and text of a page."""

  VOID = ('meta', 'img', 'br', 'hr')

  def __init__(self, content: str):
    super().__init__()
    self.open, self.tags, self.references, self.text = [], [], [], ''
    self.feed(content)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.references += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'action')]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_a_page_has_no_external_references_and_escapes_its_text(tmp_path):
  from gated.sweep.report.page import page

  swept = trained(tmp_path, grid([EVIL], [4e-3], [0]), lambda p: ('calm', 2.5))
  swept = dataclasses.replace(swept, name=EVIL)
  markdown = f'{described(swept)}\n![Figure 1](curves.svg)\n'
  parsed = Page(page(markdown, EVIL, {'curves.svg': b'<svg/>'}))
  assert not {'script', 'link', 'iframe', 'object', 'a'} & set(parsed.tags)
  assert parsed.references == ['data:image/svg+xml;base64,PHN2Zy8+']
  # It is in the title, the heading and the tables.
  assert parsed.text.count(EVIL) >= 4 and parsed.tags.count('img') == 1
  # The page also escapes text that Markdown does not.
  assert 'script' not in Page(page(EVIL.partition('!')[0], '', {})).tags


def test_a_missing_package_is_refused_with_its_installation(lab, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  for name in ('curves', 'figures', 'overlay'):
    monkeypatch.delitem(sys.modules, f'gated.sweep.report.{name}', raising=False)
    monkeypatch.delattr(report, name, raising=False)
  with pytest.raises(ValueError, match=r'matplotlib.*requirements-report\.txt'):
    report.write(tmp_path / 'out', [lab])
  assert not (tmp_path / 'out').exists()


def test_selected_points_are_judged_among_all_points(tmp_path, monkeypatch):
  figures = pytest.importorskip('gated.sweep.report.figures')
  monkeypatch.setattr(figures, 'draw', lambda pictures, lines, out: {})
  level = {1e-3: 2.5, 4e-3: 2.4, 8e-3: 4.5}
  swept = trained(
    tmp_path,
    grid(['baseline', 'elementwise'], seeds=[0]),
    lambda p: ('calm', level[p.config['optim']['lr']]),
  )
  out = storage.path(tmp_path / 'out')
  part = report.write(out, [swept], only='variant=baseline,lr=0.001,lr=0.008')
  assert [p.name for p in part.points] == [swept.points[i].name for i in (0, 2)]
  # The best loss of the sweep is not of the selected points.
  assert [p.diverged for p in part.points] == [False, True]
  message = storage.read(out / 'report.md', 1 << 20).decode()
  assert message.splitlines()[2] == (
    '2 points: 1 finished, 1 diverged. Only a part: 2 of the 6 of its grid: '
    'variant=baseline,lr=0.001,lr=0.008.'
  )
  with pytest.raises(ValueError, match='--only=lr=1, but lr has the values'):
    report.write(out, [swept], only='lr=1')


@pytest.mark.full
def test_a_report_is_complete_and_reproducible(lab, tmp_path):
  image = pytest.importorskip('matplotlib.image')
  outs = [storage.path(tmp_path / name) for name in ('first', 'second')]
  for out in outs:
    whole = report.write(out, [lab])
  assert list(whole.captions) == [
    *('overlay', 'loss_vs_lr', 'sensitivity', 'curves', 'warnings')
  ]
  files = storage.names(outs[0])
  assert storage.names(outs[1]) == files and len(files) == 8 + 3 * 5
  for name in files:
    first, second = (storage.read(out / name, 1 << 24) for out in outs)
    assert first == second, name
  for name in whole.captions:
    pixels = image.imread(outs[0] / f'{name}.png')
    assert min(pixels.shape[:2]) > 200
    # Half of the columns and a third of the rows have ink.
    inked = (pixels[..., :3] < 0.9).any(-1)
    assert inked.any(0).mean() > 0.5 and inked.any(1).mean() > 0.3
    assert b'<path' in storage.read(outs[0] / f'{name}.svg', 1 << 24)
    assert f'![Figure {list(whole.captions).index(name) + 1}]({name}.svg)' in (
      storage.read(outs[0] / 'report.md', 1 << 24).decode()
    )
  parsed = Page(storage.read(outs[0] / 'index.html', 1 << 24).decode())
  assert parsed.tags.count('img') == 5
  assert all(at.startswith('data:image/svg+xml;base64,') for at in parsed.references)
  for p in whole.points:
    assert not p.diverged or parsed.text.count(p.name) == 1
  captions = json.dumps(whole.captions)
  assert 'Crosses' in captions and 'Triangles' in captions


@pytest.mark.full
def test_the_command_needs_only_the_folder_of_a_sweep(tmp_path, capsys):
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
  # Only the report detects a run that never recovered but reached its end.
  assert script.main(['status', str(swept.folder)]) == 0
  output = capsys.readouterr().out
  assert '6 finished' in output and '`report` judges the losses as well' in output
  message = (swept.folder / 'report/report.md').read_text()
  # The paper has the same variants and learning rates, but not this model.
  assert 'layers, 400B' not in message and 'Comparison with the paper' not in message
  assert f'configs/tiny.py:gate=none --config.steps={STEPS}' in message
  assert swept.made['sha256'] in message and 'no ordering of these lines' in message
  out = tmp_path / 'other'
  lax = ['--multiple=5', '--rise=9', '--threshold=0.6', f'--out={out}']
  assert script.main(['report', str(swept.folder), *lax]) == 0
  assert '6 points: 6 finished' in capsys.readouterr().out
  message = (out / 'report.md').read_text()
  assert 'above 5 times the best' in message and 'more than 0.6 nats' in message
  assert script.main(['report', str(swept.folder), '--multiple=0.5']) == 2
  assert 'multiple=0.5' in capsys.readouterr().err
  assert script.main(['report', str(tmp_path)]) == 2
  assert 'is not a sweep' in capsys.readouterr().err
