"""Reads the points of a sweep, judges them, and gathers them in lines.

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

from gated import storage, sweep
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.sweep import judge
from gated.sweep.judge.spikes import GAP, THRESHOLD, WARMUP, WINDOW
from gated.sweep.judge.warnings import INDICATORS

TAIL, LEAST = 0.02, 10  # Fraction and least number of records in a final training loss.
# The early warnings that are drawn -> their titles.
WATCHED = {
  'grad_norm': 'gradient norm',
  'attention_logit': 'max. attention logit',
  'output_logit': 'output logit (rms)',
  'residual_growth': 'residual growth',
}


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
  """A summary of a workdir, without its records, which may be millions."""

  state: str  # absent, partial, finished, diverged or failed
  step: int
  message: str  # the reason why its last session ended
  train: Curve
  numbers: Mapping[str, Curve]  # early warnings over steps, by name
  warnings: Mapping[str, float | int | None]  # from judge.warnings
  noted: int | None  # spikes that the guard counted during training
  final: float | None  # nats per token; None for a point that has not ended
  final_of: str  # heldout or train; '' without a final loss
  seconds: float
  rate: float | None  # tokens per second
  device: str  # of the latest session: '2 x NVIDIA H200'
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
  lr: float
  seed: int

  @property
  def name(self) -> str:
    return self.point.name

  @property
  def steps(self) -> int:
    return self.point.steps

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
    steps = {k.removesuffix('_left'): v for k, v in self.log.warnings.items()}
    alarms = {k: int(v) for k, v in steps.items() if v is not None and k in INDICATORS}
    return dict(sorted(alarms.items(), key=lambda item: item[1]))

  @property
  def height(self) -> float:
    """The height of the highest spike, in nats; 0 without a spike."""
    return max((s.height for s in self.spikes), default=0.0)

  @property
  def capped(self) -> float | None:
    """min(final, init) over the finite ones; None if neither is finite."""
    losses = [x for x in (self.log.final, self.init) if x is not None]
    return min(filter(math.isfinite, losses), default=None)


def read(
  swept: sweep.Sweep, rule: judge.Rule, spike_args: Mapping[str, Any]
) -> list[Judged]:
  """A sweep -> its judged points.

  `spike_args` override the arguments of `judge.spikes` that `fitting` chooses.
  """
  points = swept.points
  lrs = [point.config['optim']['lr'] for point in points]
  seeds = [point.config['seed'] for point in points]
  axes = _label(points, 'lr', lrs), _label(points, 'seed', seeds)
  labels = [{k: v for k, v in p.labels.items() if k not in axes} for p in points]
  names = [', '.join(own.values()) or swept.name for own in labels]
  logs = [_log(swept, point) for point in points]
  finals = [log.final if log.state == 'finished' else None for log in logs]
  finite = [final for final in finals if final is not None and math.isfinite(final)]
  best = min(finite, default=math.inf)
  # A point that diverged even without a comparison to the sweep's best is not slow.
  alone = [_reason(log, math.inf, rule) for log in logs]
  stable: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
  for name, lr, final, reason in zip(names, lrs, finals, alone, strict=True):
    if final is not None and not reason:
      stable[name].append((lr, final))
  peaks = {k: judge.best_rate(v, best=best, rule=rule) for k, v in stable.items()}
  judged = []
  for i, (point, log, name) in enumerate(zip(points, logs, names, strict=True)):
    reason = _reason(log, best, rule)
    slow = bool(reason and not alone[i] and lrs[i] < peaks[name])
    args = fitting(point.steps) | dict(spike_args)
    limits = {k: args[k] for k in ('threshold', 'warmup')}
    judged.append(
      Judged(
        point=point,
        log=log,
        line=name,
        line_labels=labels[i],
        reason='' if slow else reason,
        slow=slow,
        spikes=judge.spikes(*log.train, **args),
        limit=judge.limit(*log.train, **limits),
        lr=lrs[i],
        seed=seeds[i],
      )
    )
  return judged


def _label(points: Sequence[sweep.Point], axis: str, values: Sequence[float]) -> str:
  """The name of the label that holds the values of an axis; '' if no label does.

  An axis may have any name, so the values decide if no label is called `axis`.
  """
  names = list(dict.fromkeys(name for p in points for name in p.labels))
  for name in [] if axis in names or len(set(values)) == 1 else names:
    texts = [p.labels.get(name, '') for p in points]
    try:
      if np.allclose([*map(float, texts)], values, rtol=1e-3, atol=0):
        return name
    except ValueError:
      continue  # Not a number.
  return axis


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
  warmup, gap = min(WARMUP, steps // 10), min(GAP, steps // 20)
  return {'window': WINDOW, 'threshold': THRESHOLD, 'warmup': warmup, 'gap': gap}


def _log(swept: sweep.Sweep, point: sweep.Point) -> Log:
  workdir = swept.workdir(point)
  state, step, message = sweep.state(workdir, point.steps)
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  train = _curve(records, 'train', 'loss')
  final, final_of = _final(records, train) if state == 'finished' else (None, '')
  own = [r for r in records if r['kind'] == 'train']
  # step_seconds is the mean of a step since the previous record.
  gaps = np.diff([0, *(r['step'] for r in own)])
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
    train=train,
    numbers={name: _curve(records, *INDICATORS[name]) for name in WATCHED},
    warnings=judge.warnings(records),
    noted=int(own[-1]['spikes']) if own else None,
    final=math.nan if state == 'diverged' else final,
    final_of=final_of,
    seconds=float(sum(r.get('step_seconds', 0) * n for r, n in zip(own, gaps))),
    rate=float(np.median(rates)) if rates else None,
    device=device,
    data=data,
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


def rate(lr: float) -> str:
  """0.0032 -> '3.2e-3', 0.01 -> '1e-2'."""
  digits, _, power = f'{lr:.2e}'.partition('e')
  return f'{digits.rstrip("0").rstrip(".")}e{int(power)}'


class Cell:
  """The seeds of a line at one learning rate."""

  def __init__(self, lr: float, points: Sequence[Judged]):
    self.lr, self.points = lr, points
    self.diverged = [p for p in points if p.diverged]
    ended = [p.log.final for p in points if not p.diverged]
    # Final losses of the points without divergence.
    self.finals = [final for final in ended if final is not None]
    self.spread = judge.spread(self.finals)
    self.mean = self.spread.mean


class Line:
  """Points that differ only in learning rate and seed."""

  def __init__(self, name: str, points: Sequence[Judged]):
    self.name, self.points = name, points
    self.lrs = sorted({p.lr for p in points})
    self.seeds = sorted({p.seed for p in points})
    self.cells = [Cell(lr, [p for p in points if p.lr == lr]) for lr in self.lrs]
    # Without a diverged seed.
    self.stable = [c for c in self.cells if c.finals and not c.diverged]
    # The stable cell with the lowest mean.
    self.best = min(self.stable, key=lambda c: c.mean, default=None)
    # Seed -> LR sensitivity, for seeds that have ended at every learning rate.
    self.sensitivities: dict[int, float] = {}
    for seed in self.seeds if len(self.lrs) > 1 else []:
      own = [p for p in points if p.seed == seed]
      inits = [math.nan if p.init is None else p.init for p in own]
      ended = all(p.done for p in own) and all(map(math.isfinite, inits))
      if ended and {p.lr for p in own} == set(self.lrs):
        finals = [math.nan if p.log.final is None else p.log.final for p in own]
        value = judge.sensitivity(finals, inits)
        self.sensitivities |= {seed: value} if math.isfinite(value) else {}


def gather(points: Sequence[Judged]) -> list[Line]:
  """Points -> lines, in the order of their first points."""
  names = dict.fromkeys(p.line for p in points)
  return [Line(name, [p for p in points if p.line == name]) for name in names]
