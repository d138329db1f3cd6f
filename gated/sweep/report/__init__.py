"""The report of a sweep: Markdown, CSV, figures, and one self-contained page.

The same sweep gives the same bytes: a report contains no time of writing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gated import storage, sweep
from gated.sweep import judge
from gated.sweep.report import points, tables
from gated.sweep.report.published import Published
from gated.sweep.report.text import Report, markdown

__all__ = ['Published', 'write']


def write(
  swept: sweep.Sweep,
  out: storage.Path,
  *,
  only: str = '',
  rule: judge.Rule | None = None,
  spikes: Mapping[str, Any] | None = None,
  published: Sequence[Published] = (),
) -> Report:
  """Judges a sweep's points by `rule` (default: the sweep's own) and writes the report.

  The report of an unfinished sweep lists the missing points. `only` selects points as in
  `sweep.only`; they are still judged among all points. `spikes` overrides arguments of
  `judge.spikes`; `published` are the paper's rows to compare with. ValueError if a
  package for figures or pages is missing.
  """
  try:
    from gated.sweep.report import curves, figures
    from gated.sweep.report.page import page
  except ImportError as error:
    install = 'pip install -r requirements-report.txt'
    raise ValueError(f'a report needs {error.name}: {install}') from error

  rule, spikes = rule or swept.rule, dict(spikes or {})
  about = _about(swept)
  chosen = {p.name for p in sweep.only(swept.points, only)}
  judged = [p for p in points.read(swept, rule, spikes) if p.name in chosen]
  if only:
    about['points'] = f'{len(chosen)} of the {len(swept.points)} of its grid: {only}'
  lines = points.gather(judged)
  pictures = {
    'loss_vs_lr': figures.loss_against_rate,
    'sensitivity': figures.sensitivity,
    'curves': curves.training,
    'warnings': curves.warnings,
  }
  captions = figures.draw(pictures, lines, out)
  report = Report(
    name=swept.name,
    about=about,
    points=judged,
    lines=lines,
    rule=rule,
    spikes=spikes,
    published=published,
    captions=captions,
  )
  text = markdown(report)
  drawn = {f'{name}.svg': storage.read(out / f'{name}.svg', 1 << 30) for name in captions}
  files = {
    'points.csv': tables.of_points(judged).csv(),
    'curves.csv': tables.of_curves(judged).csv(),
    'summary.csv': tables.of_summary(lines).csv(),
    'sensitivity.csv': tables.of_sensitivity(lines).csv(),
    'report.md': text.encode(),
    'index.html': page(text, swept.name, drawn).encode(),
  }
  for name, content in files.items():
    storage.write(out / name, content)
  return report


def _about(swept: sweep.Sweep) -> dict[str, str]:
  """The recipe, commit, versions and sources of a sweep, by name."""
  made = swept.made
  about = {'recipe': ' '.join([swept.recipe, *swept.overrides, *swept.flags])}
  if made.get('git'):
    changed = ', with changes' if made['git']['dirty'] else ''
    about['commit'] = f'{made["git"]["commit"]}{changed}'
  if made.get('versions'):
    versions = {'python': made['python']} | made['versions']
    about['versions'] = ', '.join(f'{k} {v}' for k, v in versions.items() if v)
  if made.get('sha256'):
    about['sources'] = f'code.tar.gz with SHA-256 {made["sha256"]}'
  return about
