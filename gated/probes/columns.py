"""A report as a table of text: a line for each layer, a column for each number."""

import math
from typing import Any

# Heading, name of the number, format.
COLUMNS = (
  ('loss', 'loss', '.4f'),
  ('first', 'first_token_attention', '.4f'),
  ('in doc.', 'first_token_attention_documents', '.4f'),
  ('uniform', 'first_token_uniform_documents', '.4f'),
  ('sink rate', 'sink_rate', '.3f'),
  ('a key', 'largest_key_weight', '.4f'),
  ('entropy', 'attention_entropy', '.3f'),
  ('logit', 'attention_logit_max', '.1f'),
  ('sinks', 'sink_mass', '.3f'),
  ('M-Act', 'm_act', '.4g'),
  ('median', 'm_act_median', '.3g'),
  ('kurtosis', 'kurtosis', '.3g'),
  ('gate', 'gate_mean', '.3f'),
  ('<0.1', 'gate_below_0.1', '.3f'),
  ('|y|<.01', 'output_below_1e-2', '.3f'),
  ('before', 'output_below_1e-2_before', '.3f'),
  ('rank VO', 'rank_value_output', '.1f'),
)


def table(report: dict[str, Any]) -> str:
  """A report -> a line per layer and one for the whole model; '-' if a number is None.

  Reports by label under 'beside' add a line to each of their layers, with the label as
  the last column.
  """
  beside = report.get('beside', {})
  runs = {'this run' if beside else '': report, **beside}
  columns = [column for column in COLUMNS if column[1] in report]
  depths = {label: len(run['m_act']['layers']) for label, run in runs.items()}
  lines = [['layer', *(heading for heading, _, _ in columns), '']]
  for layer in [*range(max(depths.values())), None]:
    for label, run in runs.items():
      if layer is None or layer < depths[label]:
        numbers = [_cell(run[name], layer, form) for _, name, form in columns]
        lines.append(['all' if layer is None else str(layer), *numbers, label])
  widths = [max(map(len, column)) for column in zip(*lines)]
  align = [*('>' for _ in columns), '>', '<']
  rows = (zip(line, align, widths) for line in lines)
  return '\n'.join(
    '  '.join(f'{cell:{a}{w}}' for cell, a, w in row).rstrip() for row in rows
  )


def _cell(number: dict[str, Any], layer: int | None, form: str) -> str:
  """A number of one layer, or of the whole model for None, as text."""
  values = number['layers']
  value = number['value'] if layer is None else values and values[layer]
  known = isinstance(value, (int, float)) and math.isfinite(value)
  return format(value, form) if known else '-'
