"""Runs of train.py, twice as they are and twice with --deterministic: are bits equal?

  python bench/deterministic.py [--steps=40 --scale=proxy] [--config.x=y ...]
  python bench/deterministic.py --config=configs/table2.py:28l_4e-3_baseline,scale=proxy

Without a recipe: a dense model with an elementwise gate, and a small mixture of experts
(--scale=test for CPUs). Each run is a process of its own and compiles anew, so that what
is chosen while compiling is chosen again. What follows the options goes to every run.
Prints whether losses and final parameters are equal to the last bit, and tokens a second
with the flag and without: it may be the faster way. Exit code 1 if runs with it differ,
or one fails.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from gated.devices import trees
from gated.run import checkpoint, metrics

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}

RECIPES = {
  'dense': 'configs/dense_1b7.py:28l,gate=elementwise,scale={scale}',
  'experts': 'configs/moe_15b.py:gate=headwise,scale={scale}',
}
# Less to compile, more to compute.
SCALES = {
  'test': {'model.layers': 'scan'},
  'proxy': {'model.layers': 'scan', 'model.depth': 8, 'batch': 32},
}
REPEATS = 2


def knobs(steps):
  """-> the command-line flags that all runs share."""
  found = {
    'steps': steps,
    'eval.every': steps,
    'eval.rows': 8,
    'checkpoint.every': steps,
    'log.indicators': 0,
    'log.tensorboard': False,
    'optim.schedule': 'constant',
  }
  return written(found)


def written(knobs):
  return [f'--config.{knob}={value}' for knob, value in knobs.items()]


def train(recipe, flags, workdir):
  """-> what a run left: losses, its parameters' digest, tokens/s; or how it failed."""
  command = [sys.executable, 'train.py', f'--config={recipe}', *flags]
  command.append(f'--workdir={workdir}')
  begun = time.perf_counter()
  run = dict(cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  done = subprocess.run(command, **run)
  if done.returncode:
    told = done.stderr.strip().splitlines() or ['nothing was said']
    return f'failed, exit code {done.returncode}: ' + ' / '.join(told[-3:])[-500:]
  records = metrics.read(workdir / 'metrics.jsonl')
  trained = [r for r in records if r['kind'] == 'train']
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    step = saved.latest()
    item = {'model': saved.shapes(step)['model']}
    digest = trees.digest(saved.read(step, item))
  rates = [r['tokens_per_second'] for r in trained[len(trained) // 2 :]]
  session = json.loads((workdir / 'run.json').read_text())['sessions'][-1]
  return dict(
    losses=[r['loss'] for r in trained],
    digest=digest,
    rate=statistics.median(rates),
    seconds=time.perf_counter() - begun,
    session=session,
  )


def alike(runs):
  """Runs of one command -> (whether they are one to the last bit, what is to be said)."""
  steps = list(zip(*(run['losses'] for run in runs)))
  off = [max(losses) - min(losses) for losses in steps]
  first = next((i for i, difference in enumerate(off, 1) if difference), None)
  losses = 'equal' if first is None else f'differ from step {first}, by {max(off):.1e}'
  same = len({run['digest'] for run in runs}) == 1
  parameters = 'equal' if same else 'differ'
  return same and first is None, f'losses {losses:30} parameters {parameters:8}'


def compare(name, recipe, flags, folder):
  """Runs a recipe with the flag and without, by turns -> whether the flag holds."""
  ways, runs = {'as it is': [], '--deterministic': ['--deterministic']}, {}
  for turn, (way, flag) in itertools.product(range(REPEATS), ways.items()):
    workdir = folder / f'{name}-{way.strip("-").replace(" ", "_")}-{turn}'
    found = train(recipe, [*flags, *flag], workdir)
    if isinstance(found, str):
      print(f'{name:8} {way:16} {found}', flush=True)
      return False
    runs.setdefault(way, []).append(found)
  first = runs['as it is'][0]
  session = first['session']
  print(f'{name}: {recipe}, {session["device_kind"]}, jax {session["versions"]["jax"]}, '
        f'{len(first["losses"])} steps, loss {first["losses"][-1]:.4f}')  # fmt: skip
  plain = statistics.mean(run['rate'] for run in runs['as it is'])
  for way, those in runs.items():
    holds, told = alike(those)
    rate = statistics.mean(run['rate'] for run in those)
    seconds = ', '.join(f'{run["seconds"]:.0f}' for run in those)
    print(f'{name:8} {way:16} {told} {rate:12,.0f} tokens/s ({rate / plain:5.1%})  '
          f'runs of {seconds} s', flush=True)  # fmt: skip
  return holds


def main():
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', action='append', help='a recipe; may be repeated')
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--scale', choices=SCALES, default='proxy')
  a, a.more = parser.parse_known_args()
  specs = {name: spec.format(scale=a.scale) for name, spec in RECIPES.items()}
  flags = knobs(a.steps) + written(SCALES[a.scale])
  if a.config:
    specs, flags = {f'recipe{i}': spec for i, spec in enumerate(a.config)}, knobs(a.steps)
  jax.config.update('jax_platforms', 'cpu')  # Here; the device is for the runs.
  with tempfile.TemporaryDirectory() as folder:
    run = lambda item: compare(*item, [*flags, *a.more], Path(folder))
    held = [run(item) for item in specs.items()]
  return 0 if all(held) else 1


if __name__ == '__main__':
  sys.exit(main())
