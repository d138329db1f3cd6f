"""The vocabulary loss against NumPy in float64, on a mesh against one device."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import kernels
from gated.devices import collectives, mesh
from gated.kernels import cross_entropy

N_ROWS, LENGTH, WIDTH, VOCAB = 4, 12, 8, 16


def loss_problem(dtype=jnp.float32, rows=N_ROWS, length=LENGTH, width=WIDTH, vocab=VOCAB):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(rows, length, width)), dtype)
  w = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
  targets = rng.integers(0, vocab, (rows, length), np.int32)
  weights = rng.choice([0, 0.5, 1], (rows, length)).astype(np.float32)
  return x, w, targets, weights


def loss_by_hand(x, w, targets, weights, z):
  """total, nll, lse, dtotal/dx and dtotal/dw in float64."""
  x, w = np.asarray(x, np.float64), np.asarray(w.astype(x.dtype), np.float64)
  logits = x @ w.T
  top = logits.max(-1, keepdims=True)
  lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
  one = np.eye(len(w))[targets]
  nll = lse - (logits * one).sum(-1)
  softmax = np.exp(logits - lse[..., None])
  dlogit = weights[..., None] * (softmax * (1 + 2 * z * lse[..., None]) - one)
  total = (weights * (nll + z * lse**2)).sum()
  return total, nll, lse, dlogit @ w, np.einsum('btv,btd->vd', dlogit, x)


def loss_and_gradients(x, w, targets, weights, *, scale=1.0, **opts):
  def total(x, w, targets, weights):
    t, nll, lse = kernels.vocab_loss(x, w, targets, weights, **opts)
    return scale * t, (nll, lse)

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (t, (nll, lse)), (dx, dw) = run(x, w, targets, weights)
  return t, nll, lse, dx, dw


def assert_loss(ours, exact, tolerance):
  for name, a, b in zip(('total', 'nll', 'lse', 'dx', 'dw'), ours, exact):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, atol=tolerance, rtol=tolerance, err_msg=name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('chunk', 'z'), [(1, 0.0), (7, 0.01), (16, 0.01), (48, 0.01), (10_000, 0.01)]
)
def test_vocab_loss_is_the_log_softmax_whatever_the_chunk(chunk, z):
  problem = loss_problem()
  ours = loss_and_gradients(*problem, z=z, chunk=chunk)
  assert_loss(ours, loss_by_hand(*problem, z), 1e-5)


def test_vocab_loss_of_bfloat16_states_is_summed_in_float32():
  problem = loss_problem(jnp.bfloat16)
  ours = loss_and_gradients(*problem, z=0.01, chunk=16)
  assert [a.dtype for a in ours] == ['float32'] * 3 + ['bfloat16', 'float32']
  exact = loss_by_hand(*problem, 0.01)
  assert_loss(ours[:3], exact[:3], 1e-5)
  assert_loss(ours, exact, 0.03)


def test_vocab_loss_without_a_gradient_is_the_same():
  problem = loss_problem()
  total, nll, lse = kernels.vocab_loss(*problem, z=0.01, chunk=16)
  assert_loss((total, nll, lse), loss_by_hand(*problem, 0.01)[:3], 1e-5)


def test_vocab_loss_scales_its_gradient_by_the_cotangent():
  problem = loss_problem()
  *_, dx, dw = loss_and_gradients(*problem, z=0.01, chunk=16, scale=-2.0)
  *_, exact_dx, exact_dw = loss_by_hand(*problem, 0.01)
  np.testing.assert_allclose(dx, -2 * exact_dx, atol=1e-5)
  np.testing.assert_allclose(dw, -2 * exact_dw, atol=1e-5)


def test_vocab_loss_is_finite_for_huge_logits():
  x, w, targets, weights = loss_problem()
  ours = loss_and_gradients(100 * x, 100 * w, targets, weights, z=0.0, chunk=16)
  assert all(np.isfinite(a).all() for a in ours)


def peak_logits(chunk, rows=8, length=64):
  """The most elements that any array with a vocabulary dim has inside the loss."""
  x, w, targets, weights = loss_problem(rows=rows, length=length)
  total = lambda x, w: kernels.vocab_loss(x, w, targets, weights, z=0.0, chunk=chunk)[0]
  jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, w)
  sizes = [0]

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      shapes = [v.aval.shape for v in eqn.outvars]
      sizes.extend(int(np.prod(s)) for s in shapes if len(s) > 1 and s[-1] == VOCAB)
      for sub in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(sub)

  walk(jaxpr.jaxpr)
  return max(sizes)


def test_only_a_chunk_of_logits_exists_at_a_time():
  assert peak_logits(chunk=32) == 32 * VOCAB
  assert peak_logits(chunk=512) == 512 * VOCAB


def placed(problem, on):
  place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(on, mesh.spec(axes, on)))
  x, w, targets, weights = problem
  return (
    place(x, 'batch', 'tokens', None),
    place(w, 'vocab', 'embed'),
    place(targets, 'batch', 'tokens'),
    place(weights, 'batch', 'tokens'),
  )


def set_inner_size(monkeypatch, n, *, vocab, width=WIDTH):
  """Sets the limit so that inner groups have n devices: fewer do not fit."""
  monkeypatch.setattr(cross_entropy, 'LIMIT', 4 * width * vocab / n)


# The sizes of the mesh's axes, the inner size, and V. 18 rows on 8 devices are 3 each,
# and the last two devices hold only padding.
SHARED = [
  *((dict(fsdp=8), n, 16) for n in (1, 2, 4, 8)),
  *((dict(fsdp=8), n, 18) for n in (1, 2, 8)),
  *((dict(fsdp=2, tensor=2, context=2), n, 18) for n in (1, 2)),
  *((dict(fsdp=2, expert=4), n, 16) for n in (1, 2)),
  *((dict(fsdp=4, data=2), n, 17) for n in (1, 2, 4)),
  (dict(data=2, expert=2, tensor=2), 1, 16),
  *(({axis: 8}, 1, 16) for axis in ('data', 'expert', 'tensor', 'context')),
]


OPTIONS = dict(z=0.01, chunk=5, scale=2.0, cap=4.0)
MANY = {vocab: loss_problem(rows=8, length=16, vocab=vocab) for vocab in (16, 17, 18)}


@functools.cache
def on_one_device(vocab):
  return loss_and_gradients(*MANY[vocab], **OPTIONS)


# Small inner groups and the whole group; a split vocabulary; rows that do not divide.
FEW = [SHARED[n] for n in (0, 6, 8, 12)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sizes', 'n', 'vocab'),
  [pytest.param(*s, marks=[] if s in FEW else pytest.mark.full) for s in SHARED],
  ids=str,
)
def test_vocab_loss_on_a_mesh_is_that_of_one_device(sizes, n, vocab, monkeypatch):
  set_inner_size(monkeypatch, n, vocab=vocab // sizes.get('tensor', 1))
  on = small.mesh_of(**sizes)
  with jax.set_mesh(on):
    ours = loss_and_gradients(*placed(MANY[vocab], on), **OPTIONS)
  assert_loss(ours, on_one_device(vocab), 1e-5)


def test_a_logit_far_below_zero_is_not_outweighed_by_rows_of_padding(monkeypatch):
  """A row of zeros has the logit 0, beside which exp(-200) would be nothing."""
  set_inner_size(monkeypatch, 8, vocab=18)
  x, w, targets, weights = loss_problem(rows=8, length=16, vocab=18)
  problem = jnp.abs(x) + 10, -jnp.abs(w) - 10, targets, weights
  on = small.mesh_of(fsdp=8)
  with jax.set_mesh(on):
    ours = loss_and_gradients(*placed(problem, on), z=0.0, chunk=5)
  for a, b in zip(ours, loss_by_hand(*problem, 0.0)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 4])
def test_vocab_loss_of_bfloat16_on_a_mesh_is_summed_in_float32(n, monkeypatch):
  set_inner_size(monkeypatch, n, vocab=16)
  problem = loss_problem(jnp.bfloat16, rows=8, length=16)
  on = small.mesh_of(fsdp=4, data=2)
  with jax.set_mesh(on):
    ours = loss_and_gradients(*placed(problem, on), z=0.01, chunk=5)
  alone = loss_and_gradients(*problem, z=0.01, chunk=5)
  assert [a.dtype for a in ours] == [a.dtype for a in alone]
  assert_loss(ours, alone, 1e-5)


@pytest.mark.parametrize('grad', [True, False])
def test_no_device_holds_an_array_as_large_as_the_unembedding(grad):
  """With fewer than V / 8 tokens a device, one inner group of 8 shares the vocabulary."""
  width, vocab = 64, 1024
  problem = loss_problem(rows=8, length=16, width=width, vocab=vocab)
  total = lambda *a: kernels.vocab_loss(*a, z=0.01, chunk=8)[0]
  run = jax.grad(total, argnums=(0, 1)) if grad else total
  on = small.mesh_of(fsdp=8)
  with jax.set_mesh(on):
    compiled = jax.jit(run).lower(*placed(problem, on)).compile()
  assert small.largest_array(compiled) <= width * vocab // 4


def test_the_inner_size_moves_the_fewest_bytes():
  pod = collectives.Group(('fsdp',), 64)
  size = lambda tokens, rows=151_936, width=1024: cross_entropy.inner_size(
    pod, rows, width, tokens
  )
  # At `even` tokens, groups of n and 2 n move the same number of bytes.
  for n in (1, 2, 4, 8, 16, 32):
    even = 151_936 / (2 * n * n)
    assert (size(0.99 * even), size(1.01 * even)) == (2 * n, n)


def test_the_inner_size_lets_the_gradient_fit():
  pod = collectives.Group(('fsdp',), 64)
  gib = 1 << 30
  assert cross_entropy.inner_size(pod, gib // 4096, 1024, gib) == 1
  assert cross_entropy.inner_size(pod, gib // 4096 + 1, 1024, gib) == 2
  assert cross_entropy.inner_size(pod, 151_936, 2048, gib) == 2
  assert cross_entropy.inner_size(pod, 65 * gib // 4096, 1024, gib) == 64
  assert cross_entropy.inner_size(collectives.ALONE, 151_936, 2048, 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize('cap', [0.7, 5.0])
def test_vocab_loss_of_capped_logits_is_the_plain_loss_of_them(cap):
  x, w, targets, weights = problem = loss_problem()

  def plain(x, w):
    logit = cap * jnp.tanh(jnp.einsum('btd,vd->btv', x, w) / cap)
    lse = jax.nn.logsumexp(logit, -1)
    nll = lse - jnp.take_along_axis(logit, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + 0.01 * lse**2))

  ours = jax.jit(
    jax.value_and_grad(
      lambda x, w: kernels.vocab_loss(x, w, targets, weights, z=0.01, chunk=7, cap=cap)[
        0
      ],
      argnums=(0, 1),
    )
  )(*problem[:2])
  exact = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, w)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
