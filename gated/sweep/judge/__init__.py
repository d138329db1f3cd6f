"""Judges runs by their logs: spikes, warnings, divergence, LR sensitivity, seeds."""

from gated.sweep.judge.rule import Rule, best_rate, diverged, sensitivity
from gated.sweep.judge.seeds import LEVEL, Noise, Spread, noise, spread
from gated.sweep.judge.spikes import Spike, limit, spikes
from gated.sweep.judge.warnings import warnings

__all__ = ['Rule', 'best_rate', 'diverged', 'sensitivity', 'warnings']
__all__ += ['LEVEL', 'Noise', 'Spike', 'Spread', 'limit', 'noise', 'spikes', 'spread']
