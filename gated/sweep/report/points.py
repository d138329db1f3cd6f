"""Judges the points of sweeps, and gathers those of one recipe in cells and lines.

A cell holds the seeds of one recipe, and a line holds cells that differ only in learning
rate. So no mean mixes different models.

Final loss, in nats per token: the held-out loss at the last step if every finished point
measured it there, otherwise the mean training loss of the last 2% of the records, at
least 10. It is NaN for a run that stopped as unstable before its end. Loss at
initialisation: the training loss of step 1, before any update.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gated import config, model, sweep
from gated.sweep import judge
from gated.sweep.judge.spikes import GAP, THRESHOLD, WARMUP, WINDOW
from gated.sweep.judge.warnings import INDICATORS
from gated.sweep.report import evaluations, logs, names
from gated.sweep.report.logs import Log

TAIL, LEAST = 0.02, 10  # Fraction and least number of records in a final training loss.
# The kind of a final loss -> its name.
LOSSES = {'heldout': 'held-out loss', 'train': 'training loss'}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
  """A point, its log, and the verdict."""

  point: sweep.Point
  name: str
  log: Log
  evaluations: Sequence[evaluations.Number]  # of eval.py
  line: str
  line_labels: Mapping[str, str]  # labels except learning rate and seed
  final: float | None  # nats per token; None for a point that has not ended
  final_of: str  # heldout or train, the same for all points
  reason: str  # why it counts as diverged, or ''
  slow: bool  # above the rule's limit, but only because it learned slowly
  spikes: Sequence[judge.Spike]
  limit: float  # the height above which this run has a spike, in nats
  parameters: int | None  # None if this version cannot build the recipe
  flops: float | None  # per trained token

  @property
  def lr(self) -> float:
    return self.point.config['optim']['lr']

  @property
  def seed(self) -> int:
    return self.point.config['seed']

  @property
  def steps(self) -> int:
    return self.point.steps

  @property
  def state(self) -> str:
    """As in `Log.state`, or 'diverged' by the rule."""
    return 'diverged' if self.reason else self.log.state

  @property
  def done(self) -> bool:
    """Whether it has finished or diverged."""
    return self.state in sweep.ENDED

  @property
  def diverged(self) -> bool:
    return self.state == 'diverged'

  @property
  def init(self) -> float | None:
    """The loss at initialisation; None if step 1 was not logged."""
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
    losses = [x for x in (self.final, self.init) if x is not None]
    return min(filter(math.isfinite, losses), default=None)


def read(
  sweeps: Sequence[sweep.Sweep], rule: judge.Rule, spike_args: Mapping[str, Any]
) -> list[Judged]:
  """Sweeps -> their judged points; a run that several of them hold counts once.

  `spike_args` override the arguments of `judge.spikes` that `fitting` chooses.
  """
  named = names.of_points(sweeps)
  read = [logs.read(p.workdir, p.point.steps) for p in named]
  kept = names.once(named, read)
  named, read = [named[i] for i in kept], [read[i] for i in kept]
  kind = _kind(read)
  finals = [_final(log, kind) for log in read]
  # A run that stopped as unstable is not the best.
  ended = [
    x if log.state == 'finished' else None for x, log in zip(finals, read, strict=True)
  ]
  finite = [final for final in ended if final is not None and math.isfinite(final)]
  best = min(finite, default=math.inf)
  # A point that counts as diverged without comparison to the sweep's best is not slow.
  alone = [_reason(log, x, math.inf, rule) for log, x in zip(read, finals, strict=True)]
  stable: dict[str, list[tuple[float, float]]] = {p.line: [] for p in named}
  for p, final, reason in zip(named, ended, alone, strict=True):
    if final is not None and not reason:
      stable[p.line].append((p.point.config['optim']['lr'], final))
  peaks = {k: judge.best_rate(v, best=best, rule=rule) for k, v in stable.items()}
  judged = []
  for p, log, final, before in zip(named, read, finals, alone, strict=True):
    reason = _reason(log, final, best, rule)
    slow = bool(reason and not before and p.point.config['optim']['lr'] < peaks[p.line])
    args = fitting(p.point.steps) | dict(spike_args)
    limits = {k: args[k] for k in ('threshold', 'warmup')}
    c = p.point.config
    parameters, flops = _size(json.dumps(c['model']), c['data']['length'])
    judged.append(
      Judged(
        point=p.point,
        name=p.name,
        log=log,
        evaluations=evaluations.read(p.workdir),
        line=p.line,
        line_labels=p.labels,
        final=final,
        final_of=kind if final is not None else '',
        reason='' if slow else reason,
        slow=slow,
        spikes=judge.spikes(*log.train, **args),
        limit=judge.limit(*log.train, **limits),
        parameters=parameters,
        flops=flops,
      )
    )
  return judged


def _kind(read: Sequence[Log]) -> str:
  """The kind of loss that all finished points have at their last step."""
  finished = [log for log in read if log.state == 'finished' and len(log.train.steps)]
  last = lambda curve: int(curve.steps[-1]) if len(curve.steps) else 0
  heldout = all(last(log.heldout) == last(log.train) for log in finished)
  return 'heldout' if heldout and finished else 'train'


def _final(log: Log, kind: str) -> float | None:
  """The final loss; NaN if the run was stopped as unstable, None before its end."""
  if log.state == 'diverged':
    return math.nan
  if log.state != 'finished' or not len(log.train.steps):
    return None
  if kind == 'heldout':
    return log.heldout.last
  count = max(LEAST, math.ceil(TAIL * len(log.train.values)))
  return float(np.mean(log.train.values[-count:]))


def _reason(log: Log, final: float | None, best: float, rule: judge.Rule) -> str:
  """Why an ended point counts as diverged; '' if it does not."""
  if log.state not in sweep.ENDED or final is None:
    return ''
  broken = log.state == 'diverged'
  return judge.diverged(*log.train, best=best, rule=rule, broken=broken, final=final)


@functools.cache
def _size(shape: str, length: int) -> tuple[int | None, float | None]:
  """config.model as JSON, tokens of a row -> parameters, and FLOPs per trained token.

  None for the shape of another version, with other knobs.
  """
  try:
    cfg = config.build(model.Config, json.loads(shape), 'config.model')
  except ValueError:
    return None, None
  return model.count(model.abstract(cfg)), model.flops_per_token(cfg, length)


def fitting(steps: int) -> dict[str, Any]:
  """A run's steps -> arguments of `judge.spikes`.

  They are those of the paper's curves; in a short run the warm-up is a tenth of the
  steps, and the gap a twentieth.
  """
  warmup, gap = min(WARMUP, steps // 10), min(GAP, steps // 20)
  return {'window': WINDOW, 'threshold': THRESHOLD, 'warmup': warmup, 'gap': gap}


def rate(lr: float) -> str:
  """0.0032 -> '3.2e-3', 0.01 -> '1e-2'."""
  digits, _, power = f'{lr:.2e}'.partition('e')
  return f'{digits.rstrip("0").rstrip(".")}e{int(power)}'


class Cell:
  """The seeds of a line at one learning rate: one recipe."""

  def __init__(self, lr: float, points: Sequence[Judged]):
    self.lr, self.points = lr, points
    self.diverged = [p for p in points if p.diverged]
    # Seed -> final loss, of the points without divergence.
    self.by_seed = {
      p.seed: p.final for p in points if not p.diverged and p.final is not None
    }
    self.finals = [*self.by_seed.values()]
    self.spread = judge.spread(self.finals)
    self.mean = self.spread.mean

  def probe(self, name: str) -> float | None:
    """The last value of a probe, mean over the seeds; None if it was not logged."""
    points = [p for p in self.points if not p.diverged]
    values = [p.log.curves[f'probes/{name}'].last for p in points]
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


class Line:
  """Points that differ only in learning rate and seed."""

  def __init__(self, name: str, points: Sequence[Judged]):
    self.name, self.points = name, points
    self.lrs = sorted({p.lr for p in points})
    self.seeds = sorted({p.seed for p in points})
    self.cells = [Cell(lr, [p for p in points if p.lr == lr]) for lr in self.lrs]
    # Cells without a diverged seed.
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
        finals = [math.nan if p.final is None else p.final for p in own]
        value = judge.sensitivity(finals, inits)
        self.sensitivities |= {seed: value} if math.isfinite(value) else {}

  @property
  def started(self) -> bool:
    return any(len(p.log.train.steps) for p in self.points)

  @property
  def gated(self) -> bool:
    attn = self.points[0].point.config['model']['attn']
    return attn['gate']['position'] != 'none' or bool(attn.get('gates'))


def gather(points: Sequence[Judged]) -> list[Line]:
  """Points -> lines, in the order of their first points."""
  lines = dict.fromkeys(p.line for p in points)
  return [Line(name, [p for p in points if p.line == name]) for name in lines]
