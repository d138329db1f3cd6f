"""Every probe equals a plain NumPy computation, for each model, row and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import probes
from gated.devices import mesh
from gated.model import gate
from gated.probes import activations, attention, gates, outputs, pairs

LENGTH = 96
VOCAB = 40
CLASS_V = (np.arange(VOCAB) % 4).astype(np.int32)
BATCH = small.batch(8, LENGTH, vocab=VOCAB)
ONE_DOCUMENT = BATCH._replace(
  segments=np.ones_like(BATCH.segments),
  positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), BATCH.tokens.shape),
)
SWITCH = dict(where='key_value', experts=3, top_k=2)
MODELS = {
  'baseline': {},
  'headwise': dict(attn__gate__position='sdpa', attn__gate__granularity='headwise'),
  'elementwise': dict(attn__gate__position='sdpa'),
  'shared': dict(
    attn__gate__position='sdpa',
    attn__gate__granularity='headwise',
    attn__gate__heads='shared',
  ),
  'query': dict(attn__gate__position='query', attn__gate__place='after'),
  'key': dict(attn__gate__position='key', attn__gate__activation='2sigmoid'),
  'value': dict(attn__gate__position='value', attn__gate__source='value'),
  'out': dict(attn__gate__position='out', attn__gate__activation='silu'),
  'parameter': dict(attn__gate__position='sdpa', attn__gate__source='parameter'),
  'sink logits and tokens': dict(attn__normalizer='sink_logit', attn__sink_tokens=2),
  'off by one, one document': dict(
    attn__normalizer='off_by_one', attn__logit_cap=2.0, mask_documents=False
  ),
  'sigmoid': dict(attn__normalizer='sigmoid', attn__gate__position='sdpa'),
  'softpick': dict(attn__normalizer='softpick', attn__qk_norm=False),
  'experts': dict(
    attn__gate__position='sdpa', moe__experts=4, moe__top_k=2, ffn=16, layers='unroll'
  ),
  'switch': {f'attn__switch__{k}': v for k, v in SWITCH.items()},
  'clipped, a window': dict(
    attn__normalizer='clipped', attn__window=70, attn__global_layers='last:1'
  ),
  'elastic, a window, one document': dict(
    attn__normalizer='elastic',
    attn__window=9,
    attn__elastic_tau=-0.3,
    mask_documents=False,
  ),
  'differential': dict(attn__differential=True),
  'elastic in the last layer': dict(
    attn__normalizer='elastic', attn__normalizer_layers='last:1', attn__elastic_tau=-0.3
  ),
  'off by one in the first layer': dict(
    attn__normalizer='off_by_one', attn__normalizer_layers='first:1'
  ),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
  monkeypatch.setattr(pairs, 'PAIRS', 8 * 4 * 40 * 40)


def traces(net, batch):
  """Each layer's trace and gate score, in float32, by the model's own layers."""

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest)
    score = gates.of_block(block, x_BTD, 'gate')
    attn = trace.attn
    if attn.sinks is None and net.cfg.attn.has_sinks:  # The layer has a plain softmax.
      attn = attn._replace(sinks=jnp.full(attn.query.shape[:3], -jnp.inf))
    return trace.output, (trace._replace(report=None, attn=attn), score)

  run = lambda net, batch: net.hidden(
    batch.tokens, batch.segments, batch.positions, through=through
  )[1]
  stacked = jax.device_get(jax.jit(run)(net, batch))
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(net.cfg.depth)]


def weights_of(trace, cfg, normalizer, mask_BTT, live_BT, offset=None):
  """Attention weights (B, H, T, T) in float64, and the largest |score|."""
  q, k = trace.query.astype(float), trace.key.astype(float)
  k = np.repeat(k, q.shape[2] // k.shape[2], 2)
  score = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(q.shape[-1])
  seen = mask_BTT[:, None] & live_BT[:, None, :, None]
  largest = np.abs(np.where(seen, score, 0)).max()
  if cfg.attn.logit_cap:
    score = cfg.attn.logit_cap * np.tanh(score / cfg.attn.logit_cap)
  mask = np.broadcast_to(mask_BTT[:, None], score.shape)
  if normalizer == 'sigmoid':
    count = mask.sum(-1, keepdims=True)
    return np.where(mask, 1 / (1 + count * np.exp(-score)), 0), largest
  if normalizer == 'softpick':
    e = np.where(mask, np.exp(score) - 1, 0)
    return np.maximum(e, 0) / np.abs(e).sum(-1, keepdims=True), largest
  e = np.where(mask, np.exp(score), 0)
  total = e.sum(-1)
  w = e / total[..., None]
  if normalizer == 'clipped':
    gamma, zeta = cfg.attn.clip_gamma, cfg.attn.clip_zeta
    return np.where(mask, np.clip((zeta - gamma) * w + gamma, 0, 1), 0), largest
  if normalizer == 'elastic':
    tau = np.asarray(offset, float)[None, :, None, None]
    return np.where(
      mask, np.maximum(w + tau / mask.sum(-1, keepdims=True), 0), 0
    ), largest
  if trace.sinks is not None:
    total = total + np.exp(trace.sinks.astype(float)).swapaxes(1, 2)
  return e / total[..., None], largest


def picked(A, start_BT):
  """The weight that each query gives to one key: (B, H, T)."""
  index = np.broadcast_to(start_BT[:, None, :, None], (*A.shape[:3], 1))
  return np.take_along_axis(A, index, -1)[..., 0]


def sink_rates(A, length_B):
  """Transcribed from sail-sg/Attention-Sink: per row, head and k."""
  rates = np.zeros((*A.shape[:2], 5), bool)
  for b, length in enumerate(length_B):
    for k in range(5):
      alpha = A[b, :, k:length, k].sum(-1) / (length - k)
      rates[b, :, k] = alpha > 0.3
  return rates


def reference(net, batch):
  """The numbers of a report, one after the other, from whole attention matrices."""
  cfg, live = net.cfg, batch.segments > 0
  B, T = live.shape
  index = np.arange(T)
  segment = batch.segments if cfg.mask_documents else np.ones_like(batch.segments)
  whole = (index[:, None] >= index[None]) & (segment[:, :, None] == segment[:, None])
  first = index[None] - batch.positions
  layers = []
  elastic = net.blocks.attn.elastic
  for i, (trace, score) in enumerate(traces(net, batch)):
    mask = whole
    if i in cfg.windowed:
      mask = whole & (index[:, None] - index[None] < cfg.attn.window)
    own = [*cfg.normalizer_layers].index(i) if i in cfg.normalizer_layers else None
    normalizer = 'softmax' if own is None else cfg.attn.normalizer
    offset = None if elastic is None or own is None else elastic.scale[...][own]
    A, logit = weights_of(trace.attn, cfg, normalizer, mask, live, offset)
    H = A.shape[1]
    uniform = np.broadcast_to((mask / mask.sum(-1, keepdims=True))[:, None], A.shape)
    row = np.zeros_like(first)
    layer = {'attention_logit_max': logit}
    for suffix, start in (('', row), ('_documents', first)):
      place = index[None] - start
      for which, least in (('', 0), ('_without_query_0', 1), ('_from_64', 64)):
        counted = live & (place >= least)
        for name, x in (('attention', A), ('uniform', uniform)):
          chosen = picked(x, start).mean(1)[counted]
          mean = chosen.mean() if len(chosen) else np.nan
          layer[f'first_token_{name}{suffix}{which}'] = mean
    size = live.sum(1)

    layer['sink_rate'] = sink_rates(A, size).mean((0, 1))
    layer['sink_rate_64'] = sink_rates(A, np.minimum(size, 64))[size >= 64].mean((0, 1))
    seen = (mask & live[..., None]).sum(1)
    mean = (A * live[:, None, :, None]).sum(2) / np.maximum(seen, 1)[:, None]
    mean = np.where(seen[:, None] >= 64, mean, -1)
    counted = (seen >= 64).any(1)
    if counted.any():
      layer['largest_key_weight'] = mean[counted].max(-1).mean()
      layer['largest_key'] = mean.max()
    alive = np.broadcast_to(live[:, None], A.shape[:3])
    entropy = -(A * np.log(np.where(A > 0, A, 1))).sum(-1)
    layer['attention_entropy'] = entropy[alive].mean()
    layer['attention_mass'] = A.sum(-1)[alive].mean()
    has_sinks = trace.attn.sinks is not None
    layer['sink_mass'] = 1 - layer['attention_mass'] if has_sinks else 0.0
    for point in activations.POINTS:
      h = np.abs(getattr(trace, point).astype(float))
      flat = [np.sort(h[b][live[b]].ravel()) for b in range(B)]
      fourth = (h**4).mean(-1) / np.square((h**2).mean(-1))
      layer[point] = {
        'max': max(f[-1] for f in flat),
        'top3': np.mean([f[:-4:-1] for f in flat], 0),
        'median': np.mean([np.median(f) for f in flat]),
        'kurtosis': fourth[live].mean(),
      }
    y, z = trace.attn.sdpa.astype(float), trace.attn.gated.astype(float)
    scaled = y
    if score is not None and cfg.attn.gate.position == 'sdpa':
      means = [score[b][live[b]].astype(float).mean() for b in range(B)]
      scaled = y * np.array(means)[:, None, None, None]
    for x, suffix in ((z, ''), (y, '_before'), (scaled, '_scaled')):
      layer[f'output_below_1e-2{suffix}'] = share_below(np.abs(x[live]), 1e-2)
      layer[f'output_below_1e-3{suffix}'] = share_below(np.abs(x[live]), 1e-3)
    layer['output_mean'], layer['output_mean_before'] = (
      np.abs(x[live]).mean() for x in (z, y)
    )
    for x, name in ((y, 'before'), (z, 'after')):
      spectra = [np.linalg.svd(x[live][:, h], compute_uv=False) for h in range(H)]
      layer[f'output_rank_{name}'] = np.mean([effective(s) for s in spectra])
    norm = np.linalg.norm(trace.attn.value.astype(float), axis=-1)
    starts = live & (batch.positions == 0)
    layer['value_norm_first'] = norm[starts].mean()
    layer['value_norm_other'] = norm[live & ~starts].mean()
    if score is not None:
      s = score[live].astype(float)
      low, high = gates.score_range(cfg.attn.gate.activation)
      edges = np.linspace(low, high, 51, dtype=np.float32)
      inner = np.clip(score[live], edges[0], np.nextafter(edges[-1], low))
      below = [share_below(inner, edge) for edge in edges[1:-1]] + [(1.0, 1.0)]
      layer |= {
        'gate_mean': s.mean(),
        'gate_std': s.std(),
        'gate_histogram': np.transpose(below) * inner.size,
        'gate_heads': s.mean((0, 2)),
        **{f'gate_below_{x:g}': share_below(score[live], x) for x in gates.BELOW},
      }
      classes = np.where(batch.positions == 0, 4, CLASS_V[batch.tokens])[live]
      layer['classes'] = [
        s[classes == c].mean() if (classes == c).any() else np.nan for c in range(5)
      ]
    layers.append(layer)
  return layers


def share_below(x, threshold):
  """-> the least and the largest share of x below a threshold, if x is exact to 1e-5."""
  slack = 1e-5 * abs(threshold)
  return [(x < float(threshold) + sign * slack).mean() for sign in (-1, 1)]


def effective(singular):
  share = singular / singular.sum()
  return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum())


def report(net, batch, parts=1):
  run = jax.jit(probes.measure)
  size = len(batch.tokens) // parts
  split = [
    type(batch)(*(x[i * size : (i + 1) * size] for x in batch)) for i in range(parts)
  ]
  merged = probes.merge([jax.device_get(run(net, part, CLASS_V)) for part in split])
  weights = jax.device_get(jax.jit(probes.of_weights)(net))
  return probes.summarize(net.cfg, merged, weights)


def agree(numbers, layers):
  exact = dict(rtol=1e-5, atol=1e-7)
  for i, layer in enumerate(layers):
    for name, expected in layer.items():
      if name in activations.POINTS:
        for kind, value in expected.items():
          actual = numbers['points'][name][kind]['layers'][i]
          np.testing.assert_allclose(actual, value, **exact, err_msg=f'{name} {kind}')
      elif name == 'largest_key':
        continue
      elif name == 'classes':
        actual = [numbers['gate_classes'][c]['layers'][i] for c in gates.CLASSES]
        np.testing.assert_allclose(actual, expected, **exact)
      elif name.startswith('sink_rate'):
        np.testing.assert_array_equal(numbers[name]['keys'][i], expected, name)
      elif 'below' in name or name == 'gate_histogram':
        actual, (least, most) = numbers[name]['layers'][i], expected
        actual = np.cumsum(actual) if name == 'gate_histogram' else actual
        assert np.all(least - 1e-9 <= actual) and np.all(actual <= most + 1e-9), name
      else:
        actual = numbers[name]['layers'][i]
        np.testing.assert_allclose(actual, expected, **exact, err_msg=name)
  largest = numbers['largest_key_weight'].get('largest')
  if largest:
    expected = max(layer['largest_key'] for layer in layers)
    np.testing.assert_allclose(largest['value'], expected, **exact)
  for name in ('m_act', 'attention_entropy', 'first_token_attention', 'output_mean'):
    np.testing.assert_allclose(numbers[name]['value'], np.mean(numbers[name]['layers']))


FAST = ('elementwise',)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', [n if n in FAST else pytest.param(n, marks=pytest.mark.full) for n in MODELS]
)
def test_numbers_equal_a_plain_computation(name):
  net = small.model_of(**MODELS[name])
  agree(report(net, BATCH), reference(net, BATCH))


@pytest.mark.full
@pytest.mark.parametrize('name', ['elementwise', 'off by one, one document', 'softpick'])
def test_numbers_of_whole_rows_equal_a_plain_computation(name):
  net = small.model_of(**MODELS[name])
  agree(report(net, ONE_DOCUMENT), reference(net, ONE_DOCUMENT))


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('elementwise', dict(fsdp=2, tensor=2, context=2)),
    ('sink logits and tokens', dict(fsdp=2, tensor=2, context=2)),
    ('experts', dict(fsdp=4, expert=2)),
    ('softpick', dict(data=2, context=4)),
  ],
)
def test_a_mesh_gives_the_numbers_of_one_device(name, sizes):
  net, on = small.model_of(**MODELS[name]), small.mesh_of(**sizes)
  placed = jax.device_put(net, mesh.shardings(net, on))
  batch = mesh.place(BATCH, on, len(BATCH.tokens))
  with jax.set_mesh(on):
    measures = jax.jit(probes.measure)(placed, batch, CLASS_V)
    weights = jax.device_get(jax.jit(probes.of_weights)(placed))
  numbers = probes.summarize(net.cfg, probes.merge([jax.device_get(measures)]), weights)
  agree(numbers, reference(net, BATCH))


@pytest.mark.full
def test_numbers_do_not_depend_on_how_rows_are_batched():
  net = small.model_of(**MODELS['elementwise'])
  parts = [report(net, BATCH, parts=n) for n in (1, 4)]
  flat = [jax.tree.leaves(part) for part in parts]
  assert len(flat[0]) == len(flat[1]) > 100
  for one, other in zip(*flat):
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_rank_of_a_map_is_that_of_its_singular_values():
  rng = np.random.default_rng(0)
  value, out = rng.normal(size=(2, 20, 2, 6)), rng.normal(size=(2, 4, 6, 20))
  stable, exp_entropy = outputs.ranks_of_maps(value, out)
  for layer in range(2):
    for head in range(4):
      product = value[layer, :, head // 2] @ out[layer, head]
      s = np.linalg.svd(product, compute_uv=False)[:6]
      assert stable[layer, head] == pytest.approx((s**2).sum() / s[0] ** 2)
      assert exp_entropy[layer, head] == pytest.approx(effective(s))


@pytest.mark.full
def test_each_of_several_gates_has_its_numbers_in_its_own_layers():
  several = dict(attn__gate__position='sdpa', attn__gate__layers='last:1')
  net = small.model_of(attn__gates='value layers=all granularity=headwise', **several)
  batch = small.batch(4, 24)
  numbers, live = report(net, batch), batch.segments > 0
  of = lambda position: np.asarray(gates.scores(net, batch, position), float)
  sdpa_BTHK, value_LBTH = of('sdpa')[0], of('value')
  mean = numbers['gate_mean']
  assert np.isnan(mean['layers'][0]) and numbers['gate_vocabulary']['value'] is None
  np.testing.assert_allclose(mean['layers'][1], sdpa_BTHK[live].mean(), rtol=1e-5)
  assert mean['value'] == mean['layers'][1]
  expected = value_LBTH[:, live].mean((1, 2))
  value = numbers['gates']['value']
  np.testing.assert_allclose(value['gate_mean']['layers'], expected, rtol=1e-5)
  assert value['gate_vocabulary']['value'] is not None


def test_the_range_of_a_histogram_follows_from_the_activation(monkeypatch):
  ranges = {name: gates.score_range(name) for name in gate.ACTIVATIONS}
  assert ranges == {
    'sigmoid': (0, 1),
    'silu': (-2, 2),
    'identity': (-2, 2),
    'ns_sigmoid': (0, 1),
    '2sigmoid': (0, 2),
    'hard_sigmoid': (0, 1),
    'tanh': (-1, 1),
    'softplus': (-2, 2),
    'exp': (-2, 2),
  }
  # A new activation needs no second table.
  monkeypatch.setitem(gate.ACTIVATIONS, 'soft_sign', jax.nn.soft_sign)
  assert gates.score_range('soft_sign') == pytest.approx((-1, 1), abs=0.05)


def test_the_vocabulary_gate_is_the_gate_of_each_token_alone():
  net = small.model_of(**MODELS['elementwise'])
  score_VH = jax.jit(gates.vocabulary, static_argnums=1)(net, 'gate')
  tokens = np.arange(VOCAB, dtype=np.int32)[None]
  ones = np.ones_like(tokens)
  batch = BATCH._replace(tokens=tokens, segments=ones, positions=0 * ones)
  score_BTHK = jax.jit(gates.scores)(net, batch)[0]
  np.testing.assert_allclose(score_VH, score_BTHK[0].mean(-1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('headwise', 'softpick')
    else pytest.param(name, marks=pytest.mark.full)
    for name in (
      'headwise',
      'softpick',
      'sigmoid',
      *(n for n in MODELS if 'sink' in n or 'first' in n),
    )
  ],
)
def test_maps_are_the_attention_weights_of_the_first_row(name):
  net = small.model_of(**MODELS[name])
  index, segment = np.arange(LENGTH), BATCH.segments
  mask = (index[:, None] >= index[None]) & (segment[:, :, None] == segment[:, None])
  map_LHTT = np.asarray(jax.jit(attention.maps)(net, BATCH))
  live_T = segment[0] > 0
  own = net.cfg.normalizer_layers
  for i, (trace, _) in enumerate(traces(net, BATCH)):
    map_HTT, normalizer = map_LHTT[i], net.cfg.attn.normalizer if i in own else 'softmax'
    expected, _ = weights_of(trace.attn, net.cfg, normalizer, mask, segment > 0)
    np.testing.assert_allclose(
      map_HTT, expected[0] * live_T[:, None], rtol=1e-5, atol=1e-7
    )
  if net.cfg.attn.normalizer == 'softmax':
    sums = np.broadcast_to(live_T, map_LHTT.shape[:3])
    np.testing.assert_allclose(map_LHTT.sum(-1), sums, rtol=1e-5)


def test_maps_of_long_rows_are_refused():
  rows = jax.tree.map(lambda x: np.zeros((1, 513), x.dtype), BATCH)
  with pytest.raises(ValueError, match=r'rows of 513 tokens.* at most 512 are allowed'):
    attention.maps(small.model_of(), rows)
