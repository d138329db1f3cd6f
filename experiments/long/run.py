"""Trains both arms of this experiment and evaluates them: claim C20.

python experiments/long/run.py --out=runs/c20 --text=TEXT --long=LONG --library=LIBRARY
python experiments/long/run.py --out=runs/c20-test --scale=test

TEXT is the corpus packed with --length=1024, LONG with --length=4096, LIBRARY a folder of
modules (README.md). Each arm trains on half of the GPUs. Each GPU runs two evaluations at
a time, since they compile for most of theirs. The same command goes on: training resumes,
an evaluation that has its text is not repeated.
--start=BASELINE,ELEMENTWISE takes two workdirs as the models of the first stage.
OUT/results/ gets what an evaluation prints, its report and figures, and their numbers as
summary.csv; weights stay in OUT.
scale=test: minutes on 2 cores, with rows of 128 and 1280 tokens and two tasks of RULER.

Exit codes: 0 done; 2 refused; 1 a command failed: OUT/results/NAME.failed has its output.
"""

import argparse
import csv
import io
import itertools
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
  sys.path.append(str(ROOT))

import numpy as np  # noqa: E402

from gated import storage  # noqa: E402
from gated.run import exit_codes, terminal  # noqa: E402
from gated.sweep import machine  # noqa: E402

FAILED = 1
ARMS = 'baseline', 'elementwise'


class Scale(NamedTuple):
  rows: int  # Tokens of the rows that YaRN stretches to FACTOR times as many.
  lengths: str  # of RULER
  distances: tuple[int, ...]  # of copying
  ruler: list[str]  # further flags
  domain: list[str]  # further flags of the evaluations on LIBRARY


FACTOR = 4
SCALES = {
  'proxy': Scale(
    4096, '1024,4096,16384', (64, 256, 1024, 4000, 16_000), ['--limit=25'], []
  ),
  'test': Scale(
    1280,
    '1280,2560',  # Shorter items have no room for the template.
    (64, 1000, 4000),
    ['--limit=2', '--tasks=niah_single_1,vt'],
    ['--rows=2'],
  ),
}
# What keeps a test at minutes.
TEST = {
  'start': {'data.length': 128, 'eval.rows': 8, 'steps': 10},
  'extend': {'data.length': 1280, 'eval.rows': 4, 'steps': 4, 'batch': 2},
}


def halves(gpus: Sequence[str]) -> list[str]:
  """GPUs -> two groups of as many, for the arms; one group if there is one GPU."""
  half = max(1, len(gpus) // 2)
  parts = gpus[:half], gpus[half : 2 * half]
  return [','.join(part) for part in parts if part] or ['']


class Work:
  """Commands on the GPUs of this machine, some at a time on each."""

  def __init__(self, results: storage.Path, groups: Sequence[str], at_a_time: int):
    """Each of `groups`, such as '0,1' or '' for CPUs, runs `at_a_time` commands."""
    self._results = results
    self._settings = {}
    if at_a_time > 1:
      self._settings['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{0.8 / at_a_time:g}'
    self._groups: queue.Queue[str] = queue.Queue()
    for group in [*groups] * at_a_time:
      self._groups.put(group)

  def run(self, name: str, command: Sequence[str]) -> bool:
    """Runs `python COMMAND` unless it is done -> whether it succeeded."""
    done, failed = (self._results / f'{name}.{end}' for end in ('txt', 'failed'))
    if storage.exists(done):
      print(f'{name}: done before', flush=True)
      return True
    if storage.exists(failed):
      storage.remove(failed)
    group, started = self._groups.get(), time.monotonic()
    try:
      ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=self._settings
        | os.environ
        | ({'CUDA_VISIBLE_DEVICES': group} if group else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    finally:
      self._groups.put(group)
    good = ended.returncode == 0
    storage.write(done if good else failed, ended.stdout)
    minutes = (time.monotonic() - started) / 60
    print(f'{name}: exit code {ended.returncode}, {minutes:.1f} minutes', flush=True)
    return good

  def all(self, commands: dict[str, list[str]]) -> bool:
    """Runs commands by name, as many at a time as there are groups -> all succeeded."""
    with futures.ThreadPoolExecutor(len(commands)) as pool:
      return all([*pool.map(self.run, commands, commands.values())])


def workdir(args: argparse.Namespace, stage: str, arm: str) -> str:
  if stage == 'start' and args.start:
    return args.start[ARMS.index(arm)]
  return f'{args.out}/{stage}-{arm}'


def training(args: argparse.Namespace, arm: str, stage: str) -> list[str]:
  """-> the command that trains a stage of an arm."""
  command = ['train.py', f'--workdir={workdir(args, stage, arm)}']
  command += [f'--config=configs/long_context.py:{arm},stage={stage},scale={args.scale}']
  text = args.text if stage == 'start' else args.long
  knobs: dict[str, object] = {'checkpoint.keep': 1, 'log.every': 10}
  knobs['log.tensorboard'] = False
  knobs |= {'data.mixture': Path(text).resolve()} if text else {}
  knobs |= TEST[stage] if args.scale == 'test' else {}
  if stage == 'extend':
    knobs['init_from'] = workdir(args, 'start', arm)
    command += ['--allow_change=config.model.attn.rope_base']
  return [*command, *(f'--config.{knob}={value}' for knob, value in knobs.items())]


def evaluations(args: argparse.Namespace) -> dict[str, list[str]]:
  """-> the commands by name: first those that take longest."""
  scale = SCALES[args.scale]
  rows, most = scale.rows, FACTOR * scale.rows
  both = lambda stage: [
    'eval.py',
    f'--workdir={workdir(args, stage, "elementwise")}',
    f'--beside={workdir(args, stage, "baseline")}',
    '--figures',
  ]
  ruler = [f'--ruler={scale.lengths}', f'--yarn={FACTOR}', '--loss_only', *scale.ruler]
  commands = {
    'ruler': [*both('extend'), *ruler],
    'probes': [*both('start'), '--probe', '--rows=64'],
  }
  domain = [f'--domain=library={args.library}', '--suffixes=.py', '--by_position']
  domain += scale.domain
  for length, yarn in ((most, FACTOR), (most, 1), (rows, 0), (rows, FACTOR)):
    spans = [f'--length={length}', f'--stride={length // 2}']
    within = [d for d in scale.distances if d < length]
    copying = [f'--copying={",".join(map(str, within))}']
    spans += [f'--yarn={yarn}'] if yarn else []
    name = f'library-{length}' + (f'-yarn{yarn}' if yarn else '')
    commands[name] = [*both('extend'), *domain, *spans, *copying]
  return commands


def collect(args: argparse.Namespace, results: storage.Path) -> None:
  """Copies reports, figures and metrics of the workdirs into the results."""
  for arm in ARMS:
    for stage in ('start', 'extend'):
      folder = storage.path(workdir(args, stage, arm))
      found = [
        folder / 'metrics.jsonl',
        *folder.glob('probes/*'),
        *folder.glob('evals/*'),
      ]
      for path in found:
        if path.is_file():
          storage.write(results / f'{stage}-{arm}-{path.name}', path.read_bytes())


# Positions between which losses are averaged.
EDGES = 0, 64, 256, 1024, 4096, 8192, 16_384
COLUMNS = 'measure', 'row_length', 'yarn', 'at', 'arm', 'nats', 'stderr', 'rank'


def numbers(report: dict[str, Any]) -> Iterator[tuple]:
  """A report of an evaluation -> rows of COLUMNS.

  At is the last position of an interval, the distance of copying, or a task of RULER.
  """
  first = {report.get('label', 'extend-elementwise'): report}
  for label, each in (first | report.get('beside', {})).items():
    arm = next(name for name in ARMS if name in label)
    if 'positions' in each:
      length, yarn = each['length'], report['options']['yarn']
      places = (np.array(each['positions'][k]) for k in ('nats_per_token', 'tokens'))
      nats_T, tokens_T = (np.nan_to_num(values.astype(float)) for values in places)
      for low, high in itertools.pairwise(EDGES):
        count = tokens_T[low:high].sum()
        if count:
          mean = (nats_T * tokens_T)[low:high].sum() / count
          yield 'position', length, yarn, min(high, length), arm, mean, '', ''
      for at, own in each['copying']['distances'].items():
        yield 'copy', length, yarn, at, arm, own['nats_per_token'], '', ''
        yield 'copy gain', length, yarn, at, arm, own['gain'], own['gain_stderr'], ''
    for length, tasks in each.get('lengths', {}).items():
      yarn = report['yarn'] if 'yarn=' in label else ''
      for task, own in (tasks or {}).items():
        error = own.get('loss_stderr', '')
        yield 'ruler', length, yarn, task, arm, own['loss'], error, own['rank']


def summarize(results: storage.Path) -> None:
  """Writes the numbers of all reports in a folder to its summary.csv."""
  text = io.StringIO()
  table = csv.writer(text, lineterminator='\n')
  table.writerow(COLUMNS)
  show = lambda x: f'{x:.4f}' if isinstance(x, float) else x
  for path in sorted(results.glob('extend-*.json')):
    table.writerows([*map(show, row)] for row in numbers(json.loads(path.read_bytes())))
  storage.write(results / 'summary.csv', text.getvalue().encode())


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', required=True, help='a folder for runs and results')
  parser.add_argument('--scale', choices=SCALES, default='proxy')
  for name in ('text', 'long', 'library'):
    parser.add_argument(f'--{name}', default='', help='a folder; see above')
  parser.add_argument('--start', default='', help='two workdirs; see above')
  args = parser.parse_args(argv)
  terminal.steady()
  args.out = str(Path(args.out).resolve())
  for name in ('text', 'long', 'library'):
    value = getattr(args, name)
    if args.scale == 'proxy' and not Path(value or 'none').is_dir():
      print(f'run.py: --{name}={value!r} is not a folder', file=sys.stderr)
      return exit_codes.REFUSED
  start = [Path(d).resolve() for d in args.start.split(',') if d]
  if args.start and not (len(start) == len(ARMS) and all(d.is_dir() for d in start)):
    print(f'run.py: --start={args.start!r} is not two folders', file=sys.stderr)
    return exit_codes.REFUSED
  args.start = [str(d) for d in start]
  if not args.library:
    args.library = str(Path(__file__).parent)
  results = storage.path(args.out) / 'results'
  gpus = machine.gpus() if machine.platform() == 'gpu' else []
  train = Work(results, halves(gpus), 1)
  evaluate = Work(results, gpus, 2) if gpus else Work(results, [''], 1)

  def arm(name: str) -> bool:
    stages = ('extend',) if args.start else ('start', 'extend')
    return all(train.run(f'{s}-{name}', training(args, name, s)) for s in stages)

  with futures.ThreadPoolExecutor(len(ARMS)) as pool:
    trained = all([*pool.map(arm, ARMS)])
  good = trained and evaluate.all(evaluations(args))
  collect(args, results)
  summarize(results)
  return exit_codes.FINISHED if good else FAILED


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
