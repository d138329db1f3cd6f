"""Attention, grouped matmul and vocabulary loss with their backends; products in FP8.

A backend that does not support a case raises NotImplementedError with the reason; 'auto'
then tries the next one, and logs the choice once.
"""

from gated.kernels.attention.case import scores, sees, soft_cap, with_lse_gradient
from gated.kernels.attention.contract import (
  ATTENTION,
  NORMALIZERS,
  REFERENCE_LIMIT,
  SOFTPICK_EPS,
  attend,
  attend_cache,
  attend_lse,
  check_backend,
)
from gated.kernels.attention.key_sums import KeySums, key_sums
from gated.kernels.attention.key_sums import fits as key_sums_fit
from gated.kernels.attention.largest import largest_scores
from gated.kernels.attention.rounding import ROUNDINGS
from gated.kernels.cross_entropy import vocab_loss
from gated.kernels.fp8 import tensordot as fp8_tensordot
from gated.kernels.grouped_matmul.contract import GROUPED, check_grouped, grouped_matmul

__all__ = [
  'ATTENTION',
  'GROUPED',
  'NORMALIZERS',
  'REFERENCE_LIMIT',
  'ROUNDINGS',
  'SOFTPICK_EPS',
  'KeySums',
  'attend',
  'attend_cache',
  'attend_lse',
  'check_backend',
  'check_grouped',
  'fp8_tensordot',
  'grouped_matmul',
  'key_sums',
  'key_sums_fit',
  'largest_scores',
  'scores',
  'sees',
  'soft_cap',
  'vocab_loss',
  'with_lse_gradient',
]
