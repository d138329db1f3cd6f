"""One attention layer: what a token sees, and where a gate stands among the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated.devices import trees
from gated.model import attention, gate, layers, remedies

D, T = 16, 7
NUMERICS = small.numerics()
X = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, D)), jnp.float32)


def layer(**changes):
  cfg = small.attention_config(**changes)
  opts = dict(width=D, std_out=0.3, numerics=NUMERICS)
  return small.filled(
    jax.eval_shape(lambda: attention.Attention(cfg, jax.random.key(0), **opts))
  )


def angles(built, positions):
  return small.angles(positions, built.cfg.head_dim, built.cfg.rope_base)


FORWARD = jax.jit(lambda built, *args: built(*args))


def run(built, positions=np.arange(T)[None]):  # noqa: B008
  return FORWARD(built, X, angles(built, positions), None)


def sees(built, segments=None):
  """Which tokens' inputs each token's output depends on: booleans (T, T)."""
  angle = angles(built, np.arange(T)[None])
  slope = jax.jit(jax.jacrev(lambda x: built(x[None], angle, segments)[0]))(X[0])
  return np.abs(slope).max((1, 3)) > 0


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize('cap', [2.0, pytest.param(0.0, marks=pytest.mark.full)])
@pytest.mark.parametrize('normalizer', remedies.OVER_SOFTMAX)
def test_a_layer_in_blocks_is_the_layer(normalizer, cap):
  segments = np.array([[1, 1, 1, 2, 2, 0, 0]])

  @jax.jit
  def gradients(built, angle):
    total = lambda built: jnp.sum(jnp.sin(built(X, angle, segments)))
    return jax.value_and_grad(total)(built)

  def leaves(backend):
    built = layer(normalizer=normalizer, logit_cap=cap, backend=backend)
    return jax.tree.leaves(gradients(built, angles(built, np.arange(T)[None])))

  for a, b in zip(leaves('blockwise'), leaves('reference')):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


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


@pytest.mark.slow
@pytest.mark.parametrize(
  'position', [p for p, at in gate.POSITIONS.items() if at and at.normed]
)
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


@pytest.mark.parametrize('position', [p for p, at in gate.POSITIONS.items() if at])
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
    (dict(max_segments=0), r'attn\.max_segments=0'),
  ],
)
def test_a_layer_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\.' + said):
    small.attention_config(**changes)


def parts(built):
  """q, k as they meet and v, (T, H, K) in float64, KV heads repeated; and the scale."""
  at = lambda part: np.asarray(part.weight[...], np.float64)
  x, cfg = np.asarray(X[0], np.float64), built.cfg
  q, k, v = (
    np.einsum('td,dhk->thk', x, at(p)) for p in (built.query, built.key, built.value)
  )

  def turned(y, norm):
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
    z = y[..., : cfg.head_dim // 2] + 1j * y[..., cfg.head_dim // 2 :]
    z = z * np.exp(1j * np.asarray(angles(built, np.arange(T)[None]), float)[0][:, None])
    return np.concatenate([z.real, z.imag], -1)

  repeat = lambda a: np.repeat(a, cfg.heads // cfg.kv_heads, 1)
  q, k = turned(q, built.query_norm), repeat(turned(k, built.key_norm))
  return q, k, repeat(v), cfg.head_dim**-0.5


def still_query(built):
  """q before RoPE."""
  weight = np.asarray(built.query.weight[...], np.float64)
  q = np.einsum('td,dhk->thk', np.asarray(X[0], np.float64), weight)
  q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6)
  return q * np.asarray(built.query_norm.scale[...])


def with_extra(built, logit_TN, value_N, head, cap=0.0):
  """One head's softmax over its keys and N terms beside them -> y_TK."""
  q, k, v, scale = (a if np.isscalar(a) else a[:, head] for a in parts(built))
  score = scale * q @ k.T
  score = cap * np.tanh(score / cap) if cap else score
  weight = np.exp(np.where(np.tril(np.ones((T, T))) > 0, score, -np.inf))
  extra = np.exp(logit_TN)
  total = weight.sum(-1, keepdims=True) + extra.sum(-1, keepdims=True)
  return (weight @ v + extra @ value_N) / total


def projected(built, y_THK):
  return np.einsum('thk,hkd->td', y_THK, np.asarray(built.out.weight[...], np.float64))


@pytest.mark.parametrize('normalizer', ['off_by_one', 'sink_logit'])
def test_a_sink_in_the_denominator_takes_its_share_and_adds_nothing(normalizer):
  built = layer(normalizer=normalizer)
  sinks = np.zeros(4)
  if normalizer == 'sink_logit':
    assert built.sinks.logit.shape == (4,)
    built.sinks.logit[...] = jnp.asarray([-1.0, 0.5, 2.0, 4.0])
    sinks = np.asarray(built.sinks.logit[...], float)
  else:
    assert not jax.tree.leaves(built.sinks)
  heads = [
    with_extra(built, np.full((T, 1), s), np.zeros((1, 8)), h)
    for h, s in enumerate(sinks)
  ]
  exact = projected(built, np.stack(heads, 1))
  np.testing.assert_allclose(run(built)[0], exact, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('values', ['learned', 'zero'])
@pytest.mark.parametrize('normalizer', ['softmax', 'sink_logit'])
def test_sink_tokens_are_keys_without_a_position_that_all_tokens_see(values, normalizer):
  cap = 3.0
  built = layer(sink_tokens=3, sink_values=values, normalizer=normalizer, logit_cap=cap)
  assert built.sinks.key.shape == (3, 2, 8)
  assert (built.sinks.value is None) == (values == 'zero')
  q, scale = still_query(built), built.cfg.head_dim**-0.5
  key = np.repeat(np.asarray(built.sinks.key[...], float), 2, 1)
  value = np.zeros_like(key)
  if values == 'learned':
    value = np.repeat(np.asarray(built.sinks.value[...], float), 2, 1)
  heads = []
  for h in range(4):
    logit = cap * np.tanh(scale * q[:, h] @ key[:, h].T / cap)
    value_h = value[:, h]
    if normalizer == 'sink_logit':
      s = float(built.sinks.logit[...][h])
      logit = np.concatenate([logit, np.full((T, 1), s)], 1)
      value_h = np.concatenate([value_h, np.zeros((1, 8))])
    heads.append(with_extra(built, logit, value_h, h, cap))
  np.testing.assert_allclose(
    run(built)[0], projected(built, np.stack(heads, 1)), atol=1e-4
  )


def test_a_sink_tokens_share_does_not_depend_on_the_position():
  """Nor does YaRN's scale on queries and keys leave the sinks behind."""
  built = layer(sink_tokens=2)
  far = run(built, positions=np.arange(T)[None] + 4000)
  np.testing.assert_allclose(run(built), far, atol=2e-3)
  yarn = dict(yarn__factor=4.0, yarn__attention=1.3, yarn__original=10**9)
  stretched = layer(sink_tokens=2, **yarn)
  for part in (built.query_norm.scale, built.key_norm.scale, built.sinks.key):
    part[...] = 1.3 * part[...]
  np.testing.assert_allclose(run(stretched), run(built), atol=1e-4)


@pytest.mark.slow
def test_sinks_gradients_are_those_of_one_softmax_over_everything():
  """No part of q, k or a sink's logit is left without its share of the gradient."""
  built = layer(normalizer='sink_logit', sink_tokens=2, qk_norm=False)
  cfg = built.cfg

  def joint(net):
    turn = lambda y: layers.rope(y, angles(net, np.arange(T)[None]), 1.0)
    wide = lambda a, axis: jnp.repeat(a, cfg.heads // cfg.kv_heads, axis)
    q, k, v = turn(net.query(X)), wide(turn(net.key(X)), 2), wide(net.value(X), 2)
    scale = cfg.head_dim**-0.5
    score = jnp.einsum('bthk,bshk->bths', q, k) * scale
    causal = jnp.tril(jnp.ones((T, T), bool))[None, :, None]
    score = jnp.where(causal, score, -1e30)
    key = wide(net.sinks.key[...], 1)
    sink = jnp.einsum('bthk,nhk->bthn', net.query(X), key) * scale
    last = jnp.broadcast_to(net.sinks.logit[...][None, None, :, None], (1, T, 4, 1))
    weight = jax.nn.softmax(jnp.concatenate([score, sink, last], -1), -1)
    y = jnp.einsum('bths,bshk->bthk', weight[..., :T], v)
    value = wide(net.sinks.value[...], 1)
    y += jnp.einsum('bthn,nhk->bthk', weight[..., T : T + 2], value)
    return jnp.sum(jnp.sin(net.out(y)))

  angle = angles(built, np.arange(T)[None])
  ours = jax.jit(jax.grad(lambda net: jnp.sum(jnp.sin(net(X, angle, None)))))(built)
  exact = trees.flatten(jax.jit(jax.grad(joint))(built))
  for name, grad in trees.flatten(ours).items():
    assert np.abs(exact[name]).max() > 1e-4, name
    np.testing.assert_allclose(grad, exact[name], atol=1e-5, err_msg=name)


def test_each_heads_output_is_normalised_by_itself():
  plain, normed = layer(), layer(output='rms_norm')
  assert normed.output_norm.scale.shape == (4, 8)
  for built in (plain, normed):
    eye = jnp.eye(32, 16).reshape(4, 8, 16)
    built.out.weight[...] = eye
  y = np.asarray(run(plain), float)[0].reshape(T, 2, 8)
  rms = np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
  scale = np.asarray(normed.output_norm.scale[...])[:2]
  np.testing.assert_allclose(
    np.asarray(run(normed))[0].reshape(T, 2, 8), y / rms * scale, atol=1e-4
  )


def test_silu_on_the_output_has_no_parameters_and_is_silu():
  plain, silu = layer(), layer(output='silu')
  assert trees.flatten(plain).keys() == trees.flatten(silu).keys()
  eye = jnp.eye(32, 16).reshape(4, 8, 16)
  plain.out.weight[...] = silu.out.weight[...] = eye
  np.testing.assert_allclose(run(silu), jax.nn.silu(run(plain)), atol=1e-5)


def test_switch_with_one_expert_is_a_headwise_gate_on_the_values():
  """Table 6, row 6: v 1top1 is G2 headwise."""
  switch = layer(switch__where='value')
  gated = layer(gate__position='value', gate__granularity='headwise')
  gated.value.weight[...] = switch.value.project.weight[...][:, :, 0]
  gated.gate.weight[...] = switch.value.router.weight[...][..., 0]
  np.testing.assert_allclose(run(switch), run(gated), atol=1e-5)


def test_switch_mixes_the_top_k_of_its_experts_by_their_scores():
  built = layer(switch__where='key_value', switch__experts=3, switch__top_k=2)
  for part in (built.key, built.value):
    assert part.project.weight.shape == (16, 2, 3, 8)
    assert part.router.weight.shape == (16, 2, 3)
  x = np.asarray(X[0], np.float64)
  project, router = (
    np.asarray(p.weight[...], np.float64)
    for p in (built.value.project, built.value.router)
  )
  score = 1 / (1 + np.exp(-np.einsum('td,dge->tge', x, router)))
  every = np.einsum('td,dgek->tgek', x, project)
  exact = np.zeros((T, 2, 8))
  for t in range(T):
    for g in range(2):
      for e in np.argsort(-score[t, g])[:2]:
        exact[t, g] += score[t, g, e] * every[t, g, e]
  np.testing.assert_allclose(built.value(X)[0], exact, atol=1e-4)


def test_a_value_state_gate_reads_the_values_it_gates():
  for granularity, shape in (('elementwise', (2, 8, 8)), ('headwise', (2, 8))):
    gate = dict(position='value', source='value', granularity=granularity)
    built, plain = layer(**{f'gate__{k}': v for k, v in gate.items()}), layer()
    assert built.gate.weight.shape == shape
    w = np.asarray(built.gate.weight[...], float)
    v = np.asarray(plain.value(X), float)
    logit = np.einsum('btgk,gk...->btg...', v, w)
    logit = logit if granularity == 'elementwise' else logit[..., None]
    np.testing.assert_allclose(
      built.gate(plain.value(X), X), v / (1 + np.exp(-logit)), atol=1e-5
    )


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(normalizer='relu'), r"attn\.normalizer='relu', but allowed are 'softmax'"),
    (
      dict(normalizer='softpick', sink_tokens=2),
      r"attn\.sink_tokens=2 with .*normalizer='softpick'",
    ),
    (
      dict(normalizer='sink_logit', output='rms_norm'),
      r"attn\.output='rms_norm' with .*, but the norm cancels sinks without",
    ),
    (
      dict(sink_tokens=2, sink_values='zero', output='rms_norm'),
      r"attn\.output='rms_norm' with .*, but the norm cancels sinks without",
    ),
    (dict(sink_tokens=-1), r'attn\.sink_tokens=-1'),
    (dict(sink_values='one'), r"attn\.sink_values='one'"),
    (dict(logit_cap=-1.0), r'attn\.logit_cap=-1\.0'),
    (dict(output='layer_norm'), r"attn\.output='layer_norm'"),
    (dict(switch__where='query'), r"attn\.switch\.where='query'"),
    (
      dict(switch__experts=2, switch__top_k=3),
      r'attn\.switch\.top_k=3, but there are .*attn\.switch\.experts=2',
    ),
    (
      dict(switch__where='key_value', switch__experts=4, switch__top_k=1),
      r"attn\.switch\.top_k=1 with where='key_value': QK-norm cancels",
    ),
    (
      dict(gate__position='sdpa', gate__source='value'),
      r"attn\.gate\.source='value' with position='sdpa'.*position='value'",
    ),
    (dict(yarn__factor=0.5), r'attn\.yarn\.factor=0\.5'),
    (dict(yarn__beta_slow=40.0), r'attn\.yarn\.beta_slow=40\.0'),
  ],
)
def test_a_remedy_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=r'config\.model\.' + said):
    small.attention_config(**changes)
