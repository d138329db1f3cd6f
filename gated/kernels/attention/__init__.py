"""The attention contract and its backends: cuDNN, splash, blocks, the reference."""

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

__all__ = [
  'ATTENTION',
  'NORMALIZERS',
  'REFERENCE_LIMIT',
  'attend',
  'attend_lse',
  'check_backend',
  'scores',
  'segment_runs',
  'soft_cap',
  'with_lse_gradient',
]
