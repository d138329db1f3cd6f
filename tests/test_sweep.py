"""Sweeps: their grids are checked, their points run once, and runs are compared."""

import pytest

from gated import sweep


def test_a_sweep_without_points_is_refused():
  with pytest.raises(ValueError, match='empty'):
    sweep.plan('configs/tiny.py', [], resolve=lambda words: {})
