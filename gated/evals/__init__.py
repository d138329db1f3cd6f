"""How good a model is: perplexity and bits per byte by domain, beside two yardsticks."""

from gated.evals.heldout import Config, perplexity, summarize, table
from gated.evals.report import measure_yardsticks
from gated.evals.yardsticks import Bigram, xz

__all__ = [
  'Bigram',
  'Config',
  'measure_yardsticks',
  'perplexity',
  'summarize',
  'table',
  'xz',
]
