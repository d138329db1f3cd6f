"""Trains every row of the paper's tables at test scale on one fixed batch.

  python tests/rows.py [--only table1] [--only table6:switch_v_1top1]

The mean loss of steps 16 to 20 must be at least 0.1 nats below the loss of step 1. A run
restored from step 10 must reach the same parameters and losses, bit for bit. Prints one
line per row. Exit code 1: a row failed.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from faults import process

from configs import table1, table2, table3, table4, table6
from gated import config, data, plan
from gated.devices import mesh, trees
from gated.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TABLES = {m.__name__.split('.')[-1]: m for m in (table1, table2, table3, table4, table6)}
STEPS, SAVED, DROP = 20, 10, 0.1  # DROP in nats


class Result(NamedTuple):
  losses: list[float]
  exact: bool  # the restored run matched bit for bit
  seconds: float

  @property
  def drop(self) -> float:
    return self.losses[0] - float(np.mean(self.losses[-5:]))

  @property
  def passed(self) -> bool:
    return self.drop >= DROP and self.exact


def recipes(only: list[str]) -> dict[str, Callable]:
  """Row names such as 'table1:k8' -> recipe functions; [] selects every row."""
  rows = {
    f'{name}:{row}': functools.partial(table.get_config, f'{row},scale=test')
    for name, table in TABLES.items()
    for row in table.ROWS
  }
  for wanted in only:
    if not any(_within(name, wanted) for name in rows):
      near = config.nearest(wanted, [*TABLES, *rows])
      raise ValueError(f'--only={wanted} is neither a table nor TABLE:ROW{near}')
  return {k: v for k, v in rows.items() if not only or any(_within(k, w) for w in only)}


def _within(name: str, wanted: str) -> bool:
  return wanted in (name, name.partition(':')[0])


def train(c: dict, folder: str | Path) -> Result:
  """Trains a resolved recipe and resumes it from a checkpoint in `folder`."""
  begun = time.perf_counter()
  cfg = config.build(plan.Config, c | {'steps': STEPS, 'accum': 1}, 'config')
  built = plan.Plan(cfg)
  options = process.HURRY if jax.default_backend() == 'cpu' else None
  step = built.train_step().compile(compiler_options=options)
  batch = mesh.place(text(cfg), built.mesh, cfg.batch)

  def run(state, steps):
    losses = []
    for _ in range(steps):
      state, values = step(state, batch)
      losses.append(float(values['loss']))
    return state, losses

  with checkpoint.Checkpoints(folder, keep=1, keep_every=0) as saved:
    state, losses = run(built.init(), SAVED)
    saved.save(SAVED, state, dict(config=c, data={}, heldout_loss=losses[-1]))
    state, rest = run(state, STEPS - SAVED)
    saved.wait()
    resumed, again = run(saved.restore(SAVED, built.state), STEPS - SAVED)
  exact = rest == again and trees.digest(state) == trees.digest(resumed)
  return Result(losses + rest, exact, time.perf_counter() - begun)


def text(cfg: plan.Config) -> data.Batch:
  """The license's bytes as tokens; each row is one document."""
  B, T = cfg.batch, cfg.data.length
  token = np.frombuffer((ROOT / 'LICENSE').read_bytes()[: B * (T + 1)], np.uint8)
  token = token.astype(np.int32).reshape(B, T + 1)
  ones = np.ones((B, T), np.int32)
  position = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  return data.Batch(token[:, :-1], token[:, 1:], ones.astype(np.float32), ones, position)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', action='append', default=[], help='TABLE or TABLE:ROW')
  try:
    chosen = recipes(parser.parse_args().only)
  except ValueError as error:
    parser.error(str(error))
  begun, failed = time.perf_counter(), []
  print(f'{"row":38}{"first":>8}{"last":>8}{"drop":>8}  resume  seconds')
  for name, recipe in chosen.items():
    with tempfile.TemporaryDirectory() as folder:
      try:
        result = train(recipe().to_dict(), folder)
      except (ValueError, NotImplementedError) as error:
        failed.append(name)
        print(f'{name:38}{error}', flush=True)
        continue
    failed += [] if result.passed else [name]
    numbers = f'{result.losses[0]:8.3f}{result.losses[-1]:8.3f}{result.drop:8.3f}'
    resume = 'exact' if result.exact else 'DIFFERS'
    mark = '' if result.passed else '  FAILED'
    print(f'{name:38}{numbers}  {resume:7}{result.seconds:8.1f}{mark}', flush=True)
  minutes = (time.perf_counter() - begun) / 60
  print(f'{len(chosen) - len(failed)} of {len(chosen)} rows passed in {minutes:.1f} min')
  if failed:
    print('failed: ' + ', '.join(failed))
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
