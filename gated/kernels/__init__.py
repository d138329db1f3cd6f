"""Three contracts, each with its backends: attention, grouped matmul, vocabulary loss.

A backend that cannot do a case raises NotImplementedError saying what it lacks; with
'auto' the next one is tried, and the choice is logged once.
"""

from gated.kernels.attention.case import scores, soft_cap, with_lse_gradient
from gated.kernels.attention.contract import (
  ATTENTION,
  NORMALIZERS,
  REFERENCE_LIMIT,
  attend,
  attend_lse,
  check_backend,
  segment_runs,
)
from gated.kernels.cross_entropy import vocab_loss
from gated.kernels.grouped_matmul.contract import GROUPED, check_grouped, grouped_matmul

__all__ = [
  'ATTENTION',
  'GROUPED',
  'NORMALIZERS',
  'REFERENCE_LIMIT',
  'attend',
  'attend_lse',
  'check_backend',
  'check_grouped',
  'grouped_matmul',
  'scores',
  'segment_runs',
  'soft_cap',
  'vocab_loss',
  'with_lse_gradient',
]
