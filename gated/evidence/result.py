"""The result of one point of an experiment, small enough to commit and to merge.

  experiments/NAME/results/SCALE/POINT.json

A result holds no weights. It keeps the resolved recipe, the final held-out loss, the
probes of the last checkpoint, and thinned curves: enough for every figure and table.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config, model, storage
from gated import plan as plans
from gated.run import metrics
from gated.sweep import Point, Sweep, judge
from gated.sweep import state as state_of
from gated.sweep.report.points import fitting

FORMAT = 1
LIMIT = 1 << 24  # Bytes of a result.
RECORDS = 200  # Most records of a curve.
DIGITS = 6  # Significant digits of probes and curves; a loss keeps all of them.
# Parts of a recipe that do not affect the computation: paths of files, and notes.
PLACES = ('name', 'paper', 'log', 'checkpoint', 'data.mixture', 'data.cache')
CURVES = ('loss', 'grad_norm', 'lr')


@dataclass(frozen=True, kw_only=True)
class Result:
  """A finished or diverged point."""

  experiment: str  # its folder under experiments/
  scale: str  # gpu or test
  point: str  # the point's name: its labels and a digest of its changes
  labels: Mapping[str, str]  # {'arm': 'baseline', 'lr': '0.004', 'seed': '0'}
  changes: Mapping[str, Any]  # knobs that differ from the experiment's recipe
  config: Mapping[str, Any]  # the resolved recipe
  state: str  # finished or diverged
  steps: int
  tokens: int  # training tokens, including those of packed rows' padding
  parameters: int
  loss: float  # held-out, nats per token, at the last step; NaN if it diverged
  spikes: float  # per 1000 steps, as gated/sweep/judge/spikes.py counts them
  probes: Mapping[str, Any]  # of the last checkpoint, without single heads
  curves: Mapping[str, Mapping[str, Sequence[float]]]  # kind -> name -> values, and step
  data: str  # fingerprint of the training data
  code: str  # SHA-256 of the sources
  machine: str  # '1 x NVIDIA H200'
  versions: Mapping[str, str | None]
  seconds: float  # of training steps
  tokens_per_second: float  # the median
  command: str

  @property
  def finished(self) -> bool:
    return self.state == 'finished'

  def probe(self, name: str) -> float:
    """The value of a probe over all layers; NaN if it was not measured."""
    entry = self.probes.get(name) or {}
    value = entry.get('value')
    return math.nan if value is None else float(value)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Two resolved recipes -> {knob: (old value, new value)}, without PLACES.

  A knob that the old recipe lacks was added since; at its default it is no difference.
  """
  plain = lambda recipe: json.loads(metrics.dumps(recipe, indent=None))
  known = config.flatten(old).keys() | config.SINCE.keys()
  return {
    knob: pair
    for knob, pair in config.differences(plain(old), plain(new)).items()
    if knob in known and not _is_place(knob)
  }


def _is_place(knob: str) -> bool:
  knob = knob.removeprefix('config.')
  return any(knob == place or knob.startswith(f'{place}.') for place in PLACES)


def of(experiment: str, scale: str, swept: Sweep, point: Point) -> Result | None:
  """A point of a sweep -> its result; None if it has not ended or is not probed yet.

  Without a checkpoint, the probes are the scalars that training logged at the last step,
  of a few training rows, and `rows` is 0. ValueError for a damaged workdir.
  """
  workdir = swept.workdir(point)
  state, step, _ = state_of(workdir, point.steps)
  probes = workdir / 'probes' / f'{step}.json'
  finished, probed = state == 'finished', storage.exists(probes)
  if state != 'diverged' and not finished:
    return None
  if finished and not probed and storage.exists(workdir / 'checkpoints'):
    return None
  records = metrics.read(workdir / 'metrics.jsonl')
  run = storage.read_json(workdir / 'run.json', LIMIT)
  session, train = run['sessions'][-1], [r for r in records if r['kind'] == 'train']
  heldout = [r['loss'] for r in records if r['kind'] == 'heldout' and r['step'] == step]
  # step_seconds is the mean over the steps since the record before; the first lacks it.
  pairs = [(a, b) for a, b in itertools.pairwise(train) if 'step_seconds' in b]
  seconds = sum(b['step_seconds'] * (b['step'] - a['step']) for a, b in pairs)
  rates = sorted(b['tokens_per_second'] for _, b in pairs)
  plain = json.loads(metrics.dumps(point.config, indent=None))
  mixture = plain['data']['mixture']
  plain['data']['mixture'] = _anywhere(mixture)
  cfg = config.build(plans.Config, point.config, 'config')
  return Result(
    experiment=experiment,
    scale=scale,
    point=point.name,
    labels=dict(point.labels),
    changes=dict(point.changes),
    config=plain,
    state=state,
    steps=step,
    tokens=step * plain['batch'] * plain['data']['length'],
    parameters=model.count(model.abstract(cfg.model)),
    loss=float(heldout[-1]) if finished else math.nan,
    spikes=_spikes(train, point.steps),
    probes=_probes(storage.read_json(probes, LIMIT))
    if probed
    else _logged(records, step),
    curves=_curves(records),
    data=run['data']['sha256'],
    code=swept.made['sha256'],
    machine=f'{session["devices"]} x {session["device_kind"]}',
    versions=session['versions'],
    seconds=_round(float(seconds)),
    tokens_per_second=_round(rates[len(rates) // 2]) if rates else math.nan,
    command=' '.join(point.command).replace(mixture, _anywhere(mixture)),
  )


def _anywhere(mixture: str) -> str:
  """A mixture -> the same with only the last name of each folder."""
  return ','.join(term.rpartition('/')[2] for term in mixture.split(','))


def _spikes(train: Sequence[Mapping[str, Any]], steps: int) -> float:
  """Training records -> spikes per 1000 steps; NaN without a record."""
  if not train:
    return math.nan
  at, losses = [r['step'] for r in train], [r['loss'] for r in train]
  return 1000 * len(judge.spikes(at, losses, **fitting(steps))) / at[-1]


def _probes(report: Mapping[str, Any]) -> dict[str, Any]:
  """probes/STEP.json -> the same without numbers of single heads and conventions."""

  def light(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {k: light(v) for k, v in value.items() if k not in ('heads', 'keys')}
    if isinstance(value, list):
      return [light(v) for v in value]
    return _round(value)

  return light({k: v for k, v in report.items() if k not in ('conventions', 'text')})


def _logged(records: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
  """Records -> the probes that training logged at its last step; {} without them."""
  logged = [r for r in records if r['kind'] == 'probes' and r['step'] == step]
  if not logged:
    return {}
  numbers = {k: v for k, v in logged[-1].items() if k not in ('step', 'kind', 'time')}
  return {'rows': 0} | {k: {'value': _round(v)} for k, v in numbers.items()}


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
  """Records -> kind -> {'step': [...], name: [...]}, at most RECORDS of each kind."""
  curves: dict[str, dict[str, list]] = {}
  for kind in dict.fromkeys(r['kind'] for r in records):
    own = [r for r in records if r['kind'] == kind]
    stride = -(-len(own) // RECORDS)
    own = [*own[:-1:stride], own[-1]]
    names = CURVES if kind == 'train' else sorted(own[-1].keys() - {'kind', 'time'})
    names = [name for name in ('step', *names) if all(name in r for r in own)]
    curves[kind] = {name: [_round(r[name]) for r in own] for name in dict.fromkeys(names)}
  return curves


def _round(value: Any) -> Any:
  is_float = isinstance(value, float) and math.isfinite(value)
  return float(f'{value:.{DIGITS}g}') if is_float else value


def folder(root: storage.Path, experiment: str, scale: str) -> storage.Path:
  """The checkout, an experiment and a scale -> the folder of its results."""
  return root / 'experiments' / experiment / 'results' / scale


def write(root: storage.Path, result: Result) -> storage.Path:
  """Writes a result under a checkout's experiments/ -> its path."""
  path = folder(root, result.experiment, result.scale) / f'{result.point}.json'
  content = {'format': FORMAT} | dataclasses.asdict(result)
  storage.write(path, (metrics.dumps(content, indent=None) + '\n').encode())
  return path


def read(path: storage.Path) -> Result:
  """A result's file -> Result; ValueError, naming the file, if it is damaged."""
  try:
    content = storage.read_json(path, LIMIT)
    if content.pop('format') != FORMAT:
      raise ValueError(f'only format {FORMAT} is supported')
    result = Result(**content)
    number = lambda name: float(getattr(result, name))  # 'NaN' is a string in JSON.
    names = ('loss', 'spikes', 'seconds', 'tokens_per_second')
    result = dataclasses.replace(result, **{name: number(name) for name in names})
    if (result.experiment, result.scale) != (path.parents[2].name, path.parent.name):
      raise ValueError(f'it is a result of {result.experiment}, scale {result.scale}')
    return result
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
    raise ValueError(f'the result {path} is damaged: {error}') from error


def read_all(root: storage.Path, experiment: str, scale: str) -> list[Result]:
  """A checkout -> the results of an experiment at a scale, in order of their names."""
  place = folder(root, experiment, scale)
  names = storage.names(place) if storage.exists(place) else []
  return [read(place / name) for name in sorted(names) if name.endswith('.json')]


def everywhere(root: storage.Path, scale: str) -> list[Result]:
  """A checkout -> the results of all experiments at a scale."""
  folders = sorted(root.glob(f'experiments/*/results/{scale}'))
  return [r for place in folders for r in read_all(root, place.parents[1].name, scale)]


def merge(source: storage.Path, root: storage.Path) -> tuple[list[str], list[str]]:
  """Copies the results of another checkout -> the paths copied, and those kept here.

  Existing results are kept. ValueError, and no copy, if a result is damaged, or has
  another recipe than the result with the same name here.
  """
  paths = sorted((source / 'experiments').glob('*/results/*/*.json'))
  if not paths:
    raise ValueError(f'{source} holds no experiments/NAME/results/SCALE/POINT.json')
  fresh, kept = [], []
  for path in paths:
    result = read(path)
    here = folder(root, result.experiment, result.scale) / path.name
    if not storage.exists(here):
      fresh.append(result)
    elif differing := changes(read(here).config, result.config):
      names = ', '.join(differing)
      raise ValueError(f'{path} and {here} differ in their recipes: {names}')
    else:
      kept.append(str(here))
  return [str(write(root, result)) for result in fresh], kept
