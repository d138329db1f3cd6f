"""The grouped matmul contract and its backends: Pallas, megablox, ragged_dot, blocks."""
