"""Sweeps: runs a recipe's grid here or on a scheduler, and judges the results.

  python scripts/sweep.py run --config=configs/lr_sweep.py:scale=test
  python scripts/sweep.py run --config=configs/tiny.py --axis=optim.lr=1e-3,4e-3 --seeds=2
  python scripts/sweep.py run --dir=DIR                   resumes that sweep
  python scripts/sweep.py run --dir=DIR --axis=optim.lr=2e-3 --seeds=5     adds points
  python scripts/sweep.py submit --config=... --on=slurm  submits it to a scheduler; then
  python scripts/sweep.py list DIR, delete DIR            (docs/clusters.md)
  python scripts/sweep.py status DIR
  python scripts/sweep.py report DIR [DIR ...]            its index.html, tables, figures
  python scripts/sweep.py compare A B                     runs, or sweeps point by point
  python scripts/sweep.py COMMAND --help

`--config` and `--config.KNOB=VALUE` work as in train.py, for all points. A sweep's
folder is enough to run it again (gated/sweep/__init__.py).

Exit codes: 0 done; compare: the same losses to the last bit. 1: some points failed,
or the losses differ. 2: bad arguments. 3: compare: the runs are not comparable. 4:
stopped by a signal; the same command resumes the sweep.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from configs import axes, base
from gated import config, storage, sweep
from gated.data.progress import Progress
from gated.plan import command
from gated.run import terminal
from gated.sweep import judge, launch, report
from gated.sweep.launch import desk

ROOT = Path(__file__).resolve().parents[1]
REFUSED, INTERRUPTED = 2, 130
AS_IN_TRAIN = (
  '--config=configs/RECIPE.py:ARG and --config.KNOB=VALUE work as in train.py.'
)
# Flags of a report that override the sweep's rule.
RULE = {
  'multiple': 'above this multiple of the best final loss',
  'rise': 'ends this many nats above its lowest level',
  'tail': 'fraction of a run whose median is its level',
}
SPIKES: dict[str, tuple[type, str]] = {
  'window': (int, 'logged points in the median'),
  'threshold': (float, 'nats above the median'),
  'warmup': (int, 'first steps, without spikes'),
  'gap': (int, 'steps within which two spikes count as one'),
}


class Recipe(NamedTuple):
  """`--config` and its knobs."""

  spec: str  # configs/lr_sweep.py:scale=test
  overrides: tuple[str, ...]  # --config.steps=100
  module: ModuleType


def recipe(words: Sequence[str]) -> Recipe:
  """The recipe's arguments -> Recipe; ValueError if they are wrong."""
  if words and all(word.startswith('--config.') for word in words):
    raise ValueError(f'{words[0]} needs --config: an existing sweep keeps its knobs')
  flag = _parse(words)
  spec = flag.value and flag.config_filename
  if not spec:
    raise ValueError('--config=configs/RECIPE.py is missing')
  changed = config_flags.get_override_values(flag)
  overrides = tuple(f'--config.{k}={axes.text(v)}' for k, v in changed.items())
  name, colon, arg = spec.partition(':')
  path = Path(name).resolve()
  if not any(path.is_relative_to(ROOT / folder) for folder in sweep.CARRIED):
    raise ValueError(
      f'--config={name} is not in {ROOT}/configs, so a sweep could not carry it'
    )
  inside = path.relative_to(ROOT)
  module = importlib.import_module('.'.join(inside.with_suffix('').parts))
  return Recipe(f'{inside}{colon}{arg}', overrides, module)


def resolve(words: Sequence[str]) -> dict:
  """`--config=...` and `--config.x=y` -> the recipe that train.py resolves."""
  key = '--config='  # A sweep's spec is relative to ROOT.
  at_root = lambda word: f'{key}{ROOT / word.removeprefix(key)}'
  words = [at_root(word) if word.startswith(key) else word for word in words]
  return _parse(words).value.to_dict()


def _parse(words: Sequence[str]) -> Any:
  """The recipe's arguments -> absl's flag; ValueError in one line for a bad knob."""
  words = ['sweep.py', *words]
  values = flags.FlagValues()
  command.define_recipe(flags, config_flags, flag_values=values, sys_argv=words)
  command.parse(words, values, base, None, folder='dir')
  return values['config']


def planned(args: argparse.Namespace, words: Sequence[str]) -> sweep.Sweep:
  """The arguments of `run` or `submit` -> a Sweep that is not written yet."""
  source = recipe(words)
  parts: list[list[axes.Point]] = []
  if hasattr(source.module, 'get_grid'):
    parts.append(source.module.get_grid(source.spec.partition(':')[2]))
  parts += _axes(args, [f'--config={source.spec}', *source.overrides], resolve)
  if not parts:
    raise ValueError(
      f'--config={source.spec} has no get_grid: name its axes, --axis=optim.lr=1e-3,2e-3 '
      '(and --seeds=3)'
    )
  rule = getattr(source.module, 'get_rule', base.rule)()
  return sweep.plan(
    source.spec,
    axes.product(*parts),
    resolve=resolve,
    overrides=source.overrides,
    flags=_flags(args),
    folder=args.dir,
    rule=config.build(judge.Rule, rule, 'rule'),
  )


def _axes(args: Any, words: Sequence[str], resolve: Callable) -> list[list[axes.Point]]:
  """The axes of `--axis` and `--seeds`, for the recipe that `words` name."""
  parts = [_axis(text, words, resolve) for text in args.axis]
  if args.seeds is not None:
    if args.seeds < 1:
      raise ValueError(f'--seeds={args.seeds} must be positive')
    parts.append(axes.seeds(args.seeds))
  return parts


def _axis(text: str, words: Sequence[str], resolve: Callable) -> list[axes.Point]:
  """'optim.lr=1e-3,2e-3' -> a point for each value, parsed as the knob's type."""
  knob, equals, values = text.partition('=')
  knob = knob.removeprefix('config.')
  if not (knob and equals):
    raise ValueError(f'--axis={text!r} is not KNOB=VALUE,VALUE')
  read = lambda value: config.dig(resolve([*words, f'--config.{knob}={value}']), knob)
  return axes.axis(knob, [read(value) for value in values.split(',') if value])


def _flags(args: argparse.Namespace) -> list[str]:
  """The flags of train.py, for all points."""
  flags = ['--deterministic'] if args.deterministic else []
  return flags + ([f'--allow_change={args.allow_change}'] if args.allow_change else [])


def requested(args: argparse.Namespace, words: Sequence[str]) -> sweep.Growth:
  """The arguments of `run` or `submit` -> the sweep that they start or continue."""
  if words or not args.dir:
    draft = planned(args, words)
    if storage.is_remote(draft.folder) or not (draft.folder / sweep.NAME).exists():
      return sweep.Growth(draft)
    return sweep.join(sweep.open(draft.folder), draft, resolve)
  old = sweep.open(args.dir)
  if other := {*_flags(args)} - {*old.flags}:
    raise ValueError(f'{min(other)}, but the sweep in {args.dir} is without it')
  if not args.axis and args.seeds is None:
    return sweep.Growth(old)
  for text in args.axis:
    sweep.check_axis(old, text.partition('=')[0])
  with sweep.resolver(old, resolve) as own:
    parts = _axes(args, [f'--config={old.recipe}', *old.overrides], own)
    return sweep.extend(old, axes.product(*parts), own, args.only)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
  growth = requested(args, words)
  draft = growth.swept
  points = sweep.only(draft.points, args.only)
  if growth.added or not (sweep.local(draft.folder) / sweep.NAME).exists():
    sweep.check_here(points)
  # Sized for all points, so that a part (--only) has the environment of the whole sweep.
  room = sweep.room(draft.points, args.jobs)
  slots = room.slots[: len(points)]
  swept = sweep.write(draft, room.environment)
  code = sweep.unpacked(swept)
  print(growth, end='')
  print(f'{swept.folder}: {len(points)} points, {len(slots)} at a time ({room.reason})')
  if not sweep.is_current(swept):
    print(f"points use the sweep's sources of {swept.made['time']}, not the current ones")
  variables = ' '.join(f'{k}={v}' for k, v in swept.made['environment'].items())
  print(f'environment of each point: {variables or "unchanged"}', flush=True)
  with sweep.View(f'{swept.name}  {swept.folder}') as view:
    runner = sweep.Runner(
      swept,
      points,
      slots=slots,
      code=code,
      show=view,
      keep_checkpoints=not args.drop_checkpoints,
    )
    with runner.signals():
      runner.run()
  return sweep.conclude(runner, swept)


def status(args: argparse.Namespace, words: Sequence[str]) -> int:
  swept = sweep.open(args.dir)
  rows = sweep.rows(swept, swept.points)
  sweep.show(rows, swept)
  if any(row.state in sweep.ENDED for row in rows):
    print(
      'diverged: stopped as unstable (exit code 3); `report` judges the losses as well'
    )
  return 0


def compare(args: argparse.Namespace, words: Sequence[str]) -> int:
  code, text = sweep.folders(storage.path(args.a), storage.path(args.b))
  print(f'A  {args.a}\nB  {args.b}\n{text}')
  return code


def submit(args: argparse.Namespace, words: Sequence[str]) -> int:
  growth = requested(args, words)
  swept = growth.swept
  if growth.added and storage.exists(swept.folder / launch.RECORD):
    raise ValueError(
      f'{swept.folder} is submitted, so it cannot get {len(growth.added)} more points: '
      '`sweep.py delete` removes its jobs, and then the same command submits all points '
      'that have not ended'
    )
  if not args.dry_run:
    print(growth, end='')
  return desk.submit(args, swept, sweep.only(swept.points, args.only))


def launched(args: argparse.Namespace, words: Sequence[str]) -> int:
  return desk.COMMANDS[args.command](sweep.open(args.dir))


def write_report(args: argparse.Namespace, words: Sequence[str]) -> int:
  sweeps = [sweep.open(folder) for folder in dict.fromkeys(args.dirs)]
  options = {k: v for k, v in vars(args).items() if v is not None}
  first, names = sweeps[0].folder, [swept.folder.name for swept in sweeps]
  # The report of several sweeps is beside the first one, whose own report stays.
  out = first.parent / '-'.join(['report', *names]) if names[1:] else first / 'report'
  out = storage.path(args.out) if args.out else out
  try:
    with Progress('writing the report'):
      written = report.write(
        out,
        sweeps,
        only=args.only,
        rule={k: options[k] for k in RULE if k in options},
        spikes={k: options[k] for k in SPIKES if k in options},
        baseline=args.baseline,
        by=args.by,
        resolve=resolve,
      )
  except OSError as error:
    raise ValueError(f'the report of {", ".join(names)} in {out}: {error}') from error
  print(f'{written.states()}: {out / "index.html"}')
  return 0


def parser() -> argparse.ArgumentParser:
  """-> the parser of all commands; the recipe's own arguments are left to `recipe`."""
  folder, only, grid = (argparse.ArgumentParser(add_help=False) for _ in range(3))
  folder.add_argument('dir', help="a sweep's folder")
  text = 'points with these labels: variant=baseline,lr=0.001'
  only.add_argument('--only', default='', help=text)
  grid.add_argument('--dir', default='', help='folder; default sweeps/NAME-DIGEST')
  text = 'KNOB=VALUE,VALUE,...; repeatable'
  grid.add_argument('--axis', action='append', default=[], help=text)
  grid.add_argument('--seeds', type=int, help='number of seeds, as an axis')
  grid.add_argument('--deterministic', action='store_true', help='as in train.py')
  grid.add_argument('--allow_change', default='', help='as in train.py')

  layout: Any = {'formatter_class': argparse.RawDescriptionHelpFormatter}
  top = argparse.ArgumentParser('sweep.py', None, __doc__, allow_abbrev=False, **layout)
  commands = top.add_subparsers(dest='command', required=True, metavar='COMMAND')

  def add(name: str, do: Callable, text: str, *parents: argparse.ArgumentParser):
    more = f'. {AS_IN_TRAIN}' if grid in parents else ''
    options: Any = {'parents': parents, 'allow_abbrev': False}
    command = commands.add_parser(name, help=text, description=text + more, **options)
    command.set_defaults(do=do, takes_recipe=grid in parents)
    return command

  command = add('run', run, 'run the points here', grid, only)
  text = 'points at a time; default: as many as cores and memory allow, or one a GPU'
  command.add_argument('--jobs', type=int, default=0, help=text)
  text = 'remove the checkpoints of points that have ended; metrics stay'
  command.add_argument('--drop_checkpoints', action='store_true', help=text)
  desk.add_flags(add('submit', submit, 'submit points to a scheduler', grid, only))
  add('list', launched, 'list the submitted jobs', folder)
  add('delete', launched, 'stop and remove the submitted jobs', folder)
  add('status', status, 'print the state of the points', folder)
  command = add('report', write_report, 'judge the points: tables, figures', only)
  text = 'folders of sweeps; the losses of several must be comparable'
  command.add_argument('dirs', nargs='+', metavar='DIR', help=text)
  text = 'folder; default DIR/report, or report-A-B beside A'
  command.add_argument('--out', default='', help=text)
  text = 'the line that others are compared with, or its label; default: an ungated one'
  command.add_argument('--baseline', default='', help=text)
  text = 'horizontal axis of the overlaid runs'
  command.add_argument('--by', choices=[*report.AXES], default='step', help=text)
  for name, text in RULE.items():
    command.add_argument(f'--{name}', type=float, help=f'diverged: {text}')
  for name, (kind, text) in SPIKES.items():
    command.add_argument(f'--{name}', type=kind, help=f'spikes: {text}')
  command = add('compare', compare, 'compare two runs or sweeps')
  command.add_argument('a', help="a run's workdir, or a sweep's folder")
  command.add_argument('b', help='another of the same kind')
  return top


def main(argv: Sequence[str] | None = None) -> int:
  args, words = parser().parse_known_args(argv)
  try:
    if words and not args.takes_recipe:
      raise ValueError(f'unknown argument {words[0]!r}')
    return args.do(args, words)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'sweep.py: {error}', file=sys.stderr)
    return REFUSED
  except KeyboardInterrupt:
    print('sweep.py: interrupted', file=sys.stderr)
    return INTERRUPTED


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main())
