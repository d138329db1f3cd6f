"""Continuations of a few prompts while a model trains."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gated import data, model
from gated.data.tokenizer import Tokenizer
from gated.evals import generate
from gated.evals.sampling import Sampling

COUNT = 4  # Held-out prompts, or one from each domain if there are more.
LONGEST = 64  # Maximum tokens of a held-out prompt; and at most half a row.


def sampler(
  corpus: data.Corpus,
  texts: Sequence[str],
  options: Sampling,
  *,
  cfg: model.Config,
  on: Mesh,
  context: int,
) -> Callable[[model.Transformer], list[dict[str, str]]]:
  """A model's data and prompts -> a function: model -> [{'prompt': ..., 'text': ...}].

  Without texts, the prompts are the first tokens of documents in the first held-out rows.
  All calls draw with the same keys, and all processes must make them. ValueError names
  config.log.sample_prompts if there is nothing to continue.
  """
  tokenizer = corpus.tokenizer
  prompts = _encoded(texts, tokenizer) if texts else _heldout(corpus, context // 2)
  generate.warn(cfg, max(map(len, prompts)), options.max_tokens, context)

  def sample(net: model.Transformer) -> list[dict[str, str]]:
    # The devices may still compute the step that made this model.
    net = jax.block_until_ready(net)
    new = generate.run(net, prompts, options, on=on, tokenizer=tokenizer, context=context)
    return [
      {
        'prompt': tokenizer.decode(prompt).decode(errors='replace'),
        'text': generate.Stop(tokenizer, prompt, ()).text(ids)[0],
      }
      for prompt, ids in zip(prompts, new, strict=True)
    ]

  return sample


def longest_document(rows: data.Batch) -> np.ndarray:
  """The longest document of the first packed row -> its token ids."""
  segment_T = rows.segments[0]
  counts = np.bincount(segment_T)
  counts[0] = 0  # Padding.
  return rows.tokens[0][segment_T == counts.argmax()]


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
  prompts = [tokenizer.encode(text)[0] for text in texts]
  if empty := [text for text, ids in zip(texts, prompts) if not len(ids)]:
    raise ValueError(f'config.log.sample_prompts: {empty[0]!r} has no tokens')
  return prompts


def _heldout(corpus: data.Corpus, most: int) -> list[np.ndarray]:
  """The start of the longest document of a few held-out rows, spread over the domains."""
  most, prompts = min(LONGEST, max(1, most)), []
  for domain in corpus.domains:
    limit = max(1, COUNT // len(corpus.domains))
    for row, _ in corpus.heldout(domain, batch=1, rows=[0], limit=limit):
      prompts.append(longest_document(row)[:most])
  if not prompts:
    raise ValueError(
      'config.log.sample_prompts=(), but the data has no held-out rows to take prompts '
      'from: set it, or config.log.samples=0'
    )
  return prompts
