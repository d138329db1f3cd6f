"""Runs experiments for some minutes, first those that can decide an open claim soonest.

  python scripts/campaign.py --minutes=25 --text=DIR       all experiments, on GPUs
  python scripts/campaign.py --minutes=25 --text=DIR sink  one experiment
  python scripts/campaign.py --minutes=3 --scale=test      a small test, on CPUs
  python scripts/campaign.py --status                      results and the next points
  python scripts/campaign.py --merge=CHECKOUT              adds another machine's results
  python scripts/campaign.py --summary                     writes a table and a figure

An experiment is a folder of experiments/; its recipe.py has the grid. Each GPU runs one
point at a time, or --per_card of them. Results are written to
experiments/NAME/results/SCALE/ when a point ends: recipe, losses, probes, curves, without
weights. When the time is over, the running points save; the same command continues them
while runs/campaign/ exists. --whole starts only points that fit into the time left, for
machines whose disk is lost afterwards. --only='baseline*' chooses points by their names.

Exit codes: 0 the time is spent, or nothing is wanted. 1: some points failed. 2: refused.
"""

import argparse
import fnmatch
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
  sys.path.append(str(ROOT))  # For experiments/ and scripts/, which are not installed.

from configs import base  # noqa: E402
from gated import config, storage, sweep  # noqa: E402
from gated.evidence import campaign, experiment, result, summary  # noqa: E402
from gated.run import terminal  # noqa: E402
from gated.sweep import judge  # noqa: E402
from gated.sweep.runner import tail  # noqa: E402
from scripts import claims  # noqa: E402
from scripts.sweep import resolve  # noqa: E402

REFUSED, FAILED = 2, 1
DECIDED = 'supported', 'contradicted'  # Claims with another status need more results.


def names() -> list[str]:
  """-> the experiments of this checkout."""
  return sorted(p.parent.name for p in ROOT.glob('experiments/*/recipe.py'))


def opened(name: str, scale: str, text: str) -> experiment.Experiment:
  """An experiment's name, a scale and the folder of its text -> Experiment."""
  if name not in names():
    known = ', '.join(names())
    raise ValueError(f'{name!r} is not an experiment; experiments/ has {known}')
  module = importlib.import_module(f'experiments.{name}.recipe')
  spec = f'experiments/{name}/recipe.py:scale={scale}'
  place = [f'--config.data.mixture={Path(text).resolve()}'] if text else []
  rule = getattr(module, 'get_rule', base.rule)()
  swept = sweep.plan(
    spec,
    module.get_grid(f'scale={scale}'),
    resolve=resolve,
    overrides=place if scale == 'gpu' else (),
    rule=config.build(judge.Rule, rule, 'rule'),
  )
  root = storage.path(ROOT)
  return experiment.opened(root, name, scale, swept=swept, settings=vars(module))


def chosen_points(
  experiments: list[experiment.Experiment], patterns: Sequence[str]
) -> list[experiment.Experiment]:
  """The experiments, each wanting only points whose name fits a pattern."""
  for pattern in patterns:
    points = [p.name for e in experiments for p in e.swept.points]
    if not fnmatch.filter(points, pattern):
      raise ValueError(f'--only={pattern!r} fits no point, such as {points[0]!r}')

  def narrowed(e: experiment.Experiment) -> experiment.Experiment:
    fits = lambda name: any(fnmatch.fnmatchcase(name, p) for p in patterns)
    choose = lambda points, results: [*filter(fits, e.choose(points, results))]
    return replace(e, choose=choose)

  return [narrowed(e) for e in experiments]


def run(args: argparse.Namespace, experiments: list[experiment.Experiment]) -> int:
  if not experiments:
    print('nothing is wanted: every point has a result, or its budget is spent')
    return 0
  campaign.check(experiments)
  swept = campaign.joined(experiments, storage.path(ROOT / 'runs' / 'campaign'))
  cards = len(sweep.machine.gpus()) if args.scale == 'gpu' else 0
  room = sweep.room(swept.points, args.per_card * cards)
  swept = sweep.write(swept, room.environment)
  campaign.check_versions(swept)
  code = sweep.unpacked(swept)
  decided = {r.claim.name for r in claims.rows() if r.status in DECIDED}
  print(f'{swept.folder}: {len(room.slots)} points at a time ({room.reason})', flush=True)
  for e in experiments:
    print(e.status(), flush=True)
  with sweep.View(f'campaign  {swept.folder}') as view:
    work = campaign.Campaign(
      storage.path(ROOT),
      experiments,
      swept,
      seconds=60 * args.minutes,
      whole=args.whole,
      open_claims=lambda e: len(set(e.claims) - decided),
      view=view,
      others=result.everywhere(storage.path(ROOT), args.scale),
      keep_checkpoints=args.keep_checkpoints,
    )
    runner = work.runner(room.slots, code)
    with runner.signals():
      runner.run()
  for e in experiments:
    print(e.status())
  print(work.summary())
  failed = work.failed()
  for row in failed:
    print(f'{row.point.name} failed; the end of {swept.log(row.point)}:')
    print(tail(swept.log(row.point)))
  return FAILED if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
  layout = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser('campaign.py', None, __doc__, formatter_class=layout)
  parser.add_argument('experiments', nargs='*', help='default: all')
  parser.add_argument('--minutes', type=float, default=0.0, help='for this campaign')
  parser.add_argument('--scale', choices=experiment.SCALES, default='gpu')
  parser.add_argument('--text', default='', help='the dataset, for scale=gpu')
  parser.add_argument('--per_card', type=int, default=1, help='concurrent points per GPU')
  parser.add_argument('--whole', action='store_true', help='start only what can end')
  parser.add_argument(
    '--only',
    action='append',
    metavar='PATTERN',
    help='of the names of points; repeatable',
  )
  parser.add_argument('--keep_checkpoints', action='store_true', help='of ended points')
  parser.add_argument('--status', action='store_true', help='print the status and exit')
  parser.add_argument('--summary', action='store_true', help='write tables and figures')
  parser.add_argument('--merge', default='', help='a checkout whose results are added')
  args = parser.parse_args(argv)
  try:
    if args.merge:
      copied, kept = result.merge(storage.path(args.merge), storage.path(ROOT))
      print(f'{len(copied)} results copied; {len(kept)} were here already')
      return 0
    if args.summary:
      results = result.everywhere(storage.path(ROOT), args.scale)
      for name in args.experiments or names():
        if args.experiments or any(r.experiment == name for r in results):
          print(summary.write(storage.path(ROOT), name, args.scale, results))
        else:
          print(f'{name}: no results at scale={args.scale} yet')
      return 0
    if not (args.status or args.minutes > 0):
      raise ValueError(f'--minutes={args.minutes:g} must be positive')
    if args.scale == 'gpu' and not (args.status or args.text):
      raise ValueError(
        '--text=DIR is missing: make the text as experiments/text/README.md says'
      )
    chosen = args.experiments or names()
    experiments = [opened(name, args.scale, args.text) for name in chosen]
    if args.only:
      experiments = chosen_points(experiments, args.only)
    if args.status:
      print(*(e.status() for e in experiments), sep='\n')
      return 0
    return run(args, [e for e in experiments if e.wanted()])
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'campaign.py: {error}', file=sys.stderr)
    return REFUSED


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main())
