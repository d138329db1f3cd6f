"""The decoder against one written plainly in NumPy, and what may change it or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import dense_1b7
from gated import config, kernels, model
from gated.devices import trees

LENGTH = 16
BATCH = small.batch(2, LENGTH)
GATE = dict(attn__gate__position='sdpa')


RUN = jax.jit(lambda net, *batch: net(*batch))


def logits(net, tokens=BATCH.tokens, segments=None, positions=None):
  return RUN(net, tokens, segments, positions)


def decoder_by_hand(net, tokens, segments, positions):
  """Section 1 and Table 7 of the paper in float64, one row, head and token at a time."""
  cfg = net.cfg
  at = {name: np.asarray(leaf, np.float64) for name, leaf in trees.flatten(net).items()}
  H, G, K = cfg.attn.heads, cfg.attn.kv_heads, cfg.attn.head_dim
  sigmoid = lambda x: 1 / (1 + np.exp(-x))

  def norm(x, scale):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.numerics.norm_eps)

  def turn(x, position):
    z = x[: K // 2] + 1j * x[K // 2 :]
    z = z * np.exp(1j * position * cfg.attn.rope_base ** -(2 * np.arange(K // 2) / K))
    return np.concatenate([z.real, z.imag])

  def row(tokens, segments, positions):
    x = at['embed.table'][tokens]
    for i in range(cfg.depth):
      w = {
        k.removeprefix('blocks.'): v[i] for k, v in at.items() if k.startswith('blocks.')
      }
      n, y = norm(x, w['attn_norm.scale']), np.zeros((len(x), H, K))
      for h in range(H):
        g = h // (H // G)
        q = norm(n @ w['attn.query.weight'][:, h], w['attn.query_norm.scale'])
        k = norm(n @ w['attn.key.weight'][:, g], w['attn.key_norm.scale'])
        v = n @ w['attn.value.weight'][:, g]
        q, k = (np.stack([turn(a, p) for a, p in zip(m, positions)]) for m in (q, k))
        for t in range(len(x)):
          seen = [s for s in range(t + 1) if segments[s] == segments[t]]
          weight = np.exp(k[seen] @ q[t] / np.sqrt(K))
          y[t, h] = weight / weight.sum() @ v[seen]
      y *= sigmoid(np.einsum('td,dhk->thk', n, w['attn.gate.weight']))
      x = x + np.einsum('thk,hkd->td', y, w['attn.out.weight'])
      n = norm(x, w['ffn_norm.scale'])
      act, up = n @ w['ffn.act.weight'], n @ w['ffn.up.weight']
      x = x + (act * sigmoid(act) * up) @ w['ffn.down.weight']
    return norm(x, at['norm.scale']) @ at.get('head.table', at['embed.table']).T

  return np.stack([row(*r) for r in zip(tokens, segments, positions)])


@pytest.mark.parametrize('tied', [True, False])
def test_the_decoder_is_the_one_written_by_hand(tied):
  net = small.model_of(tied=tied, **GATE)
  ours = logits(net, BATCH.tokens, BATCH.segments, BATCH.positions)
  assert ours.dtype == jnp.float32
  exact = decoder_by_hand(net, BATCH.tokens, BATCH.segments, BATCH.positions)
  np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())


def test_without_segments_and_positions_a_row_is_one_document_counted_from_0():
  net = small.model_of(**GATE)
  ones = np.ones_like(BATCH.tokens)
  counted = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
  np.testing.assert_array_equal(logits(net), logits(net, BATCH.tokens, ones, counted))


def test_logits_are_float32_of_a_bfloat16_model():
  cfg = small.model_config(numerics__compute='bfloat16', **GATE)
  tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
  net = model.abstract(cfg)
  assert jax.eval_shape(lambda n, t: n.hidden(t)[0], net, tokens).dtype == jnp.bfloat16
  out = jax.eval_shape(lambda n, t: n(t), net, tokens)
  assert (out.shape, out.dtype) == ((2, LENGTH, cfg.vocab), jnp.float32)


def test_changing_a_token_changes_nothing_before_it():
  net = small.model_of(**GATE)
  for at in (0, 7, LENGTH - 1):
    tokens = BATCH.tokens.copy()
    tokens[0, at] = (tokens[0, at] + 1) % 40
    moved = np.abs(logits(net) - logits(net, tokens)).max(-1)
    np.testing.assert_array_equal(moved[0, :at], 0)
    assert (moved[0, at:] > 0).all()
    np.testing.assert_array_equal(moved[1], 0)


# Three documents and padding in a row, with tokens that no other document has.
DOCUMENTS = np.array([[1] * 5 + [2] * 6 + [3] * 3 + [0] * 2], np.int32)
PLACES = np.array([[*range(5), *range(6), *range(3), *range(2)]], np.int32)
TOKENS = (10 * DOCUMENTS + PLACES).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize('layers', ['scan', 'unroll'])
def test_packing_never_leaks(layers):
  """Neither forward, nor through the gradient of one document's loss."""
  net = small.model_of(layers=layers, tied=False, **GATE)
  alone = (DOCUMENTS == 2).astype(np.float32)

  @jax.jit
  def run(net, tokens):
    def loss(net):
      out = net(tokens, DOCUMENTS, PLACES)
      nll = jax.nn.logsumexp(out, -1) - out[..., 1]
      return jnp.sum(nll * alone), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(net)
    return out, grads.embed.table[...]

  out, grad = run(net, TOKENS)
  read = np.abs(grad).max(-1) > 0
  assert set(np.flatnonzero(read)) == set(TOKENS[DOCUMENTS == 2])
  for document in (0, 1, 3):
    tokens = np.where(document == DOCUMENTS, TOKENS + 5, TOKENS)
    changed, same_grad = run(net, tokens)
    others = document != DOCUMENTS
    np.testing.assert_array_equal(changed[others], out[others])
    np.testing.assert_array_equal(same_grad, grad)
    assert (np.abs(changed - out).max(-1)[~others] > 0).all()


@pytest.mark.slow
def test_a_packed_document_gets_the_logits_it_gets_alone():
  net = small.model_of(**GATE)
  packed = logits(net, TOKENS, DOCUMENTS, PLACES)
  for document in (1, 2, 3):
    here = packed[0, DOCUMENTS[0] == document]
    # Alone at the start of a row: what comes after it cannot matter.
    tokens = np.concatenate([TOKENS[document == DOCUMENTS], TOKENS[0]])[None, :LENGTH]
    alone = logits(net, tokens)[0, : len(here)]
    np.testing.assert_allclose(here, alone, atol=2e-5, rtol=1e-4)


def test_documents_see_each_other_when_they_are_not_masked():
  net = small.model_of(mask_documents=False, **GATE)
  tokens = np.where(DOCUMENTS == 1, TOKENS + 5, TOKENS)
  moved = np.abs(
    logits(net, TOKENS, DOCUMENTS, PLACES) - logits(net, tokens, DOCUMENTS, PLACES)
  )
  assert (moved.max(-1) > 0).all()


def test_positions_count_along_the_row_when_documents_are_not_masked():
  """Restarting, a token stands at the same distance from several of those it sees."""
  net = small.model_of(mask_documents=False, **GATE)
  np.testing.assert_array_equal(
    logits(net, TOKENS, DOCUMENTS, PLACES), logits(net, TOKENS)
  )


def train_loss(net):
  x, _ = net.hidden(BATCH.tokens, BATCH.segments, BATCH.positions)
  return kernels.vocab_loss(
    x, net.unembedding(), BATCH.targets, BATCH.weights, z=1e-3, chunk=8
  )[0]


@pytest.fixture(scope='module')
def scanned():
  return jax.jit(jax.value_and_grad(train_loss))(small.model_of(**GATE))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('layers', 'remat'),
  [
    ('scan', 'full'),
    ('unroll', 'none'),
    pytest.param('scan', 'dots', marks=pytest.mark.full),
    pytest.param('unroll', 'full', marks=pytest.mark.full),
    pytest.param('unroll', 'dots', marks=pytest.mark.full),
  ],
)
def test_layers_and_remat_change_neither_loss_nor_gradient(layers, remat, scanned):
  net = small.model_of(layers=layers, remat=remat, **GATE)
  loss, grads = jax.jit(jax.value_and_grad(train_loss))(net)
  np.testing.assert_allclose(loss, scanned[0], rtol=1e-6)
  exact = trees.flatten(scanned[1])
  for name, grad in trees.flatten(grads).items():
    size = float(np.abs(exact[name]).max())
    np.testing.assert_allclose(grad, exact[name], atol=1e-5 * size, err_msg=name)


def test_remat_keeps_less():
  """Full keeps each layer's input alone; dots more; none all."""

  def kept(remat):
    cfg = small.model_config(remat=remat, layers='unroll', **GATE)
    cotangent = jax.eval_shape(
      lambda net: jax.vjp(train_loss, net)[1], model.abstract(cfg)
    )
    return model.count(cotangent)

  assert kept('full') < kept('dots') < kept('none')


def test_training_through_hidden_is_training_on_the_logits(scanned):
  def plain(net):
    out = net(BATCH.tokens, BATCH.segments, BATCH.positions)
    lse = jax.nn.logsumexp(out, -1)
    nll = lse - jnp.take_along_axis(out, BATCH.targets[..., None], -1)[..., 0]
    return jnp.sum(BATCH.weights * (nll + 1e-3 * lse**2))

  loss, grads = jax.jit(jax.value_and_grad(plain))(small.model_of(**GATE))
  np.testing.assert_allclose(loss, scanned[0], rtol=1e-5)
  ours = trees.flatten(scanned[1])
  for name, grad in trees.flatten(grads).items():
    size = float(np.abs(grad).max())
    assert size > 0
    np.testing.assert_allclose(ours[name], grad, atol=2e-5 * size, err_msg=name)


def test_tied_embeddings_are_one_table():
  tied, untied = (model.abstract(small.model_config(tied=t)) for t in (True, False))
  assert model.count(untied) - model.count(tied) == 40 * 16
  assert tied.head is None
  net = small.model_of(tied=False)
  same = small.model_of(tied=True)
  net.head.table[...] = net.embed.table[...]
  np.testing.assert_array_equal(logits(net), logits(same))


def test_biases_add_exactly_their_parameters():
  count = lambda **changes: model.count(model.abstract(small.model_config(**changes)))
  H, G, K, D, L = 4, 2, 8, 16, 2
  assert count(attn__bias=True) - count() == L * (H + 2 * G) * K
  assert count(attn__out_bias=True) - count() == L * D
  assert count(attn__qk_norm=False) - count() == -L * 2 * K


def published(arg):
  c = dense_1b7.get_config(arg).to_dict()
  return config.build(model.Config, c['model'], 'config.model')


@pytest.mark.parametrize(
  ('arg', 'count'),
  [
    ('28l', 1_720_574_976),
    ('48l', 1_705_735_680),
    ('28l,gate=elementwise', 1_720_574_976 + 28 * 2048 * 16 * 128),
    ('48l,gate=headwise', 1_705_735_680 + 48 * 1536 * 16),
  ],
)
def test_the_papers_dense_models_have_their_parameters(arg, count):
  assert model.count(model.abstract(published(arg))) == count


def test_flops_are_counted_as_by_hand():
  L, D, H, G, K, F, V, T = 28, 2048, 16, 8, 128, 6144, 151_936, 4096
  matrices = L * (D * K * (2 * H + 2 * G) + 3 * D * F) + V * D
  # Scores and their use: 2 products of 2 K flops a pair, forward once and backward twice.
  attention = 3 * L * H * 2 * 2 * K * sum(range(1, T + 1)) / T
  assert model.flops_per_token(published('28l'), T) == 6 * matrices + attention
  gated = model.flops_per_token(published('28l,gate=elementwise'), T)
  assert gated == 6 * (matrices + L * D * H * K) + attention


def test_flops_count_neither_norms_nor_biases_nor_a_second_table():
  plain = model.flops_per_token(small.model_config(), 8)
  more = dict(attn__bias=True, attn__out_bias=True, attn__qk_norm=False, tied=False)
  assert model.flops_per_token(small.model_config(**more), 8) == plain
  parameter = dict(attn__gate__position='sdpa', attn__gate__source='parameter')
  assert model.flops_per_token(small.model_config(**parameter), 8) == plain
  out = model.flops_per_token(small.model_config(attn__gate__position='out'), 8)
  assert out - plain == 6 * 2 * 16 * 16


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(vocab=0), 'vocab=0'),
    (dict(width=0), 'width=0'),
    (dict(depth=0), 'depth=0'),
    (dict(ffn=-1), 'ffn=-1'),
    (dict(layers='loop'), "layers='loop', but allowed are 'scan', 'unroll'"),
    (dict(remat='some'), "remat='some', but allowed are 'none', 'full', 'dots'"),
  ],
)
def test_a_model_that_cannot_be_is_refused_by_its_knob(changes, said):
  with pytest.raises(ValueError, match=f'config.model.{said}'):
    small.model_config(**changes)


@pytest.mark.slow
def test_branches_are_normalised_before_they_are_added():
  """Sandwich norm: with scales of zero a branch adds nothing."""
  net = small.model_of(branch_norm='rms')
  extra = set(trees.flatten(net)) - set(trees.flatten(small.model_of()))
  assert extra == {'blocks.attn_branch_norm.scale', 'blocks.ffn_branch_norm.scale'}
  assert np.abs(logits(net) - logits(small.model_of())).max() > 1e-2
  for norm in (net.blocks.attn_branch_norm, net.blocks.ffn_branch_norm):
    norm.scale[...] = jnp.zeros_like(norm.scale[...])
  bare = net.norm(net.embed(BATCH.tokens)) @ net.unembedding().T
  np.testing.assert_allclose(logits(net), bare, atol=1e-5)


@pytest.mark.slow
def test_branches_are_clipped_before_they_are_added():
  clipped, free = small.model_of(branch_clip=0.05), small.model_of()
  grown = lambda net: np.abs(
    first_layer(net)(net.embed(BATCH.tokens)) - net.embed(BATCH.tokens)
  )
  assert grown(clipped).max() <= 2 * 0.05 + 1e-6 < grown(free).max()
  np.testing.assert_array_equal(
    logits(small.model_of(branch_clip=1e6)), logits(small.model_of())
  )


def first_layer(net):
  """Of a model: x -> x."""
  cfg = net.cfg
  angle = small.angles([np.arange(LENGTH)], cfg.attn.head_dim, cfg.attn.rope_base)
  return lambda x: model.unstack(net.blocks, cfg.depth)[0](x, angle, None, None)[0]


def test_capped_logits_stay_below_the_cap_in_training_and_in_evaluation():
  net, free = small.model_of(logit_cap=2.0), small.model_of()
  np.testing.assert_allclose(logits(net), 2 * np.tanh(logits(free) / 2), atol=1e-5)
  assert np.abs(logits(net)).max() < 2 < np.abs(logits(free)).max()


def test_gated_norms_stand_at_every_norm_before_a_branch_and_at_the_end():
  added = set(trees.flatten(small.model_of(norm='gated', norm_rank=4))) - set(
    trees.flatten(small.model_of())
  )
  assert {n.rpartition('.down')[0] for n in added if '.down' in n} == {
    'blocks.attn_norm', 'blocks.ffn_norm', 'norm'
  }  # fmt: skip


@pytest.mark.parametrize(
  'changes',
  [
    dict(attn__normalizer='sink_logit', attn__sink_tokens=2),
    dict(attn__normalizer='softpick', attn__output='rms_norm'),
    dict(attn__switch__where='key_value', attn__switch__experts=3, attn__switch__top_k=2),
    dict(norm='gated', branch_norm='rms', branch_clip=10.0, logit_cap=5.0),
    dict(moe__experts=4, moe__top_k=2, moe__shared=1),
  ],
  ids=str,
)
@pytest.mark.full
def test_every_remedy_scans_as_it_unrolls_and_rematerialises(changes):
  """The two ways that differ in both; all ways of one model are compared above."""
  found = []
  for layers, remat in (('unroll', 'dots'), ('scan', 'full')):
    net = small.model_of(layers=layers, remat=remat, **changes)
    found.append(jax.jit(jax.value_and_grad(train_loss))(net))
  (loss, grads), (exact_loss, exact_grads) = found
  np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
  exact = trees.flatten(exact_grads)
  for name, grad in trees.flatten(grads).items():
    size = float(np.abs(exact[name]).max())
    np.testing.assert_allclose(grad, exact[name], atol=1e-4 * size, err_msg=name)


def test_parts_count_every_parameter_once():
  cfg = small.model_config(attn__gate__position='sdpa', tied=False)
  parts = model.parts(cfg)
  assert parts['total'] == parts['active'] == model.count(model.abstract(cfg))
  assert parts['embedding'] == 2 * 40 * 16
  assert parts['gate'] == 2 * 16 * 4 * 8
  assert parts['attention'] == 2 * (16 * 8 * (4 + 2 + 2 + 4) + 2 * 8)
  assert parts['experts'] == 0
