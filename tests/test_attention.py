"""One attention layer: what a token sees, and where a gate stands among the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import attention, layers

D, T = 16, 7
NUMERICS = layers.Numerics(
  weights='float32', compute='float32', init_std=0.3, residual_init='plain', norm_eps=1e-6
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, D)), jnp.float32)


def layer(**changes):
  cfg = small.attention_config(**changes)
  opts = dict(width=D, std_out=0.3, numerics=NUMERICS)
  return small.filled(
    jax.eval_shape(lambda: attention.Attention(cfg, jax.random.key(0), **opts))
  )


def angles(built, positions):
  return layers.rope_angles(
    jnp.asarray(positions), built.cfg.head_dim, built.cfg.rope_base
  )


FORWARD = small.jit(lambda built, *args: built(*args))


def run(built, positions=np.arange(T)[None]):  # noqa: B008
  return FORWARD(built, X, angles(built, positions), None)


def sees(built, segments=None):
  """Which tokens' inputs each token's output depends on: booleans (T, T)."""
  angle = angles(built, np.arange(T)[None])
  slope = small.jit(jax.jacrev(lambda x: built(x[None], angle, segments)[0]))(X[0])
  return np.abs(slope).max((1, 3)) > 0


@pytest.mark.parametrize('position', ['none', 'value', 'sdpa'])
def test_a_token_sees_itself_and_all_before_it_and_nothing_after(position):
  built = layer(gate__position=position)
  np.testing.assert_array_equal(sees(built), np.tril(np.ones((T, T), bool)))


def test_a_token_sees_its_own_document_alone():
  segments = np.array([[1, 1, 1, 2, 2, 0, 0]])
  expected = np.tril(segments == segments.T)
  np.testing.assert_array_equal(sees(layer(gate__position='value'), segments), expected)


def test_only_differences_of_positions_matter():
  built = layer(gate__position='sdpa')
  np.testing.assert_allclose(
    run(built), run(built, positions=np.arange(T)[None] + 50), atol=1e-4
  )
  assert np.abs(run(built) - run(built, positions=2 * np.arange(T)[None])).max() > 1e-2


def test_rope_base_is_a_knob():
  assert np.abs(run(layer()) - run(layer(rope_base=100.0))).max() > 1e-3


def test_query_heads_share_the_keys_and_values_of_their_group():
  """Each KV head written out twice is the same layer: head h reads KV head h // 2."""
  grouped, full = layer(kv_heads=2), layer(kv_heads=4)
  for name in ('key', 'value'):
    weight = getattr(grouped, name).weight[...]
    getattr(full, name).weight[...] = jnp.repeat(weight, 2, axis=1)
  np.testing.assert_allclose(run(grouped), run(full), atol=1e-5)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
  for qk_norm in (True, False):
    built = layer(qk_norm=qk_norm)
    before = run(built)
    for projection in (built.query, built.key):
      projection.weight[...] = 5 * projection.weight[...]
    moved = np.abs(run(built) - before).max()
    assert moved < 1e-4 if qk_norm else moved > 1e-2


def test_a_headwise_gate_before_qk_norm_would_indeed_be_cancelled():
  """Why the config refuses it: seen with QK-norm's refusal stepped around."""
  changes = dict(
    gate__position='query', gate__granularity='headwise', gate__place='after'
  )
  late, early, ungated = layer(**changes), layer(**changes), layer()
  object.__setattr__(early.cfg.gate, 'place', 'before')
  np.testing.assert_allclose(run(early), run(ungated), atol=1e-3)
  assert np.abs(run(late) - run(ungated)).max() > 1e-2


@pytest.mark.parametrize('position', ['query', 'key'])
def test_place_puts_the_gate_before_or_after_qk_norm(position):
  early, late = (
    layer(gate__position=position, gate__place=p) for p in ('before', 'after')
  )
  assert np.abs(run(early) - run(late)).max() > 1e-3
  # Without QK-norm there is nothing to stand before or after of.
  early, late = (
    layer(gate__position=position, gate__place=p, qk_norm=False)
    for p in ('before', 'after')
  )
  np.testing.assert_array_equal(run(early), run(late))


@pytest.mark.parametrize('position', ['query', 'key', 'value', 'sdpa', 'out'])
def test_a_gate_acts_at_its_own_position(position):
  """A gate whose score is 1/2 there is the same as halving that tensor's weight."""
  built = layer(gate__position=position, qk_norm=False, gate__place='before')
  built.gate.weight[...] = jnp.zeros_like(built.gate.weight[...])
  halved = layer(qk_norm=False)
  weight = getattr(halved, 'out' if position == 'sdpa' else position).weight
  weight[...] = weight[...] / 2
  np.testing.assert_allclose(run(built), run(halved), atol=1e-5)
  assert np.abs(run(built) - run(layer(qk_norm=False))).max() > 1e-2


def test_biases_are_added_where_asked():
  plain = layer()
  assert plain.query.bias is None and plain.out.bias is None
  built = layer(bias=True, out_bias=True)
  H, G, K = 4, 2, 8
  shapes = [built.query.bias.shape, built.key.bias.shape, built.value.bias.shape]
  assert shapes == [(H, K), (G, K), (G, K)] and built.out.bias.shape == (D,)
  for projection in (built.query, built.key, built.value):
    projection.bias[...] = jnp.zeros_like(projection.bias[...])
  np.testing.assert_allclose(
    run(built), run(plain) + built.out.bias[...][None, None], atol=1e-5
  )


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (
      dict(heads=4, kv_heads=3),
      r'attn\.heads=4 must be a multiple of .*attn\.kv_heads=3',
    ),
    (dict(kv_heads=0), r'attn\.kv_heads=0'),
    (dict(heads=0), r'attn\.heads=0'),
    (dict(head_dim=7), r'attn\.head_dim=7'),
    (dict(head_dim=0), r'attn\.head_dim=0'),
    (dict(rope_base=0.5), r'attn\.rope_base=0\.5'),
    (dict(max_segments=1), r'attn\.max_segments=1'),
  ],
)
def test_a_layer_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\.' + said):
    small.attention_config(**changes)
