"""The report of a sweep: Markdown, CSV, figures, and one page that needs nothing else.

The same sweep gives the same bytes: nothing in a report tells when it was written.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gated import storage, sweep
from gated.sweep import judge
from gated.sweep.report import points, tables
from gated.sweep.report.lines import Line, gather
from gated.sweep.report.published import Published
from gated.sweep.report.text import Report, markdown

__all__ = ['Published', 'write']

NEEDED = {'matplotlib': 'matplotlib', 'markdown_it': 'markdown-it-py'}


def write(
  swept: sweep.Sweep,
  out: storage.Path,
  *,
  only: str = '',
  rule: judge.Rule | None = None,
  spikes: Mapping[str, Any] | None = None,
  published: Sequence[Published] = (),
) -> Report:
  """Judges a sweep's points by a rule (its own), and writes the report of them.

  A sweep that is not finished has one as well, which says what is missing; `only` (as in
  `sweep.only`) makes it one of some points, which says so; they are judged as among all.
  `spikes` are arguments of `judge.spikes` other than those that suit the number of
  steps, `published` the paper's rows to set beside ours. ValueError where a package that
  draws is not installed.
  """
  missing = [name for module, name in NEEDED.items() if not _found(module)]
  if missing:
    raise ValueError(
      f'a report needs {" and ".join(missing)}: pip install -r requirements-report.txt'
    )
  from gated.sweep.report import figures
  from gated.sweep.report.page import page

  rule, spikes = rule or swept.rule, dict(spikes or {})
  about = _about(swept)
  chosen = {p.name for p in sweep.only(swept.points, only)}
  judged = [p for p in points.read(swept, rule, spikes) if p.name in chosen]
  if only:
    about['points'] = f'{len(chosen)} of the {len(swept.points)} of its grid: {only}'
  lines = gather(judged)
  captions = {d.name: d.caption for d in figures.draw(_pictures(lines), lines, out)}
  the = Report(
    name=swept.name,
    about=about,
    points=judged,
    lines=lines,
    rule=rule,
    spikes=spikes,
    published=published,
    captions=captions,
  )
  text = markdown(the)
  files = {
    'points.csv': tables.of_points(judged).csv(),
    'curves.csv': tables.of_curves(judged).csv(),
    'summary.csv': tables.of_summary(lines).csv(),
    'sensitivity.csv': tables.of_sensitivity(lines).csv(),
    'report.md': text.encode(),
  }
  drawn = {f'{name}.svg': storage.read(out / f'{name}.svg', 1 << 30) for name in captions}
  files['index.html'] = page(text, swept.name, drawn).encode()
  for name, content in files.items():
    storage.write(out / name, content)
  return the


def _about(swept: sweep.Sweep) -> dict[str, str]:
  """What was run, by name."""
  made = swept.made
  told = {'recipe': ' '.join([swept.recipe, *swept.overrides, *swept.flags])}
  if made.get('git'):
    changed = ', with changes' if made['git']['dirty'] else ''
    told['commit'] = f'{made["git"]["commit"]}{changed}'
  if made.get('versions'):
    versions = {'python': made['python']} | made['versions']
    told['versions'] = ', '.join(f'{k} {v}' for k, v in versions.items() if v)
  if made.get('sha256'):
    told['sources'] = f'code.tar.gz with SHA-256 {made["sha256"]}'
  return told


def _found(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


def _pictures(lines: list[Line]) -> dict[str, Callable]:
  """The figures that there is something to draw in."""
  from gated.sweep.report import curves, figures

  every = [p for line in lines for p in line.points]
  several = len({p.lr for p in every if p.done}) > 1
  wanted = {
    'loss_vs_lr': (figures.loss_against_rate, several),
    'sensitivity': (figures.sensitivity, any(line.sensitivities() for line in lines)),
    'curves': (curves.training, any(len(p.train.steps) for p in every)),
    'warnings': (curves.warnings, curves.warned(lines)),
  }
  return {name: draw for name, (draw, there) in wanted.items() if there}
