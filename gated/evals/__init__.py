"""Evaluation of a model: held-out loss beside two yardsticks, and text generation."""

from gated.evals import generate
from gated.evals.heldout import Config, perplexity, summarize, table
from gated.evals.positions import Curve
from gated.evals.samples import longest_document, sampler
from gated.evals.sampling import Sampling, define
from gated.evals.yardsticks import Bigram, measure_yardsticks, xz
from gated.evals.yardsticks import define as define_yardsticks

__all__ = [
  'Bigram',
  'Config',
  'Curve',
  'Sampling',
  'define',
  'define_yardsticks',
  'generate',
  'longest_document',
  'measure_yardsticks',
  'perplexity',
  'sampler',
  'summarize',
  'table',
  'xz',
]
