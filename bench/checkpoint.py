"""Checkpoints of `gated.run.checkpoint` beside plain Orbax, of one state.

  python bench/checkpoint.py [--bytes=2e9 --repeats=7 --folder=/tmp] [--cold] [--memory]

Measures synchronous saves, asynchronous saves followed at once by a donating step, and
restores. Ours also writes digests and a manifest. Both take turns on the same arrays; the
disk is idle before each save. Restores read from the page cache, or with --cold from the
disk. Times are medians in seconds, with minimum and maximum. --memory adds the memory in
use after each of 20 small saves. The last table holds the criteria; exit code 1 if one
fails.
"""

import collections
import contextlib
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import timing

from gated.run import checkpoint
from gated.train import step

# The criteria: the loss of throughput against Orbax, blocking as a share of a save, the
# cost of verification as a share of a restore, and the growth of memory over 15 saves.
SLOWER, BLOCKING, VERIFYING, GROWTH = 0.2, 0.1, 0.2, 0.1

ABOUT = dict(config={}, data={}, heldout_loss=None)


class Side(NamedTuple):
  """Functions that save and restore checkpoints below a folder."""

  folder: Path
  save: Callable  # (number, state)
  wait: Callable
  restore: Callable  # (number, abstract state)


def ours(saved):
  """Saves as a run does: the arrays, their digests, and a manifest."""
  save = functools.partial(saved.save, about=ABOUT)
  return Side(Path(saved.directory), save, saved.wait, saved.restore)


def plain_orbax(folder, saver):
  """The same arrays in the same two items, and nothing else."""

  def composite(make, state):
    model, rest = map(make, checkpoint.split(state).values())
    return ocp.args.Composite(model=model, rest=rest)

  def save(number, state):
    args = composite(ocp.args.StandardSave, state)
    saver.save(folder / str(number), args=args, force=True)

  def restore(number, like):
    args = composite(ocp.args.StandardRestore, like)
    return dict(saver.restore(folder / str(number), args=args).items())

  return Side(folder, save, saver.wait_until_finished, restore)


def random_state(size, width):
  """Bytes -> random float32 weights of a decoder, a third of them, and two moments."""
  ffn, count = width * 11 // 4, int(size) // 12
  layer = 4 * width * width + 3 * width * ffn + 2 * width
  depth = max(1, int(0.8 * count / layer))
  vocab = (count - depth * layer) // width
  if vocab < 1:
    raise ValueError(f'--bytes={size:g} is too little for a layer of --width={width}')
  shapes = dict.fromkeys(('query', 'key', 'value', 'out'), (depth, width, width))
  shapes |= dict.fromkeys(('act', 'up'), (depth, width, ffn))
  shapes |= dict.fromkeys(('attn_norm', 'ffn_norm'), (depth, width))
  shapes |= {'down': (depth, ffn, width), 'embed': (vocab, width)}

  @jax.jit
  def draw(key):
    model, mu, nu = (
      {
        name: jax.random.normal(jax.random.fold_in(k, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
      }
      for k in jax.random.split(key, 3)
    )
    zero = jnp.zeros((), jnp.int32)
    return step.State(zero, zero + 0, model, {'mu': mu, 'nu': nu})

  return jax.block_until_ready(draw(jax.random.key(0)))


@functools.partial(jax.jit, donate_argnums=0)
def advance(state):
  """A step that overwrites every array of its donated state."""
  move = lambda x: x * 0.999 + 1e-3 if x.dtype == jnp.float32 else x + 1
  return jax.tree.map(move, state)


def timed(times, name, f, *args):
  """Calls f and appends its seconds to times[name]."""
  start = time.perf_counter()
  result = jax.block_until_ready(f(*args))
  times[name].append(time.perf_counter() - start)
  return result


def rotated(names, turn):
  """The names, rotated by one position in each turn."""
  names = collections.deque(names)
  names.rotate(-turn)
  return names


def measure_saves(sides, state, repeats):
  """-> (times, the state after the last step); each side keeps its last checkpoint."""
  times = collections.defaultdict(list)
  for turn in range(repeats + 1):
    if turn == 1:  # Turn 0 warms up.
      times.clear()
    for name in rotated(sides, turn):
      side = sides[name]

      state = jax.block_until_ready(advance(state))
      number = int(state.step)
      os.sync()
      timed(times, f'{name}: whole save', save_and_wait, side, number, state)
      remove_others(side, number)
      for _ in range(3):
        state = timed(times, 'a step, undisturbed', advance, state)
      number = int(state.step)
      os.sync()
      timed(times, f'{name}: until save() returns', side.save, number, state)
      for which in ('the step that follows', 'the step after that'):
        state = timed(times, f'{name}: {which}', advance, state)
      side.wait()
      remove_others(side, number)
  return times, state


def save_and_wait(side, number, state):
  side.save(number, state)
  side.wait()


def remove_others(side, number):
  """Removes all checkpoints but one."""
  for folder in side.folder.glob('[0-9]*'):
    if folder.name != str(number):
      shutil.rmtree(folder)


def measure_restores(sides, verifier, state, repeats, cold):
  """-> times; `verifier` verifies a checkpoint of ours."""
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  like = jax.tree.map(abstract, state)
  last = {name: int(next(s.folder.glob('[0-9]*')).name) for name, s in sides.items()}
  verify = lambda: verifier(last['ours'])
  restore = lambda: sides['ours'].restore(last['ours'], like)
  runs = {
    'ours: restore': restore,
    'orbax: restore': lambda: sides['orbax'].restore(last['orbax'], like),
    'ours: verify, then restore': lambda: (verify(), restore()),
    'ours: verify': verify,
  }
  times = collections.defaultdict(list)
  for turn in range(repeats + 1):
    if turn == 1:
      times.clear()
    for name in rotated(runs, turn):
      if cold:
        drop_cache(sides[name.partition(':')[0]].folder)
      timed(times, name, runs[name])
  return times


def drop_cache(folder):
  """Removes the files of a folder from the system's page cache."""
  os.sync()
  for path in folder.rglob('*'):
    if path.is_file():
      with path.open('rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(folder):
  """-> MB in use after each of 20 saves of a small state."""
  state, used = random_state(2e6, 64), []
  with checkpoint.Checkpoints(folder / 'small', keep=2, keep_every=0) as saved:
    for number in range(20):
      state = advance(state)
      saved.save(number, state, ABOUT)
      saved.wait()
      pages = int(Path('/proc/self/statm').read_text().split()[1])
      used.append(pages * os.sysconf('SC_PAGE_SIZE') / 1e6)
  return used


def report(times, size):
  """Prints the times -> {criterion: (measured, the most allowed)}."""
  medians = {name: statistics.median(values) for name, values in times.items()}
  print('\nseconds')
  for name in sorted(times):
    spread = f'({min(times[name]):.3f} to {max(times[name]):.3f})'
    rate = f'  {size / 1e9 / medians[name]:.2f} GB/s' if 'whole' in name else ''
    print(f'{name:34}{medians[name]:8.3f}  {spread}{rate}')
  whole, restore = medians['ours: whole save'], medians['ours: restore']
  delay = medians['ours: the step that follows'] - medians['a step, undisturbed']
  print(
    f'\nthe step after save() is late by {delay:.3f} s, {delay / whole:.1%} of a save'
  )
  slower = 1 - medians['orbax: whole save'] / whole
  blocking = medians['ours: until save() returns'] / whole
  verifying = medians['ours: verify, then restore'] / restore - 1
  return {
    'GB/s less than plain Orbax': (slower, SLOWER),
    'save() blocks, of a whole save': (blocking, BLOCKING),
    'verifying adds to a restore': (verifying, VERIFYING),
  }


def main():
  a = timing.options(
    __doc__,
    bytes=2e9,
    width=1024,
    repeats=7,
    folder=tempfile.gettempdir(),
    cold=False,
    memory=False,
  ).parse_args()
  print(timing.title(vars(a)))
  with contextlib.ExitStack() as stack:
    name = stack.enter_context(tempfile.TemporaryDirectory(prefix='bench-', dir=a.folder))
    folder = Path(name)
    used = memory(folder) if a.memory else []
    state = random_state(a.bytes, a.width)
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    load = os.getloadavg()[0]
    print(f'{sum(sizes) / 1e9:.3f} GB in {len(sizes)} arrays, load {load:.1f}')
    saved = checkpoint.Checkpoints(folder / 'ours', keep=1000, keep_every=0)
    stack.enter_context(saved)
    handlers = {item: ocp.StandardCheckpointHandler() for item in ('model', 'rest')}
    saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
    stack.enter_context(contextlib.closing(saver))
    sides = {'ours': ours(saved), 'orbax': plain_orbax(folder / 'orbax', saver)}
    times, state = measure_saves(sides, state, a.repeats)
    times |= measure_restores(sides, saved.verify, state, a.repeats, a.cold)
  criteria = report(times, sum(sizes))
  if used:
    print('\nMB in use after each save:', *map(round, used))
    criteria['memory after 20 saves, over 5'] = used[-1] / used[4] - 1, GROWTH
  print(f'\n{"criterion":34}measured    at most   load {os.getloadavg()[0]:.1f}')
  for name, (value, most) in criteria.items():
    verdict = 'PASS' if value <= most else 'FAIL'
    print(f'{name:34}{value:8.1%} {most:10.0%}   {verdict}')
  return int(any(value > most for value, most in criteria.values()))


if __name__ == '__main__':
  sys.exit(main())
