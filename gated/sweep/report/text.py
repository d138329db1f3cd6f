"""The text of the report: a judged sweep as Markdown."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config
from gated.sweep import judge
from gated.sweep.judge.warnings import SETTLED, TIMES
from gated.sweep.report import probed, published, results, tables
from gated.sweep.report.points import (
  LEAST,
  LOSSES,
  TAIL,
  Judged,
  Line,
  fitting,
  rate,
)
from gated.sweep.report.tables import Table, plain

MOST = 0.5  # Above this fraction of skipped updates, a loss says little.
STATES = ('finished', 'diverged', 'partial', 'failed', 'absent')
# The knobs that the report lists; the first three multiply to a run's tokens.
KNOBS = (
  *('steps', 'batch', 'data.length', 'model.vocab', 'model.depth', 'model.width'),
  *(
    'model.numerics.compute',
    'model.numerics.matmul',
    'optim.name',
    'optim.schedule',
    'optim.warmup',
  ),
  *('optim.weight_decay', 'optim.clip'),
)
UNLIKE = (
  "Scale, data and tokenizer differ from the paper's, and so does every loss: only the "
  'signs and the ratios of differences may be compared. Differences are in nats; the '
  "paper's are the logarithm of the ratio of two perplexities."
)


@dataclass(frozen=True, kw_only=True)
class Report:
  """The contents of a report."""

  name: str
  about: Mapping[str, str]  # recipe, commit, ...
  points: Sequence[Judged]
  lines: Sequence[Line]
  rule: judge.Rule
  spikes: Mapping[str, Any]  # arguments of judge.spikes from the command line
  baseline: Line
  rows: Sequence[published.Row]  # of the paper's tables
  notes: Mapping[str, str]  # what differs between several sweeps, by name
  captions: Mapping[str, str]  # of the figures, by name

  def states(self) -> str:
    """'18 points: 16 finished, 2 diverged'."""
    count = Counter(p.state for p in self.points)
    counts = ', '.join(f'{count[s]} {s}' for s in STATES if count[s])
    return f'{len(self.points)} points: {counts}'

  @property
  def noise(self) -> judge.Noise:
    return judge.noise([c.finals for x in self.lines for c in x.cells if not c.diverged])

  @property
  def loss(self) -> str:
    """'held-out loss': the kind of the final losses."""
    kinds = {p.final_of for p in self.points if p.final_of}
    return LOSSES[kinds.pop()] if kinds else 'loss'

  def results(self) -> tuple[list[results.Result], judge.Noise]:
    """-> the main table, and the noise of the differences of pairs."""
    return results.of_lines(self.lines, self.baseline, self.noise)


def markdown(report: Report) -> str:
  """A report -> the text of report.md."""
  return '\n\n'.join(_paragraphs(report)) + '\n'


def _paragraphs(report: Report) -> Iterator[str]:
  yield f'# {plain(report.name)}'
  yield from _opening(report)
  number = 0
  loss = report.loss
  for heading, figure, section in (
    ('Results', '', _results),
    ('Loss over training', 'overlay', lambda _: ()),
    (f'Final {loss} by learning rate', 'loss_vs_lr', _losses),
    ('Comparison with the paper', '', _paper),
    ('Probes', 'probes', lambda r: probed.section(r.lines)),
    ('Evaluations', '', _evaluations),
    ('LR sensitivity', 'sensitivity', _sensitivity),
    ('Training curves and spikes', 'curves', _spikes),
    ('Divergence', '', _divergence),
    ('Early warnings', 'warnings', _warnings),
    ('Method', '', _method),
  ):
    paragraphs = list(section(report))
    if paragraphs or figure in report.captions:
      yield f'## {heading}'
    if figure in report.captions:
      number += 1
      yield f'![Figure {number}]({figure}.svg)'
      yield f'*Figure {number}.* {report.captions[figure]}'
    yield from paragraphs


def _opening(report: Report) -> Iterator[str]:
  part = report.about.get('points')
  yield f'{report.states()}.{f" Only a part: {plain(part)}." if part else ""}'
  for name, value in report.notes.items():
    yield f'**The sweeps differ in their {name}**, which may move a loss: {plain(value)}.'
  share = {p.name: float(p.log.warnings['skipped'] or 0) for p in report.points}
  if most := {name: x for name, x in share.items() if x > MOST}:
    listed = ', '.join(f'{name} ({x:.0%})' for name, x in most.items())
    yield (
      f'**Most updates were skipped in {len(most)} of {len(report.points)} points**, '
      f'so their losses mean little: {plain(listed)}.'
    )
  missing = [p for p in report.points if not p.done]
  if missing:
    yield (
      f'**This sweep is not finished: {len(missing)} of {len(report.points)} points have '
      'not ended.** The means below exclude them:'
    )
    rows = [[p.name, p.state, p.log.step, p.steps, p.log.message] for p in missing]
    yield Table(['point', 'state', 'step', 'of', 'message'], rows).markdown()


def _results(report: Report) -> Iterator[str]:
  lines, paired = report.results()
  yield (
    f'Each line at the learning rate with its lowest final {report.loss} (nats per '
    f'token) and no diverged seed. Differences are to **{plain(report.baseline.name)}**.'
  )
  yield tables.main(lines, report.loss).markdown()
  if any(r.parameters is None for r in lines):
    yield 'Parameters and FLOPs are unknown for models of other versions of the code.'
  if not report.noise.dof and not paired.dof:
    yield str(report.noise)
    return
  level = f'{judge.LEVEL:.0%}'
  yield (
    f'± is half of a {level} confidence interval (Student). A difference is beyond the '
    'noise floor if its interval excludes 0; otherwise it claims no ordering. The '
    'learning rates were chosen by the same runs, so a small difference is less certain '
    'than its interval suggests.'
  )
  if paired.dof:
    yield (
      'Pairs: the same seed gives both runs the same order of data, so losses are '
      'subtracted seed by seed. The standard deviation of a difference is '
      f'{paired.std:.4f} nats, pooled over {paired.cells} lines ({paired.dof} degrees of '
      'freedom). Lines share the runs of the baseline, so their errors are not '
      'independent.'
    )


def _losses(report: Report) -> Iterator[str]:
  yield 'Nats per token; mean and standard deviation over the seeds without divergence.'
  yield tables.by_rate(report.lines, tables.loss_text).markdown()
  counts = sorted({len(c.points) for line in report.lines for c in line.cells})
  seeds = ' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))
  yield f'Seeds per learning rate: {seeds}. {report.noise}'
  if counts[-1] <= 1:
    yield 'One seed per line: the report claims no ordering of these lines.'


def _evaluations(report: Report) -> Iterator[str]:
  values: dict[tuple[str, str], dict[str, list[float]]] = {}
  for line in report.lines:
    for point in line.best.points if line.best else ():
      for name, measure, value, _ in point.evaluations:
        own = values.setdefault((name, measure), {})
        own.setdefault(line.name, []).append(value)
  if not values:
    return
  yield (
    'Each line at its best learning rate: mean and standard deviation over the seeds '
    'that eval.py measured. evaluations.csv has every point.'
  )
  rows = []
  for (name, measure), own in values.items():
    for line_name, numbers in own.items():
      mean, std, n = judge.spread(numbers)
      text = f'{mean:.4f}' + (f' ± {std:.4f}' if n > 1 else '')
      rows.append([name, measure, line_name, text, n])
  yield Table(['evaluation', 'measure', '', 'value', 'seeds'], rows).markdown()


def _sensitivity(report: Report) -> Iterator[str]:
  lines = [line for line in report.lines if line.sensitivities]
  if not lines:
    yield (
      'Not available: it needs a line with several learning rates that have all ended, '
      'and a loss logged at step 1.'
    )
    return
  yield (
    'The mean over the learning rates of min(final loss, loss at initialisation), minus '
    'the best final loss, in nats (Wortsman et al., arXiv 2309.14322), for each seed. '
    'It depends on this grid of rates: a wider grid has a larger sensitivity.'
  )
  means = [row for row in tables.of_sensitivity(lines).rows if row[1] == 'mean']
  rows = []
  for line, (name, _, *numbers, low, high) in zip(lines, means, strict=True):
    rows.append([name, *numbers, len(line.lrs), rate(low), rate(high)])
  columns = ['', 'sensitivity', 'std over seeds', 'seeds', 'rates', 'from lr', 'to lr']
  yield Table(columns, rows).markdown()
  if len({tuple(line.lrs) for line in lines}) > 1:
    yield 'The learning rates differ by line: these numbers are not comparable.'
  if all(len(line.sensitivities) == 1 for line in lines):
    yield 'One seed per line: the report claims no ordering of them.'
  partial = [x.name for x in report.lines if len(x.sensitivities) < len(x.seeds)]
  if partial:
    names = plain(', '.join(partial))
    yield f'Seeds that have not ended at every rate are excluded, in: {names}.'


def _spikes(report: Report) -> Iterator[str]:
  lengths = {p.steps for p in report.points}
  args = fitting(min(lengths)) | dict(report.spikes)
  article = 'In the shortest run, a' if len(lengths) > 1 else 'A'
  yield (
    f'{article} spike is an excursion of the training loss of more than '
    f'{args["threshold"]:g} nats above the centred median of {args["window"]} logged '
    f'points, after step {args["warmup"]}; excursions within {args["gap"]} steps count '
    'once.'
  )
  limits = [p.limit for p in report.points if len(p.log.train.steps)]
  if max(limits, default=0.0) > args['threshold']:
    yield (
      f'**Batch noise raises this threshold to as much as {max(limits):.2f} nats** (at '
      f'least {min(limits):.2f}): noise alone exceeds it in one such run of a hundred. A '
      'lower excursion is indistinguishable from noise and is not counted.'
    )
  yield 'Spikes per run, and the height of the highest in nats:'
  yield tables.by_rate(report.lines, tables.spike_text).markdown()
  noted = [p.log.noted for p in report.points if p.log.noted is not None]
  if noted:
    yield (
      f'Spikes that the guard counted during training: {sum(noted)}, in '
      f'{sum(map(bool, noted))} of {len(noted)} runs. Its method differs: it counts a '
      'step if the loss or the gradient norm is config.stability.threshold standard '
      'deviations above the previous steps. A gradient norm can spike without the loss.'
    )


def _divergence(report: Report) -> Iterator[str]:
  yield str(report.rule)
  slow = [p.name for p in report.points if p.slow]
  if slow:
    yield f'Slow by this rule, so counted as finished: {plain(", ".join(slow))}.'
  rows = [
    [p.line, rate(p.lr), p.seed, f'diverged: {p.reason}', p.name]
    for p in report.points
    if p.diverged
  ]
  if rows:
    yield Table(['', 'lr', 'seed', 'reason', 'point'], rows).markdown()
  else:
    done = sum(p.done for p in report.points)
    yield f'None of the {done} points that ended diverged by this rule.'


def _warnings(report: Report) -> Iterator[str]:
  yield (
    'The first step at which an indicator left its usual range: more than '
    f'{TIMES:g} times its median in the first half of the run, or not finite. The first '
    f'{SETTLED:.0%} of the steps are ignored.'
  )
  alarmed = [p for p in report.points if p.done and p.alarms]
  if not alarmed:
    yield 'No indicator left its range in any point that has ended.'
    return
  columns = ['', 'lr', 'seed', 'state', 'last step', 'left its range']
  row = lambda p: [p.line, rate(p.lr), p.seed, p.state, p.log.step, tables.warned(p)]
  yield Table(columns, [*map(row, alarmed)]).markdown()


def _paper(report: Report) -> Iterator[str]:
  if not report.rows:
    return
  certainty = 'Our noise is unknown: the signs of our differences may be by chance.'
  if report.noise.dof:
    certainty = 'Below the noise floor, the sign of our differences means nothing.'
  yield f'{UNLIKE} {certainty}'
  yield (
    f"Rows of the paper's tables: the loss is our final {report.loss}, and nats are the "
    "difference to the table's baseline at the same learning rate."
  )
  yield f'Our models: {"; ".join(published.shapes(report.rows))}.'
  yield published.table(report.rows).markdown()


def _method(report: Report) -> Iterator[str]:
  yield '\n'.join(f'- {item}.' for item in _items(report))


def _items(report: Report) -> Iterator[str]:
  points = report.points
  kinds = {p.final_of for p in points if p.final_of}
  names = {
    'heldout': 'the held-out loss at the last step',
    'train': f'the mean training loss of the last {TAIL:.0%} of the records '
    f'({LEAST} at least)',
  }
  for kind in kinds:
    yield f'Final loss: {names[kind]}'
  inits = [p.init for p in points if p.init is not None]
  ends = f' ({min(inits):.3f} to {max(inits):.3f})' if inits else ''
  yield f'Loss at initialisation: the training loss of step 1, before any update{ends}'
  yield f'Each run: {", ".join(map(plain, _shared(points)))}'
  devices, data = ({p.log.device for p in points}, {p.log.data for p in points})
  about = dict(report.about)
  about['devices'] = ', '.join(sorted(devices - {''}))
  about['data with SHA-256'] = ', '.join(sorted(data - {''}))
  for name, value in about.items():
    if value:
      yield f'{name[0].upper()}{name[1:]}: {plain(value)}'
  yield (
    'Do not compare speeds: the runs may have shared a device, which affects their '
    'seconds and tokens per second (points.csv)'
  )
  yield (
    'Other files in this folder: results.csv (the main table), points.csv (every point), '
    'summary.csv (every line and learning rate), sensitivity.csv, evaluations.csv, '
    'curves.csv (thinned training losses), and each figure as SVG, PDF and PNG'
  )


def _shared(points: Sequence[Judged]) -> Iterator[str]:
  """'steps 1000', ...: the values of KNOBS that all points share, and their tokens."""
  configs = [p.point.config for p in points]
  for knob in KNOBS:
    values = {str(config.dig(c, knob)) for c in configs}
    yield f'{knob} {values.pop() if len(values) == 1 else "differs"}'
  sizes = {math.prod(config.dig(c, knob) for knob in KNOBS[:3]) for c in configs}
  if len(sizes) == 1:
    yield f'which is {sizes.pop() / 1e6:.3g}M tokens with their padding'
