"""The yardsticks of a corpus, to stand beside a model on the same held-out text."""

import itertools

import numpy as np

from gated import data
from gated.evals.yardsticks import Bigram, xz

ROWS = 64  # Rows of a batch that the bigram model reads.


def measure_yardsticks(
  corpus: data.Corpus, trained: data.Corpus, *, rows: int, limit: int, xz_bytes: int
) -> dict[str, dict[str, float]]:
  """By domain: bits per byte of a bigram model and of `xz -9e` on the held-out text.

  The bigram model is fitted to the first `rows` training rows of `trained`. Of each
  domain of `corpus` the first `limit` rows count (0: all); xz compresses the first
  `xz_bytes` of their text (0: all).
  """
  batches = itertools.islice(trained.train(0, [0]), rows)
  pairs = ((batch.tokens, batch.targets, batch.weights) for batch in batches)
  bigram = Bigram.fit(pairs, vocab=corpus.vocab)
  report = {}
  for domain in corpus.domains:
    nats, size = 0.0, 0
    heldout = corpus.heldout(domain, batch=ROWS, rows=range(ROWS), limit=limit)
    for batch, bytes_B in heldout:
      nats += (bigram.nll(batch.tokens, batch.targets) * batch.weights).sum()
      size += int(bytes_B.sum())
    text = corpus.heldout_text(domain, limit)[: xz_bytes or None]
    report[domain] = {
      'bigram_rows': rows,
      'bigram_bits_per_byte': float(nats / np.log(2) / size),
      'xz_bits_per_byte': xz(text),
      'xz_bytes': len(text),
    }
  return report
