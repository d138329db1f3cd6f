"""Rows of the fault table: what logged numbers and the best step mean."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import evidence
from faults.process import Done
from faults.world import SMALL, STEPS, Outcome, Row, Tally, World, arguments

from gated.run import checkpoint, metrics, outcome

# 53


def other_evaluations(world: World, times: int) -> Outcome:
  """config.eval.rows changes on resumption: only equal evaluations compare."""
  tally, first = Tally(), world.path('evaluated')
  knobs: dict[str, Any] = dict(optim__schedule='constant', checkpoint__keep=1)
  world.finish(first, eval__rows=8, steps=16, **knobs)
  before = evidence.saved(first)
  copies = {rows: world.path(f'rows-{rows}') for rows in (1, 2, 0)[:times]}
  for copy in copies.values():
    shutil.copytree(first, copy)
  commands = [arguments(w, eval__rows=rows, **knobs) for rows, w in copies.items()]
  for (rows, workdir), done in zip(copies.items(), world.many(commands), strict=True):
    losses = dict(evidence.losses(workdir, 'heldout'))
    with tally.one(f'--step=best after eval.rows=8 became {rows}'):
      done.expect(0)
      with checkpoint.Reader(workdir / 'checkpoints') as saved:
        steps, best = saved.steps(), saved.pick('best', '--step')
      assert best == min((s for s in losses if s > 16), key=lambda s: losses[s]), best
    with tally.one(f'the steps that are kept after eval.rows={rows}'):
      old = min(before, key=lambda s: losses[s])
      assert steps == sorted({old, best, STEPS}), (steps, losses)
  return tally.outcome()


# 54


def _train(workdir: Path) -> list[dict]:
  records = metrics.read(workdir / 'metrics.jsonl')
  return [record for record in records if record['kind'] == 'train']


def _run(world: World, workdir: Path, **knobs) -> Done:
  [done] = world.many([arguments(workdir, **knobs)])
  return done.expect(0)


def _skipped(world: World) -> None:
  """Updates that are not finite, though the loss and the gradient are."""
  workdir, rate = world.path('skipped'), 1e30
  knobs: dict[str, Any] = dict(optim__lr=rate, optim__warmup=1, steps=6)
  knobs |= dict(optim__floor=4e-4, checkpoint__every=6)
  _run(world, workdir, **knobs)
  last = _train(workdir)[-1]
  assert last['skipped'] >= 3, last
  assert math.isclose(last['lr'], 4e-4, rel_tol=1e-5), last['lr']
  told = outcome.read(workdir)
  assert told and f'; {last["skipped"]:.0f} of 6 updates were skipped' in told.told, told


def _accepted(world: World) -> None:
  """Skipped spikes do not advance the schedule, and the logged rate neither."""
  workdir = world.path('spikes')
  fault = {'do': 'nan', 'what': 'gradients', 'steps': [9, 12]}
  world.finish(workdir, fault=fault)
  usual = {record['step']: record['lr'] for record in _train(world.straight().workdir)}
  rates = {record['step']: record['lr'] for record in _train(workdir)}
  skipped = {step: 0 if step < 9 else min(step - 9, 4) for step in rates}
  for step, lr in rates.items():
    expected = usual[step - skipped[step]]
    assert math.isclose(lr, expected, rel_tol=1e-5), (step, lr, expected)


def _warm(world: World) -> None:
  workdir = world.path('warm')
  done = _run(world, workdir, optim__warmup=60)
  done.expect(0, 'config.optim.warmup=60 does not end before config.steps=24: ')
  last = _train(workdir)[-1]['lr']
  assert math.isclose(last, 0.4 * SMALL['optim.lr'], rel_tol=1e-5)
  assert f'ends at {last:.3g} and does not reach its peak' in done.err, done.err


def _coarse(world: World) -> None:
  knobs: dict[str, Any] = dict(optim__lr=3e-5, optim__floor=3e-6)
  workdir = world.path('coarse')
  done = _run(world, workdir, model__numerics__weights='bfloat16', **knobs)
  done.expect(0, 'weights=bfloat16: the smallest step of a weight of', 'optim.lr=3e-05')


def _empty(world: World) -> None:
  """Held-out text without a byte: no infinite bits a byte."""
  folder, made = world.path('texts'), world.path('set')
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.txt').write_text(chr(97 + i % 26))
  command = ['scripts/prepare_data.py', f'--out={made}', '--length=1', '--processes=1']
  command += ['--tokenizer=bytes', f'--domain=a={folder}', '--heldout=0.4']
  command += ['--dedup=none']
  [done] = world.many([command])
  done.expect(0)
  workdir = world.path('empty')
  _run(world, workdir, data__mixture=made, data__length=1, loss__chunk=1)
  assert 'inf' not in (workdir / 'metrics.jsonl').read_text().lower()


NUMBERS: dict[str, Callable[[World], None]] = {
  'updates that are not finite': _skipped,
  'updates that are skipped': _accepted,
  'a warm-up longer than the run': _warm,
  'weights too coarse for the rate': _coarse,
  'held-out text without a byte': _empty,
}


def numbers(world: World, times: int) -> Outcome:
  world.straight()
  tally = Tally()
  for fault, run in list(NUMBERS.items())[:times]:
    with tally.one(fault):
      run(world)
  return tally.outcome()


ROWS_D = [
  Row('53', 'eval.rows changes on resumption: the best step', other_evaluations, 3, 0),
  Row('54', 'numbers that are logged, and that acted', numbers, len(NUMBERS), 0),
]
