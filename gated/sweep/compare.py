"""Whether two runs are comparable, what differs between them, and their losses.

Two runs are comparable if whatever may change a loss is the same: the recipe, the data,
the code, the versions, the devices, the flags and what the environment tells the
compiler. Then, on the same kind of machine, their losses should be the same to the last
bit, save on GPUs without --deterministic.
"""

import collections
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gated import config, storage
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.sweep import folder as sweeps
from gated.sweep.grid import Point, Sweep

SAME, DIFFERENT, NOT_COMPARABLE = 0, 1, 3  # Exit codes.

# Knobs that change no loss: names, and when and what is written down.
HARMLESS = (
  'config.name',
  'config.paper.',
  'config.log.',
  'config.checkpoint.',
  'config.eval.every',
  'config.stability.stuck_after',
  'config.stability.peer_timeout',
  'config.data.cache',
  'config.data.verify',
  'config.data.workers',
  'config.data.prefetch',
)
# Of a session in a run.json: what it is called here.
SESSION = {
  'backend': 'backend',
  'device_kind': 'device',
  'devices': 'devices',
  'processes': 'processes',
  'deterministic': '--deterministic',
  'python': 'Python',
}
# Variables that steer memory and speed only.
HARMLESS_VARIABLES = 'XLA_PYTHON_CLIENT_', 'JAX_COMPILATION_CACHE_'
HEADINGS = {
  True: 'what makes them not comparable',
  False: 'what differs and changes no loss',
}
COMPARED = 'loss', 'grad_norm'  # Of the records of training.


class Difference(NamedTuple):
  """Something that two runs do not share."""

  what: str
  a: str
  b: str
  matters: bool = True  # Whether it may change a loss.

  def __str__(self) -> str:
    return f'  {self.what:32} {self.a}  |  {self.b}'


class Losses(NamedTuple):
  """The losses of two runs, step by step."""

  steps: int  # That both tell of.
  first: int | None  # The first step at which they differ; None if none does.
  a: float  # There, or at the last step that both tell of.
  b: float
  most: float  # The largest difference over all steps, in nats.
  finals: tuple[tuple[int, float], tuple[int, float]]  # Last step and loss of each.

  @property
  def same(self) -> bool:
    """To the last bit, for as long as both go on."""
    return self.steps > 0 and self.first is None

  def __str__(self) -> str:
    (last, final), (other_last, other_final) = self.finals
    ends = f'{final:.6g} at step {last}  |  {other_final:.6g} at step {other_last}'
    if not self.steps:
      return f'no step is told of by both; {ends}'
    if self.first is not None:
      return (
        f'they differ from step {self.first} on: {self.a!r}  |  {self.b!r}; '
        f'up to {self.most:.3g} nats apart; in the end {ends}'
      )
    if last != other_last:
      return f'the same to the last bit as far as both go; {ends}'
    return f'the same to the last bit, all {self.steps} steps; {final!r} in the end'


class Comparison(NamedTuple):
  """What there is to say of two runs."""

  differences: tuple[Difference, ...]
  losses: Losses

  @property
  def comparable(self) -> bool:
    return not any(d.matters for d in self.differences)

  @property
  def same(self) -> bool:
    """Whether they have the same losses, over the same steps."""
    (last, _), (other, _) = self.losses.finals
    return self.losses.same and last == other

  def __str__(self) -> str:
    """All of it, to be read."""
    told = [d for d in self.differences if d.matters]
    harmless = [d for d in self.differences if not d.matters]
    lines = ['comparable: nothing differs that may change a loss']
    if told:
      lines = ['NOT comparable: they differ in', *map(str, told)]
    if harmless:
      lines += ['and in what changes no loss:', *map(str, harmless)]
    return '\n'.join([*lines, f'losses: {self.losses}'])


def runs(a: storage.Path, b: storage.Path) -> Comparison:
  """Two workdirs -> Comparison; ValueError where one is none, or is damaged."""
  return Comparison(tuple(_differences(_about(a), _about(b))), _losses(a, b))


def paired(
  a: Sweep, b: Sweep
) -> tuple[list[tuple[Point, Point]], list[Point], list[Point]]:
  """Two sweeps -> their points by pairs, and those that only one or the other has.

  Points are the same that have the same labels.
  """
  key = lambda p: tuple(sorted(p.labels.items()))
  there = {key(p): p for p in b.points}
  pairs = [(p, there[key(p)]) for p in a.points if key(p) in there]
  mine = {key(p) for p in a.points}
  only_a = [p for p in a.points if key(p) not in there]
  return pairs, only_a, [p for p in b.points if key(p) not in mine]


def folders(a: storage.Path, b: storage.Path) -> tuple[int, str]:
  """Two runs, or two sweeps -> an exit code, and what there is to say of them.

  SAME, DIFFERENT or NOT_COMPARABLE. ValueError if they are not two of a kind.
  """
  a, b = (_whole(each) for each in (a, b))
  kinds = [storage.exists(each / sweeps.NAME) for each in (a, b)]
  if kinds[0] != kinds[1]:
    sweep, run = (a, b) if kinds[0] else (b, a)
    raise ValueError(f'{sweep} is a sweep, but {run} is none: name a run in each, or two')
  if kinds[0]:
    return _sweeps(sweeps.open(a), sweeps.open(b))
  found = runs(a, b)
  return _code_of([found]), str(found)


def _whole(folder: storage.Path) -> storage.Path:
  """A folder from the root on: the sweep that a run is in lies above it."""
  return folder if storage.is_remote(folder) else storage.Path(os.path.abspath(folder))


def _sweeps(a: Sweep, b: Sweep) -> tuple[int, str]:
  pairs, only_a, only_b = paired(a, b)
  lines, found = [], []
  told: dict[Difference, int] = {}
  idle = collections.Counter()
  for one, other in pairs:
    places = a.workdir(one), b.workdir(other)
    begun = [storage.exists(place / 'run.json') for place in places]
    if not all(begun):
      idle[begun[0], begun[1]] += 1
      continue
    each = runs(*places)
    found.append(each)
    told |= {d: told.get(d, 0) + 1 for d in each.differences}
    verdict = 'comparable' if each.comparable else 'NOT comparable'
    lines.append(f'{one.name}: {verdict}; losses: {each.losses}')
  where = {(False, False): 'in either', (False, True): 'in A', (True, False): 'in B'}
  lines += [f'{n} points are not begun {where[which]}' for which, n in idle.items()]
  for side, points in (('A', only_a), ('B', only_b)):
    lines += [f'{p.name}: only in {side}' for p in points]
  for matters, heading in HEADINGS.items():
    listed = [f'{d}  ({n} points)' for d, n in told.items() if d.matters == matters]
    lines += [f'{heading}:', *listed] if listed else []
  whole = len(found) == len(a.points) == len(b.points)
  same = sum(each.same for each in found)
  most = max(len(a.points), len(b.points))
  lines.append(f'{same} of {most} points have the same losses to the last bit')
  code = _code_of(found)
  return code if whole or code == NOT_COMPARABLE else DIFFERENT, '\n'.join(lines)


def _code_of(found: Sequence[Comparison]) -> int:
  if not all(each.comparable for each in found):
    return NOT_COMPARABLE
  return SAME if all(each.same for each in found) else DIFFERENT


def _about(workdir: storage.Path) -> dict:
  """A workdir -> its run.json, and the code of the sweep that it is in, if it is."""
  path = workdir / 'run.json'
  try:
    run = json.loads(storage.read(path, workdirs.LIMIT))
    found = {'config': dict(run['config']), 'data': dict(run['data'])}
    found['sessions'] = [dict(session) for session in run['sessions']]
    if not found['sessions']:
      raise ValueError('it has no session')
  except FileNotFoundError:
    raise ValueError(f'{workdir} is no run: there is no run.json') from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error!r}') from error
  found['code'] = found['sessions'][-1].get('git')
  where = workdir.parent.parent
  if not found['code'] and storage.exists(where / sweeps.NAME):
    made = sweeps.open(where).made
    found['code'] = {'sha256': made['sha256'], **(made['git'] or {})}
  return found


def _differences(a: dict, b: dict) -> list[Difference]:
  """Two of `_about` -> all that differs, the recipe first."""
  data = [run['data'].get('sha256') for run in (a, b)]
  # The same data may lie elsewhere.
  harmless = (*HARMLESS, 'config.data.mixture') if data[0] == data[1] else HARMLESS
  found = [
    Difference(knob, _short(x), _short(y), not knob.startswith(harmless))
    for knob, (x, y) in config.differences(a['config'], b['config']).items()
  ]
  if data[0] != data[1]:
    found.append(Difference('data', str(data[0])[:12], str(data[1])[:12]))
  found += _code(a['code'], b['code'])
  one, other = a['sessions'][-1], b['sessions'][-1]
  for key, name in SESSION.items():
    if one.get(key) != other.get(key):
      found.append(Difference(name, _short(one.get(key)), _short(other.get(key))))
  for group, sign in (('versions', ''), ('environment', '$')):
    x, y = one.get(group) or {}, other.get(group) or {}
    for key in sorted(x.keys() | y.keys()):
      if x.get(key) != y.get(key):
        matters = not (sign and key.startswith(HARMLESS_VARIABLES))
        found.append(
          Difference(sign + key, _short(x.get(key)), _short(y.get(key)), matters)
        )
  if one.get('platform') != other.get('platform'):
    there, here = one.get('platform'), other.get('platform')
    found.append(Difference('platform', str(there), str(here), False))
  return found + [d for run, side in ((a, 'a'), (b, 'b')) for d in _mixed(run, side)]


def _code(a: Mapping | None, b: Mapping | None) -> list[Difference]:
  """The code of two runs -> what differs, or cannot be told to be the same."""
  if not a or not b:
    return [Difference('code', _named(a), _named(b))]
  if 'sha256' in a and 'sha256' in b:
    if a['sha256'] == b['sha256']:
      return []
  elif a.get('commit') == b.get('commit') and not (a.get('dirty') or b.get('dirty')):
    return []
  return [Difference('code', _named(a), _named(b))]


def _named(code: Mapping | None) -> str:
  """A commit, and sources that differ from it -> words."""
  if not code:
    return 'not known'
  told = str(code.get('commit') or 'no commit')[:10]
  told += ' with changes' if code.get('dirty') else ''
  return told + (f', sources {code["sha256"][:12]}' if 'sha256' in code else '')


def _mixed(run: dict, side: str) -> list[Difference]:
  """Sessions of one run that were not on the same machine or of the same code."""
  found = []
  for key in (*SESSION, 'versions', 'environment', 'git'):
    seen = [session.get(key) for session in run['sessions']]
    if any(each != seen[0] for each in seen):
      what = f'{SESSION.get(key, key)} of the sessions of {side}'
      found.append(Difference(what, _short(seen[0]), _short(seen[-1])))
  return found


def _losses(a: storage.Path, b: storage.Path) -> Losses:
  """Two workdirs -> how their losses in training and held out go along."""
  one, other = ({_key(r): r for r in _records(w)} for w in (a, b))
  shared = sorted(one.keys() & other.keys())
  pairs = [(step, one[step, kind], other[step, kind]) for step, kind in shared]
  first, most = None, 0.0
  at = (math.nan, math.nan)
  for step, x, y in pairs:
    if not all(_equal(x.get(k), y.get(k)) for k in COMPARED):
      gap = abs(x['loss'] - y['loss'])
      most = max(most, math.inf if math.isnan(gap) else gap)
      first = step if first is None else first
      at = (x['loss'], y['loss']) if first == step else at
  if first is None and pairs:
    at = pairs[-1][1]['loss'], pairs[-1][2]['loss']
  steps = len({step for step, _ in shared})
  return Losses(steps, first, *at, most, (_last(one), _last(other)))


def _records(workdir: storage.Path) -> Sequence[dict]:
  path = workdir / 'metrics.jsonl'
  found = metrics.read(path) if metrics.exists(path) else []
  return [r for r in found if r.get('kind') in ('train', 'heldout') and 'loss' in r]


def _key(record: dict) -> tuple[int, str]:
  return record['step'], record['kind']


def _last(records: Mapping[tuple[int, str], dict]) -> tuple[int, float]:
  """-> the last step, and its loss: held out, where it is."""
  if not records:
    return 0, math.nan
  step = max(step for step, _ in records)
  kind = 'heldout' if (step, 'heldout') in records else 'train'
  return step, records[step, kind]['loss']


def _equal(x: float | None, y: float | None) -> bool:
  both_nan = x is not None and y is not None and math.isnan(x) and math.isnan(y)
  return x == y or both_nan


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else metrics.dumps(value, indent=None)
  return text if len(text) <= 60 else f'{text[:57]}...'
