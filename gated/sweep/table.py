"""Where the points of a sweep stand, as a table: live on a terminal, else lines."""

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

FAILED = 1  # An exit code: some points did.
LINE = 30.0  # Seconds between lines, where no terminal shows a table.
WIDTH = 120  # Of a table that no terminal shows.
COLORS = {
  'running': 'cyan',
  'elsewhere': 'cyan',
  'finished': 'green',
  'diverged': 'magenta',
  'failed': 'red',
}
# Those that are shown where there is no room for all.
FIRST = 'failed', 'running', 'elsewhere', 'diverged', 'partial', 'finished', 'absent'


def console() -> Console:
  return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def table(rows: Sequence[Row], title: str, most: int = 0) -> Group:
  """Rows -> a table of at most so many of them (0: all), the most urgent."""
  shown = list(rows)
  if most and len(shown) > most:
    urgent = sorted(shown, key=lambda row: FIRST.index(row.state))[:most]
    shown = [row for row in shown if any(row is each for each in urgent)]
  found = Table(box=None, pad_edge=False)
  names = list(dict.fromkeys(name for row in rows for name in row.point.labels))
  for name in names:
    found.add_column(Text(name))
  found.add_column('state')
  for name in ('step', 'loss', 'spikes', 'left'):
    found.add_column(name, justify='right')
  for row in shown:
    color = COLORS.get(row.state, 'dim')
    left = (row.steps - row.step) * row.follower.seconds
    where = f'{row.state} {row.slot}'.strip()
    found.add_row(
      *(Text(row.point.labels.get(name, '')) for name in names),
      Text(where, color),
      f'{row.step}/{row.steps}',
      row.follower.loss,
      str(row.follower.spikes or ''),
      time_left(left) if row.state == 'running' and left else '',
    )
  hidden = len(rows) - len(shown)
  more = [Text(f'{hidden} more are not shown')] if hidden else []
  line = lambda text: Text(text, overflow='ellipsis', no_wrap=True)
  return Group(line(title), found, *more, line(summary(rows)))


def summary(rows: Sequence[Row]) -> str:
  """Rows -> how many are in which state, and how long it takes until all have ended."""
  counts = collections.Counter(row.state for row in rows)
  told = ', '.join(f'{n} {name}' for name, n in sorted(counts.items()))
  running = [row for row in rows if row.state == 'running']
  own = [row.follower.seconds for row in running if row.follower.seconds]
  # Of a step, with a point's share of starting and ending, where one was seen whole.
  whole = [row.took / row.steps for row in rows if row.took] or own
  if not (running and whole):
    return told
  left = 0.0
  for row in rows:
    if row.state in ('running', 'absent', 'partial'):
      seconds = row.follower.seconds if row.state == 'running' else 0.0
      left += (row.steps - row.step) * (seconds or sum(whole) / len(whole))
  return f'{told}; about {time_left(left / len(running))} left'


def time_left(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


class View:
  """`with View(title) as view:` shows rows whenever it is called with them."""

  def __init__(self, title: str):
    self._title, self._console = title, console()
    self._live: Live | None = None
    self._states: dict[str, str] = {}
    self._told = time.monotonic()

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
    if time.monotonic() - self._told >= LINE:
      self._told = time.monotonic()
      running = [row for row in rows if row.state == 'running']
      told = [f'{r.point.name} {r.step}/{r.steps} {r.follower.loss}' for r in running]
      print('; '.join([summary(rows), *told]), flush=True)


def told(runner: Runner, swept: Sweep) -> int:
  """Tells what a runner's points came to -> the exit code, as train.py's are."""
  if not sys.stdout.isatty():
    show(runner.rows, swept)
  failed = [row for row in runner.rows if row.state == 'failed']
  for row in failed:
    log = swept.log(row.point)
    print(f'{row.point.name} failed with exit code {row.code}; {log} ends in')
    print(textwrap.indent(tail(log), '  | '))
  if runner.leaving:
    print('told to leave: the same command goes on')
    return PREEMPTED
  if failed:
    print(f'{len(failed)} points failed; the same command tries them again')
    return FAILED
  print(f'done: {swept.folder}')
  return 0


def show(rows: Sequence[Row], swept: Sweep) -> None:
  """Prints all rows once; whoever runs a point, it is running."""
  rows = [
    dataclasses.replace(r, state='running') if r.state == 'elsewhere' else r for r in rows
  ]
  console().print(table(rows, f'{swept.name}  {swept.folder}'))
  for row in rows:
    if row.state == 'failed' and row.message:
      print(f'{row.point.name} failed: {row.message}; see {swept.log(row.point)}')
