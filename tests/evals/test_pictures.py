"""Figures of evaluations: what they show, for one model and for several."""

import numpy as np
import pytest

figures = pytest.importorskip('gated.evals.figures')


def words(figure):
  """All texts of a figure, its legend included."""
  from matplotlib.text import Text

  return {text.get_text() for text in figure.findobj(Text)}


def curve(tokens, place='document'):
  nats = [1.0 + 1 / (i + 1) if n else None for i, n in enumerate(tokens)]
  return {'position_in': place, 'nats_per_token': nats, 'tokens': tokens}


def test_losses_are_drawn_over_the_context_weighted_by_their_targets():
  tokens = [4, 0, *[1] * 5, 3]  # Positions 4 and 5, contexts 5 and 6, have bins apart.
  curves = {'first': curve(tokens), 'second': curve([2] * 64, 'row')}
  figure = figures.positions(curves)
  [ax] = figure.axes
  assert ax.get_xlabel() == 'tokens of context in the document or row'
  x, y = ax.lines[0].get_data()
  assert x.tolist() == [1, 3, 4, 5, 6, 7, 8]  # No target has 2 tokens of context.
  np.testing.assert_allclose(y, 1 + 1 / x)
  x, y = ax.lines[1].get_data()
  context = np.arange(54, 64)  # The last whole quarter of an octave.
  np.testing.assert_allclose(x[-2], context.mean())
  np.testing.assert_allclose(y[-2], (1 + 1 / context).mean())
  assert {'first', 'second'} <= words(figure)


def losses(*pairs):
  return {
    name: {'nats_per_token': nats, 'nats_per_token_stderr': error}
    for name, nats, error in pairs
  }


def test_a_domain_has_a_point_and_its_error_for_each_model():
  """Domains that only one model has are shown, and a row alone has no error."""
  reports = {
    'first': {'domains': losses(('code', 1.5, 0.1), ('prose', 2.5, None))},
    'second': {'domains': losses(('prose', 2.0, 0.2), ('more', 3.0, 0.3))},
  }
  figure = figures.by_domain(reports)
  [ax] = figure.axes
  assert [label.get_text() for label in ax.get_yticklabels()] == ['code', 'prose', 'more']
  assert {'first', 'second'} <= words(figure)
  points, bars = zip(*(each[::2] for each in ax.containers), strict=True)
  assert [line.get_xdata().tolist() for line in points] == [[1.5, 2.5], [2.0, 3.0]]
  rows = [np.rint(line.get_ydata()).tolist() for line in points]
  assert rows == [[0, 1], [1, 2]]
  ends = bars[1][0].get_segments()
  np.testing.assert_allclose([end[:, 0] for end in ends], [[1.8, 2.2], [2.7, 3.3]])


def test_a_domain_without_rows_has_no_point():
  figure = figures.by_domain(
    {'run': {'domains': losses(('a', None, None), ('b', 1.0, 0.1))}}
  )
  [line] = [line for line, *_ in figure.axes[0].containers]
  assert np.isnan(line.get_xdata()[0]) and line.get_xdata()[1] == 1


def task(loss, score=None):
  errors = {'loss_stderr': loss / 10, 'score_stderr': score and score / 10}
  return {'loss': loss, 'score': score} | errors


@pytest.mark.parametrize('name', ['loss', 'score'])
def test_ruler_has_a_panel_for_each_task_and_a_point_for_each_length(name):
  by_task = lambda factor: {'qa_1': task(2.0 * factor, 40.0), 'fwe': task(3.0, 20.0)}
  mean = {'mean': {'loss': 2.5, 'score': 30.0}}
  whole = {length: by_task(int(length) / 512) | mean for length in ('512', '1024')}
  reports = {'one': {'lengths': whole}, 'two': {'lengths': whole | {'1024': None}}}
  figure = figures.ruler(reports, name)
  panels = {ax.get_title(): ax for ax in figure.axes if ax.get_visible()}
  assert [*panels] == ['mean', 'qa_1', 'fwe'] and {'one', 'two'} <= words(figure)
  drawn = [line for line, *_ in panels['qa_1'].containers]
  assert [line.get_xdata().tolist() for line in drawn] == [[512, 1024], [512]]
  values = {'loss': [2.0, 4.0], 'score': [40.0, 40.0]}[name]
  assert [line.get_ydata().tolist() for line in drawn] == [values, values[:1]]


def test_nothing_to_draw_is_an_error():
  with pytest.raises(ValueError, match='nothing to draw'):
    figures.by_domain({})
  with pytest.raises(ValueError, match="first: the report lacks 'domains'"):
    figures.by_domain({'first': {}})
