"""Numbers of a result, samples of arms over seeds, and conditions of a comparison."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gated.evidence.arms import Arm, Cell, Open
from gated.evidence.result import Result
from gated.probes import attention
from gated.sweep import judge

Arms = Mapping[str, Arm]
Sampler = Callable[[Arms], dict[str, dict[int, float]]]  # -> arm -> seed -> number.

RATES = 3  # The fewest learning rates that give a sensitivity.
SINK_RATE, FIRST_TOKEN, LENGTH = 0.15, 0.05, 1024  # A sink: at least these.
MASSIVE = 100.0  # A massive activation: above this, and above this times the median.
UNSTABLE = 0.1  # Nats above the best loss, at a learning rate above the best one.


class Number(NamedTuple):
  """A number of a result; NaN where the result lacks it."""

  words: str
  of: Callable[[Result], float]


def _probe(words: str, name: str) -> Number:
  return Number(words, lambda r: r.probe(name))


def first_token(r: Result) -> str:
  """The name of the F-Attn probe for the mask that the model was trained with."""
  documents = '_documents' if r.config['model']['mask_documents'] else ''
  return f'first_token_attention{documents}_from_{attention.LATER}'


def _layers(r: Result, *names: str) -> np.ndarray:
  """A probe's values by layer; empty where the result lacks them."""
  entry: Any = r.probes
  for name in names:
    entry = entry.get(name) or {}
  return np.array(entry.get('layers') or [], np.float64)


def _onsets(r: Result) -> float:
  """Layers from the onset of massive activations to that of the sink.

  Activations begin where the largest |h| of the FFN's output is the largest multiple of
  that in the layer before; a sink begins where F-Attn grows most.
  """
  added, first = _layers(r, 'points', 'ffn_branch', 'max'), _layers(r, first_token(r))
  if min(len(added), len(first)) < 2:
    return math.nan
  return float(abs(np.argmax(added[1:] / added[:-1]) - np.argmax(np.diff(first))))


def _mode(r: Result) -> float:
  """The middle of the bin with most scores in the gate's histogram."""
  entry = r.probes.get('gate_histogram') or {}
  counts, edges = entry.get('value'), entry.get('edges')
  if not counts or not edges:
    return math.nan
  fullest = int(np.argmax(counts))
  return float(edges[fullest] + edges[fullest + 1]) / 2


def _beyond_scaling(limit: str) -> Number:
  name = f'output_below_{limit}'
  return Number(
    f'share of |Y| < {limit} after the gate, minus that of Y times the mean gate',
    lambda r: r.probe(name) - r.probe(f'{name}_scaled'),
  )


LOSS = Number('held-out loss', lambda r: r.loss)
F_ATTN = Number(
  f'F-Attn (queries from {attention.LATER} on)', lambda r: r.probe(first_token(r))
)
SINK = _probe(f'sink rate at {attention.PREFIX} tokens', 'sink_rate_64')
M_ACT = _probe('M-Act', 'm_act')
M_ACT_MAX = _probe('largest |h|', 'm_act_max')
KURTOSIS = _probe('kurtosis of the residual stream', 'kurtosis')
GATE = _probe('mean gate score', 'gate_mean')
GATE_SMALL = _probe('share of gate scores below 0.1', 'gate_below_0.1')
GATE_MODE = Number('most frequent gate score', _mode)
SPARSER = _beyond_scaling('1e-2'), _beyond_scaling('1e-3')
ONSETS = Number('layers between the onsets of activations and sink', _onsets)
SPIKES = Number('spikes per 1000 steps', lambda r: r.spikes)


def log(number: Number) -> Number:
  """A number -> its logarithm; NaN where it is not positive."""

  def of(r: Result) -> float:
    value = number.of(r)
    return math.log(value) if value > 0 else math.nan

  return Number(number.words, of)


def _named(name: str, act: Callable[[], Any]) -> Any:
  try:
    return act()
  except Open as reason:
    raise Open(f'{name}: {reason}') from None


def _cells(arms: Arms) -> dict[str, Mapping[int, Result]]:
  """Arms -> the results of their best cells, by seed."""
  return {n: arm.cells[_named(n, lambda a=arm: a.best)] for n, arm in arms.items()}


def _take(number: Number, cells: Mapping[str, Mapping[int, Result]]):
  samples = {}
  for name, own in cells.items():
    values = {seed: number.of(r) for seed, r in own.items()}
    samples[name] = {seed: x for seed, x in values.items() if math.isfinite(x)}
    if not samples[name]:
      raise Open(f'{name}: no result holds its {number.words}')
  return samples


def at_own_best(number: Number) -> Sampler:
  """Each arm at its own best learning rate and weight decay."""
  return lambda arms: _take(number, _cells(arms))


def at_best_of_baseline(number: Number) -> Sampler:
  """Each arm at the baseline's best learning rate and weight decay."""

  def sample(arms: Arms):
    cell = _named('baseline', lambda: arms['baseline'].best)
    for name, arm in arms.items():
      if cell not in arm.cells:
        raise Open(f'{name}: no run at learning rate {cell.lr:g}, decay {cell.decay:g}')
    return _take(number, {name: arm.cells[cell] for name, arm in arms.items()})

  return sample


def _worst(r: Result) -> float:
  """The loss of uniform predictions; it stands for the loss at initialisation."""
  return math.log(r.config['model']['vocab'])


def _capped(r: Result) -> float:
  """The final loss of a run, at most that of uniform predictions."""
  return min(r.loss, _worst(r)) if math.isfinite(r.loss) else _worst(r)


def sensitivity(arms: Arms) -> dict[str, dict[int, float]]:
  """LR sensitivity of each seed (arXiv 2309.14322), over the rates tried for all arms.

  Each arm has its best weight decay. A diverged run counts as uniform predictions.
  """
  decays = {n: _named(n, lambda a=arm: a.best).decay for n, arm in arms.items()}
  own = {n: {c.lr for c in a.cells if c.decay == decays[n]} for n, a in arms.items()}
  rates = sorted(set.intersection(*own.values()))
  if len(rates) < RATES:
    raise Open(
      f'{" and ".join(arms)} share {len(rates)} learning rates, and sensitivity needs '
      f'{RATES}'
    )
  samples = {}
  for name, arm in arms.items():
    cells = [arm.cells[Cell(lr, decays[name])] for lr in rates]
    seeds = set.intersection(*map(set, cells))
    runs = {seed: [cell[seed] for cell in cells] for seed in sorted(seeds)}
    samples[name] = {
      seed: judge.sensitivity([r.loss for r in own], [_worst(r) for r in own])
      for seed, own in runs.items()
      if any(math.isfinite(r.loss) for r in own)
    }
    if not samples[name]:
      raise Open(f'{name}: no seed has ended at every one of {len(rates)} learning rates')
  return samples


def rise(arms: Arms) -> dict[str, dict[int, float]]:
  """The loss at twice the baseline's best learning rate minus that at it, in nats.

  A diverged run counts as uniform predictions.
  """
  best = _named('baseline', lambda: arms['baseline'].best)
  samples = {}
  for name, arm in arms.items():
    decay = _named(name, lambda a=arm: a.best).decay
    pair = [arm.cells.get(Cell(best.lr * times, decay), {}) for times in (1, 2)]
    seeds = sorted(set(pair[0]) & set(pair[1]))
    values = {s: _capped(pair[1][s]) - _capped(pair[0][s]) for s in seeds}
    samples[name] = {s: x for s, x in values.items() if math.isfinite(x)}
    if not samples[name]:
      raise Open(f'{name}: no seed has ended at both {best.lr:g} and {2 * best.lr:g}')
  return samples


def correlation(x: Number, y: Number) -> Sampler:
  """Spearman's rank correlation of two numbers over arms, for each seed they share."""

  def sample(arms: Arms):
    from scipy.stats import spearmanr  # Loads slowly.

    cells = _cells(arms)
    both = [_take(number, cells) for number in (x, y)]
    seeds = set.intersection(*(set(own) for part in both for own in part.values()))
    if not seeds:
      raise Open('no seed has a result in every arm')
    samples = {}
    for seed in sorted(seeds):
      columns = [[part[name][seed] for name in arms] for part in both]
      if min(len(set(column)) for column in columns) > 1:
        samples[seed] = float(spearmanr(*columns).statistic)
    if not samples:
      raise Open('all arms have the same number')
    return {'all arms': samples}

  return sample


# Conditions on the arms of a comparison; they raise Open if not met.


def _mean(arm: Arm, number: Number | Callable[[Result], float]) -> float:
  of = number.of if isinstance(number, Number) else number
  return judge.spread([of(r) for r in arm.cells[arm.best].values()]).mean


def has_sink(arms: Arms) -> None:
  """The baseline has a sink that an arm could remove."""
  base = arms['baseline']
  length = next(iter(base.cells[base.best].values())).config['data']['length']
  rate, weight = _mean(base, SINK), _mean(base, F_ATTN)
  if not (rate >= SINK_RATE and weight >= FIRST_TOKEN and length >= LENGTH):
    raise Open(
      f'the baseline has no sink: Sink64 {rate:.3g} (a sink has {SINK_RATE:g}), F-Attn '
      f'{weight:.2g} ({FIRST_TOKEN:g}), {length} tokens a row ({LENGTH})'
    )


def has_massive_activations(arms: Arms) -> None:
  """The baseline has massive activations in some layer, by MASSIVE."""

  base = arms['baseline']
  by_layer = [r for r in base.cells[base.best].values() if len(_layers(r, 'm_act'))]
  if not by_layer:
    raise Open('no baseline has its activations by layer: they were probed in training')
  over = [np.max(_layers(r, 'm_act') / _layers(r, 'm_act_median')) for r in by_layer]
  largest, multiple = _mean(base, lambda r: r.probe('m_act_max')), float(np.mean(over))
  if not (largest > MASSIVE and multiple > MASSIVE):
    raise Open(
      f'the baseline has no massive activations: the largest is {largest:.3g}, '
      f'{multiple:.3g} times the median (above {MASSIVE:g} both)'
    )


def has_spikes(arms: Arms) -> None:
  """Every run of the baseline at its best cell has a spike."""
  runs = arms['baseline'].cells[arms['baseline'].best].values()
  calm = sum(not r.spikes > 0 for r in runs)
  if calm:
    raise Open(f'{calm} of {len(runs)} runs of the baseline have no spike to remove')


def is_unstable(arms: Arms) -> None:
  """The baseline loses UNSTABLE nats, or diverges, at a learning rate above its best."""
  base = arms['baseline']
  losses = {
    cell.lr: np.mean([_capped(r) for r in own.values()])
    for cell, own in base.cells.items()
    if cell.decay == base.best.decay and cell.lr >= base.best.lr
  }
  worst = max(losses.values()) - losses[base.best.lr]
  if not worst >= UNSTABLE:
    raise Open(
      f'the baseline loses at most {worst:.3g} nats at larger learning rates than its '
      f'best; there is nothing to stabilise below {UNSTABLE:g}'
    )
