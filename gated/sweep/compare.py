"""Compares two runs: their recipes, data, code and machines, and their losses.

Two runs are comparable if nothing differs that may change a loss: recipe, data, code,
versions, devices, flags and the compiler's environment. On the same kind of machine,
comparable runs have the same losses to the last bit, except on GPUs without
--deterministic.
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

# Knobs that change no loss.
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
# Keys of a session in run.json -> their names in the output.
SESSION = {
  'backend': 'backend',
  'device_kind': 'device',
  'devices': 'devices',
  'processes': 'processes',
  'deterministic': '--deterministic',
  'python': 'Python',
}
# Variables that affect only memory and speed.
HARMLESS_VARIABLES = 'XLA_PYTHON_CLIENT_', 'JAX_COMPILATION_CACHE_'
HEADINGS = {
  True: 'differences that make the runs not comparable',
  False: 'differences that change no loss',
}
COMPARED = 'loss', 'grad_norm'  # The compared fields of a record.


class Difference(NamedTuple):
  """A setting that differs between two runs."""

  name: str
  a: str
  b: str
  matters: bool = True  # Whether it may change a loss.

  def __str__(self) -> str:
    return f'  {self.name:32} {self.a}  |  {self.b}'


class Losses(NamedTuple):
  """The losses of two runs, step by step."""

  steps: int  # The number of steps that both runs logged.
  first: int | None  # The first step at which they differ, or None.
  a: float  # The loss at that step, or at the last common step.
  b: float
  most: float  # The largest difference over all steps, in nats.
  finals: tuple[tuple[int, float], tuple[int, float]]  # Last step and loss of each run.

  @property
  def same(self) -> bool:
    """Whether all common steps agree to the last bit."""
    return self.steps > 0 and self.first is None

  def __str__(self) -> str:
    (last, final), (other_last, other_final) = self.finals
    ends = f'{final:.6g} at step {last}  |  {other_final:.6g} at step {other_last}'
    if not self.steps:
      return f'the runs have no step in common; final: {ends}'
    if self.first is not None:
      return (
        f'different from step {self.first} on: {self.a!r}  |  {self.b!r}; '
        f'at most {self.most:.3g} nats apart; final: {ends}'
      )
    if last != other_last:
      return f'the same to the last bit in all common steps; final: {ends}'
    return f'the same to the last bit, all {self.steps} steps; final: {final!r}'


class Comparison(NamedTuple):
  """The result of comparing two runs."""

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
    harmless = [str(d) for d in self.differences if not d.matters]
    lines = ['comparable: no difference that may change a loss']
    if not self.comparable:
      serious = [str(d) for d in self.differences if d.matters]
      lines = ['NOT comparable, because of these differences:', *serious]
    if harmless:
      lines += ['differences that change no loss:', *harmless]
    return '\n'.join([*lines, f'losses: {self.losses}'])


def runs(a: storage.Path, b: storage.Path) -> Comparison:
  """Two workdirs -> Comparison; ValueError for a missing or damaged run."""
  return Comparison(tuple(_differences(_about(a), _about(b))), _losses(a, b))


def _paired(
  a: Sweep, b: Sweep
) -> tuple[list[tuple[Point, Point]], list[Point], list[Point]]:
  """Two sweeps -> pairs of points with the same labels, and the rest of each sweep."""
  mine, other = ({tuple(sorted(p.labels.items())): p for p in s.points} for s in (a, b))
  pairs = [(p, other[key]) for key, p in mine.items() if key in other]
  only_a = [p for key, p in mine.items() if key not in other]
  return pairs, only_a, [p for key, p in other.items() if key not in mine]


def folders(a: storage.Path, b: storage.Path) -> tuple[int, str]:
  """Two runs, or two sweeps -> an exit code, and the text of the comparison.

  SAME, DIFFERENT or NOT_COMPARABLE. ValueError for a run and a sweep.
  """
  a, b = (_absolute(folder) for folder in (a, b))
  kinds = [storage.exists(folder / sweeps.NAME) for folder in (a, b)]
  if kinds[0] != kinds[1]:
    sweep, run = (a, b) if kinds[0] else (b, a)
    raise ValueError(f'{sweep} is a sweep, but {run} is not: name two runs or two sweeps')
  if kinds[0]:
    return _sweeps(sweeps.open(a), sweeps.open(b))
  comparison = runs(a, b)
  return _exit_code([comparison]), str(comparison)


def _absolute(folder: storage.Path) -> storage.Path:
  """Makes a local path absolute: a run's sweep is in one of its parents."""
  return folder if storage.is_remote(folder) else storage.Path(os.path.abspath(folder))


def _sweeps(a: Sweep, b: Sweep) -> tuple[int, str]:
  pairs, only_a, only_b = _paired(a, b)
  lines, comparisons = [], []
  counts: collections.Counter[Difference] = collections.Counter()
  missing = collections.Counter()
  for point, other in pairs:
    workdirs_ab = a.workdir(point), b.workdir(other)
    started = tuple(storage.exists(workdir / 'run.json') for workdir in workdirs_ab)
    if not all(started):
      missing[started] += 1
      continue
    result = runs(*workdirs_ab)
    comparisons.append(result)
    counts.update(dict.fromkeys(result.differences, 1))
    verdict = 'comparable' if result.comparable else 'NOT comparable'
    lines.append(f'{point.name}: {verdict}; losses: {result.losses}')
  places = {(False, False): 'in either', (False, True): 'in A', (True, False): 'in B'}
  lines += [f'{n} points have not started {places[key]}' for key, n in missing.items()]
  for side, points in (('A', only_a), ('B', only_b)):
    lines += [f'{p.name}: only in {side}' for p in points]
  for matters, heading in HEADINGS.items():
    listed = [f'{d}  ({n} points)' for d, n in counts.items() if d.matters == matters]
    lines += [f'{heading}:', *listed] if listed else []
  complete = len(comparisons) == len(a.points) == len(b.points)
  same = sum(result.same for result in comparisons)
  most = max(len(a.points), len(b.points))
  lines.append(f'{same} of {most} points have the same losses to the last bit')
  code = _exit_code(comparisons)
  return code if complete or code == NOT_COMPARABLE else DIFFERENT, '\n'.join(lines)


def _exit_code(comparisons: Sequence[Comparison]) -> int:
  if not all(result.comparable for result in comparisons):
    return NOT_COMPARABLE
  return SAME if all(result.same for result in comparisons) else DIFFERENT


def _about(workdir: storage.Path) -> dict:
  """A workdir -> its run.json, and its code, which its sweep may record."""
  path = workdir / 'run.json'
  try:
    run = json.loads(storage.read(path, workdirs.LIMIT))
    about = {'config': dict(run['config']), 'data': dict(run['data'])}
    about['sessions'] = [dict(session) for session in run['sessions']]
    if not about['sessions']:
      raise ValueError('it has no session')
  except FileNotFoundError:
    raise ValueError(f'{workdir} is not a run: run.json is missing') from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error!r}') from error
  about['code'] = about['sessions'][-1].get('git')
  root = workdir.parent.parent
  if not about['code'] and storage.exists(root / sweeps.NAME):
    made = sweeps.open(root).made
    about['code'] = {'sha256': made['sha256'], **(made['git'] or {})}
  return about


def _differences(a: dict, b: dict) -> list[Difference]:
  """Two results of `_about` -> all differences, the recipe's first."""
  data = [run['data'].get('sha256') for run in (a, b)]
  # The same data may have another path.
  harmless = (*HARMLESS, 'config.data.mixture') if data[0] == data[1] else HARMLESS
  differences = [
    Difference(knob, _short(x), _short(y), not knob.startswith(harmless))
    for knob, (x, y) in config.differences(a['config'], b['config']).items()
  ]
  if data[0] != data[1]:
    differences.append(Difference('data', str(data[0])[:12], str(data[1])[:12]))
  if not _same_code(a['code'], b['code']):
    differences.append(Difference('code', _code_name(a['code']), _code_name(b['code'])))
  last = [run['sessions'][-1] for run in (a, b)]
  fields = [(name, *(s.get(key) for s in last), True) for key, name in SESSION.items()]
  for group, sign in (('versions', ''), ('environment', '$')):
    x, y = (session.get(group) or {} for session in last)
    for key in sorted(x.keys() | y.keys()):
      matters = not (sign and key.startswith(HARMLESS_VARIABLES))
      fields.append((sign + key, x.get(key), y.get(key), matters))
  fields.append(('platform', *(str(s.get('platform')) for s in last), False))
  differences += [
    Difference(name, _short(x), _short(y), matters)
    for name, x, y, matters in fields
    if x != y
  ]
  return [*differences, *_mixed(a, 'a'), *_mixed(b, 'b')]


def _same_code(a: Mapping | None, b: Mapping | None) -> bool:
  """Whether two runs are known to have the same code."""
  if not a or not b:
    return False
  if 'sha256' in a and 'sha256' in b:
    return a['sha256'] == b['sha256']
  return a.get('commit') == b.get('commit') and not (a.get('dirty') or b.get('dirty'))


def _code_name(code: Mapping | None) -> str:
  """'1a2b3c4d5e with changes, sources 0a1b2c3d4e5f'."""
  if not code:
    return 'not known'
  name = str(code.get('commit') or 'no commit')[:10]
  name += ' with changes' if code.get('dirty') else ''
  return name + (f', sources {code["sha256"][:12]}' if 'sha256' in code else '')


def _mixed(run: dict, side: str) -> list[Difference]:
  """Differences between the sessions of one run."""
  differences = []
  for key in (*SESSION, 'versions', 'environment', 'git'):
    values = [session.get(key) for session in run['sessions']]
    if any(value != values[0] for value in values):
      name = f'{SESSION.get(key, key)} of the sessions of {side}'
      differences.append(Difference(name, _short(values[0]), _short(values[-1])))
  return differences


def _losses(a: storage.Path, b: storage.Path) -> Losses:
  """Two workdirs -> a comparison of their training and held-out losses."""
  ours, theirs = ({(r['step'], r['kind']): r for r in _records(w)} for w in (a, b))
  shared = sorted(ours.keys() & theirs.keys())
  first, most = None, 0.0
  losses = (math.nan, math.nan)
  for key in shared:
    x, y = ours[key], theirs[key]
    if all(_equal(x.get(k), y.get(k)) for k in COMPARED):
      continue
    gap = abs(x['loss'] - y['loss'])
    most = max(most, math.inf if math.isnan(gap) else gap)
    first = key[0] if first is None else first
    losses = (x['loss'], y['loss']) if first == key[0] else losses
  if first is None and shared:
    losses = ours[shared[-1]]['loss'], theirs[shared[-1]]['loss']
  steps = len({step for step, _ in shared})
  return Losses(steps, first, *losses, most, (_last(ours), _last(theirs)))


def _records(workdir: storage.Path) -> Sequence[dict]:
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  return [r for r in records if r.get('kind') in ('train', 'heldout') and 'loss' in r]


def _last(records: Mapping[tuple[int, str], dict]) -> tuple[int, float]:
  """-> the last step, and its held-out loss, or else its training loss."""
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
