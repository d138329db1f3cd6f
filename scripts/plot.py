"""Plots runs in shared panels, without a server: figures and one HTML page.

  python scripts/plot.py runs/demo
  python scripts/plot.py runs/demo runs/demo-baseline --by=tokens --out=plots

Writes loss, training, indicators and probes as .svg and .png, and index.html, which holds
all of them. `loss` also shows each run minus the first, or minus --baseline. Needs
requirements-report.txt. Exit code 2: bad arguments.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gated import storage
from gated.data.progress import Progress
from gated.probes.report import SCALARS
from gated.run import terminal
from gated.run import workdir as workdirs
from gated.run.exit_codes import REFUSED
from gated.sweep.report import logs
from gated.sweep.report.tables import Table, plain, short

FORMATS = 'svg', 'png'
# Figure -> its numbers in the log, with their titles.
PANELS: dict[str, dict[str, str]] = {
  'training': {'train/grad_norm': 'gradient norm', 'train/lr': 'learning rate'},
  'indicators': {
    f'indicators/{name}': title
    for name, title in logs.WATCHED.items()
    if name != 'grad_norm'
  },
  'probes': {f'probes/{name}': name.replace('_', ' ') for name in SCALARS},
}


def read(workdirs_: Sequence[str]) -> dict[str, logs.Log]:
  """Workdirs -> their logs by label: the shortest end of the path that tells them apart.

  ValueError for a folder that is not a run, or that has no records.
  """
  runs = {}
  for name in workdirs_:
    workdir = storage.path(name)
    about = workdir / 'run.json'
    if not storage.exists(about):
      raise ValueError(f'{name} is not a run: run.json is missing')
    recipe = storage.read_json(about, workdirs.LIMIT)['config']
    log = logs.read(workdir, recipe['steps'])
    if not len(log.train.steps):
      raise ValueError(f'{name} has no training step in metrics.jsonl yet')
    runs[str(workdir).rstrip('/')] = log
  if len(runs) < len(workdirs_):
    raise ValueError(f'a run is named twice: {" ".join(workdirs_)}')
  parts = {name: name.split('/') for name in runs}
  for count in range(1, 1 + max(map(len, parts.values()))):
    labels = ['/'.join(words[-count:]) for words in parts.values()]
    if len(set(labels)) == len(labels):
      return dict(zip(labels, runs.values(), strict=True))
  return runs


def summary(runs: Mapping[str, logs.Log]) -> Table:
  """A row for each run: its state and its last losses."""
  rows = []
  for name, log in runs.items():
    speed = short(log.rate, 'kMGT') if log.rate else None
    step = int(log.train.steps[-1])
    losses = log.train.last, log.heldout.last
    rows.append([name, log.state, step, *losses, speed, log.device])
  columns = ['run', 'state', 'step', 'training loss', 'held-out loss', 'tokens/s']
  return Table([*columns, 'devices'], rows)


def write(
  runs: Mapping[str, logs.Log], out: storage.Path, *, baseline: str, by: str
) -> storage.Path:
  """Draws the logs into a folder -> its page; ValueError if a package is missing."""
  try:
    from gated.sweep.report import figures, overlay
    from gated.sweep.report.page import page
  except ImportError as error:
    install = 'pip install -r requirements-report.txt'
    raise ValueError(f'plots need {error.name}: {install}') from error
  names = [*runs]
  if baseline and baseline not in names:
    raise ValueError(f'--baseline={baseline}, but the runs are {", ".join(names)}')
  series = [overlay.Series(name, {0: log}) for name, log in runs.items()]
  base = names.index(baseline) if baseline else 0
  pictures: dict[str, Any] = {'loss': functools.partial(overlay.losses, base=base, by=by)}
  pictures |= {
    name: functools.partial(overlay.panels, titles=titles, by=by)
    for name, titles in PANELS.items()
  }
  captions = figures.draw(pictures, series, out, FORMATS)
  text = [f'# {plain(", ".join(names))}', summary(runs).markdown()]
  for name, caption in captions.items():
    text += [f'## {name.capitalize()}', f'![{name}]({name}.svg)', caption]
  drawn = {f'{n}.svg': storage.read(out / f'{n}.svg', 1 << 30) for n in captions}
  content = page('\n\n'.join(text), ', '.join(names), drawn)
  storage.write(out / 'index.html', content.encode())
  return out / 'index.html'


def parser() -> argparse.ArgumentParser:
  layout = argparse.RawDescriptionHelpFormatter
  words = argparse.ArgumentParser('plot.py', None, __doc__, formatter_class=layout)
  words.add_argument('workdir', nargs='+', help="a run's folder")
  words.add_argument('--out', default='', help="folder; default: the first run's plots/")
  text = 'the run that others are compared with; default: the first'
  words.add_argument('--baseline', default='', help=text)
  text = 'horizontal axis'
  words.add_argument('--by', choices=[*logs.AXES], default='step', help=text)
  return words


def main(argv: Sequence[str] | None = None) -> int:
  args = parser().parse_args(argv)
  out = storage.path(args.out) if args.out else storage.path(args.workdir[0]) / 'plots'
  try:
    with Progress('plotting'):
      line = write(read(args.workdir), out, baseline=args.baseline, by=args.by)
    print(line)
  except (ValueError, OSError) as error:
    print(f'plot.py: {error}', file=sys.stderr)
    return REFUSED
  return 0


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main())
