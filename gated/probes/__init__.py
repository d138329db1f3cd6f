"""What a model does inside: attention, activations, gates, outputs, early warnings."""

from gated.probes.measure import measure, merge
from gated.probes.report import CONVENTIONS, of_weights, summarize, table

__all__ = ['CONVENTIONS', 'measure', 'merge', 'of_weights', 'summarize', 'table']
