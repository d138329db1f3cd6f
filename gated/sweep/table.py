"""The status of a sweep's points: a live table on a terminal, lines elsewhere."""

import collections
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gated.run import terminal
from gated.run.exit_codes import PREEMPTED
from gated.sweep.grid import Sweep
from gated.sweep.runner import Row, Runner, tail

FAILED = 1  # The exit code if points failed.
WIDTH = 120  # Columns of a table without a terminal.
COLORS = {
  'running': 'cyan',
  'elsewhere': 'cyan',
  'finished': 'green',
  'diverged': 'magenta',
  'failed': 'red',
}


def console() -> Console:
  """-> the terminal, or standard output at a fixed width."""
  width = None if sys.stdout.isatty() else WIDTH
  return Console(file=terminal.drawing(sys.stdout), width=width)


def table(rows: Sequence[Row], title: str) -> Group:
  """Rows -> a summary, visible on a short terminal too, and a table below it."""
  grid = Table(box=None, pad_edge=False)
  names = list(dict.fromkeys(name for row in rows for name in row.point.labels))
  for name in names:
    grid.add_column(_cell(name))
  grid.add_column('state')
  skips = any(row.skipped for row in rows)
  for name in ('step', 'loss', 'spikes', *(['skipped'] if skips else []), 'left'):
    grid.add_column(name, justify='right')
  for row in rows:
    left = (row.steps - row.step) * row.seconds
    grid.add_row(
      *(_cell(row.point.labels.get(name, '')) for name in names),
      Text(f'{row.state} {row.slot}'.strip(), COLORS.get(row.state, 'dim')),
      f'{row.step}/{row.steps}',
      row.loss,
      str(row.spikes or ''),
      *([str(row.skipped or '')] if skips else []),
      _time(left) if row.state == 'running' and left else '',
    )
  line = lambda text: Text(terminal.visible(text), overflow='ellipsis', no_wrap=True)
  return Group(line(title), line(summary(rows)), grid)


def _cell(text: str) -> Text:
  return Text(terminal.visible(text))


def summary(rows: Sequence[Row]) -> str:
  """Rows -> the number of points in each state, and the estimated time left."""
  counts = collections.Counter(row.state for row in rows)
  states = ', '.join(f'{n} {name}' for name, n in sorted(counts.items()))
  timed = [row.seconds for row in rows if row.state == 'running' and row.seconds]
  if not timed:
    return states
  due = [row for row in rows if row.state in ('running', 'absent', 'partial')]
  steps = sum(row.steps - row.step for row in due)
  left = steps * sum(timed) / len(timed) / counts['running']
  return f'{states}; about {_time(left)} left'


def _time(seconds: float) -> str:
  """Seconds -> H:MM:SS."""
  return str(timedelta(seconds=round(seconds)))


class View:
  """`with View(title) as view:` shows the rows of each call `view(rows)`."""

  def __init__(self, title: str):
    self._title = title
    self._live = Live(console=console(), auto_refresh=False)
    self._terminal = self._live.console.is_terminal
    self._states: dict[str, str] = {}

  def __enter__(self) -> 'View':
    if self._terminal:
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    if self._terminal:
      self._live.stop()

  def __call__(self, rows: Sequence[Row]) -> None:
    if self._terminal:
      self._live.update(table(rows, self._title), refresh=True)
      return
    for row in rows:
      before = self._states.setdefault(row.point.name, row.state)
      if row.state != before:
        loss = f', loss {row.loss}' if row.loss else ''
        step = f', step {row.step}/{row.steps}' if row.state != 'running' else ''
        print(f'{row.point.name}: {row.state}{step}{loss}', flush=True)
        self._states[row.point.name] = row.state


def conclude(runner: Runner, swept: Sweep) -> int:
  """Prints the result of a runner's points -> the exit code."""
  if not sys.stdout.isatty():
    show(runner.rows, swept)
  failed = [row for row in runner.rows if row.state == 'failed']
  for row in failed:
    log = swept.log(row.point)
    print(f'{row.point.name} failed with exit code {row.code}; the end of {log}:')
    print(textwrap.indent(tail(log), '  | '))
  if runner.leaving:
    print('stopped: the same command resumes the sweep')
    return PREEMPTED
  if failed:
    print(f'{len(failed)} points failed; the same command retries them')
    return FAILED
  print(f'done: {swept.folder}')
  return 0


def show(rows: Sequence[Row], swept: Sweep) -> None:
  """Prints all rows once; `elsewhere` is shown as `running`."""
  rows = [
    dataclasses.replace(r, state='running') if r.state == 'elsewhere' else r for r in rows
  ]
  console().print(table(rows, f'{swept.name}  {swept.folder}'))
  for row in rows:
    if row.state == 'failed' and row.message:
      print(f'{row.point.name} failed: {row.message}; see {swept.log(row.point)}')
    if row.ended and 2 * row.skipped > row.step:
      print(f'{row.point.name}: {row.skipped} of {row.step} updates were skipped')
