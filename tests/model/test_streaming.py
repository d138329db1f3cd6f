"""StreamingLLM against its cache, filled and re-indexed by hand."""

import jax
import numpy as np
import pytest
import small

from gated.model import attention, decoder, layers, streaming

T, WINDOW, KEPT = 14, 4, 3
X = np.random.default_rng(0).normal(size=(1, T, 16)).astype(np.float32)


def by_hand(net, x_TD):
  """Each query's cache as a list: (y of all heads before the output projection)."""
  cfg, K = net.cfg, net.cfg.head_dim
  frequency = layers.rope_frequencies(K, cfg.rope_base, cfg.yarn)
  project = lambda part, norm: np.asarray(norm(part(x_TD[None])))[0]
  q, k = project(net.query, net.query_norm), project(net.key, net.key_norm)
  v, share = np.asarray(net.value(x_TD[None]))[0], cfg.heads // cfg.kv_heads

  def turned(x_NHK, position_N):
    a, b = np.split(x_NHK, 2, -1)
    z = (a + 1j * b) * np.exp(1j * np.outer(position_N, frequency))[:, None]
    return cfg.yarn.scale * np.concatenate([z.real, z.imag], -1)

  y = np.zeros((T, cfg.heads, K))
  for t in range(T):
    cache = [i for i in range(t + 1) if i < KEPT or i > t - WINDOW]
    places = np.arange(len(cache))
    key, query = turned(k[cache], places), turned(q[t][None], places[-1:])[0]
    for h in range(cfg.heads):
      score = key[:, h // share] @ query[h] / np.sqrt(K)
      score = cfg.logit_cap * np.tanh(score / cfg.logit_cap) if cfg.logit_cap else score
      weight = np.exp(score - score.max())
      extra = np.exp(-score.max()) if cfg.normalizer == 'off_by_one' else 0
      y[t, h] = weight @ v[cache, h // share] / (weight.sum() + extra)
  return y


@pytest.mark.slow
@pytest.mark.parametrize(
  'knobs',
  [
    {},
    dict(normalizer='off_by_one', yarn__factor=2.0, yarn__original=8, logit_cap=3.0),
  ],
  ids=['plain', 'off_by_one, YaRN and a cap'],
)
def test_a_query_sees_its_cache_at_the_positions_in_the_cache(knobs):
  cfg = small.attention_config(window=WINDOW, **knobs)
  numerics = small.model_config().numerics
  build = lambda: attention.Attention(
    cfg, jax.random.key(0), width=16, std_out=0.3, numerics=numerics
  )
  net = small.filled(jax.eval_shape(build))
  net.kept = KEPT
  frequency = layers.rope_frequencies(cfg.head_dim, cfg.rope_base, cfg.yarn)
  angle = layers.rope_angles(np.arange(T)[None], frequency)
  trace = jax.jit(lambda net, x: net.trace(x, angle, None).sdpa)(net, X)
  np.testing.assert_allclose(trace[0], by_hand(net, X[0]), rtol=1e-4, atol=1e-5)
  empty = np.zeros((1, T, cfg.kv_heads, cfg.head_dim), np.float32)
  cache = attention.Cache(empty, empty, np.zeros(1, np.int32))
  with pytest.raises(NotImplementedError, match='no generation'):
    jax.eval_shape(lambda: net.trace(X, angle, None, cache).sdpa)


@pytest.mark.slow
def test_a_window_that_holds_the_row_changes_nothing_and_kept_tokens_help_a_shorter_one():
  """In whole models, whose layers are scanned in two runs."""
  gate = dict(attn__gate__position='sdpa', attn__gate__layers='0')
  plain = small.model_of(**gate)
  token_BT = np.random.default_rng(1).integers(0, 40, (1, T))
  run = jax.jit(lambda net: net(token_BT))

  def streamed(window, kept):
    cfg = small.model_config(**gate, attn__window=window)
    net = small.filled(
      jax.eval_shape(lambda: decoder.Transformer(cfg, jax.random.key(0)))
    )
    return run(streaming.keep(net, kept) if kept else net)

  np.testing.assert_allclose(streamed(T, 2), run(plain), rtol=1e-4, atol=1e-4)
  whole, window, both = run(plain), streamed(4, 0), streamed(4, 2)
  # The first window is whole; a query then has lost token 0 without the kept ones.
  np.testing.assert_allclose(window[:, :4], whole[:, :4], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(both[:, :6], whole[:, :6], rtol=1e-4, atol=1e-4)
  assert np.abs(window - whole)[:, 4:6].max() > 1e-2 < np.abs(both - whole)[:, 6:].max()
