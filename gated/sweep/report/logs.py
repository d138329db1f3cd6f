"""The log of a run, read from its workdir: curves over steps, and a summary.

Records may be millions, so only the numbers that are drawn or judged are kept.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gated import storage, sweep
from gated.probes.report import SCALARS
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.sweep import judge
from gated.sweep.judge.warnings import INDICATORS

# The early warnings that are drawn -> their titles.
WATCHED = {
  'grad_norm': 'gradient norm',
  'attention_logit': 'max. attention logit',
  'output_logit': 'output logit (rms)',
  'residual_growth': 'residual growth',
}
# The kept numbers: KIND/NAME of metrics.jsonl.
KEPT = ('train/loss', 'train/lr', 'heldout/loss')
KEPT += tuple('/'.join(INDICATORS[name][:2]) for name in WATCHED)
KEPT += tuple(f'probes/{name}' for name in SCALARS)


class Curve(NamedTuple):
  """A metric over steps."""

  steps: np.ndarray
  values: np.ndarray

  def thinned(self, count: int) -> 'Curve':
    """About `count` points: the minimum and maximum of each stretch."""
    n = len(self.steps)
    if n <= count:
      return self
    kept = {0, n - 1}
    finite = np.isfinite(self.values)
    for part in np.array_split(np.arange(n), max(1, count // 2)):
      good = part[finite[part]]
      if len(good):
        kept |= {good[np.argmin(self.values[good])], good[np.argmax(self.values[good])]}
      kept |= set(part[~finite[part]][:1])
    indices = np.array(sorted(kept))
    return Curve(self.steps[indices], self.values[indices])

  @property
  def last(self) -> float | None:
    """The last value; None for an empty curve."""
    return float(self.values[-1]) if len(self.values) else None


class Log(NamedTuple):
  """A summary of a workdir, without its records."""

  state: str  # absent, partial, finished, diverged or failed
  step: int
  message: str  # the reason why its last session ended
  curves: Mapping[str, Curve]  # those of KEPT, and the two axes of `along`
  warnings: Mapping[str, float | int | None]  # from judge.warnings
  noted: int | None  # spikes that the guard counted during training
  rate: float | None  # tokens per second
  device: str  # of the latest session: '2 x NVIDIA H200'
  data: str  # the fingerprint of its training data

  @property
  def train(self) -> Curve:
    """The training loss, in nats per token."""
    return self.curves['train/loss']

  @property
  def heldout(self) -> Curve:
    """The held-out loss, in nats per token."""
    return self.curves['heldout/loss']

  @property
  def seconds(self) -> float:
    """The duration of all training steps."""
    return 3600 * (self.curves['hours'].last or 0.0)

  def watched(self, name: str) -> Curve:
    """The curve of a number in WATCHED."""
    return self.curves['/'.join(INDICATORS[name][:2])]

  def along(self, curve: Curve, axis: str) -> np.ndarray:
    """The x values of a curve, along one of AXES."""
    if axis == 'step' or not len(curve.steps):
      return curve.steps.astype(np.float64)
    steps, values = self.curves[axis]
    return np.interp(curve.steps, [0, *steps], [0.0, *values])


# The axes of curves -> their labels.
AXES = {'step': 'step', 'tokens': 'tokens', 'hours': 'hours of training'}


def read(workdir: storage.Path, steps: int) -> Log:
  """The workdir of a run of `steps` steps -> Log."""
  state, step, message = sweep.state(workdir, steps)
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  own = [r for r in records if r['kind'] == 'train']
  rates = [r['tokens_per_second'] for r in own if 'tokens_per_second' in r]
  device = data = ''
  if storage.exists(workdir / 'run.json'):
    run = json.loads(storage.read(workdir / 'run.json', workdirs.LIMIT))
    last, data = run['sessions'][-1], run['data'].get('sha256', '')
    device = f'{last["devices"]} x {last["device_kind"]}'
  return Log(
    state=state,
    step=step,
    message=message,
    curves=_curves(records)
    | {
      'tokens': _total(own, 'tokens', 1.0),
      'hours': _total(own, 'step_seconds', 1 / 3600),
    },
    warnings=judge.warnings(records),
    noted=int(own[-1]['spikes']) if own else None,
    rate=float(np.median(rates)) if rates else None,
    device=device,
    data=data,
  )


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
  kept: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in KEPT}
  for record in records:
    for name in record:
      pair = kept.get(f'{record["kind"]}/{name}')
      if pair:
        pair[0].append(record['step'])
        pair[1].append(record[name])
  return {
    name: Curve(np.array(steps, np.int64), np.array(values, np.float64))
    for name, (steps, values) in kept.items()
  }


def _total(records: Sequence[Mapping[str, Any]], name: str, unit: float) -> Curve:
  """The sum of a number of the training steps so far.

  A record has the value of its step, or the mean since the record before; it counts for
  all steps since then.
  """
  steps = np.array([r['step'] for r in records], np.int64)
  values = np.array([r.get(name, 0.0) for r in records], np.float64)
  return Curve(steps, unit * np.cumsum(values * np.diff(steps, prepend=0)))
