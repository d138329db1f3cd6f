"""What the points of a sweep came to: read from their workdirs, and judged.

Final loss, in nats a token: the held-out loss at the point's last step, where it has one,
else the mean training loss of the last 2% of its records, and of at least 10. NaN of
a run that was left as unstable: it never came to its end, and what it had before is none.
Loss at initialisation: the training loss of step 1, which is taken before any update.
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

TAIL, LEAST = 0.02, 10  # Of the records, whose mean is a final training loss.
DONE = sweep.ENDED
# Labels that are no part of a line's name: what such a label means -> its knob.
AXES = {'lr': 'optim.lr', 'seed': 'seed'}
# What is drawn of early warnings -> the kind of record that has it.
WATCHED = {
  'grad_norm': 'train',
  'attention_logit': 'indicators',
  'output_logit': 'indicators',
  'residual_growth': 'indicators',
}
LIMITED = ('threshold', 'warmup')  # What a spike's height depends on.


class Curve(NamedTuple):
  """A number over steps."""

  steps: np.ndarray
  values: np.ndarray

  def thinned(self, count: int) -> 'Curve':
    """About so many points: of each stretch the least and the largest."""
    n = len(self.steps)
    if n <= count:
      return self
    kept = {0, n - 1}
    finite = np.isfinite(self.values)
    for part in np.array_split(np.arange(n), max(1, count // 2)):
      seen = part[finite[part]]
      if len(seen):
        kept |= {seen[np.argmin(self.values[seen])], seen[np.argmax(self.values[seen])]}
      kept |= set(part[~finite[part]][:1])
    at = np.array(sorted(kept))
    return Curve(self.steps[at], self.values[at])


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
  """A point, and what became of it."""

  name: str
  line: str  # what its labels but learning rate and seed say
  labels: Mapping[str, str]
  apart: Mapping[str, str]  # those labels
  config: Mapping[str, Any]
  state: str  # absent, partial, finished, diverged or failed
  step: int
  told: str  # what its last session said as it ended
  reason: str  # why it counts as diverged, or ''
  slow: bool  # too far above the best to the rule, but for want of steps
  train: Curve
  numbers: Mapping[str, Curve]  # early warnings over steps, by name
  final: float | None  # nats a token; None for a point that is not done
  final_of: str  # heldout or train; '' where it is none
  spikes: Sequence[judge.Spike]
  limit: float  # nats above the median that a spike is, by this run's noise
  noted: int | None  # spikes by the guard, step by step, as it trained
  warnings: Mapping[str, float | int | None]  # as judge.warnings has them
  seconds: float
  rate: float | None  # tokens a second
  device: str
  data: str  # the fingerprint of what it trained on

  @property
  def lr(self) -> float:
    return self.config['optim']['lr']

  @property
  def steps(self) -> int:
    return self.config['steps']

  @property
  def seed(self) -> int:
    return self.config['seed']

  @property
  def done(self) -> bool:
    return self.state in DONE

  @property
  def diverged(self) -> bool:
    return self.state == 'diverged'

  @property
  def init(self) -> float | None:
    first = self.train.steps[:1] == 1
    return float(self.train.values[0]) if first.any() else None

  @property
  def left(self) -> dict[str, int]:
    """Early warning -> the step at which it left its usual range, in their order."""
    found = {
      name.removesuffix('_left'): int(step)
      for name, step in self.warnings.items()
      if name.endswith('_left') and step is not None
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))

  @property
  def best(self) -> float | None:
    finite = self.train.values[np.isfinite(self.train.values)]
    return float(finite.min()) if len(finite) else None

  @property
  def height(self) -> float:
    """Of the highest spike, in nats; 0 without one."""
    return max((s.height for s in self.spikes), default=0.0)

  @property
  def capped(self) -> float | None:
    """min(final, init), which what is not finite does not enter."""
    known = [x for x in (self.final, self.init) if x is not None and math.isfinite(x)]
    return min(known, default=None)


def read(swept: sweep.Sweep, rule: judge.Rule, how: Mapping[str, Any]) -> list[Judged]:
  """A sweep -> its points, judged by a rule.

  `how` are arguments of `judge.spikes`, for those that do not suit the steps.
  """
  lr, seed = (_label(swept.points, axis, knob) for axis, knob in AXES.items())
  logs = [_log(swept, point) for point in swept.points]
  ended = [log for log in logs if log.state == 'finished' and log.final is not None]
  best = judge.lowest([log.final for log in ended if log.final is not None])
  names = [_line(swept, point, (lr, seed)) for point in swept.points]
  rates = [point.config['optim']['lr'] for point in swept.points]
  # What diverged whatever the best of the sweep is was not slow.
  alone = [_reason(log, math.inf, rule) for log in logs]
  sound: dict[str, list[tuple[float, float]]] = {line: [] for line in names}
  for line, lr_of, log, other in zip(names, rates, logs, alone, strict=True):
    if log.state == 'finished' and log.final is not None and not other:
      sound[line].append((lr_of, log.final))
  peaks = {k: judge.best_rate(v, best=best, rule=rule) for k, v in sound.items()}
  found = []
  for i, (point, log, line) in enumerate(zip(swept.points, logs, names, strict=True)):
    apart = {k: v for k, v in point.labels.items() if k not in (lr, seed)}
    reason = _reason(log, best, rule)
    slow = bool(reason and not alone[i] and rates[i] < peaks[line])
    counted = fitting(point.config['steps']) | dict(how)
    found.append(
      Judged(
        name=point.name,
        line=line,
        labels=point.labels,
        apart=apart,
        config=point.config,
        state='diverged' if reason and not slow else log.state,
        step=log.step,
        told=log.told,
        reason='' if slow else reason,
        slow=slow,
        train=log.train,
        numbers=log.numbers,
        final=log.final,
        final_of=log.final_of,
        spikes=judge.spikes(*log.train, **counted),
        limit=judge.limit(*log.train, **{k: counted[k] for k in LIMITED}),
        noted=log.noted,
        warnings=log.warnings,
        seconds=log.seconds,
        rate=log.rate,
        device=log.device,
        data=log.data,
      )
    )
  return found


def _line(swept: sweep.Sweep, point: sweep.Point, axes: Sequence[str]) -> str:
  """The name of a point's line: its labels but those of the axes."""
  apart = [value for name, value in point.labels.items() if name not in axes]
  return ', '.join(apart) or swept.name


def _reason(log: '_Log', best: float, rule: judge.Rule) -> str:
  """Why a point that is done counts as diverged; '' if it does not."""
  if log.state not in DONE or log.final is None:
    return ''
  broken = log.state == 'diverged'
  given: dict[str, Any] = dict(best=best, rule=rule, broken=broken, final=log.final)
  return judge.diverged(*log.train, **given)


def fitting(steps: int) -> dict[str, Any]:
  """How spikes are counted in so many steps: the arguments of `judge.spikes`.

  As in the paper's curves; but in a short run a tenth is warm-up, and what is of one
  spike lies within a twentieth.
  """
  return {
    'window': WINDOW,
    'threshold': THRESHOLD,
    'warmup': min(WARMUP, steps // 10),
    'gap': min(GAP, steps // 20),
  }


class _Log(NamedTuple):
  """What a workdir says; of its records no more is kept, for they may be millions."""

  state: str
  step: int
  told: str
  train: Curve
  numbers: Mapping[str, Curve]
  warnings: Mapping[str, float | int | None]
  noted: int | None
  final: float | None
  final_of: str
  seconds: float
  rate: float | None
  device: str
  data: str


def _log(swept: sweep.Sweep, point: sweep.Point) -> _Log:
  workdir = swept.workdir(point)
  state, step, told = sweep.state(workdir, point.config['steps'])
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  train = _curve(records, 'loss', kind='train')
  final, final_of = _final(records, train) if state == 'finished' else (None, '')
  if state == 'diverged':
    final = math.nan
  own = [r for r in records if r['kind'] == 'train']
  # A record tells the seconds of a step, as a mean since the record before.
  gaps = np.diff([0, *(r['step'] for r in own)])
  timed = [(r, gap) for r, gap in zip(own, gaps, strict=True) if 'step_seconds' in r]
  rates = [r['tokens_per_second'] for r in own if 'tokens_per_second' in r]
  return _Log(
    state=state,
    step=step,
    told=told,
    train=train,
    numbers={name: _curve(records, name) for name in WATCHED},
    warnings=judge.warnings(records),
    noted=int(own[-1]['spikes']) if own else None,
    final=final,
    final_of=final_of,
    seconds=float(sum(r['step_seconds'] * gap for r, gap in timed)),
    rate=float(np.median(rates)) if rates else None,
    **_session(workdir),
  )


def _curve(records: Sequence[Mapping[str, Any]], name: str, kind: str = '') -> Curve:
  own = [r for r in records if name in r and r['kind'] == (kind or WATCHED[name])]
  steps = np.array([r['step'] for r in own], np.int64)
  return Curve(steps, np.array([r[name] for r in own], np.float64))


def _final(
  records: Sequence[Mapping[str, Any]], train: Curve
) -> tuple[float | None, str]:
  if not len(train.steps):
    return None, ''
  held = [r for r in records if r['kind'] == 'heldout' and r['step'] == train.steps[-1]]
  if held:
    return float(held[-1]['loss']), 'heldout'
  count = max(LEAST, math.ceil(TAIL * len(train.values)))
  return float(np.mean(train.values[-count:])), 'train'


def _session(workdir: storage.Path) -> dict[str, str]:
  """The devices of the latest session: '2 x NVIDIA H200', and the data's fingerprint."""
  path = workdir / 'run.json'
  if not storage.exists(path):
    return {'device': '', 'data': ''}
  found = json.loads(storage.read(path, workdirs.LIMIT))
  last = found['sessions'][-1]
  device = f'{last["devices"]} x {last["device_kind"]}'
  return {'device': device, 'data': found['data'].get('sha256', '')}


def _label(points: Sequence[sweep.Point], axis: str, knob: str) -> str:
  """The name of the label that tells a knob; '' if none does.

  An axis may have any name, so one whose labels are the knob's values is taken as well.
  """
  names = list(dict.fromkeys(name for p in points for name in p.labels))
  if axis in names:
    return axis

  def tells(name: str) -> bool:
    pairs = {(p.labels.get(name, ''), config.dig(p.config, knob)) for p in points}
    return len(pairs) > 1 and all(_same(text, value) for text, value in pairs)

  return next((name for name in names if tells(name)), '')


def _same(text: str, value: float) -> bool:
  try:
    return math.isclose(float(text), value, rel_tol=1e-3)
  except ValueError:
    return False
