"""Continuations of a few prompts while a model trains."""

import numpy as np

from gated import data


def longest_document(rows: data.Batch) -> np.ndarray:
  """The longest document of the first packed row -> its token ids."""
  segment_T = rows.segments[0]
  counts = np.bincount(segment_T)
  counts[0] = 0  # Padding.
  return rows.tokens[0][segment_T == counts.argmax()]
