"""Compares two runs: their recipes, data, code and machines, and their losses.

Two runs are comparable if nothing differs that may change a loss: recipe, data, code,
versions, devices, flags and the compiler's environment. On the same kind of machine,
comparable runs have the same losses to the last bit, except on GPUs without
--deterministic.
"""

import collections
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gated import config, storage
from gated.run import metrics
from gated.run import workdir as workdirs
from gated.run.metrics import settings
from gated.sweep import folder as sweeps
from gated.sweep.grid import Sweep, absolute

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
    """Whether they agree to the last bit, over the same steps."""
    (last, _), (other, _) = self.finals
    return self.steps > 0 and self.first is None and last == other

  def __str__(self) -> str:
    if self.same:
      return f'the same to the last bit, all {self.steps} steps; final: {self.a!r}'
    finals = [f'{loss:.6g} at step {step}' for step, loss in self.finals]
    ends = f'final: {"  |  ".join(finals)}'
    if not self.steps:
      return f'the runs have no step in common; {ends}'
    if self.first is None:
      return f'the same to the last bit in all common steps; {ends}'
    return (
      f'different from step {self.first} on: {self.a!r}  |  {self.b!r}; '
      f'at most {self.most:.3g} nats apart; {ends}'
    )


class Comparison(NamedTuple):
  """The result of comparing two runs."""

  differences: tuple[Difference, ...]
  losses: Losses

  @property
  def comparable(self) -> bool:
    return not any(d.matters for d in self.differences)

  @property
  def code(self) -> int:
    """SAME, DIFFERENT or NOT_COMPARABLE."""
    if not self.comparable:
      return NOT_COMPARABLE
    return SAME if self.losses.same else DIFFERENT


def folders(a: storage.Path, b: storage.Path) -> tuple[int, str]:
  """Two runs, or two sweeps -> an exit code, and the text of the comparison.

  ValueError for one of each.
  """
  a, b = absolute(a), absolute(b)  # A parent folder of a run may hold its sweep.
  kinds = [storage.exists(folder / sweeps.NAME) for folder in (a, b)]
  if kinds[0] != kinds[1]:
    sweep, run = (a, b) if kinds[0] else (b, a)
    raise ValueError(f'{sweep} is a sweep, but {run} is not: name two runs or two sweeps')
  if kinds[0]:
    return _sweeps(sweeps.open(a), sweeps.open(b))
  result = runs(a, b)
  listed = _listed({d: str(d) for d in result.differences})
  if result.comparable:
    listed.insert(0, 'comparable: no difference that may change a loss')
  return result.code, '\n'.join([*listed, f'losses: {result.losses}'])


def _listed(differences: Mapping[Difference, str]) -> list[str]:
  """Differences and their lines -> those that matter and the others, with headings."""
  lines = []
  for matters, heading in (
    (True, 'NOT comparable, because of these differences:'),
    (False, 'differences that change no loss:'),
  ):
    group = [line for d, line in differences.items() if d.matters == matters]
    lines += [heading, *group] if group else []
  return lines


def _sweeps(a: Sweep, b: Sweep) -> tuple[int, str]:
  """Two sweeps, by points with the same labels -> an exit code and a text."""
  started_a, started_b = _started(a), _started(b)
  lines, results = [], []
  counts: collections.Counter[Difference] = collections.Counter()
  for labels, workdir in (started_a | started_b).items():
    if labels not in started_a or labels not in started_b:
      side = 'A' if labels in started_a else 'B'
      lines.append(f'{workdir.name}: started in {side} only')
      continue
    result = runs(started_a[labels], started_b[labels])
    results.append(result)
    counts.update(result.differences)
    verdict = 'comparable' if result.comparable else 'NOT comparable'
    lines.append(f'{workdir.name}: {verdict}; losses: {result.losses}')
  lines += _listed({d: f'{d}  ({n} points)' for d, n in counts.items()})
  codes = [result.code for result in results]
  most = max(len(a.points), len(b.points))
  same = sum(result.losses.same for result in results)
  lines.append(f'{same} of {most} points have the same losses to the last bit')
  if not len(codes) == len(a.points) == len(b.points):
    codes.append(DIFFERENT)
  return max(codes), '\n'.join(lines)


def _started(swept: Sweep) -> dict[frozenset, storage.Path]:
  """A sweep -> the workdirs of its started points, by their labels."""
  workdirs = {frozenset(p.labels.items()): swept.workdir(p) for p in swept.points}
  return {k: v for k, v in workdirs.items() if storage.exists(v / 'run.json')}


def runs(a: storage.Path, b: storage.Path) -> Comparison:
  """Two workdirs -> Comparison; ValueError for a missing or damaged run."""
  return Comparison(tuple(_differences(_about(a), _about(b))), _losses(a, b))


def _about(workdir: storage.Path) -> dict:
  """A workdir -> its run.json, with its code, which may be recorded by its sweep."""
  path = workdir / 'run.json'
  try:
    run = json.loads(storage.read(path, workdirs.LIMIT))
    about = {'config': dict(run['config']), 'data': dict(run['data'])}
    about['sessions'] = [dict(session) for session in run['sessions']]
    about['code'] = about['sessions'][-1].get('git')
  except FileNotFoundError:
    raise ValueError(f'{workdir} is not a run: run.json is missing') from None
  except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error!r}') from error
  root = workdir.parent.parent
  if not about['code'] and storage.exists(root / sweeps.NAME):
    made = sweeps.open(root).made
    about['code'] = {'sha256': made['sha256'], **(made['git'] or {})}
  return about


def _differences(a: dict, b: dict) -> list[Difference]:
  """Two results of `_about` -> all differences; those of the recipe come first."""
  changed = config.differences(a['config'], b['config'])
  harmless = HARMLESS + settings.HARMLESS
  x, y = (run['data'].get('sha256') or 'unknown' for run in (a, b))
  if x == y:
    harmless += ('config.data.mixture',)  # The same data may have another path.
  else:
    changed['data'] = x[:12], y[:12]
  if not _same_code(a['code'], b['code']):
    changed['code'] = _code_name(a['code']), _code_name(b['code'])
  changed |= settings.changed(
    settings.of(a['sessions'][-1]), settings.of(b['sessions'][-1])
  )
  for side, run in {'a': a, 'b': b}.items():
    first, *others = (settings.of(s) | {'code': s.get('git')} for s in run['sessions'])
    for other in others:
      mixed = settings.changed(first, other)
      changed |= {f'{k} of the sessions of {side}': pair for k, pair in mixed.items()}
  return [
    Difference(name, _short(x), _short(y), not name.startswith(harmless))
    for name, (x, y) in changed.items()
  ]


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


def _losses(a: storage.Path, b: storage.Path) -> Losses:
  """Two workdirs -> a comparison of their training and held-out losses."""
  ours, theirs = _records(a), _records(b)
  shared = sorted(ours.keys() & theirs.keys())
  first, most = None, 0.0
  losses = [(ours[key]['loss'], theirs[key]['loss']) for key in shared]
  shown = losses[-1] if losses else (math.nan, math.nan)
  for key, (x, y) in zip(shared, losses, strict=True):
    if all(_equal(ours[key].get(k), theirs[key].get(k)) for k in COMPARED):
      continue
    if first is None:
      first, shown = key[0], (x, y)
    most = max(most, math.inf if math.isnan(x - y) else abs(x - y))
  steps = len({step for step, _ in shared})
  return Losses(steps, first, *shown, most, (_last(ours), _last(theirs)))


def _records(workdir: storage.Path) -> dict[tuple[int, str], dict]:
  """A workdir -> its records with a loss, by step and kind."""
  path = workdir / 'metrics.jsonl'
  records = metrics.read(path) if metrics.exists(path) else []
  kept = [r for r in records if r.get('kind') in ('train', 'heldout') and 'loss' in r]
  return {(r['step'], r['kind']): r for r in kept}


def _last(records: Mapping[tuple[int, str], dict]) -> tuple[int, float]:
  """-> the last step, and its held-out loss, or else its training loss."""
  if not records:
    return 0, math.nan
  step = max(step for step, _ in records)
  kind = 'heldout' if (step, 'heldout') in records else 'train'
  return step, records[step, kind]['loss']


def _equal(x: float | None, y: float | None) -> bool:
  """Whether two numbers are equal; NaN equals NaN."""
  return x == y or (x != x and y != y)


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else metrics.dumps(value, indent=None)
  return text if len(text) <= 60 else f'{text[:57]}...'
