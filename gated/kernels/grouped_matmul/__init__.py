"""The grouped matmul contract and its backends: Pallas, megablox, ragged_dot, blocks."""

from gated.kernels.grouped_matmul.contract import GROUPED, check_grouped, grouped_matmul

__all__ = ['GROUPED', 'check_grouped', 'grouped_matmul']
