"""Measurements inside a model: attention, activations, gates, outputs, early warnings."""

from gated.probes.columns import table
from gated.probes.conventions import CONVENTIONS
from gated.probes.measure import measure, merge, watch
from gated.probes.report import of_weights, scalars, summarize

__all__ = [
  'CONVENTIONS',
  'measure',
  'merge',
  'of_weights',
  'scalars',
  'summarize',
  'table',
  'watch',
]
