"""A part of a claim: one comparison of arms, and the verdict of the results."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gated.evidence import contrast, measures
from gated.evidence.arms import Arm, Open, Setting
from gated.evidence.contrast import LEAST, Estimate
from gated.evidence.measures import LOSS, Number, Sampler

NONE = '–'
TRIES = {'lr': (2, 'learning rates'), 'decay': (2, 'weight decays')}  # At least, per arm.
MATCHED = 0.025  # The largest relative difference of equal parameters.

SHOWN: dict[str, Callable[[float], str]] = {
  'nats': lambda x: f'{x:+.4f}',
  'ratio': lambda x: f'{x:.3g}',
  'share': lambda x: f'{x:.2f}',
  'level': lambda x: f'{x:.3g}',
}


@dataclass(frozen=True, kw_only=True)
class Part:
  """A testable statement: a weighted sum of means of arms is below (or above) a bound."""

  words: str  # The number, as a formula of arms.
  weights: Mapping[str, float]  # Arm -> its weight in the sum.
  sample: Sampler
  sense: str  # <, > or =: as in contrast.decide
  bound: float
  kind: str  # A key of SHOWN; a ratio is a difference of logarithms.
  paper: str  # The paper's figure.
  # Arm -> its weight in a denominator; the bound is then on the ratio of the sums.
  over: Mapping[str, float] = field(default_factory=dict)
  needs: Sequence[Callable[[measures.Arms], None]] = ()  # Conditions; Open if one fails.
  matched: bool = False  # Whether arms must have the baseline's number of parameters.
  continued: bool = False  # Whether the runs must continue another run.
  # Knobs, if the statement is about a difference between settings that differ only in
  # them: the sum at the largest value of the first knob minus that at the smallest.
  across: tuple[str, ...] = ()

  of: tuple[str, ...] = ()  # The sampled arms, if not those with a weight.

  @property
  def arms(self) -> list[str]:
    """The arms that the part needs."""
    return [*(self.of or dict.fromkeys([*self.weights, *self.over]))]

  @property
  def form(self) -> str:
    """The measurable form, in words."""
    bound = SHOWN['level'](math.exp(self.bound) if self.kind == 'ratio' else self.bound)
    unit = ' nats' if self.kind == 'nats' else ''
    signs = {'<': '<', '>': '>', '=': 'within ×÷' if self.kind == 'ratio' else 'within ±'}
    gap = '' if self.sense == '=' else ' '
    matched = f', parameters within {MATCHED:.1%}' if self.matched else ''
    return f'{self.words} {signs[self.sense]}{gap}{bound}{unit}{matched}'


def difference(
  a: str, b: str = 'baseline', *, sense: str = '<', bound: float = 0.0, **more: Any
) -> Part:
  """The loss of an arm minus that of another, each at its own best cell."""
  return Part(
    words=f'{LOSS.words}, {a} minus {b},',
    weights={a: 1.0, b: -1.0},
    sample=_best(LOSS),
    sense=sense,
    bound=bound,
    kind='nats',
    **more,
  )


def ratio(
  number: Number, a: str, b: str = 'baseline', *, bound: float, **more: Any
) -> Part:
  """A positive number of an arm over that of another: the ratio of geometric means."""
  sample = _best(measures.log(number))
  return Part(
    words=f'{number.words}, {a} over {b},',
    weights={a: 1.0, b: -1.0},
    sample=sample,
    bound=math.log(bound),
    kind='ratio',
    **more,
  )


def quotient(
  number: Number, a: str, b: str = 'baseline', *, sample=None, **more: Any
) -> Part:
  """A number of an arm over that of another: the ratio of means; the number may be 0."""
  return Part(
    words=f'{number.words}, {a} over {b},',
    weights={a: 1.0},
    over={b: 1.0},
    sample=(sample or measures.at_own_best)(number),
    kind='share',
    **more,
  )


def share(arm: str, whole: str = 'elementwise', **more: Any) -> Part:
  """The gain in loss of an arm over the baseline, as a share of another arm's gain."""
  return Part(
    words=f'gain of {arm} over gain of {whole}, in {LOSS.words},',
    weights={'baseline': 1.0, arm: -1.0},
    over={'baseline': 1.0, whole: -1.0},
    sample=_best(LOSS),
    kind='share',
    **more,
  )


def level(number: Number, arm: str, **more: Any) -> Part:
  """A number of one arm."""
  words, sample = f'{number.words}, {arm},', _best(number)
  return Part(words=words, weights={arm: 1.0}, sample=sample, kind='level', **more)


_best = measures.at_own_best


@dataclass(frozen=True, kw_only=True)
class Verdict:
  """The verdict on a part in one setting, or across two settings."""

  part: Part
  status: str
  reason: str = ''  # Why it is open or undecided.
  estimate: Estimate | None = None
  floor: float = math.inf
  seeds: tuple[int, ...] = ()  # Of each arm.
  arms: Mapping[str, Arm] = field(default_factory=dict)
  settings: Sequence[Setting] = ()

  @property
  def figure(self) -> str:
    """'-0.0120 [-0.0180, -0.0060]'; '–' without a figure."""
    if self.estimate is None or math.isnan(self.estimate.value):
      return NONE
    show, (value, *ends) = SHOWN[self.part.kind], self.estimate
    if self.part.kind == 'ratio':
      value, *ends = (math.exp(min(x, 700.0)) for x in (value, *ends))
    interval = f' [{show(ends[0])}, {show(ends[1])}]' if max(self.seeds) > 1 else ''
    return show(value) + interval

  @property
  def noise(self) -> str:
    """The noise floor, in the unit of the figure."""
    if not math.isfinite(self.floor):
      return NONE
    if self.part.kind == 'ratio':
      return f'×÷{math.exp(min(self.floor, 700.0)):.3g}'
    return f'±{SHOWN[self.part.kind](self.floor).removeprefix("+")}'

  @property
  def rank(self) -> tuple[bool, int, float]:
    """The sort key: decided before open, then most seeds, then most training FLOPs."""
    training = max((setting.tokens for setting in self.settings), default=0)
    parameters = max((arm.parameters for arm in self.arms.values()), default=0)
    return self.status != 'open', min(self.seeds, default=0), training * parameters


def verdicts(part: Part, settings: Sequence[Setting]) -> list[Verdict]:
  """A part and all settings -> its verdicts, highest rank first."""
  missing = 'no run continues another one' if part.continued else 'no results'
  settings = [p for p in settings if bool(p.knobs['init_from']) == part.continued]
  if part.across:
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
      groups.setdefault(setting.without(part.across), []).append(setting)
    axis = lambda setting: setting.knobs[part.across[0]]
    ends = [(min(g, key=axis), max(g, key=axis)) for g in groups.values()]
    compared = [(low, high) for low, high in ends if axis(low) != axis(high)]
    missing = f'no two settings differ in {part.across[0]} alone'
  else:
    compared = [(setting,) for setting in settings]
  all_verdicts = [_verdict(part, group) for group in compared]
  all_verdicts.sort(key=lambda verdict: verdict.rank, reverse=True)
  return all_verdicts or [Verdict(part=part, status='open', reason=missing)]


def _verdict(part: Part, settings: Sequence[Setting]) -> Verdict:
  known: dict[str, Any] = {'part': part, 'settings': settings}
  try:
    own = [_chosen(part, setting) for setting in settings]
    labels = (
      [''] if len(settings) == 1 else [f', {p.knobs[part.across[0]]}' for p in settings]
    )
    sampled = [{n: arm for n, arm in some.items() if n in part.arms} for some in own]
    known['arms'] = _labelled(sampled, labels)
    means = contrast.Means(part.sample(known['arms']))
  except Open as reason:
    return Verdict(status='open', reason=str(reason), **known)
  # Across two settings, the sum is that of the last minus that of the first.
  signs = [1.0] if len(settings) == 1 else [-1.0, 1.0]
  signed = lambda w: [{n: sign * x for n, x in w.items()} for sign in signs]
  top, bottom = (_labelled(signed(w), labels) for w in (part.weights, part.over))
  known['seeds'] = tuple(int(n) for n in means.counts)
  if bottom:
    known['estimate'] = means.ratio(top, bottom)
    known['floor'] = means.floor(top) / abs(means.sum(bottom).value or math.nan)
  else:
    known |= {'estimate': means.sum(top), 'floor': means.floor(top)}
  reason = '; '.join(_reasons(part, own, known['arms'], known['seeds']))
  if reason:
    return Verdict(status='open', reason=reason, **known)
  status, reason = _decided(part, means, top, bottom)
  return Verdict(status=status, reason=reason, **known)


def _labelled(
  groups: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
  return {n + label: x for g, label in zip(groups, labels) for n, x in g.items()}


def _chosen(part: Part, setting: Setting) -> dict[str, Arm]:
  """The arms of a part in a setting; Open if one is missing or has other parameters."""
  chosen = setting.choose(part.arms)
  missing = [name for name in part.arms if name not in chosen]
  if missing or not chosen:
    raise Open(f'no results of {", ".join(missing or ["baseline"])}')
  base = chosen['baseline']
  for name, arm in chosen.items() if part.matched else ():
    if arm.surplus(base) > MATCHED:
      raise Open(
        f'{name} has {arm.parameters / base.parameters - 1:+.1%} parameters '
        f'({MATCHED:.1%} at most)'
      )
  return chosen


def _reasons(
  part: Part, own: Sequence[measures.Arms], arms: measures.Arms, seeds: Sequence[int]
) -> Iterator[str]:
  """-> the reasons why the samples decide nothing; none if they do."""
  for chosen, need in itertools.product(own, part.needs):
    try:
      need(chosen)
    except Open as reason:
      yield str(reason)
  if min(seeds) < LEAST:
    yield f'{min(seeds)} of {LEAST} seeds'
  for (name, arm), (axis, (least, words)) in itertools.product(
    arms.items(), TRIES.items()
  ):
    if len(arm.tried(axis)) < least:
      yield f'{name} is not tuned: fewer than {least} {words}'


def _decided(
  part: Part, means: contrast.Means, top: Mapping[str, float], bottom: Mapping[str, float]
) -> tuple[str, str]:
  """-> status, and the reason if it is undecided or open."""
  total, bound = dict(top), part.bound
  if bottom:
    whole, floor = means.sum(bottom), means.floor(bottom)
    if whole.low <= 0 <= whole.high or abs(whole.value) <= floor:
      return 'undecided', 'the denominator is within its noise'
    if whole.value < 0:
      return 'open', 'the denominator is negative: no gain to share'
    # top / bottom < bound where top - bound * bottom < 0.
    total = {n: top.get(n, 0.0) - bound * bottom.get(n, 0.0) for n in {*top, *bottom}}
    bound = 0.0
  estimate, floor = means.sum(total), means.floor(total)
  status = contrast.decide(estimate, part.sense, bound, floor)
  if status != 'undecided':
    return status, ''
  near = abs(estimate.value - bound) <= floor
  return status, 'within the noise floor' if near else 'the interval holds the bound'
