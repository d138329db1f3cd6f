"""The rows of the fault table, and the table of their results in Markdown."""

import datetime
import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import NamedTuple

from faults.world import Outcome, Row

HERE = Path(__file__).resolve().parent
PACKAGES = ('jax', 'orbax-checkpoint', 'flax', 'optax', 'numpy')


class Result(NamedTuple):
  row: Row
  outcome: Outcome | None  # None for a skipped row.
  detail: str
  minutes: float

  @property
  def green(self) -> bool:
    return self.outcome is not None and self.outcome.injected == self.outcome.survived > 0

  def line(self) -> str:
    number, fault = self.row.number, self.row.fault
    if self.outcome is None:
      return f'| {number} | {fault} | - | - | cannot run here: {self.detail} |'
    injected, survived, _ = self.outcome
    return f'| {number} | {fault} | {injected} | {survived} | {self.detail} |'


def rows() -> list[Row]:
  """Every row of rows_*.py, by number."""
  entries = []
  for path in sorted(HERE.glob('rows_*.py')):
    module = importlib.import_module(f'faults.{path.stem}')
    letter = path.stem.split('_')[1][0].upper()
    entries += getattr(module, f'ROWS_{letter}', [])
  numbers = [row.number for row in entries]
  assert len(set(numbers)) == len(numbers), f'duplicate numbers: {numbers}'
  return sorted(entries, key=lambda row: (_leading(row.number), row.number))


def _leading(number: str) -> int:
  return int(''.join(c for c in number if c.isdigit()) or 0)


def markdown(results: list[Result], minutes: float, seed: int) -> str:
  versions = ', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)
  today = datetime.datetime.now(datetime.UTC).date()
  ran = [r for r in results if r.outcome is not None]
  outcomes = [r.outcome for r in ran if r.outcome]
  injected, survived = (
    sum(o.injected for o in outcomes),
    sum(o.survived for o in outcomes),
  )
  skipped = len(results) - len(ran)
  lines = [
    f'{today}, Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, '
    f'{minutes:.1f} minutes, seed {seed}',
    '',
    '| # | fault | injected | survived | lost |',
    '|---|---|---|---|---|',
    *(result.line() for result in results),
    '',
    f'{survived} of {injected} faults survived'
    + (f'; {skipped} rows cannot run here' if skipped else ''),
    f'{sum(r.green for r in ran)} of {len(ran)} rows green',
  ]
  return '\n'.join(lines)
