"""Checkpoints of `gated.checkpoint` beside plain Orbax, of one state, in three tables.

  python bench/checkpoint.py [--bytes=2e9 --repeats=7 --folder=/tmp] [--cold] [--memory]

Saves to the end, saves that a donating step follows at once, and restores. Ours digests
what it wrote and commits it by a manifest. Ours and Orbax take turns on the same arrays
in the same folder, the disk is idle before each save, and what was written is still in
memory when it is read, unless --cold has it forgotten. Times are medians of seconds, with
the least and the most. The last table holds the criteria; exit code 1 if one fails.
"""

import argparse
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import train_step

from gated.devices import mesh
from gated.plan import Plan
from gated.run import checkpoint
from gated.train import step

# What is asked for: GB/s as a share of Orbax's, blocking as a share of a whole save,
# what verifying adds to a restore, and what 15 saves add to the memory in use.
RATE, BLOCKING, VERIFYING, GROWTH = 0.8, 0.1, 0.2, 0.1

ABOUT = dict(config={}, data={}, heldout_loss=None)
TINY = ['model.width=64', 'model.depth=2', 'model.ffn=128', 'data.length=64']
STEPS, SAVES = 300, 20


class Side:
  """What saves below a folder of its own."""

  folder: Path

  def keep(self, number):
    """Removes all steps but one."""
    for old in self.folder.glob('[0-9]*'):
      if old.name != str(number):
        shutil.rmtree(old)


class Ours(Side):
  """As a run saves: the arrays, their digests, and a manifest."""

  def __init__(self, folder):
    self._saved = checkpoint.Checkpoints(folder / 'ours', keep=1000, keep_every=0)
    self.folder = Path(self._saved.directory)
    self.close, self.verify = self._saved.close, self._saved.verify
    self.wait, self.restore = self._saved.wait, self._saved.restore

  def save(self, number, state):
    self._saved.save(number, state, ABOUT)


class Orbax(Side):
  """The same arrays in the same two items, and nothing else."""

  def __init__(self, folder):
    self.folder = folder / 'orbax'
    items = {item: ocp.StandardCheckpointHandler() for item in ('model', 'rest')}
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))
    self.close, self.wait = self._orbax.close, self._orbax.wait_until_finished

  def save(self, number, state):
    model, rest = map(ocp.args.StandardSave, checkpoint.split(state))
    args = ocp.args.Composite(model=model, rest=rest)
    self._orbax.save(self.folder / str(number), args=args, force=True)

  def restore(self, number, like):
    model, rest = map(ocp.args.StandardRestore, checkpoint.split(like))
    args = ocp.args.Composite(model=model, rest=rest)
    return dict(self._orbax.restore(self.folder / str(number), args=args).items())


def shapes(size, width):
  """Bytes -> a decoder's weights by name, which fill a third; moments fill the rest."""
  ffn, count = width * 11 // 4, int(size) // 12
  layer = 4 * width * width + 3 * width * ffn + 2 * width
  depth = max(1, int(0.8 * count / layer))
  vocab = (count - depth * layer) // width
  if vocab < 1:
    raise ValueError(f'--bytes={size:g} is too little for a layer of --width={width}')
  found = {name: (depth, width, width) for name in ('query', 'key', 'value', 'out')}
  found |= {name: (depth, width, ffn) for name in ('act', 'up')}
  found |= {name: (depth, width) for name in ('attn_norm', 'ffn_norm')}
  return found | {'down': (depth, ffn, width), 'embed': (vocab, width)}


def state_of(size, width):
  """-> random float32 weights and moments, no bit of which is easy to foretell."""

  def draw(key):
    made = [
      {
        name: jax.random.normal(jax.random.fold_in(k, i), shape)
        for i, (name, shape) in enumerate(shapes(size, width).items())
      }
      for k in jax.random.split(key, 3)
    ]
    zero = jnp.zeros((), jnp.int32)
    return step.State(zero, zero + 0, made[0], {'mu': made[1], 'nu': made[2]})

  return jax.block_until_ready(jax.jit(draw)(jax.random.key(0)))


@functools.partial(jax.jit, donate_argnums=0)
def advance(state):
  """A step that writes every number anew, where the old one lay."""
  move = lambda x: x * 0.999 + 1e-3 if x.dtype == jnp.float32 else x + 1
  return jax.tree.map(move, state)


def seconds(f, *args):
  """-> (how long it took until its arrays were there, what it returned)."""
  start = time.perf_counter()
  out = jax.block_until_ready(f(*args))
  return time.perf_counter() - start, out


class Times(dict):
  """'side: what' -> seconds, each time."""

  def add(self, side, what, value):
    self.setdefault(f'{side}: {what}'.removeprefix(': '), []).append(value)

  def median(self, name):
    return statistics.median(self[name])

  def line(self, name, more=''):
    each = self[name]
    return (
      f'{name:34}{self.median(name):8.3f}  ({min(each):.3f} to {max(each):.3f}){more}'
    )


def saves(sides, state, a, found):
  """Whole saves, and saves under which steps go on -> the state after them.

  Each side keeps the last that it saved.
  """
  for i in range(a.repeats + 1):  # The first one warms up.
    times = found if i else Times()
    for name in turn(sides, i):
      state = save_whole(sides[name], state, functools.partial(times.add, name))
      for _ in range(3):
        alone, state = seconds(advance, state)
        times.add('', 'a step, undisturbed', alone)
      state = save_and_step(sides[name], state, functools.partial(times.add, name))
  return state


def save_whole(side, state, add):
  _, state = seconds(advance, state)
  number = int(state.step)
  os.sync()
  add('whole save', seconds(lambda: (side.save(number, state), side.wait()))[0])
  side.keep(number)
  return state


def save_and_step(side, state, add):
  number = int(state.step)
  os.sync()
  add('until save() returns', seconds(side.save, number, state)[0])
  for which in ('the step that follows', 'the step after that'):
    late, state = seconds(advance, state)
    add(which, late)
  side.wait()
  side.keep(number)
  return state


def restores(sides, state, a, found):
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  like = jax.tree.map(place, state)
  last = {name: int(next(s.folder.glob('[0-9]*')).name) for name, s in sides.items()}
  ours = sides['ours']
  runs = {
    f'{k}: restore': functools.partial(s.restore, last[k]) for k, s in sides.items()
  }
  runs['ours: verify, then restore'] = lambda like: (
    ours.verify(last['ours']),
    ours.restore(last['ours'], like),
  )
  runs['ours: verify'] = lambda like: ours.verify(last['ours'])
  for i in range(a.repeats + 1):
    times = found if i else Times()
    for name in turn(runs, i):
      if a.cold:
        forget(sides[name.partition(':')[0]].folder)
      times.add('', name, seconds(runs[name], like)[0])


def turn(names, i):
  """Names -> the same, beginning at another one each time."""
  names = list(names)
  return names[i % len(names) :] + names[: i % len(names)]


def forget(folder):
  """Has the system drop what it keeps in memory of the files in a folder."""
  os.sync()
  for path in folder.rglob('*'):
    if path.is_file():
      handle = os.open(path, os.O_RDONLY)
      os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(handle)


def memory(folder):
  """-> MB in use after each save of a run of tiny steps."""
  recipe = str(Path(__file__).resolve().parents[1] / 'configs/tiny.py')
  cfg = train_step.recipe(recipe, [f'steps={STEPS}', *TINY])
  plan = Plan(cfg)
  run, state = plan.train_step().compile(), plan.init()
  rng, used = np.random.default_rng(0), []
  with checkpoint.Checkpoints(folder / 'tiny', keep=2, keep_every=0) as saved:
    for number in range(1, STEPS + 1):
      batch = mesh.place(train_step.random_batch(cfg, rng), plan.mesh, cfg.batch)
      state, _ = run(state, batch)
      if number % (STEPS // SAVES) == 0:
        saved.save(number, state, ABOUT)
        saved.wait()
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        used.append(pages * os.sysconf('SC_PAGE_SIZE') / 1e6)
  return used


def report(found, size):
  """Prints the tables -> the criteria: name: (what was measured, how far it may go)."""
  rate = {name: size / 1e9 / found.median(f'{name}: whole save') for name in SIDES}
  print('\nsaving, s')
  for name in SIDES:
    print(found.line(f'{name}: whole save', f'  {rate[name]:.2f} GB/s'))
  for name in SIDES:
    for part in ('until save() returns', 'the step that follows', 'the step after that'):
      print(found.line(f'{name}: {part}'))
  print(found.line('a step, undisturbed'))
  print('\nrestoring, s')
  for name in ('orbax: restore', 'ours: restore', 'ours: verify, then restore'):
    print(found.line(name))
  print(found.line('ours: verify'))
  whole = found.median('ours: whole save')
  blocking = found.median('ours: until save() returns')
  late = found.median('ours: the step that follows') - found.median('a step, undisturbed')
  print(f'\nthe step after save() is late by {late:.3f} s, {late / whole:.1%} of a save')
  verified = found.median('ours: verify, then restore') / found.median('ours: restore')
  return {
    'GB/s less than plain Orbax': (1 - rate['ours'] / rate['orbax'], 1 - RATE),
    'save() blocks, of a whole save': (blocking / whole, BLOCKING),
    'verifying adds to a restore': (verified - 1, VERIFYING),
  }


SIDES = {'ours': Ours, 'orbax': Orbax}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--bytes', type=float, default=2e9, help='of the state')
  parser.add_argument('--width', type=int, default=1024, help='of its leaves')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--folder', default=tempfile.gettempdir(), help='to write below')
  parser.add_argument('--cold', action='store_true', help='read from the disk')
  parser.add_argument('--memory', action='store_true', help='also count a run of saves')
  a = parser.parse_args()
  found = Times()
  with tempfile.TemporaryDirectory(prefix='bench-', dir=a.folder) as name:
    folder = Path(name)
    used = memory(folder) if a.memory else []
    try:
      state = state_of(a.bytes, a.width)
    except ValueError as error:
      parser.error(str(error))
    leaves = jax.tree.leaves(state)
    size = sum(x.nbytes for x in leaves)
    told = f'{size / 1e9:.3f} GB in {len(leaves)} arrays, load {os.getloadavg()[0]:.1f}'
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}\n{told}')
    sides = {name: side(folder) for name, side in SIDES.items()}
    state = saves(sides, state, a, found)
    restores(sides, state, a, found)
    for side in sides.values():
      side.close()
    del state, leaves
    criteria = report(found, size)
    if used:
      print(f'\n{STEPS} tiny steps, MB in use after each save: ', end='')
      print(' '.join(f'{mb:.0f}' for mb in used))
      criteria['memory after 20 saves, over 5'] = used[-1] / used[4] - 1, GROWTH
  print(f'\n{"criterion":34}measured    at most   load {os.getloadavg()[0]:.1f}')
  for name, (value, most) in criteria.items():
    verdict = 'PASS' if value <= most else 'FAIL'
    print(f'{name:34}{value:8.1%} {most:10.0%}   {verdict}')
  return 1 if any(value > most for value, most in criteria.values()) else 0


if __name__ == '__main__':
  sys.exit(main())
