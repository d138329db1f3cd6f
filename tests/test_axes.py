"""Grids as plain data: product, zip and chain of axes."""

import pytest

from configs import axes

LR = axes.axis('optim.lr', [1e-3, 4e-3])


def test_an_axis_is_called_by_the_last_part_of_its_knob():
  assert LR[1] == axes.Point({'lr': '0.004'}, {'optim.lr': 4e-3})
  assert axes.axis('optim.lr', [1e-3], 'rate')[0].labels == {'rate': '0.001'}


def test_a_float_is_written_so_that_it_comes_back_to_the_last_bit():
  values = [0.1 + 0.2, 1e-45, 4.5e-3, 1 / 3]
  assert [float(p.labels['lr']) for p in axes.axis('optim.lr', values)] == values


def test_a_choice_changes_several_knobs_under_one_name():
  points = axes.choice('variant', baseline={}, wide={'model.width': 8, 'model.ffn': 9})
  assert [p.labels for p in points] == [{'variant': 'baseline'}, {'variant': 'wide'}]
  assert points[1].changes == {'model.width': 8, 'model.ffn': 9}


def test_a_product_has_every_combination_and_the_last_axis_varies_fastest():
  points = axes.product(LR, axes.seeds(3))
  assert [(p.changes['optim.lr'], p.changes['seed']) for p in points] == [
    (lr, seed) for lr in (1e-3, 4e-3) for seed in range(3)
  ]
  assert list(points[0].labels) == ['lr', 'seed']
  assert axes.product() == [axes.Point({}, {})]


def test_zipped_axes_go_together_and_chained_ones_after_each_other():
  batches = axes.axis('batch', [8, 32])
  together = axes.zipped(LR, batches)
  assert [p.changes for p in together] == [
    {'optim.lr': 1e-3, 'batch': 8},
    {'optim.lr': 4e-3, 'batch': 32},
  ]
  assert axes.chain(LR, together) == [*LR, *together]


def test_axes_of_different_lengths_are_not_zipped():
  with pytest.raises(ValueError, match=r'\[2, 3\] points cannot be zipped'):
    axes.zipped(LR, axes.seeds(3))


@pytest.mark.parametrize('other', ['optim.lr', 'optim', 'optim.lr.more'])
def test_two_axes_that_change_the_same_knob_are_refused(other):
  with pytest.raises(ValueError, match=r'two axes change config\.optim'):
    axes.product(LR, axes.axis(other, [1], 'other'))


def test_the_rows_of_a_table_are_arguments_of_its_recipe():
  assert axes.rows('scale=test', ['baseline', 'k8']) == [
    axes.Point({'row': 'baseline'}, {}, 'baseline,scale=test'),
    axes.Point({'row': 'k8'}, {}, 'k8,scale=test'),
  ]
  points = axes.product(axes.rows('', ['a', 'b']), LR)
  assert points[3] == axes.Point({'row': 'b', 'lr': '0.004'}, {'optim.lr': 4e-3}, 'b')


def test_a_named_row_is_alone_in_its_grid():
  points = axes.rows('scale=test,k8', ['baseline', 'k8'])
  assert points == [axes.Point({'row': 'k8'}, {}, 'k8,scale=test')]


def test_two_arguments_of_one_recipe_are_refused():
  other = [axes.Point({'size': 'large'}, {}, '48l')]
  with pytest.raises(ValueError, match='two axes give the recipe an argument: k8 and 48'):
    axes.product(axes.rows('', ['k8']), other)


def test_two_axes_of_one_name_are_refused():
  with pytest.raises(ValueError, match="two axes are named 'lr'"):
    axes.product(LR, axes.axis('model.attn.gate.lr', [1.0]))
