"""The report in words: Markdown of a sweep that was judged."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config
from gated.sweep import judge
from gated.sweep.judge.warnings import SETTLED, TIMES
from gated.sweep.report import published, tables
from gated.sweep.report.lines import Line, rate
from gated.sweep.report.points import DONE, LEAST, TAIL, Judged, fitting
from gated.sweep.report.tables import Table, plain

STATES = ('finished', 'diverged', 'partial', 'failed', 'absent')
# What a reader asks of a run first; the first three multiply to its tokens.
KNOBS = (
  *('steps', 'batch', 'data.length', 'model.vocab', 'model.depth', 'model.width'),
  *('model.numerics.compute', 'optim.name', 'optim.schedule', 'optim.warmup'),
  *('optim.weight_decay', 'optim.clip'),
)
OF_RUNS = {'device': 'devices', 'data': 'data with SHA-256'}
UNLIKE = (
  "Scale, data and tokenizer differ from the paper's, and with them every loss: only the "
  'signs and the ratios of differences may be compared. The differences are in nats; the '
  "paper's are the logarithm of a ratio of two of its perplexities."
)


@dataclass(frozen=True, kw_only=True)
class Report:
  """All that a report is made of."""

  name: str
  about: Mapping[str, str]  # what was run: recipe, commit, ...
  points: Sequence[Judged]
  lines: Sequence[Line]
  rule: judge.Rule
  spikes: Mapping[str, Any]  # arguments of judge.spikes that were asked for
  published: Sequence[published.Published]
  captions: Mapping[str, str]  # of the figures that were drawn, by name

  def states(self) -> str:
    """'18 points: 16 finished, 2 diverged'."""
    count = Counter(p.state for p in self.points)
    told = ', '.join(f'{count[s]} {s}' for s in STATES if count[s])
    return f'{len(self.points)} points: {told}'

  @property
  def noise(self) -> judge.Noise:
    cells = (c for line in self.lines for c in line.cells() if not c.diverged)
    return judge.noise([c.finals for c in cells])


def markdown(the: Report) -> str:
  """A report -> report.md."""
  figures = {name: i + 1 for i, name in enumerate(the.captions)}

  def figure(name: str) -> list[str]:
    if name not in figures:
      return []
    told = f'Figure {figures[name]}'
    return [f'![{told}]({name}.svg)', '', f'*{told}.* {the.captions[name]}', '']

  parts = [
    [f'# {plain(the.name)}', '', *_opening(the)],
    ['## Final loss', '', *figure('loss_vs_lr'), *_losses(the)],
    ['## LR sensitivity', '', *figure('sensitivity'), *_sensitivity(the)],
    ['## Training curves and spikes', '', *figure('curves'), *_spikes(the)],
    ['## Divergence', '', *_divergence(the)],
    ['## Early warnings', '', *figure('warnings'), *_warnings(the)],
    *_paper(the),
    ['## How it was measured', '', *_measured(the)],
  ]
  return '\n'.join(line for part in parts for line in [*part, ''])


def _opening(the: Report) -> Iterator[str]:
  part = the.about.get('points')
  yield f'{the.states()}.{f" A part: {plain(part)}." if part else ""}'
  left = [p for p in the.points if not p.done]
  if left:
    yield ''
    yield (
      f'**This sweep is not finished: {len(left)} of {len(the.points)} points are not '
      'done.** They are in no mean below:'
    )
    yield ''
    rows = [[p.name, p.state, p.step, p.steps, p.told] for p in left]
    yield from Table(['point', 'state', 'step', 'of', 'told'], rows).markdown()


def _losses(the: Report) -> Iterator[str]:
  yield 'Nats a token; mean and standard deviation over the seeds that did not diverge.'
  yield ''
  yield from tables.by_rate(the.lines).markdown()
  yield ''
  counts = [len(c.points) for line in the.lines for c in line.cells()]
  least, most = min(counts), max(counts)
  seeds = f'{most}' if least == most else f'{least} to {most}'
  noun = 'seed' if most == 1 else 'seeds'
  yield f'Seeds of each: {seeds} {noun}, where all are done. {the.noise}'
  if most <= 1:
    yield 'With one seed no ordering of these lines is claimed.'
  elif len(the.lines) > 1:
    yield ''
    yield from _ordering(the)


def _ordering(the: Report) -> Iterator[str]:
  """Each line at its best against the first."""
  noise, rows = the.noise, []
  bests = [(line, cell) for line in the.lines if (cell := line.best())]
  if not bests or not noise.dof:
    return
  (first, start), *_ = bests
  for line, cell in bests:
    row = [line.name, rate(cell.lr), tables.told(cell), len(cell.finals)]
    if line is first:
      rows.append([*row, '–', '–', '–'])
      continue
    apart, beyond = cell.mean - start.mean, noise.beyond(cell.spread.n, start.spread.n)
    side = 'lower' if apart < 0 else 'higher'
    said = side if noise.differ(cell.spread, start.spread) else 'within the noise'
    rows.append([*row, f'{apart:+.4f}', f'{beyond:.4f}', said])
  yield (
    f'Each line at its best learning rate without divergence, against '
    f'{plain(first.name)}. The rate was chosen by the same runs, so that small '
    'differences say less than the noise floor promises.'
  )
  yield ''
  columns = ['', 'lr', 'final loss', 'seeds', 'difference', 'noise floor', 'is']
  yield from Table(columns, rows).markdown()


def _sensitivity(the: Report) -> Iterator[str]:
  found = tables.of_sensitivity(the.lines)
  rows = [row for row in found.rows if row[1] == 'mean']
  if not rows:
    yield (
      'There is none: it takes a line with several learning rates that are all done, and '
      'a loss logged at step 1.'
    )
    return
  yield (
    'The mean over the learning rates of min(final loss, loss at initialisation), less '
    'the best final loss, in nats (Wortsman et al., arXiv 2309.14322); a seed at a time. '
    'It is of this grid of rates: what reaches further has more.'
  )
  yield ''
  columns = ['', 'sensitivity', 'std over seeds', 'seeds', 'rates', 'from lr', 'to lr']
  lrs = {line.name: tuple(line.lrs) for line in the.lines if line.sensitivities()}
  cut = [[r[0], *r[2:5], len(lrs[r[0]]), rate(r[5]), rate(r[6])] for r in rows]
  yield from Table(columns, cut).markdown()
  yield ''
  if len(set(lrs.values())) > 1:
    yield 'Their learning rates are not the same: these numbers are not comparable.'
  if all(row[4] == 1 for row in rows):
    yield 'They are of one seed each: no ordering of them is claimed.'
  short = [line.name for line in the.lines if len(line.sensitivities()) < len(line.seeds)]
  if short:
    names = plain(', '.join(short))
    yield f'Seeds that are not done at every rate are left out. They are of: {names}.'


def _spikes(the: Report) -> Iterator[str]:
  lengths = {p.steps for p in the.points}
  how = fitting(min(lengths)) | dict(the.spikes)
  of = 'In the shortest run, a' if len(lengths) > 1 else 'A'
  yield (
    f'{of} spike is an excursion of the training loss of more than '
    f'{how["threshold"]:g} nats above the centred median of {how["window"]} logged '
    f'points, after step {how["warmup"]}; what is within {how["gap"]} steps is one.'
  )
  limits = [p.limit for p in the.points if len(p.train.steps)]
  if max(limits, default=0.0) > how['threshold']:
    yield (
      f'**Here it takes up to {max(limits):.2f} nats** ({min(limits):.2f} at least): '
      'so high the noise of a batch reaches by itself, in one such run of a hundred. '
      'What is lower than that cannot be told from noise, and is not counted.'
    )
  yield 'Spikes a run, with the highest in nats:'
  yield ''
  yield from tables.of_spikes(the.lines).markdown()
  noted = [p.noted for p in the.points if p.noted is not None]
  if noted:
    yield ''
    yield (
      f'Steps that the guard noted as they trained: {sum(noted)}, in '
      f'{sum(map(bool, noted))} of {len(noted)} runs. It measures otherwise: a loss or a '
      'gradient norm that many standard deviations above those before it '
      '(config.stability.threshold), and a norm may do so where the loss does nothing.'
    )


def _divergence(the: Report) -> Iterator[str]:
  yield str(the.rule)
  slow = [p.name for p in the.points if p.slow]
  if slow:
    yield f'Slow by this rule, and so counted as finished: {plain(", ".join(slow))}.'
  yield ''
  found = [p for p in the.points if p.diverged]
  if not found:
    done = sum(p.done for p in the.points)
    yield f'None of the {done} points that are done diverged by this rule.'
    return
  rows = [[p.line, rate(p.lr), p.seed, f'diverged: {p.reason}', p.name] for p in found]
  yield from Table(['', 'lr', 'seed', 'why', 'point'], rows).markdown()


def _warnings(the: Report) -> Iterator[str]:
  rows = [
    [p.line, rate(p.lr), p.seed, p.state, p.step, tables.warned(p)]
    for p in the.points
    if p.state in DONE and p.left
  ]
  yield (
    'The first step at which a number left its usual range: more than '
    f'{TIMES:g} times its median in the first half of the run, or not finite. The first '
    f'{SETTLED:.0%} of the steps are not looked at.'
  )
  yield ''
  if rows:
    columns = ['', 'lr', 'seed', 'state', 'last step', 'left its range']
    yield from Table(columns, rows).markdown()
  else:
    yield 'None did in a point that is done.'


def _paper(the: Report) -> Iterator[list[str]]:
  parts = []
  row = published.by_row(the.lines)
  if row:
    parts += ['Rows of its tables, each against the row that is its baseline:', '']
    parts += [*row.markdown(), '']
  tables_of = list(published.by_rate(the.lines, the.published))
  parts += [published.MEANS, ''] if tables_of else []
  for of, table in tables_of:
    parts += [f'**{plain(of)}**', '', *table.markdown(), '']
  if parts:
    sure = (
      'A difference of ours within the noise floor has no sign.'
      if the.noise.dof
      else 'Our noise is not known: the signs of our differences may be chance.'
    )
    yield ['## Beside the paper', '', f'{UNLIKE} {sure}', '', *parts]


def _measured(the: Report) -> Iterator[str]:
  kinds = {p.final_of for p in the.points if p.final_of and not p.diverged}
  names = {
    'heldout': 'the held-out loss at the last step',
    'train': f'the mean training loss of the last {TAIL:.0%} of the records '
    f'({LEAST} at least)',
  }
  if kinds:
    both = ' (both occur here, and differ in kind)' if len(kinds) > 1 else ''
    yield f'- Final loss: {" or ".join(names[k] for k in sorted(kinds))}{both}.'
  inits = [p.init for p in the.points if p.init is not None]
  ends = f' ({min(inits):.3f} to {max(inits):.3f})' if inits else ''
  yield f'- Loss at initialisation: the training loss of step 1, before any update{ends}.'
  yield f'- Each run: {", ".join(map(plain, _shared(the.points)))}.'
  told = {name: sorted({getattr(p, name) for p in the.points} - {''}) for name in OF_RUNS}
  about = {OF_RUNS[name]: ', '.join(values) for name, values in told.items() if values}
  for name, value in (dict(the.about) | about).items():
    yield f'- {name[0].upper()}{name[1:]}: {plain(value)}.'
  yield (
    '- Seconds and tokens a second (points.csv) are of runs that may have shared a '
    'device with others: they compare no speeds.'
  )
  yield (
    '- Beside this page: points.csv (every point), summary.csv (every line and learning '
    'rate), sensitivity.csv, curves.csv (thinned training losses), and each figure as '
    'SVG, PDF and PNG.'
  )


def _shared(points: Sequence[Judged]) -> Iterator[str]:
  """'steps 1000', ...: what all points have in common of what they trained, and how."""
  for knob in KNOBS:
    values = list(dict.fromkeys(str(config.dig(p.config, knob)) for p in points))
    yield f'{knob} {values[0] if len(values) == 1 else "differs"}'
  sizes = {math.prod(config.dig(p.config, knob) for knob in KNOBS[:3]) for p in points}
  if len(sizes) == 1:
    yield f'which is {sizes.pop() / 1e6:.3g}M tokens with their padding'
