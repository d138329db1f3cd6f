"""Samples over seeds -> sums and ratios of means with intervals, and a verdict."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gated.sweep import judge
from gated.sweep.judge.seeds import LEVEL

LEAST = 3  # With fewer seeds of an arm, nothing is decided.

Samples = Mapping[str, Mapping[int, float]]  # Arm -> seed -> number.
Weights = Mapping[str, float]  # Arm -> its weight in a sum of means.


class Estimate(NamedTuple):
  """A number with its interval at LEVEL; infinite with one seed."""

  value: float
  low: float
  high: float


class Means:
  """The means of samples, and the covariance of their errors.

  Samples are paired by seed if they share LEAST seeds, or all seeds of the smallest; then
  only shared seeds count, and errors that the arms have in common cancel. Otherwise they
  are independent (Welch).
  """

  def __init__(self, samples: Samples):
    self.names = list(samples)
    shared = sorted(set.intersection(*(set(own) for own in samples.values())))
    self.paired = len(shared) >= min(LEAST, *map(len, samples.values()))
    used = [
      [own[s] for s in shared] if self.paired else [*own.values()]
      for own in samples.values()
    ]
    self.counts = np.array([len(x) for x in used])
    self.mean = np.array([np.mean(x) for x in used])
    if min(self.counts) < 2:
      self.covariance = np.full((len(used), len(used)), np.nan)
    elif self.paired:
      self.covariance = np.atleast_2d(np.cov(used)) / self.counts[0]
    else:
      self.covariance = np.diag([np.var(x, ddof=1) for x in used] / self.counts)
    self.noise = judge.noise(used)

  def _vector(self, weights: Weights) -> np.ndarray:
    return np.array([weights.get(name, 0.0) for name in self.names])

  def t(self, w: np.ndarray) -> float:
    """Student's t at LEVEL, with the degrees of freedom of a sum (Satterthwaite)."""
    from scipy.special import stdtrit  # Loads slowly.

    dof = self.counts.min() - 1
    parts = w**2 * np.diag(self.covariance)
    if not self.paired and parts.sum() > 0:
      dof = parts.sum() ** 2 / np.sum(parts**2 / (self.counts - 1))
    return float(stdtrit(dof, (1 + LEVEL) / 2))

  def sum(self, weights: Weights) -> Estimate:
    """The weighted sum of the means."""
    w = self._vector(weights)
    value, square = float(w @ self.mean), float(w @ self.covariance @ w)
    if not math.isfinite(square):
      return Estimate(value, -math.inf, math.inf)
    half = self.t(w) * math.sqrt(max(square, 0))
    return Estimate(value, value - half, value + half)

  def ratio(self, top: Weights, bottom: Weights) -> Estimate:
    """The ratio of two sums, with Fieller's interval: the r for which top - r * bottom
    may be 0. The interval is infinite if the bottom may be 0.
    """
    a, b = self._vector(top), self._vector(bottom)
    x, y = float(a @ self.mean), float(b @ self.mean)
    value = x / y if y else math.nan
    aa, ab, bb = (float(u @ self.covariance @ v) for u, v in ((a, a), (a, b), (b, b)))
    if not (math.isfinite(aa + bb) and math.isfinite(value)):
      return Estimate(value, -math.inf, math.inf)
    t = self.t(a - value * b) ** 2
    A, B, C = y * y - t * bb, x * y - t * ab, x * x - t * aa
    if A <= 0:
      return Estimate(value, -math.inf, math.inf)
    half = math.sqrt(max(B * B - A * C, 0))
    return Estimate(value, (B - half) / A, (B + half) / A)

  def floor(self, weights: Weights) -> float:
    """The noise floor of a sum: the smallest significant value by judge.Noise.

    Arms count as independent: pairing narrows an interval, but not the floor.
    """
    scale = math.sqrt(np.sum(self._vector(weights) ** 2 / self.counts))
    return self.noise.within(1) * scale


def decide(estimate: Estimate, sense: str, bound: float, floor: float) -> str:
  """An estimate and a claim about it -> supported, contradicted or undecided.

  sense   '<' or '>': below or above the bound; '=': within +-bound of 0
  floor   the distance from the bound must exceed it to decide
  """
  value, low, high = estimate
  if sense == '=':
    if max(-low, high, floor) < bound:
      return 'supported'
    return (
      'contradicted' if max(low, -high) > bound and abs(value) > floor else 'undecided'
    )
  if low <= bound <= high or abs(value - bound) <= floor:
    return 'undecided'
  return 'supported' if (value < bound) == (sense == '<') else 'contradicted'
