import lzma
import math
import random

import numpy as np
import pytest

from gated import evals
from gated.evals import yardsticks


def pairs(seed, *, vocab, rows=4, tokens=50):
  rng = np.random.default_rng(seed)
  tokens_BT = rng.zipf(1.5, (rows, tokens)) % vocab
  targets_BT = (tokens_BT * 7 + rng.zipf(1.5, (rows, tokens))) % vocab
  return tokens_BT, targets_BT, np.ones((rows, tokens), np.float32)


def test_a_summary_is_the_ratio_of_the_sums():
  nll_R, weight_R, bytes_R = np.array([[20.0, 10, 3], [10, 10, 2], [40, 20, 5]])
  actual = evals.summarize(nll_R, weight_R, bytes_R)
  assert actual['nats_per_token'] == pytest.approx(33 / 22)
  assert actual['perplexity'] == pytest.approx(math.exp(33 / 22))
  assert actual['bits_per_byte'] == pytest.approx(33 / math.log(2) / 65)
  assert (actual['tokens'], actual['bytes'], actual['rows']) == (22, 65, 3)


def test_rows_without_tokens_do_not_count_and_one_row_has_no_error():
  single = evals.summarize(np.array([2.0, 0.0]), np.array([4, 0]), np.array([8, 0]))
  assert single['rows'] == 1 and single['nats_per_token'] == 0.5
  assert (
    single['nats_per_token_stderr'] is None and single['bits_per_byte_stderr'] is None
  )


def test_rows_without_counted_tokens_are_refused():
  with pytest.raises(ValueError, match='no row to evaluate holds a counted token'):
    evals.summarize(np.zeros(3), np.zeros(3), np.zeros(3))


def test_the_standard_error_is_the_spread_over_repeated_samples():
  rng = np.random.default_rng(0)
  values, claimed = [], []
  for _ in range(400):
    weight_R = rng.integers(50, 200, 60)
    # A row shares its difficulty: its tokens are far from independent.
    nll_R = weight_R * rng.normal(3, 0.5, 60)
    actual = evals.summarize(nll_R, weight_R, weight_R * 4)
    values.append(actual['nats_per_token'])
    claimed.append(actual['nats_per_token_stderr'])
    ratio = actual['bits_per_byte_stderr'] / actual['nats_per_token_stderr']
    assert ratio == pytest.approx(1 / (4 * math.log(2)))
  assert np.std(values) == pytest.approx(np.mean(claimed), rel=0.15)


@pytest.mark.parametrize('vocab', [5, 257])
def test_bigram_probabilities_sum_to_one_after_every_token(vocab):
  bigram = evals.Bigram.fit([pairs(0, vocab=vocab)], vocab=vocab)
  context_CV, target_CV = np.mgrid[0:vocab, 0:vocab]
  p_CV = np.exp(-bigram.nll(context_CV, target_CV))
  assert (bigram.seen_V == 0).any() or vocab == 5
  np.testing.assert_allclose(p_CV.sum(1), 1, rtol=1e-12)


def test_bigram_follows_its_formula():
  tokens, targets = np.array([[0, 0, 0, 1]]), np.array([[1, 1, 2, 0]])
  bigram = evals.Bigram.fit([(tokens, targets, np.ones((1, 4)))], vocab=4)
  # p(w) = (n(w) + 1) / (4 + 4); after 0: 3 tokens, 2 different ones.
  expected = [(2 + 2 * 3 / 8) / 5, (0 + 2 * 1 / 8) / 5, (1 + 1 * 2 / 8) / 2, 1 / 8]
  actual = bigram.nll(np.array([0, 0, 1, 3]), np.array([1, 3, 0, 3]))
  np.testing.assert_allclose(actual, -np.log(expected), rtol=1e-12)
  assert actual.dtype == np.float64


def test_targets_of_weight_zero_are_no_pairs():
  tokens_BT, targets_BT, weights_BT = pairs(1, vocab=9)
  weights_BT[:, ::2] = 0
  all_but = evals.Bigram.fit([(tokens_BT, targets_BT, weights_BT)], vocab=9)
  kept = [a[:, 1::2] for a in (tokens_BT, targets_BT, weights_BT)]
  np.testing.assert_array_equal(
    all_but.nll(tokens_BT, targets_BT),
    evals.Bigram.fit([kept], vocab=9).nll(tokens_BT, targets_BT),
  )


def test_a_large_vocabulary_merged_in_pieces_counts_the_same(monkeypatch):
  batches = [pairs(seed, vocab=151_936) for seed in range(6)]
  whole = evals.Bigram.fit(batches, vocab=151_936)
  monkeypatch.setattr(yardsticks, 'PENDING', 300)
  pieces = evals.Bigram.fit(iter(batches), vocab=151_936)
  np.testing.assert_array_equal(whole.pair_P, pieces.pair_P)
  np.testing.assert_array_equal(whole.count_P, pieces.count_P)
  assert pieces.count_P.sum() == 6 * 4 * 50


def test_an_empty_bigram_is_uniform():
  bigram = evals.Bigram.fit([], vocab=8)
  np.testing.assert_allclose(bigram.nll(np.array([3]), np.array([5])), math.log(8))


@pytest.mark.parametrize('bad', [-1, 8])
def test_a_token_outside_the_vocabulary_is_refused(bad):
  tokens = np.array([[bad, 1]])
  with pytest.raises(ValueError, match=f'token {bad} is outside the vocabulary of 8'):
    evals.Bigram.fit([(tokens, tokens, np.ones((1, 2)))], vocab=8)


def test_xz_counts_the_bytes_of_the_compressed_text():
  text = bytes(random.Random(0).choices(b'ab', k=4000))
  packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  assert evals.xz(text) == 8 * len(packed) / 4000
  assert 1 < evals.xz(text) < 2
  with pytest.raises(ValueError, match='empty'):
    evals.xz(b'')


def test_the_table_has_a_line_a_domain_and_aligned_columns():
  summary = evals.summarize(np.array([20.0, 10]), np.array([10, 10]), np.array([40, 20]))
  yardsticks = {'bigram_bits_per_byte': 3.61, 'xz_bits_per_byte': 1.46}
  report = {'step': 12, 'domains': {'code': summary | yardsticks, 'prose': summary}}
  head, code, prose = evals.table(report).splitlines()
  assert head.startswith('step 12') and head.endswith('xz -9e b/B')
  assert code.startswith('code') and code.split()[-2:] == ['3.6100', '1.4600']
  assert prose.startswith('prose') and prose.split()[-2:] == ['-', '-']
  assert len(head) == len(code) == len(prose)
  other = {'step': 12, 'domains': {'code': summary, 'prose': summary}}
  lines = evals.table(report | {'beside': {'gates open': other}}).splitlines()
  assert [line.split('  ')[0] for line in lines[1:]] == [
    'code',
    'code, gates open',
    'prose',
    'prose, gates open',
  ]


def test_rows_without_text_have_no_bits_per_byte():
  """Rows of ends of text only: tokens, but no byte."""
  zero = np.zeros(2)
  summary = evals.heldout.summarize(np.array([3.0, 5.0]), np.ones(2), zero)
  assert (summary['nats_per_token'], summary['bytes']) == (4.0, 0)
  assert summary['bits_per_byte'] is summary['bits_per_byte_stderr'] is None
  table = evals.table({'step': 1, 'domains': {'code': summary}}).splitlines()[1]
  assert 'inf' not in table and 'nan' not in table
