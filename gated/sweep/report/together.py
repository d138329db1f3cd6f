"""Several sweeps in one report: settings that must agree, and reported differences."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gated import config, sweep
from gated.sweep.compare import HARMLESS
from gated.sweep.report.points import Judged

# These knobs decide what a loss means: the training text, its amount, the held-out text.
MEASURE = 'config.steps', 'config.batch', 'config.data.', 'config.eval.rows'
MIXTURE = 'config.data.mixture'


def check(
  sweeps: Sequence[sweep.Sweep], points: Sequence[Judged], settled: Collection[str]
) -> None:
  """ValueError, with the differences, if the losses of sweeps are not comparable.

  Sweeps may differ in models, optimizers and the knobs of their grids. `settled` are the
  fields of the rule that the caller sets for all sweeps.
  """
  values = {knob: each for knob, each in _knobs(sweeps).items() if _differ(each)}
  texts = _data(sweeps, points)
  if all(texts) and not _differ(texts):
    values.pop(MIXTURE, None)  # The same data may have another path.
  elif all(texts):
    values['the data (SHA-256)'] = [{x[:12] for x in each} for each in texts]
  for name in vars(sweeps[0].rule).keys() - set(settled):
    rules = [{getattr(swept.rule, name)} for swept in sweeps]
    if _differ(rules):
      values[f'the rule of divergence, --{name}'] = rules
  if values:
    lines = [f'  {name}: {_each(sweeps, each)}' for name, each in sorted(values.items())]
    raise ValueError(
      'these sweeps are not comparable, so one report cannot hold them:\n'
      + '\n'.join(lines)
    )


def notes(sweeps: Sequence[sweep.Sweep], points: Sequence[Judged]) -> dict[str, str]:
  """Differences of the sweeps that may change a loss slightly, by name."""
  own = [_of(swept, points) for swept in sweeps]
  made = [swept.made for swept in sweeps]
  each = {
    'sources': [{str(m['sha256'])[:12]} if m.get('sha256') else set() for m in made],
    'versions': [{f'{k} {v}' for k, v in _versions(m).items()} for m in made],
    'devices': [{p.log.device for p in ps} - {''} for ps in own],
    'flags': [{*swept.flags} for swept in sweeps],
  }
  return {name: _each(sweeps, sets) for name, sets in each.items() if _differ(sets)}


def _versions(made: Mapping[str, Any]) -> dict[str, str]:
  return dict(made['versions']) if made.get('versions') else {}


def _of(swept: sweep.Sweep, points: Sequence[Judged]) -> list[Judged]:
  own = {id(p) for p in swept.points}
  return [p for p in points if id(p.point) in own]


def _knobs(sweeps: Sequence[sweep.Sweep]) -> dict[str, list[set[str]]]:
  """-> each knob of MEASURE that no grid changes, with its values in each sweep."""
  grids = {f'config.{knob}' for s in sweeps for p in s.points for knob in p.changes}
  flat = [[config.flatten(p.config) for p in swept.points] for swept in sweeps]
  names = {k for own in flat for knobs in own for k in knobs if k.startswith(MEASURE)}
  names = {k for k in names if k not in grids and not k.startswith(HARMLESS)}
  return {k: [{str(knobs.get(k)) for knobs in own} for own in flat] for k in names}


def _data(sweeps: Sequence[sweep.Sweep], points: Sequence[Judged]) -> list[set[str]]:
  """-> the fingerprints of the data of each sweep; empty before a point has started."""
  return [{p.log.data for p in _of(swept, points)} - {''} for swept in sweeps]


def _differ(each: Sequence[set[str]]) -> bool:
  return any(values != each[0] for values in each)


def _each(sweeps: Sequence[sweep.Sweep], each: Sequence[set[Any]]) -> str:
  """'256 in sweeps/a, 512 in sweeps/b'."""
  text = lambda values: ', '.join(sorted(map(str, values))) or 'none'
  return '; '.join(
    f'{text(values)} in {swept.folder}'
    for swept, values in zip(sweeps, each, strict=True)
  )
