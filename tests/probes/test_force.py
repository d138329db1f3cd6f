"""Gates forced open, closed, to their mean or to a constant."""

import jax
import numpy as np
import pytest
import small

from gated.devices import trees
from gated.probes import force, gates

BATCH = small.batch(4, 24)
GATES = {
  'elementwise': dict(position='sdpa'),
  'headwise': dict(position='sdpa', granularity='headwise'),
  'shared': dict(position='sdpa', heads='shared'),
  'value': dict(position='value', source='value'),
  'parameter': dict(position='sdpa', source='parameter'),
  'query': dict(position='query', place='after'),
  'out': dict(position='out'),
}
EVERY = [
  name if name in ('elementwise', 'out') else pytest.param(name, marks=pytest.mark.full)
  for name in GATES
]


def gated(name, **changes):
  knobs = {f'attn__gate__{key}': value for key, value in GATES[name].items()}
  return small.model_of(**knobs, **changes)


def forced(net, gates, layers=None, mean=None):
  own, *_ = force.check(net.cfg, gates, layers)
  arrays = force.arrays(net.cfg, gates, layers, mean)
  return force.force(net, own, *map(jax.numpy.asarray, arrays))


def logits(net):
  run = lambda net, batch: net(batch.tokens, batch.segments, batch.positions)
  return jax.jit(run)(net, BATCH)


@pytest.mark.slow
@pytest.mark.parametrize('name', EVERY)
def test_open_gates_give_the_model_without_a_gate(name):
  plain = small.model_of()
  close = dict(rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(logits(forced(gated(name), 'open')), logits(plain), **close)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['headwise', 'out', 'value'])
def test_closed_gates_give_a_model_without_attention(name):
  plain = small.model_of()
  leaves = trees.flatten(plain)
  leaves['blocks.attn.out.weight'] = 0 * leaves['blocks.attn.out.weight']
  silent = trees.unflatten(plain, leaves)
  close = dict(rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    logits(forced(gated(name), 'closed')), logits(silent), **close
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', EVERY)
def test_a_constant_is_the_score_of_the_chosen_layers_alone(name):
  net = gated(name, depth=3)
  before, after = (
    np.asarray(jax.jit(gates.scores)(x, BATCH)) for x in (net, forced(net, 0.15, [1]))
  )
  assert before.shape == after.shape and (after[1] == np.float32(0.15)).all()
  np.testing.assert_array_equal(after[0], before[0])
  # The input of the next layer has changed, unless its score has none.
  assert (np.abs(after[2] - before[2]).max() > 1e-4) == (name != 'parameter')


@pytest.mark.slow
@pytest.mark.parametrize('name', EVERY)
def test_the_mean_is_taken_over_tokens_by_layer_head_and_channel(name):
  net = gated(name)
  score = np.asarray(jax.jit(gates.scores)(net, BATCH))[:, 0].swapaxes(1, 2)
  again = np.asarray(
    jax.jit(gates.scores)(forced(net, 'mean', None, score.mean(2)), BATCH)
  )
  expected = score.mean(2)[:, None, None]
  np.testing.assert_allclose(again, np.broadcast_to(expected, again.shape), rtol=1e-6)


def test_a_forced_gate_may_be_forced_again_and_the_model_stays_as_it_was():
  net = gated('headwise')
  twice = forced(forced(net, 'open'), 'closed', [0])
  score = np.asarray(jax.jit(gates.scores)(twice, BATCH))
  assert (score[0] == 0).all() and (score[1] == 1).all()
  assert 0 < np.asarray(jax.jit(gates.scores)(net, BATCH)).min() < 1
  assert gates.weight_norms(twice, 'gate').shape == (2, 4)


def test_a_forced_gate_is_spelled_with_its_layers():
  assert force.parse('mean@0,5-7', 8) == ('mean', [0, 5, 6, 7])
  assert force.parse('open', 8) == ('open', None)
  assert force.parse('0.15@3', 8) == (0.15, [3])
  assert force.parse('value:mean@last:2', 8) == ('value:mean', [6, 7])


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('open@8', "layers='8', but the model has the layers 0 to 7"),
    ('open@5-99999999', "layers='5-99999999', but the model has"),
    ('open@', "layers='', but layers are expected: 'all', 'every:K'"),
    ('open@7-5', "layers='7-5', but the model has the layers 0 to 7, and a range asc"),
    ('open@-1', "layers='-1', but layers are expected"),
    ('open@1,x', "layers='1,x', but layers are expected"),
  ],
)
def test_layers_that_do_not_exist_are_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    force.parse(spec, 8)


@pytest.mark.parametrize('name', EVERY)
def test_the_sums_of_scores_over_rows_exclude_padding(name):
  net = gated(name)
  total, tokens = jax.device_get(jax.jit(gates.sums)(net, BATCH))
  live_N = (BATCH.segments > 0).ravel()
  score = np.asarray(jax.jit(gates.scores)(net, BATCH))
  score_LNx = score.reshape(len(score), live_N.size, *score.shape[3:])
  assert tokens == live_N.sum() < live_N.size
  expected = score_LNx[:, live_N].astype(float).sum(1)
  np.testing.assert_allclose(total.reshape(expected.shape), expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('gate', 'layers', 'message'),
  [
    ('open', [0, 2], r'layers=\[0, 2\], but the model has the layers 0 to 1'),
    ('open', [-1], r'layers=\[-1\], but the model has the layers 0 to 1'),
    ('open', [0.5], 'a list of numbers is needed'),
    ('ajar', None, r"gates='ajar', but allowed are \['open', 'closed', 'mean'\]"),
    (float('nan'), None, 'gates=nan, but allowed'),
    ('mean', None, "gates='mean' needs a text"),
  ],
)
def test_wrong_gates_and_layers_are_refused(gate, layers, message):
  with pytest.raises(ValueError, match=message):
    forced(gated('headwise'), gate, layers)


@pytest.mark.slow
def test_one_of_several_gates_is_forced_in_the_layers_that_have_it():
  several = dict(attn__gates='value granularity=headwise layers=1,2', depth=3)
  net = gated('elementwise', **several)
  assert gates.scores(net, BATCH, 'value').shape == (2, *BATCH.tokens.shape, 2)
  closed = forced(net, 'value:closed', [2])
  both = [np.asarray(gates.scores(x, BATCH, 'value')) for x in (net, closed)]
  np.testing.assert_array_equal(both[1][0], both[0][0])
  assert (both[1][1] == 0).all() and both[0].min() > 0
  first = [np.asarray(gates.scores(x, BATCH)) for x in (net, closed)]
  np.testing.assert_array_equal(*first)  # Layer 2 is the last.
  with pytest.raises(ValueError, match=r'layers=\[0\], but .* layers \[1, 2\] with it'):
    forced(net, 'value:open', [0])
  with pytest.raises(ValueError, match="position of a gate='key', but allowed are"):
    forced(net, 'key:open')


def test_a_text_is_for_the_mean_alone_and_a_model_without_a_gate_is_refused():
  with pytest.raises(ValueError, match="gates='open' takes no text"):
    forced(gated('headwise'), 'open', None, np.ones((2, 4)))
  with pytest.raises(ValueError, match=r"has no gate: .*position='none'"):
    forced(small.model_of(), 'open')
