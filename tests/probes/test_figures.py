"""Figures of the probes and the page of the gates: what they show and refuse."""

import html.parser
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small

import gated
from gated import evals, storage
from gated.plan import drawing
from gated.probes import page

EVIL = ['<b>', '&amp;', '"', "'", '</script>', '\n', 'é', ' x']


class Page(html.parser.HTMLParser):
  """The tags of a page, the texts of its spans, and its embedded numbers."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.spans, self.scripts = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in ('meta', 'br'):
      self.open.append((tag, dict(attrs)))
    if tag == 'span' and 'style' in dict(attrs):
      self.spans.append('')

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    tag, attrs = self.open[-1] if self.open else ('', {})
    if tag == 'span' and 'style' in attrs:
      self.spans[-1] += data
    if tag == 'script':
      self.scripts.append(data)


def scores(tokens, layers=2, heads=3):
  rng = np.random.default_rng(0)
  return rng.random((layers, heads, tokens))


def test_the_page_holds_every_token_escaped():
  score_LHT = scores(len(EVIL))
  text = page.page(score_LHT, EVIL, title='<i>run</i>')
  parsed = Page(text)
  assert parsed.spans == [*map(page.shown, EVIL)] and parsed.open == []
  assert not {'b', 'i', 'link', 'img', 'iframe'} & set(parsed.tags)
  assert '<i>' not in text and 'http://' not in text and 'src=' not in text
  numbers = json.loads(parsed.scripts[0])
  share = np.array(numbers['scores']) / 1000
  assert share.shape == (3, 4, len(EVIL))
  np.testing.assert_allclose(share[:2, :3], score_LHT, atol=1e-3)
  np.testing.assert_allclose(share[2, :3], score_LHT.mean(0), atol=1e-3)
  np.testing.assert_allclose(share[2, 3], score_LHT.mean((0, 1)), atol=1e-3)


def test_channels_are_averaged_and_colours_range_over_the_limits():
  score = np.stack([scores(4), scores(4) + 0.5], -1)
  numbers = json.loads(
    Page(page.page(score, EVIL[:4], title='', limits=(-2.0, 2.0))).scripts[0]
  )
  share = (score.mean(-1) + 2) / 4
  np.testing.assert_allclose(np.array(numbers['scores'])[:2, :3] / 1000, share, atol=1e-3)


# A page as far as its script uses one: the spans' style and title, and two selections.
DOM = """
const [data, script, choices] = JSON.parse(require('fs').readFileSync(0));
const spans = data.scores[0][0].map(() => ({style: {}, title: ''}));
const parts = {scores: {textContent: JSON.stringify(data)}, layer: {}, head: {}};
[parts.layer.value, parts.head.value] = choices[0];
const document = {getElementById: id => parts[id], querySelectorAll: () => spans};
new Function('document', script)(document);
const shown = choices.map(([layer, head], i) => {
  parts.layer.value = layer, parts.head.value = head;
  if (i) parts[i % 2 ? 'layer' : 'head'].onchange();
  return spans.map(span => [span.style.background, span.title]);
});
console.log(JSON.stringify(shown));
"""


@pytest.mark.skipif(not shutil.which('node'), reason='needs node')
def test_the_script_colours_the_text_for_the_chosen_layer_and_head():
  score_LHT = 4 * scores(len(EVIL)) - 2
  text = page.page(score_LHT, EVIL, title='', limits=(-2.0, 2.0))
  numbers, script = Page(text).scripts
  choices = [('2', '3'), ('0', '3'), ('0', '1')]  # The mean of all first.
  command = json.dumps([json.loads(numbers), script, choices])
  done = subprocess.run(
    ['node', '-e', DOM], input=command, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  expected = score_LHT.mean((0, 1)), score_LHT[0].mean(0), score_LHT[0, 1]
  for shown, score_T in zip(json.loads(done.stdout), expected, strict=True):
    for i, ((color, title), score) in enumerate(zip(shown, score_T, strict=True)):
      head, _, number = title.rpartition(' ')
      assert head == f'token {i}:' and float(number) == pytest.approx(score, abs=3e-3)
      # White at the least score, LOW, to HIGH at the greatest.
      levels = [int(x) for x in color[4:-1].split(',')]
      mixed = [a + (score + 2) / 4 * (b - a) for a, b in zip(page.LOW, page.HIGH)]
      np.testing.assert_allclose(levels, mixed, atol=1)


@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 5), (2, 3, 0)])
def test_scores_of_other_tokens_are_refused(shape):
  with pytest.raises(ValueError, match=r'scores of shape .* for 4 tokens'):
    page.page(np.zeros(shape), EVIL[:4], title='')


def number(layers, **more):
  return {'value': float(np.mean(layers)), 'layers': list(layers)} | more


def report(*, gate=True, depth=3):
  """A report with the numbers that are drawn."""
  rng = np.random.default_rng(depth)
  layers = lambda high: rng.random(depth) * high
  numbers = {
    'first_token_attention': number(layers(0.5)),
    'first_token_uniform': number([0.02] * depth),
    'm_act': number(layers(1000)),
  }
  for limit in ('1e-2', '1e-3'):
    before = layers(0.1)
    for kind in ('_before', '', '_scaled'):
      shares = before if not gate or kind == '_before' else layers(0.5)
      numbers[f'output_below_{limit}{kind}'] = number(shares)
  counts = rng.integers(1, 99, (depth, 50))
  histogram = {'value': counts.sum(0).tolist(), 'layers': counts.tolist()}
  histogram['edges'] = np.linspace(0, 1, 51).tolist()
  absent = {'value': None, 'layers': None}
  numbers['gate_histogram'] = histogram if gate else absent
  numbers['gate_mean'] = number(layers(1)) if gate else absent
  return numbers


def draw(name, *args, **options):
  figures = pytest.importorskip('gated.probes.figures')
  return getattr(figures, name)(*args, **options)


def words(figure):
  """All texts of a figure, its legend included."""
  from matplotlib.text import Text

  return '\n'.join(text.get_text() for text in figure.findobj(Text))


FIGURES = ('sinks', 'sparsity', 'gates', 'gates_by_layer')


@pytest.mark.parametrize('name', FIGURES)
def test_a_figure_of_two_runs_names_both(name):
  reports = {'first run': report(), 'second run': report(depth=5)}
  shown = words(draw(name, reports))
  assert all(label in shown for label in reports)


def test_a_run_without_a_gate_stands_beside_one_with_a_gate():
  reports = {'baseline': report(gate=False), 'gate': report()}
  for name in FIGURES:
    shown = words(draw(name, reports))
    assert ('baseline' in shown.replace('paper, baseline', '')) == (
      name in ('sinks', 'sparsity')
    )
  # It keeps the colour that it has in the other figures.
  from matplotlib.colors import to_rgb

  [ax] = draw('gates', reports).axes
  assert to_rgb(ax.lines[0].get_color()) == to_rgb('#D55E00')
  for name in ('gates', 'gates_by_layer'):
    with pytest.raises(ValueError, match='no gates to draw: baseline'):
      draw(name, {'baseline': report(gate=False)})


def test_numbers_of_the_paper_and_uniform_attention_are_marked():
  shown = words(draw('sinks', {'run': report()}))
  for text in ('0.467 and 1053', '0.048 and 94', 'uniform attention'):
    assert text in shown
  shown = words(draw('gates', {'run': report()}))
  assert all(f'mean {x}' in shown for x in (0.116, 0.221, 0.271))


@pytest.mark.parametrize('name', FIGURES)
def test_what_is_no_report_is_refused(name):
  for wrong in ({}, None, [report()]):
    with pytest.raises(ValueError, match='nothing to draw'):
      draw(name, wrong)
  with pytest.raises(ValueError, match='run: the report lacks'):
    draw(name, {'run': {'step': 3}})


def maps(depth=5, heads=3, tokens=6):
  weight = np.tril(np.random.default_rng(0).random((depth, heads, tokens, tokens)))
  return weight / weight.sum(-1, keepdims=True)


def test_maps_of_runs_are_drawn_side_by_side_at_four_layers():
  weight, tokens = maps(28), list('abcdef')
  figure = draw('attention', {'first': weight, 'second': weight[:2]}, tokens)
  shown = words(figure)
  for layer in (0, 6, 20, 27):
    first = weight[layer].mean(0)[1:, 0].mean()
    assert f'layer {layer}: first {first:.2f}' in shown
  assert 'first\n' in shown and 'second\n' in shown and '\na\na\nb' in shown
  images = [ax.images[0] for ax in figure.axes if ax.images and ax.get_visible()]
  assert len(images) == 6
  np.testing.assert_allclose(images[0].get_array().filled(0), weight[0].mean(0))
  figure = draw('attention_heads', weight, tokens, [3])
  assert sum(bool(ax.images) for ax in figure.axes) == 3


def test_maps_that_are_none_are_refused():
  for wrong in (np.zeros((2, 3, 4)), np.zeros((2, 3, 4, 5)), np.zeros((0, 3, 4, 4))):
    with pytest.raises(ValueError, match=r'maps of shape .* is needed'):
      draw('attention_heads', wrong)
  with pytest.raises(ValueError, match=r'layers=\[5\], but run has the layers 0 to 4'):
    draw('attention', {'run': maps()}, layers=[0, 5])


@pytest.mark.slow
def test_the_same_numbers_give_the_same_files(tmp_path):
  style = pytest.importorskip('gated.probes.style')
  for name in ('first', 'second'):
    figure = draw('sinks', {'run': report()})
    style.save(figure, storage.path(tmp_path), name, ('svg', 'png'))
  for kind in ('svg', 'png'):
    first, second = (tmp_path / f'{name}.{kind}' for name in ('first', 'second'))
    assert first.read_bytes() == second.read_bytes()


def test_figures_without_matplotlib_are_refused_with_its_installation(monkeypatch):
  for name in ('figures', 'style'):
    monkeypatch.delitem(sys.modules, f'gated.probes.{name}', raising=False)
    monkeypatch.delattr(f'gated.probes.{name}', raising=False)
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  run = gated.load('tests/golden/hf_authors_headwise')
  with pytest.raises(ValueError, match=r'into a workdir, but .*hf_authors_headwise'):
    drawing.check(run)
  run.about = {'step': 1}
  with pytest.raises(ValueError, match=r"matplotlib: pip install 'gated\[report\]'"):
    drawing.check(run)


def test_the_longest_document_of_the_first_row_is_drawn():
  batch = small.batch(2, 32)
  segment_T = batch.segments[0]
  ids = evals.longest_document(batch)
  sizes = [(segment_T == s).sum() for s in range(1, segment_T.max() + 1)]
  assert len(ids) == max(sizes)
  start = int(np.flatnonzero(segment_T == 1 + int(np.argmax(sizes)))[0])
  np.testing.assert_array_equal(ids, batch.tokens[0, start : start + len(ids)])


@pytest.mark.slow
def test_nothing_needs_matplotlib_until_figures_are_drawn():
  code = 'import sys, gated, gated.plan.load; print("matplotlib" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stdout.strip() == 'False', done.stderr
