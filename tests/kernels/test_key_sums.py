"""What each key receives: the kernel equals whole attention matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated.kernels.attention import key_sums

B, T, H, G, K = 2, 256, 4, 2, 32


def inputs(cap):
  """-> the kernel's arguments, and each query's weights in float64."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(2 * rng.normal(size=(B, T, n, K)), jnp.bfloat16) for n in (H, G))
  segment = np.sort(rng.integers(1, 4, (B, T)), 1).astype(np.int32)
  segment[0, 200:] = 0
  score = np.einsum(
    'bthk,bshk->bhts', np.asarray(q, float), np.repeat(np.asarray(k, float), H // G, 2)
  )
  score *= K**-0.5
  mask = np.tril(np.ones((T, T), bool)) & (segment[:, :, None] == segment[:, None])
  capped = cap * np.tanh(score / cap) if cap else score
  e = np.where(mask[:, None], np.exp(capped), 0)
  log_sum = np.log(e.sum(-1)).swapaxes(1, 2)
  live = segment > 0
  arrays = (
    q,
    k,
    jnp.asarray(log_sum, jnp.float32),
    jnp.asarray(segment),
    jnp.asarray(live),
  )
  seen = (mask & live[..., None])[:, None]
  return arrays, np.where(seen, e / e.sum(-1, keepdims=True), 0), np.where(seen, score, 0)


@pytest.mark.slow
@pytest.mark.parametrize('cap', [0.0, 3.0])
def test_the_kernel_gives_the_sums_of_whole_matrices(cap):
  arrays, weight, score = inputs(cap)
  interpret = jax.default_backend() == 'cpu'
  sums = key_sums.key_sums(*arrays, cap=cap, interpret=interpret)
  exact = dict(rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(sums.weight, weight.sum(2), **exact)
  terms = weight * np.log(np.where(weight > 0, weight, 1))
  np.testing.assert_allclose(sums.entropy, -terms.sum(2), **exact)
  np.testing.assert_allclose(sums.logit, np.abs(score).max(2), **exact)


def test_a_score_that_is_no_number_is_reported_as_infinite():
  (q, *rest), _, _ = inputs(0.0)
  q = q.at[1, 7, 0, 0].set(jnp.nan)
  sums = key_sums.key_sums(q, *rest, cap=0.0, interpret=jax.default_backend() == 'cpu')
  assert np.isinf(sums.logit[1, 0]).any() and np.isfinite(sums.logit[0]).all()
