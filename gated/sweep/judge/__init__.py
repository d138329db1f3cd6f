"""Judges runs by their logs: spikes, warnings, divergence, LR sensitivity, seeds."""

from gated.sweep.judge.rule import Rule, best_rate, diverged, sensitivity
from gated.sweep.judge.seeds import Noise, Spread, noise, spread
from gated.sweep.judge.spikes import Spike, limit, spikes
from gated.sweep.judge.warnings import warnings

__all__ = [
  'Noise',
  'Rule',
  'Spike',
  'Spread',
  'best_rate',
  'diverged',
  'limit',
  'noise',
  'sensitivity',
  'spikes',
  'spread',
  'warnings',
]
