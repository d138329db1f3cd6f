"""Reads the points of a sweep from their workdirs, and judges them.

Final loss, in nats per token: the held-out loss at the point's last step if it was
measured, otherwise the mean training loss of the last 2% of the records, at least 10. NaN
for a run that was stopped as unstable: it did not reach its end. Loss at initialisation:
the training loss of step 1, taken before any update.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gated import config, storage, sweep
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.sweep import judge
from gated.sweep.judge.spikes import GAP, THRESHOLD, WARMUP, WINDOW
from gated.sweep.judge.warnings import INDICATORS

TAIL, LEAST = 0.02, 10  # Fraction and least number of records in a final training loss.
# Labels that are not part of a line's name -> their knobs.
AXES = {'lr': 'optim.lr', 'seed': 'seed'}
# The early warnings that are drawn.
WATCHED = 'grad_norm', 'attention_logit', 'output_logit', 'residual_growth'
LIMITED = ('threshold', 'warmup')  # The arguments of judge.spikes that set the limit.


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


class Log(NamedTuple):
  """What a workdir records; the records themselves, perhaps millions, are dropped."""

  state: str  # absent, partial, finished, diverged or failed
  step: int
  message: str  # of the last session, as it ended
  train: Curve
  numbers: Mapping[str, Curve]  # early warnings over steps, by name
  warnings: Mapping[str, float | int | None]  # from judge.warnings
  noted: int | None  # spikes that the guard counted during training
  final: float | None  # nats per token; None for a point that has not ended
  final_of: str  # heldout or train; '' without a final loss
  seconds: float
  rate: float | None  # tokens per second
  device: str
  data: str  # the fingerprint of its training data


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
  """A point, its log, and the verdict."""

  point: sweep.Point
  log: Log
  line: str
  line_labels: Mapping[str, str]  # labels except learning rate and seed
  reason: str  # why it counts as diverged, or ''
  slow: bool  # above the rule's limit only because it learned slowly
  spikes: Sequence[judge.Spike]
  limit: float  # the height above which this run has a spike, in nats

  @property
  def name(self) -> str:
    return self.point.name

  @property
  def lr(self) -> float:
    return self.point.config['optim']['lr']

  @property
  def steps(self) -> int:
    return self.point.config['steps']

  @property
  def seed(self) -> int:
    return self.point.config['seed']

  @property
  def state(self) -> str:
    return 'diverged' if self.reason else self.log.state

  @property
  def done(self) -> bool:
    return self.state in sweep.ENDED

  @property
  def diverged(self) -> bool:
    return self.state == 'diverged'

  @property
  def init(self) -> float | None:
    first = self.log.train.steps[:1] == 1
    return float(self.log.train.values[0]) if first.any() else None

  @property
  def alarms(self) -> dict[str, int]:
    """Early warning -> the step at which it left its usual range, in order of step."""
    alarms = {
      name.removesuffix('_left'): int(step)
      for name, step in self.log.warnings.items()
      if name.endswith('_left') and step is not None
    }
    return dict(sorted(alarms.items(), key=lambda item: item[1]))

  @property
  def best(self) -> float | None:
    values = self.log.train.values[np.isfinite(self.log.train.values)]
    return float(values.min()) if len(values) else None

  @property
  def height(self) -> float:
    """Of the highest spike, in nats; 0 without a spike."""
    return max((s.height for s in self.spikes), default=0.0)

  @property
  def capped(self) -> float | None:
    """min(final, init) of those that are finite."""
    losses = [x for x in (self.log.final, self.init) if x is not None]
    return min(filter(math.isfinite, losses), default=None)


def read(
  swept: sweep.Sweep, rule: judge.Rule, spike_args: Mapping[str, Any]
) -> list[Judged]:
  """A sweep -> its judged points.

  `spike_args` override the arguments of `judge.spikes` that `fitting` chooses.
  """
  axes = [_label(swept.points, axis, knob) for axis, knob in AXES.items()]
  logs = [_log(swept, point) for point in swept.points]
  labels = [{k: v for k, v in p.labels.items() if k not in axes} for p in swept.points]
  names = [', '.join(own.values()) or swept.name for own in labels]
  rates = [point.config['optim']['lr'] for point in swept.points]
  finals = [log.final if log.state == 'finished' else None for log in logs]
  best = judge.lowest([final for final in finals if final is not None])
  # A point that diverged even without a comparison to the sweep's best is not slow.
  alone = [_reason(log, math.inf, rule) for log in logs]
  stable: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
  for name, lr, final, reason in zip(names, rates, finals, alone, strict=True):
    if final is not None and not reason:
      stable[name].append((lr, final))
  peaks = {k: judge.best_rate(v, best=best, rule=rule) for k, v in stable.items()}
  points = []
  for i, (point, log, name) in enumerate(zip(swept.points, logs, names, strict=True)):
    reason = _reason(log, best, rule)
    slow = bool(reason and not alone[i] and rates[i] < peaks[name])
    args = fitting(point.config['steps']) | dict(spike_args)
    points.append(
      Judged(
        point=point,
        log=log,
        line=name,
        line_labels=labels[i],
        reason='' if slow else reason,
        slow=slow,
        spikes=judge.spikes(*log.train, **args),
        limit=judge.limit(*log.train, **{k: args[k] for k in LIMITED}),
      )
    )
  return points


def _reason(log: Log, best: float, rule: judge.Rule) -> str:
  """Why an ended point counts as diverged; '' if it does not."""
  if log.state not in sweep.ENDED or log.final is None:
    return ''
  broken = log.state == 'diverged'
  return judge.diverged(*log.train, best=best, rule=rule, broken=broken, final=log.final)


def fitting(steps: int) -> dict[str, Any]:
  """A run's steps -> arguments of `judge.spikes`.

  They are those of the paper's curves, except in a short run: its warm-up is a tenth of
  the steps, and its gap a twentieth.
  """
  return {
    'window': WINDOW,
    'threshold': THRESHOLD,
    'warmup': min(WARMUP, steps // 10),
    'gap': min(GAP, steps // 20),
  }


def _log(swept: sweep.Sweep, point: sweep.Point) -> Log:
  workdir = swept.workdir(point)
  state, step, message = sweep.state(workdir, point.config['steps'])
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  train = _curve(records, 'train', 'loss')
  final, final_of = _final(records, train) if state == 'finished' else (None, '')
  if state == 'diverged':
    final = math.nan
  own = [r for r in records if r['kind'] == 'train']
  # step_seconds is the mean of a step since the previous record.
  gaps = np.diff([0, *(r['step'] for r in own)])
  timed = [(r, gap) for r, gap in zip(own, gaps, strict=True) if 'step_seconds' in r]
  rates = [r['tokens_per_second'] for r in own if 'tokens_per_second' in r]
  return Log(
    state=state,
    step=step,
    message=message,
    train=train,
    numbers={name: _curve(records, *INDICATORS[name]) for name in WATCHED},
    warnings=judge.warnings(records),
    noted=int(own[-1]['spikes']) if own else None,
    final=final,
    final_of=final_of,
    seconds=float(sum(r['step_seconds'] * gap for r, gap in timed)),
    rate=float(np.median(rates)) if rates else None,
    **_session(workdir),
  )


def _curve(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> Curve:
  own = [r for r in records if name in r and r['kind'] == kind]
  steps = np.array([r['step'] for r in own], np.int64)
  return Curve(steps, np.array([r[name] for r in own], np.float64))


def _final(
  records: Sequence[Mapping[str, Any]], train: Curve
) -> tuple[float | None, str]:
  if not len(train.steps):
    return None, ''
  last = train.steps[-1]
  heldout = [r for r in records if r['kind'] == 'heldout' and r['step'] == last]
  if heldout:
    return float(heldout[-1]['loss']), 'heldout'
  count = max(LEAST, math.ceil(TAIL * len(train.values)))
  return float(np.mean(train.values[-count:])), 'train'


def _session(workdir: storage.Path) -> dict[str, str]:
  """The devices of the latest session: '2 x NVIDIA H200', and the data's fingerprint."""
  path = workdir / 'run.json'
  if not storage.exists(path):
    return {'device': '', 'data': ''}
  run = json.loads(storage.read(path, workdirs.LIMIT))
  last = run['sessions'][-1]
  device = f'{last["devices"]} x {last["device_kind"]}'
  return {'device': device, 'data': run['data'].get('sha256', '')}


def _label(points: Sequence[sweep.Point], axis: str, knob: str) -> str:
  """The name of the label that holds a knob's values; '' if no label does.

  An axis may have any name, so the values decide if no label is called `axis`.
  """
  names = list(dict.fromkeys(name for p in points for name in p.labels))
  if axis in names:
    return axis

  def holds_knob(name: str) -> bool:
    pairs = {(p.labels.get(name, ''), config.dig(p.config, knob)) for p in points}
    return len(pairs) > 1 and all(_same(text, value) for text, value in pairs)

  return next((name for name in names if holds_knob(name)), '')


def _same(text: str, value: float) -> bool:
  try:
    return math.isclose(float(text), value, rel_tol=1e-3)
  except ValueError:
    return False
