"""Injects real faults into real runs, and prints how many were survived.

  python tests/faults [--only 1] [--only 7] [--few] [--seed N] [--workers N]
                      [--folder FOLDER] [--list]

Each row injects its fault as often as its `times` say, or, with --few, as often as the
tests do. The table is printed last, in Markdown. Exit code 1 if a run did not survive.
"""

import argparse
import concurrent.futures
import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(row, root, few: bool) -> 'table.Result':
  """One row -> its result; any exception counts as a fault that was not survived."""
  started = time.monotonic()
  outcome, detail = None, ''
  with root.row(row.number) as space:
    try:
      outcome = row.run(space, max(row.few, 1) if few else row.times)
      detail = outcome.lost
    except world.Skip as reason:
      detail = str(reason)
    except Exception as error:
      traceback.print_exc()
      outcome, detail = world.Outcome(1, 0, ''), f'{type(error).__name__}: {error}'
  detail = ' '.join(detail.split()).replace('|', '/')
  return table.Result(row, outcome, detail, (time.monotonic() - started) / 60)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--only', action='append', default=[], metavar='NUMBER', help='a row; repeatable')
  add('--few', action='store_true', help='as often as the tests do')
  add('--seed', type=int, default=0, help='seed of all random choices')
  add('--workers', type=int, default=2, help='number of rows that run at the same time')
  add('--folder', default='', help='a new folder in which the runs are kept')
  add('--list', action='store_true', help='print the rows and exit')
  args = parser.parse_args(argv)
  known = [row.number for row in table.rows()]
  for number in args.only:
    if number not in known:
      parser.error(f'--only={number}, but the rows are {", ".join(known)}')
  if args.folder and Path(args.folder).exists():
    parser.error(f'--folder={args.folder} exists')
  return args


def main(argv: list[str]) -> int:
  args, started = parse(argv), time.monotonic()
  chosen = [row for row in table.rows() if not args.only or row.number in args.only]
  if args.few and not args.only:
    chosen = [row for row in chosen if row.few]
  if args.list:
    for row in chosen:
      print(f'{row.number:>4}  {row.times:3} times  {row.fault}')
    return 0
  # The faults are deliberate: only the results of the rows count.
  logging.getLogger('gated').propagate = False
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  temporary = tempfile.TemporaryDirectory(prefix='faults-', ignore_cleanup_errors=True)
  with (
    contextlib.nullcontext(args.folder) if args.folder else temporary as folder,
    world.World(Path(folder), seed=args.seed) as root,
    concurrent.futures.ThreadPoolExecutor(args.workers) as pool,
  ):
    results = {}
    tasks = {pool.submit(run, row, root, args.few): row.number for row in chosen}
    for task in concurrent.futures.as_completed(tasks):
      result = results[tasks[task]] = task.result()
      state = 'skipped' if result.outcome is None else 'ok' if result.green else 'FAILED'
      print(f'{state:7} {result.line()} {result.minutes:.1f} min', flush=True)
  ended = [results[row.number] for row in chosen]
  print('\n' + table.markdown(ended, (time.monotonic() - started) / 60, args.seed))
  return 0 if all(r.green for r in ended if r.outcome is not None) else 1


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  sys.path[:1] = [str(HERE.parents[1]), str(HERE.parent)]
  from faults import table, world

  sys.exit(main(sys.argv[1:]))
