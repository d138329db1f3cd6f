"""Early warnings: indicators that change before the loss diverges."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gated.train.guard import VERDICTS

TIMES = 5.0  # An indicator above this multiple of its usual value is out of range.
SETTLED = 0.1  # The first fraction of the steps is ignored: the learning rate warms up.

# Indicator -> the kind of its records, and its field; two fields make a ratio.
INDICATORS = {
  'grad_norm': ('train', 'grad_norm'),
  'update_ratio': ('train', 'update_norm', 'param_norm'),
  'attention_logit': ('indicators', 'attention_logit'),
  'output_logit': ('indicators', 'output_logit'),
  'residual_growth': ('indicators', 'residual_growth'),
}


def warnings(records: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
  """Records of a metrics.jsonl -> its early warnings by name; None if not logged.

  For each of INDICATORS:

    NAME_max     the largest value, or the first non-finite one
    NAME_last    the last value
    NAME_left    the first step at which it left its usual range, or None

  grad_norm is the global norm before clipping; update_ratio the norm of the update over
  that of the parameters; attention_logit the largest logit; output_logit a root mean
  square; residual_growth the residual stream's root mean square after the last layer over
  that before the first. The usual range ends at TIMES the median of the finite values in
  the first half of the steps; a non-finite value is out of range. The first tenth of the
  steps is ignored, because stable runs have large norms there too.

  `skipped` is the fraction of steps without an update; `not_finite` is the fraction of
  steps with a non-finite loss, gradient or update (such steps are always logged).
  """
  records = list(records)
  summary: dict[str, float | int | None] = {}
  for name, (kind, *fields) in INDICATORS.items():
    logged = [r for r in records if r['kind'] == kind and all(f in r for f in fields)]
    steps = np.array([r['step'] for r in logged], np.int64)
    values = [_ratio(*(r[f] for f in fields)) for r in logged]
    summary |= {f'{name}_{k}': v for k, v in _describe(steps, values).items()}
  train = [r for r in records if r['kind'] == 'train']
  summary |= dict.fromkeys(('skipped', 'not_finite'))
  if train and train[-1]['step']:
    count = train[-1]['step']
    bad = sum(VERDICTS[int(r['verdict'])] == 'not finite' for r in train)
    summary |= {'skipped': train[-1]['skipped'] / count, 'not_finite': bad / count}
  return summary


def _describe(steps: np.ndarray, values: list[float]) -> dict[str, float | int | None]:
  x = np.asarray(values, np.float64)
  if not len(x):
    return dict.fromkeys(('max', 'last', 'left'))
  finite = np.isfinite(x)
  half = finite & (steps <= steps[-1] / 2)
  usual = x[half] if half.any() else x[finite]
  high = ~finite | (x > TIMES * (np.median(usual) if len(usual) else math.inf))
  left = steps[high & (steps > SETTLED * steps[-1])]
  most = float(x.max() if finite.all() else x[~finite][0])
  return {'max': most, 'last': float(x[-1]), 'left': int(left[0]) if len(left) else None}


def _ratio(above: float, below: float = 1.0) -> float:
  return above / below if below else math.nan
