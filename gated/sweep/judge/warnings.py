"""Early warnings: what a run's own numbers said before its loss did."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gated.train.guard import VERDICTS

# So many times its usual value, an indicator has left its range.
TIMES = 5.0
# Of the steps: before them it is not looked at, as the learning rate still warms up.
SETTLED = 0.1

# Indicator -> the kind of record it is in, and its field; the ratio where there are two.
INDICATORS = {
  'grad_norm': ('train', 'grad_norm'),
  'update_ratio': ('train', 'update_norm', 'param_norm'),
  'attention_logit': ('indicators', 'attention_logit'),
  'output_logit': ('indicators', 'output_logit'),
  'residual_growth': ('indicators', 'residual_growth'),
}


def warnings(records: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
  """Records of a metrics.jsonl -> its early warnings by name; None where none was logged.

  For each of INDICATORS:

    NAME_max     the largest value, or what was not finite
    NAME_last    the last one
    NAME_left    the first step at which it left its usual range; None if it never did

  of grad_norm, the global norm before clipping; update_ratio, the norm of the update over
  that of the parameters; attention_logit, the largest; output_logit, a root mean square;
  residual_growth, the residual stream's root mean square after the last layer over that
  before the first. Usual is at most TIMES the median of the finite values of the first
  half of the steps; what is not finite has left it. The first tenth of the steps is not
  looked at, as there norms are large in sound runs as well.

  Of all steps: `skipped`, the fraction whose update was left out, and `not_finite`, that
  whose loss, gradient or update was not finite (such steps are always logged).
  """
  records = list(records)
  told: dict[str, float | int | None] = {}
  for name, (kind, *fields) in INDICATORS.items():
    own = [r for r in records if r['kind'] == kind and all(f in r for f in fields)]
    steps = np.array([r['step'] for r in own], np.int64)
    values = [_ratio(*(r[f] for f in fields)) for r in own]
    told |= {f'{name}_{k}': v for k, v in _describe(steps, values).items()}
  train = [r for r in records if r['kind'] == 'train']
  told |= dict.fromkeys(('skipped', 'not_finite'))
  if train and train[-1]['step']:
    count = train[-1]['step']
    bad = sum(VERDICTS[int(r['verdict'])] == 'not finite' for r in train)
    told |= {'skipped': train[-1]['skipped'] / count, 'not_finite': bad / count}
  return told


def _describe(steps: np.ndarray, values: list[float]) -> dict[str, float | int | None]:
  x = np.asarray(values, np.float64)
  if not len(x):
    return {'max': None, 'last': None, 'left': None}
  finite = np.isfinite(x)
  half = steps <= steps[-1] / 2
  usual = x[finite & half] if (finite & half).any() else x[finite]
  high = ~finite
  if len(usual):
    high |= x > TIMES * np.median(usual)
  left = steps[high & (steps > SETTLED * steps[-1])]
  most = float(x[finite].max()) if finite.all() else float(x[~finite][0])
  return {'max': most, 'last': float(x[-1]), 'left': int(left[0]) if len(left) else None}


def _ratio(above: float, below: float = 1.0) -> float:
  return above / below if below else math.nan
