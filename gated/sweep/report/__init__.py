"""The report of one or several sweeps: Markdown, CSV, figures, one self-contained page.

The same sweeps give the same bytes: a report contains no time of writing.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gated import storage, sweep
from gated.sweep.grid import Resolve
from gated.sweep.report import points, published, results, tables, together
from gated.sweep.report.logs import AXES
from gated.sweep.report.text import Report, markdown

__all__ = ['AXES', 'write']


def write(
  folder: storage.Path,
  sweeps: Sequence[sweep.Sweep],
  *,
  only: str = '',
  rule: Mapping[str, float] | None = None,
  spikes: Mapping[str, Any] | None = None,
  baseline: str = '',
  by: str = 'step',
  resolve: Resolve | None = None,
) -> Report:
  """Judges the points of one or several sweeps, and writes their report into `folder`.

  The report of an unfinished sweep lists the missing points. `only` selects points as in
  `sweep.only`; they are still judged among all points. `rule` and `spikes` override
  fields of the sweep's rule and arguments of `judge.spikes`. `baseline` is a line or its
  label (default: the first without a gate), `by` one of `logs.AXES`; `resolve` gives the
  recipe of a command, which decides whether a point is a row of the paper.

  ValueError if a package for figures or pages is missing, if no line or several lines
  have the label `baseline`, or if several sweeps are not comparable.
  """
  try:
    from gated.sweep.report import curves, figures, overlay
    from gated.sweep.report.page import page
  except ImportError as error:
    install = 'pip install -r requirements-report.txt'
    raise ValueError(f'a report needs {error.name}: {install}') from error

  rule, spikes, first = dict(rule or {}), dict(spikes or {}), sweeps[0]
  chosen = {id(p) for p in sweep.only([p for s in sweeps for p in s.points], only)}
  judge_by = replace(first.rule, **rule)
  judged = points.read(sweeps, judge_by, spikes)
  together.check(sweeps, judged, rule)
  differing = together.notes(sweeps, judged)
  kept = [p for p in judged if id(p.point) in chosen]
  about = _about(sweeps)
  if only:
    about['points'] = f'{len(kept)} of the {len(judged)} of its grid: {only}'
  lines = points.gather(kept)
  compared = results.baseline(lines, baseline)
  rows = published.rows(lines, resolve)
  pictures = {
    'overlay': functools.partial(overlay.of_lines, baseline=compared, by=by),
    'loss_vs_lr': figures.loss_against_rate,
    'probes': functools.partial(figures.probed, rows=rows),
    'sensitivity': figures.sensitivity,
    'curves': curves.training,
    'warnings': curves.warnings,
  }
  report = Report(
    name=' and '.join(dict.fromkeys(swept.name for swept in sweeps)),
    about=about,
    points=kept,
    lines=lines,
    rule=judge_by,
    spikes=spikes,
    baseline=compared,
    rows=rows,
    notes=differing,
    captions=figures.draw(pictures, lines, folder),
  )
  text = markdown(report)
  drawn = {
    f'{n}.svg': storage.read(folder / f'{n}.svg', 1 << 30) for n in report.captions
  }
  files = {
    'results.csv': tables.of_results(report.results()[0]).csv(),
    'points.csv': tables.of_points(kept).csv(),
    'curves.csv': tables.of_curves(kept).csv(),
    'summary.csv': tables.of_summary(lines).csv(),
    'sensitivity.csv': tables.of_sensitivity(lines).csv(),
    'evaluations.csv': tables.of_evaluations(kept).csv(),
    'report.md': text.encode(),
    'index.html': page(text, report.name, drawn).encode(),
  }
  for name, content in files.items():
    storage.write(folder / name, content)
  return report


def _about(sweeps: Sequence[sweep.Sweep]) -> dict[str, str]:
  """The recipe, commit, versions and sources of each sweep, by name."""
  about: dict[str, str] = {}
  for swept in sweeps:
    made, end = swept.made, '' if len(sweeps) == 1 else f' of {swept.folder.name}'
    about[f'recipe{end}'] = ' '.join([swept.recipe, *swept.overrides, *swept.flags])
    if made.get('git'):
      changed = ', with changes' if made['git']['dirty'] else ''
      about[f'commit{end}'] = f'{made["git"]["commit"]}{changed}'
    if made.get('versions'):
      versions = {'python': made['python']} | made['versions']
      about[f'versions{end}'] = ', '.join(f'{k} {v}' for k, v in versions.items() if v)
    if made.get('sha256'):
      about[f'sources{end}'] = f'code.tar.gz with SHA-256 {made["sha256"]}'
  return about
