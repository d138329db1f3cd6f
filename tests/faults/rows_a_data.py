"""Rows of the fault table: changed data or recipes, and the step of a resumption."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from faults import evidence
from faults.rows_a import preempt
from faults.rows_a_damage import flip
from faults.world import SAVES, STEPS, Outcome, Row, Straight, Tally, World

LEFT = 10  # The step at which the runs below are preempted.
EPOCH = 17  # The step in which the first epoch of `dataset` ends.


def dataset(world: World, tokenizer: str = 'bytes') -> Path:
  """132 rows of text in five shards, and ten rows held out."""
  text, out = world.path('text'), world.path('dataset')
  text.mkdir()
  source = Path(argparse.__file__).read_text()
  for i in range(30):
    (text / f'{i:02}.txt').write_text(source[i * 600 : (i + 1) * 600])
  paths = [f'--out={out}', f'--domain=text={text}', f'--tokenizer={tokenizer}']
  sizes = ['--length=128', '--heldout=0.1', '--shard_rows=32', '--processes=1']
  sizes += ['--dedup=none']  # Whatever the content is, names decide what is held out.
  world.spawn(['scripts/prepare_data.py', *paths, *sizes]).wait().expect(0)
  return out


def refused(world: World, workdir: Path, *messages: str, **options) -> None:
  """Checks that the run is refused with exit code 2 and a reason, and changes nothing."""
  before = evidence.contents(workdir)
  world.train(workdir, **options).wait().expect(2, *messages)
  assert evidence.contents(workdir) == before, 'something was overwritten'


# 10


def data_damaged(world: World, times: int) -> Outcome:
  """Each damage is refused and undone; at the end the run resumes."""
  tally, data = Tally(), dataset(world)
  straight = world.straight(data__mixture=str(data))
  workdir = world.path('left')
  preempt(world, workdir, LEFT, data__mixture=str(data))
  shards = sorted(data.glob('text-train-*'))
  one, other = world.random.sample(shards, 2)
  for what, (harm, messages) in list(_harms(one, other).items())[:times]:
    with tally.one(what):
      contents = evidence.contents(data)
      harm()
      try:
        refused(world, workdir, 'config.data.mixture', *messages, data__mixture=str(data))
      finally:
        for name, content in contents.items():
          (data / name).write_bytes(content)
  with tally.one('a foreign file in the repaired dataset'):
    (data / 'text-train-00005-of-00006.array_record').write_bytes(one.read_bytes())
    (data / 'a note.txt').write_text('harmless\n')
    world.finish(workdir, data__mixture=str(data))
    world.check(workdir, straight)
  return tally.outcome()


def _harms(one: Path, other: Path) -> dict[str, tuple[Callable, tuple[str, ...]]]:
  manifest = one.parent / 'manifest.json'

  def truncate() -> None:
    one.write_bytes(one.read_bytes()[:65536])

  def swap() -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)

  def edit() -> None:
    content = json.loads(manifest.read_text())
    shard = content['splits']['train']['text']['shards'][0]
    shard['rows'] -= 1
    manifest.write_text(json.dumps(content))

  return {
    'a bit of a shard flipped': (lambda: flip(one), (one.name,)),
    'a shard truncated': (truncate, (one.name,)),
    'a shard deleted': (one.unlink, (one.name,)),
    'two shards swapped': (swap, (min(one, other).name,)),
    'a number in manifest.json changed': (edit, ('manifest.json',)),
    'a bit of manifest.json flipped': (lambda: flip(manifest), ('manifest.json',)),
    'manifest.json deleted': (manifest.unlink, ('no such dataset',)),
  }


# 11

CHANGES = {
  'seed': (3, 'config.seed: 0 there, 3 here'),
  'batch': (16, 'config.batch: 8 there, 16 here'),
  'optim.lr': (2e-3, 'config.optim.lr: 0.001 there, 0.002 here'),
  'model.width': (96, 'config.model.width: 64 there, 96 here'),
  'data.length': (64, 'config.data.length: 128 there, 64 here'),
  'data.mixture': ('stdlib@code', 'data: '),
  'data.tokenizer': ('bpe:300', 'data: '),
}


def changed(world: World, times: int) -> Outcome:
  tally, workdir = Tally(), world.path('left')
  preempt(world, workdir, LEFT)
  for knob, (value, messages) in list(CHANGES.items())[:times]:
    options = {knob.replace('.', '__'): value}
    if knob == 'data.tokenizer':
      options['data__cache'] = str(world.path('cache'))
    with tally.one(f'config.{knob}={value}'):
      refused(world, workdir, 'belongs to a run that differs', messages, **options)
  with tally.one('three knobs at once'):
    messages = [CHANGES[knob][1] for knob in ('seed', 'batch', 'optim.lr')]
    refused(world, workdir, *messages, seed=3, batch=16, optim__lr=2e-3)
  for knob in ('seed', 'optim.lr'):
    with tally.one(f'--allow_change=config.{knob}'):
      _allowed(world, workdir, knob)
  return tally.outcome()


def _allowed(world: World, workdir: Path, knob: str) -> None:
  """The run resumes at the same step with the new value, and run.json records it."""
  copy, value = world.path('allowed'), CHANGES[knob][0]
  shutil.copytree(workdir, copy)
  flags = [f'--allow_change=config.{knob}']
  world.finish(copy, flags=flags, **{knob.replace('.', '__'): value})
  before, now = evidence.losses(workdir), evidence.losses(copy)
  assert now[:LEFT] == before and [s for s, _ in now] == list(range(1, STEPS + 1))
  session = evidence.sessions(copy)[-1]
  assert session['restored_step'] == LEFT
  assert session['changed'][f'config.{knob}'][1] == value, session['changed']
  # The new value is now that of the run and needs no flag.
  world.finish(copy, **{knob.replace('.', '__'): value})


# 14


def other_workers(world: World, times: int) -> Outcome:
  straight, tally = world.straight(), Tally()
  for counts in [(0, 2, 1), (2, 0, 3)][:times]:
    with tally.one(f'config.data.workers={counts}', times=2):
      workdir = world.path('workers')
      preempt(world, workdir, 7, data__workers=counts[0])
      preempt(world, workdir, 15, data__workers=counts[1])
      world.finish(workdir, data__workers=counts[2])
      world.check(workdir, straight)
  return tally.outcome()


# 22


def resumed(world: World, times: int) -> Outcome:
  """Three resumptions around the end of an epoch, and two after the last step."""
  tally, data = Tally(), dataset(world)
  options = dict(data__mixture=str(data))
  straight = world.straight(**options)
  for first in (EPOCH - 2, EPOCH - 1, EPOCH)[:times]:
    with tally.one(f'resumed at steps {first} to {first + 2} of a run', times=3):
      workdir = world.path('resumed')
      for at in range(first, first + 3):
        preempt(world, workdir, at, **options)
      world.finish(workdir, **options)
      world.check(workdir, straight)
  with tally.one('resumed twice at the final step', times=2):
    before = evidence.contents(workdir)
    for _ in range(2):
      world.finish(workdir, **options)
    after = evidence.contents(workdir)
    differs = {n for n in after.keys() | before.keys() if after.get(n) != before.get(n)}
    # Both files hold the time of the last session.
    per_session = {'run.json', 'outcome.json'}
    assert differs <= per_session, f'a finished run changed {differs}'
    world.check(workdir, straight)
  with tally.one('SIGTERM at the last step'):
    workdir, fault = world.path('last'), {'do': 'term', 'at': 'step', 'step': STEPS}
    # Its held-out loss is still owed.
    world.train(workdir, fault=fault, **options).wait().expect(4)
    world.finish(workdir, **options)
    world.check(workdir, straight)
  return tally.outcome()


# 24


def exact_steps(world: World, times: int) -> Outcome:
  tally, workdir, options = Tally(), world.path('kept'), dict(checkpoint__keep=9)
  straight = world.straight(**options)
  shutil.copytree(straight.workdir, workdir)
  for step in (SAVES, 3 * SAVES, STEPS)[:times]:
    with tally.one(f'eval.py --step={step}'):
      evaluation = ['eval.py', f'--workdir={workdir}', f'--step={step}', '--rows=8']
      done = world.spawn(evaluation).wait().expect(0)
      loss = json.loads(done.out.splitlines()[-1])['loss']
      own = dict(straight.heldout)[step]
      assert loss == own, f'the loss is {loss!r}, in the run it was {own!r}'
  shutil.rmtree(workdir / 'eval', ignore_errors=True)
  for step in (SAVES, 2 * SAVES, 4 * SAVES)[:times]:
    with tally.one(f'--restore_step={step}'):
      copy = world.path('restored')
      shutil.copytree(workdir, copy)
      world.finish(copy, flags=[f'--restore_step={step}'], **options)
      assert evidence.sessions(copy)[-1]['restored_step'] == step
      world.check(copy, straight)
  with tally.one('killed after --restore_step, before the next save'):
    _killed_after_going_back(world, workdir, straight, options)
  with tally.one('steps that do not exist'):
    flags = ['--restore_step=7']
    refused(world, workdir, "--restore_step='7'", '4, 8, 12', flags=flags, **options)
    done = world.spawn(['eval.py', f'--workdir={workdir}', '--step=7']).wait()
    done.expect(2, "--step='7'", '4, 8, 12')
  with tally.one('--restore_step of a damaged step'):
    copy = world.path('damaged')
    shutil.copytree(workdir, copy)
    flip(evidence.committed(copy, 12) / 'model' / '_METADATA')
    refused(world, copy, 'model/_METADATA', flags=['--restore_step=12'], **options)
  return tally.outcome()


def _killed_after_going_back(
  world: World, workdir: Path, straight: Straight, options: dict
) -> None:
  """Discarded steps stay discarded: the run resumes from step 8."""
  copy, back = world.path('restored'), 2 * SAVES
  shutil.copytree(workdir, copy)
  kill = {'do': 'kill', 'at': 'step', 'step': back + 2}
  flags = [f'--restore_step={back}']
  world.train(copy, fault=kill, flags=flags, **options).wait().expect(-9)
  world.finish(copy, **options)
  assert evidence.sessions(copy)[-1]['restored_step'] == back
  world.check(copy, straight)


ROWS_A = [
  Row('10', 'a data shard is damaged, deleted or swapped', data_damaged, 7, 0),
  Row('11', 'a different recipe on resumption', changed, len(CHANGES), 0),
  Row('14', 'different worker counts on resumption', other_workers, 2, 0),
  Row('22', 'resumed three times, at the end, across an epoch', resumed, 3, 0),
  Row('24', 'evaluate a saved step, restore exactly that step', exact_steps, 3, 0),
]
