"""Compares runs of train.py with and without --deterministic: bits, and tokens a second.

  python bench/deterministic.py [--steps=40 --scale=proxy] [--config.x=y ...]
  python bench/deterministic.py --config=configs/table2.py:28l_4e-3_baseline,scale=proxy

Without a recipe: a dense model with an elementwise gate, and a small mixture of experts
(--scale=test for CPUs). Each recipe runs twice with the flag and twice without it. Each
run is a process of its own and compiles anew, which repeats the choices of the compiler.
Unknown options are passed to every run. Prints whether losses and final parameters are
bitwise equal. Exit code 1 if runs with the flag differ, or a run fails.
"""

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
import timing

from gated.devices import trees
from gated.run import checkpoint, metrics

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}

RECIPES = (
  'configs/dense_1b7.py:28l,gate=elementwise,scale={scale}',
  'configs/moe_15b.py:gate=headwise,scale={scale}',
)
# Overrides that shorten compilation and lengthen computation.
SCALES = {
  'test': ['--config.model.layers=scan'],
  'proxy': ['--config.model.layers=scan', '--config.model.depth=8', '--config.batch=32'],
}
METHODS = {'default': [], '--deterministic': ['--deterministic']}
REPEATS = 2


def flags(steps):
  """The flags that all runs share."""
  knobs = dict.fromkeys(('steps', 'eval.every', 'checkpoint.every'), steps)
  knobs |= {'eval.rows': 8, 'log.indicators': 0, 'log.tensorboard': False}
  knobs |= {'optim.schedule': 'constant'}
  return [f'--config.{knob}={value}' for knob, value in knobs.items()]


def train(recipe, flags, workdir):
  """Trains -> losses, digest of the parameters, tokens/s; RuntimeError if it fails."""
  command = [sys.executable, 'train.py', f'--config={recipe}', *flags]
  command.append(f'--workdir={workdir}')
  begun = time.perf_counter()
  run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  if run.returncode:
    message = ' / '.join(run.stderr.strip().splitlines()[-3:])[-500:]
    raise RuntimeError(f'exit code {run.returncode}: {message}')
  records = [r for r in metrics.read(workdir / 'metrics.jsonl') if r['kind'] == 'train']
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    step = saved.latest()
    item = {'model': saved.shapes(step)['model']}
    digest = trees.digest(saved.read(step, item))
  rates = [r['tokens_per_second'] for r in records[len(records) // 2 :]]
  return dict(
    losses=[r['loss'] for r in records],
    digest=digest,
    rate=statistics.median(rates),
    seconds=time.perf_counter() - begun,
    session=json.loads((workdir / 'run.json').read_text())['sessions'][-1],
  )


def compare(runs):
  """Runs of one command -> (whether they are bitwise equal, a description)."""
  spreads = [max(losses) - min(losses) for losses in zip(*(r['losses'] for r in runs))]
  first = next((step for step, spread in enumerate(spreads, 1) if spread), None)
  losses = f'differ from step {first}, by {max(spreads):.1e}' if first else 'equal'
  same = len({run['digest'] for run in runs}) == 1
  parameters = 'equal' if same else 'differ'
  return same and not first, f'losses {losses:30} parameters {parameters:8}'


def measure(recipe, flags, folder):
  """Runs a recipe with each method in turn -> whether runs with the flag are equal."""
  runs = {method: [] for method in METHODS}
  for turn, (method, flag) in itertools.product(range(REPEATS), METHODS.items()):
    workdir = Path(folder, f'{method}-{turn}')
    try:
      runs[method].append(train(recipe, [*flags, *flag], workdir))
    except RuntimeError as error:
      print(f'{recipe}: {method} failed with {error}', flush=True)
      return False
  first = runs['default'][0]
  session, losses = first['session'], first['losses']
  print(f'{recipe}, {session["device_kind"]}, jax {session["versions"]["jax"]}, '
        f'{len(losses)} steps, loss {losses[-1]:.4f}')  # fmt: skip
  rates = {m: statistics.mean(run['rate'] for run in runs[m]) for m in METHODS}
  for method, rate in rates.items():
    equal, description = compare(runs[method])
    seconds = ', '.join(f'{run["seconds"]:.0f}' for run in runs[method])
    share = rate / rates['default']
    print(f'{method:16} {description} {rate:12,.0f} tokens/s ({share:5.1%})  '
          f'runs of {seconds} s', flush=True)  # fmt: skip
  return equal  # Of the last method, --deterministic.


def main():
  parser = timing.options(__doc__, steps=40)
  parser.allow_abbrev = False
  parser.add_argument('--config', action='append', help='a recipe; may be repeated')
  parser.add_argument('--scale', choices=SCALES, default='proxy')
  a, more = parser.parse_known_args()
  recipes = a.config or [recipe.format(scale=a.scale) for recipe in RECIPES]
  shared = [*flags(a.steps), *([] if a.config else SCALES[a.scale]), *more]
  jax.config.update('jax_platforms', 'cpu')  # The runs need the device.
  equal = []
  for recipe in recipes:
    with tempfile.TemporaryDirectory() as folder:
      equal.append(measure(recipe, shared, folder))
  return int(not all(equal))


if __name__ == '__main__':
  sys.exit(main())
