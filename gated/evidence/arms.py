"""Results -> settings and their arms: which results may be compared with which.

An arm is a model: its changes to the plain model, and its sizes. A setting is everything
else that training depends on, except the tuned knobs and the seed. Both come from the
resolved recipe, never from a label: two results share a setting and an arm only if their
recipes differ in nothing but TUNED, the seed and the paths of files.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gated import config
from gated.evidence.result import PLACES, Result
from gated.sweep import judge

# Every arm is compared at its own best values of these.
TUNED = 'optim.lr', 'optim.weight_decay'

# Knobs below config.model that make an arm -> their values in the plain model.
PLAIN: dict[str, Any] = {
  'attn.gate.position': 'none',
  'attn.gate.granularity': 'elementwise',
  'attn.gate.heads': 'specific',
  'attn.gate.mean': 'after',
  'attn.gate.form': 'multiply',
  'attn.gate.activation': 'sigmoid',
  'attn.gate.source': 'input',
  'attn.gate.init': 'normal',
  'attn.gate.lr': 1.0,
  'attn.gate.place': 'before',
  'attn.normalizer': 'softmax',
  'attn.normalizer_layers': '',
  'attn.clip_gamma': -0.03,
  'attn.clip_zeta': 1.0,
  'attn.elastic_tau': -1.0,
  'attn.differential': False,
  'attn.window': 0,
  'attn.global_layers': '',
  'attn.sink_tokens': 0,
  'attn.sink_values': 'learned',
  'attn.output': 'none',
  'attn.value_scale': 'none',
  'attn.switch.where': 'none',
  'attn.switch.experts': 1,
  'attn.switch.top_k': 1,
  'branch_norm': 'none',
  'branch_clip': 0.0,
  'norm': 'rms',
  'norm_rank': 16,
  'norm_alpha': (1.0, 1.0),
}
# Arms may differ in these as well. They have no plain value.
SIZES = 'ffn', 'attn.heads', 'attn.kv_heads', 'moe.experts', 'moe.top_k'
# Knob, or group of knobs -> whether the model depends on it.
USED: dict[str, Callable[[Mapping[str, Any]], bool]] = {
  'attn.gate.': lambda m: m['attn.gate.position'] != 'none',
  'attn.gate.mean': lambda m: m['attn.gate.heads'] == 'shared',
  'attn.gate.place': lambda m: m['attn.gate.position'] in ('query', 'key'),
  'attn.clip_gamma': lambda m: m['attn.normalizer'] == 'clipped',
  'attn.clip_zeta': lambda m: m['attn.normalizer'] == 'clipped',
  'attn.elastic_tau': lambda m: m['attn.normalizer'] == 'elastic',
  'attn.sink_values': lambda m: m['attn.sink_tokens'] > 0,
  'attn.switch.': lambda m: m['attn.switch.where'] != 'none',
  'norm_rank': lambda m: m['norm'] == 'gated',
  'norm_alpha': lambda m: m['norm'] == 'dyt',
}


def _gate(position: str = 'sdpa', **knobs: str) -> dict[str, Any]:
  return {f'attn.gate.{k}': v for k, v in {'position': position, **knobs}.items()}


def _switch(experts: int, top_k: int) -> dict[str, Any]:
  # One expert is the plain value, so it is not a change.
  knobs = {'where': 'value', 'experts': experts, 'top_k': top_k}
  return {
    k: v for k, v in ((f'attn.switch.{k}', v) for k, v in knobs.items()) if v != PLAIN[k]
  }


def _times(factor: float) -> Callable[[int], int]:
  return lambda size: round(factor * size)


# Arm -> its changes to the plain model; a size is a function of the plain model's. If an
# arm changes more than sizes, its FFN may be narrower, to offset the added parameters.
ARMS: dict[str, dict[str, Any]] = {
  'baseline': {},
  'elementwise': _gate(),
  'headwise': _gate(granularity='headwise'),
  'shared': _gate(heads='shared'),
  'g2': _gate('value'),
  'g3': _gate('key'),
  'g4': _gate('query'),
  'g5': _gate('out'),
  'additive_silu': _gate(form='add', activation='silu'),
  'multiplicative_silu': _gate(activation='silu'),
  'additive_identity': _gate(form='add', activation='identity'),
  'input_independent': _gate(source='parameter', init='zero'),
  'ns_sigmoid': _gate(activation='ns_sigmoid'),
  'attached': _gate(activation='2sigmoid', init='zero'),
  'sdpa_rmsnorm': {'attn.output': 'rms_norm'},
  'sdpa_silu': {'attn.output': 'silu'},
  'kv_heads_x2': {'attn.kv_heads': _times(2)},
  'heads_x1.5': {'attn.heads': _times(1.5)},
  'experts_plus_4': {'moe.experts': lambda n: n + 4, 'moe.top_k': _times(1.5)},
  'sandwich': {'branch_norm': 'rms'},
  'clip300': {'branch_clip': 300.0},
  'clip100': {'branch_clip': 100.0},
  'switch_v_1top1': _switch(1, 1),
  'switch_v_4top4': _switch(4, 4),
  'switch_v_8top2': _switch(8, 2),
  'sink_token': {'attn.sink_tokens': 1},
  'sink_logit': {'attn.normalizer': 'sink_logit'},
  'off_by_one': {'attn.normalizer': 'off_by_one'},
  'softpick': {'attn.normalizer': 'softpick'},
  'sigmoid': {'attn.normalizer': 'sigmoid'},
  'elastic': {'attn.normalizer': 'elastic'},
  'differential': {'attn.differential': True},
  'v_scale': {'attn.value_scale': 'learned'},
  'gated_norm': {'norm': 'gated'},
  'pre_affine': {'norm': 'pre_affine'},
  'dyt': {'norm': 'dyt'},
}


class Open(Exception):
  """Raised with the reason why a claim is still open."""


class Cell(NamedTuple):
  """Values of TUNED."""

  lr: float
  decay: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
  """The results of one model in one setting."""

  changes: Mapping[str, Any]  # Knobs of PLAIN with other values.
  sizes: Mapping[str, int]
  parameters: int
  cells: Mapping[Cell, Mapping[int, Result]]  # Cell -> seed -> result.

  @functools.cached_property
  def stable(self) -> dict[Cell, Mapping[int, Result]]:
    """The cells without a diverged seed."""
    healthy = lambda r: r.finished and math.isfinite(r.loss)
    return {c: own for c, own in self.cells.items() if all(map(healthy, own.values()))}

  @functools.cached_property
  def best(self) -> Cell:
    """The stable cell with the lowest mean loss; Open without a stable cell.

    Cells are compared on the seeds that all of them have, so that more seeds of one cell
    do not change its rank. Without such seeds, each mean is over its own seeds.
    """
    if not self.stable:
      raise Open('diverged at every learning rate that was tried')
    shared = set.intersection(*(set(own) for own in self.stable.values()))

    def mean(cell: Cell) -> float:
      own = self.stable[cell]
      return judge.spread([own[seed].loss for seed in shared or own]).mean

    return min(self.stable, key=lambda cell: (mean(cell), cell))

  def tried(self, name: str) -> list[float]:
    """The values of a field of Cell for which there are results."""
    return sorted({getattr(cell, name) for cell in self.cells})

  def surplus(self, other: 'Arm') -> float:
    """The absolute relative difference of the numbers of parameters."""
    return abs(self.parameters / other.parameters - 1)

  def like(self, name: str, plain: 'Arm') -> bool:
    """Whether this is the arm `name` of ARMS, for a plain model."""
    changes = {k: v for k, v in ARMS[name].items() if k not in SIZES}
    sizes = dict(plain.sizes)
    sizes |= {k: f(sizes[k]) for k, f in ARMS[name].items() if k in SIZES}
    if changes:
      sizes['ffn'] = self.sizes['ffn']
    return changes == self.changes and sizes == self.sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
  """Arms that were trained alike."""

  knobs: Mapping[str, Any]  # The shared knobs, by full name without `config.`.
  data: str  # The fingerprint of the training data.
  arms: Sequence[Arm]

  @property
  def tokens(self) -> int:
    """Training tokens of a run."""
    return math.prod(self.knobs[k] for k in ('steps', 'batch', 'data.length'))

  def without(self, axes: Sequence[str]) -> str:
    """The digest of the setting without some knobs."""
    kept = {k: v for k, v in self.knobs.items() if k not in axes}
    return config.digest([kept, self.data])

  def __str__(self) -> str:
    k = self.knobs
    return (
      f'{k["model.depth"]} layers of {k["model.width"]}, '
      f'{"" if k["model.attn.qk_norm"] else "no "}QK-norm, {k["data.length"]} tokens a '
      f'row, {k["batch"]} rows, {k["steps"]} steps, {k["model.numerics.compute"]} '
      f'{"with products in fp8 " if k.get("model.numerics.matmul") == "fp8" else ""}'
      f'(setting {self.without(())[:6]})'
    )

  def choose(self, names: Iterable[str]) -> dict[str, Arm]:
    """Names of arms -> those that have results, the baseline among them.

    Of several models of the same name it takes the one whose parameters are nearest to
    the baseline's; of several baselines, the one with the most arms, then the nearest.
    """
    options = []
    for plain in [arm for arm in self.arms if not arm.changes]:
      chosen, away = {'baseline': plain}, 0.0
      for name in names:
        own = [arm for arm in self.arms if arm.like(name, plain)]
        if own and name != 'baseline':
          chosen[name] = min(
            own, key=lambda arm, to=plain: (arm.surplus(to), arm.parameters)
          )
          away += chosen[name].surplus(plain)
      options.append((-len(chosen), away, plain.parameters, chosen))
    return min(options, key=lambda option: option[:3])[-1] if options else {}


def settings(results: Iterable[Result]) -> list[Setting]:
  """Results -> their settings; of two results of one run, one counts."""
  found: dict[str, tuple[dict, str, dict[str, list[Result]]]] = {}
  for result in sorted(results, key=lambda r: (r.experiment, r.point)):
    knobs, arm = split(result.config)
    _, _, arms = found.setdefault(
      config.digest([knobs, result.data]), (knobs, result.data, {})
    )
    arms.setdefault(config.digest(arm), []).append(result)
  return [
    Setting(knobs=knobs, data=data, arms=[_arm(own) for own in arms.values()])
    for knobs, data, arms in found.values()
  ]


def split(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """A resolved recipe -> the knobs of its setting, and its arm's [changes, sizes]."""
  short = lambda flat: {k.removeprefix('config.'): v for k, v in flat.items()}
  # A later knob with its earlier value is left out, as in results that lack it.
  flat = short(config.flatten(config.earlier(recipe)))
  since = short(config.SINCE) | flat
  model = {k: since[f'model.{k}'] for k in (*PLAIN, *SIZES)}
  model = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
  unused = [group for group, used in USED.items() if not used(model)]
  changes = {
    k: model[k]
    for k, plain in PLAIN.items()
    if model[k] != plain
    and not any(
      k == group or (group[-1] == '.' and k.startswith(group)) for group in unused
    )
  }
  own = {*TUNED, 'seed', *(f'model.{k}' for k in model)}
  knobs = {k: v for k, v in flat.items() if k not in own and not _is_place(k)}
  return knobs, [changes, {k: model[k] for k in SIZES}]


def _is_place(knob: str) -> bool:
  return any(f'{knob}.'.startswith(f'{place}.') for place in PLACES)


def _arm(results: Sequence[Result]) -> Arm:
  cells: dict[Cell, dict[int, Result]] = {}
  for r in results:
    cell = Cell(*(float(config.dig(r.config, knob)) for knob in TUNED))
    cells.setdefault(cell, {}).setdefault(r.config['seed'], r)
  changes, sizes = split(results[0].config)[1]
  return Arm(changes=changes, sizes=sizes, parameters=results[0].parameters, cells=cells)
