"""The status of a sweep's points: a live table on a terminal, lines elsewhere."""

import collections
import dataclasses
import sys
import textwrap
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gated.run.exit_codes import PREEMPTED
from gated.sweep.grid import Sweep
from gated.sweep.runner import Row, Runner, tail

FAILED = 1  # The exit code if points failed.
LINE = 30.0  # Seconds between lines without a terminal.
WIDTH = 120  # Columns of a table without a terminal.
COLORS = {
  'running': 'cyan',
  'elsewhere': 'cyan',
  'finished': 'green',
  'diverged': 'magenta',
  'failed': 'red',
}
# Which states are shown first if the terminal is too short for all rows.
FIRST = 'failed', 'running', 'elsewhere', 'diverged', 'partial', 'finished', 'absent'


def console() -> Console:
  return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def table(rows: Sequence[Row], title: str, most: int = 0) -> Group:
  """Rows -> a table of the `most` most urgent ones (0: all)."""
  shown = list(rows)
  if most and len(shown) > most:
    urgent = sorted(shown, key=lambda row: FIRST.index(row.state))[:most]
    shown = [row for row in shown if any(row is other for other in urgent)]
  grid = Table(box=None, pad_edge=False)
  names = list(dict.fromkeys(name for row in rows for name in row.point.labels))
  for name in names:
    grid.add_column(Text(name))
  grid.add_column('state')
  for name in ('step', 'loss', 'spikes', 'left'):
    grid.add_column(name, justify='right')
  for row in shown:
    color = COLORS.get(row.state, 'dim')
    left = (row.steps - row.step) * row.follower.seconds
    grid.add_row(
      *(Text(row.point.labels.get(name, '')) for name in names),
      Text(f'{row.state} {row.slot}'.strip(), color),
      f'{row.step}/{row.steps}',
      row.follower.loss,
      str(row.follower.spikes or ''),
      time_left(left) if row.state == 'running' and left else '',
    )
  hidden = len(rows) - len(shown)
  more = [Text(f'{hidden} more points')] if hidden else []
  line = lambda text: Text(text, overflow='ellipsis', no_wrap=True)
  return Group(line(title), grid, *more, line(summary(rows)))


def summary(rows: Sequence[Row]) -> str:
  """Rows -> the number of points in each state, and the time until all have ended."""
  counts = collections.Counter(row.state for row in rows)
  states = ', '.join(f'{n} {name}' for name, n in sorted(counts.items()))
  running = [row for row in rows if row.state == 'running']
  own = [row.follower.seconds for row in running if row.follower.seconds]
  # Seconds per step, including start-up and shutdown if a whole run was timed.
  whole = [row.took / row.steps for row in rows if row.took] or own
  if not (running and whole):
    return states
  left = 0.0
  for row in rows:
    if row.state in ('running', 'absent', 'partial'):
      seconds = row.follower.seconds if row.state == 'running' else 0.0
      left += (row.steps - row.step) * (seconds or sum(whole) / len(whole))
  return f'{states}; about {time_left(left / len(running))} left'


def time_left(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


class View:
  """`with View(title) as view:` shows the rows of each call `view(rows)`."""

  def __init__(self, title: str):
    self._title, self._console = title, console()
    self._live: Live | None = None
    self._states: dict[str, str] = {}
    self._printed = time.monotonic()

  def __enter__(self) -> 'View':
    if self._console.is_terminal:
      self._live = Live(console=self._console, auto_refresh=False)
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    if self._live:
      self._live.stop()

  def __call__(self, rows: Sequence[Row]) -> None:
    if self._live:
      room = max(3, self._console.height - 6)
      self._live.update(table(rows, self._title, room), refresh=True)
      return
    for row in rows:
      before = self._states.setdefault(row.point.name, row.state)
      if row.state != before:
        loss = f', loss {row.follower.loss}' if row.follower.loss else ''
        step = f', step {row.step}/{row.steps}' if row.state != 'running' else ''
        print(f'{row.point.name}: {row.state}{step}{loss}', flush=True)
        self._states[row.point.name] = row.state
    if time.monotonic() - self._printed >= LINE:
      self._printed = time.monotonic()
      running = [row for row in rows if row.state == 'running']
      steps = [f'{r.point.name} {r.step}/{r.steps} {r.follower.loss}' for r in running]
      print('; '.join([summary(rows), *steps]), flush=True)


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
