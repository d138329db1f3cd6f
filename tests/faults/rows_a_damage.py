"""Rows of the fault table: what lies in a workdir was damaged, or is a stranger's."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import evidence
from faults.rows_a import leave
from faults.world import Outcome, Row, Straight, Tally, World

from gated import config
from gated.run import checkpoint

LEFT = 10  # The step at which the runs below are left; before it stands step 8.
OLDER = 8

Harm = Callable[[Path], None]


def _truncate(path: Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
  os.truncate(path, 0)


def flip(path: Path) -> None:
  """One bit in the middle of a file is another."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


HARMS: dict[str, Harm] = {
  'truncated': _truncate,
  'emptied': _empty,
  'deleted': Path.unlink,
}
FLIPS: dict[str, Harm] = {'one bit flipped': flip}


# 6 and 7


def damaged(harms: dict[str, Harm]) -> Callable[[World, int], Outcome]:
  """Every file of a checkpoint in turn; so many of them, by lot, in a run's own way."""

  def run(world: World, times: int) -> Outcome:
    straight, tally = world.straight(), Tally()
    two, one = world.path('two-steps'), world.path('one-step')
    leave(world, two, LEFT)
    leave(world, one, LEFT, checkpoint__every=100)
    assert evidence.saved(one) == [LEFT] and OLDER in evidence.saved(two)
    for name, what, harm in _cases(two, harms):
      with tally.one(f'{name} {what}, an older step there'):
        _passed_over(world, two, name, harm)
    for name, what, harm in _cases(one, harms):
      with tally.one(f'{name} {what}, no other step there'):
        _refused(world, one, name, harm)
    for name, what, harm in _drawn(world, two, harms, times):
      with tally.one(f'{name} {what}, and the run goes on'):
        _goes_on_before(world, two, name, harm, straight)
    for name, what, harm in _drawn(world, one, harms, times // 2):
      with tally.one(f'{name} {what}, and the run has no other step'):
        _stops(world, one, name, harm)
    return tally.outcome()

  return run


def _cases(workdir: Path, harms: dict[str, Harm]) -> Iterator[tuple[str, str, Harm]]:
  """Each file of the step at which a run was left, and each harm that alters it."""
  for name, content in evidence.contents(evidence.committed(workdir, LEFT)).items():
    for what, harm in harms.items():
      if content or what == 'deleted':  # There is nothing in it to be lost.
        yield name, what, harm


def _drawn(world: World, workdir: Path, harms: dict[str, Harm], count: int) -> list:
  """So many cases by lot, one of them the manifest's."""
  cases = list(_cases(workdir, harms))
  world.random.shuffle(cases)
  cases.sort(key=lambda case: case[0] != 'manifest.json')
  return cases[len(harms) - 1 :][:count]


def _copy(world: World, workdir: Path, name: str, harm: Harm) -> Path:
  copy = world.path('damaged')
  shutil.copytree(workdir, copy)
  harm(evidence.committed(copy, LEFT) / name)
  return copy


def _passed_over(world: World, workdir: Path, name: str, harm: Harm) -> None:
  copy = _copy(world, workdir, name, harm)
  with evidence.warnings() as told, checkpoint.Reader(copy / 'checkpoints') as saved:
    assert saved.newest_good() == OLDER, f'{saved.newest_good()} was taken for good'
  said = ' '.join(told)
  assert 'skipped: ' in said and name in said, f'not told of: {said}'
  shutil.rmtree(copy)


def _refused(world: World, workdir: Path, name: str, harm: Harm) -> None:
  copy = _copy(world, workdir, name, harm)
  with checkpoint.Reader(copy / 'checkpoints') as saved:
    try:
      found = saved.newest_good()
    except ValueError as error:
      assert name in str(error), f'not told of: {error}'
    else:
      raise AssertionError(f'{found} was taken for good')
  shutil.rmtree(copy)


def _goes_on_before(
  world: World, workdir: Path, name: str, harm: Harm, straight: Straight
) -> None:
  copy = _copy(world, workdir, name, harm)
  world.finish(copy).expect(0, 'skipped: ', name, f'using step {OLDER}')
  assert evidence.sessions(copy)[-1]['restored_step'] == OLDER
  world.check(copy, straight)


def _stops(world: World, workdir: Path, name: str, harm: Harm) -> None:
  copy = _copy(world, workdir, name, harm)
  before = evidence.contents(copy)
  stopped = world.train(copy, checkpoint__every=100).wait()
  stopped.expect(2, 'no valid checkpoint is left', name)
  assert evidence.contents(copy) == before, 'something was overwritten'


def head_damaged(world: World, times: int) -> Outcome:
  """head.json is a hint: without it, a run goes on from the newest step."""
  straight, tally = world.straight(), Tally()
  workdir = world.path('left')
  leave(world, workdir, LEFT)
  for what, harm in list((HARMS | FLIPS).items())[:times]:
    with tally.one(f'head.json {what}'):
      copy = world.path('headless')
      shutil.copytree(workdir, copy)
      harm(copy / 'checkpoints' / 'head.json')
      world.finish(copy)
      assert evidence.sessions(copy)[-1]['restored_step'] == LEFT
      world.check(copy, straight)
  return tally.outcome()


# 21

STRANGERS = {
  'a note.txt': 'file',
  '.hidden': 'file',
  '012': 'copy',  # Of a step, with leading zeros, so that it is not one.
  '0': 'file',
  '12x': 'copy',
  '-12': 'folder',
  '1e3': 'folder',
  '12.5': 'folder',
  '\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT TWO}': 'copy',  # int() reads a 12.
  '99999999999999999999': 'copy',
  '20': 'folder',  # An empty one, where a step will be.
  '23': 'link',  # To a step of another name.
}
STALE = ('12.orbax-checkpoint-tmp', '12.orbax-checkpoint-tmp-1790000000', '4.removed')


def strangers(world: World, times: int) -> Outcome:
  """All of them at once, with the clock of the files set back, and set ahead."""
  straight, tally, year = world.straight(), Tally(), 365 * 86400.0
  workdir = world.path('left')
  leave(world, workdir, LEFT)
  for number in range(times):
    aged = {LEFT: -10 * year, OLDER: 10 * year} if number % 2 == 0 else {LEFT: 10 * year}
    with tally.one(f'foreign names, files of {aged} s', times=len(STRANGERS | aged) + 3):
      copy = world.path('strange')
      shutil.copytree(workdir, copy)
      folder = copy / 'checkpoints'
      for name, kind in STRANGERS.items():
        _plant(folder, name, kind)
      for name in STALE:
        shutil.copytree(folder / str(OLDER), folder / name)
      for step, seconds in aged.items():
        _set_clock(evidence.committed(copy, step), seconds)
      world.finish(copy)
      assert evidence.sessions(copy)[-1]['restored_step'] == LEFT, 'order is not by step'
      world.check(copy, straight, foreign=STRANGERS)
      here = evidence.names(folder)
      gone = [name for name in STRANGERS if not name.isdecimal() and name not in here]
      assert not gone, f"what was not the run's was removed: {gone}"
  return tally.outcome()


def _plant(folder: Path, name: str, kind: str) -> None:
  if kind == 'file':
    (folder / name).write_text('not yours\n')
  elif kind == 'folder':
    (folder / name).mkdir()
  elif kind == 'link':
    (folder / name).symlink_to(str(OLDER))
  else:
    shutil.copytree(folder / str(OLDER), folder / name)


def _set_clock(folder: Path, seconds: float) -> None:
  for path in (folder, *folder.rglob('*')):
    at = path.stat().st_mtime + seconds
    os.utime(path, (at, at))


# 27


def _other_format(content: dict) -> dict:
  content = {k: v for k, v in content.items() if k != 'sha256'} | {'format': 0}
  return content | {'sha256': config.digest(content)}


def _older_format(folder: Path) -> None:
  """manifest.json as an earlier, or a later, version of this code might write it."""
  path = folder / 'manifest.json'
  path.write_text(json.dumps(_other_format(json.loads(path.read_text()))))


def _without_manifest(folder: Path) -> None:
  """As Orbax's manager laid a step out, before there was a manifest."""
  about = json.loads((folder / 'manifest.json').read_text())['about']
  (folder / 'manifest.json').unlink()
  (folder.parent / 'head.json').unlink(missing_ok=True)
  for item, value in (
    ('about', about),
    ('metrics', {'heldout_loss': about['heldout_loss']}),
  ):
    (folder / item).mkdir()
    (folder / item / 'metadata').write_text(json.dumps(value))


FORMATS = {
  'format=0': (_older_format, 'format=0'),
  'no manifest': (_without_manifest, str(LEFT)),
}


def other_versions(world: World, times: int) -> Outcome:
  """All steps, and then the newest alone, are of another version: told, nothing lost."""
  straight, tally = world.straight(), Tally()
  workdir = world.path('left')
  leave(world, workdir, LEFT)
  for what, (age, told) in list(FORMATS.items())[:times]:
    with tally.one(f'every step: {what}'):
      copy = world.path('old')
      shutil.copytree(workdir, copy)
      for step in evidence.saved(copy):
        age(evidence.committed(copy, step))
      before = evidence.contents(copy)
      world.train(copy).wait().expect(2, told)
      assert evidence.contents(copy) == before, 'something was overwritten'
  with tally.one('the newest step alone: format=0'):
    copy = world.path('old')
    shutil.copytree(workdir, copy)
    _older_format(evidence.committed(copy, LEFT))
    world.finish(copy).expect(0, 'skipped: ', 'format=0')
    world.check(copy, straight)
  return tally.outcome()


ROWS_A = [
  Row('6', 'each file of a checkpoint truncated, emptied, deleted', damaged(HARMS), 6, 0),
  Row('7', 'one bit flipped in each file of a checkpoint', damaged(FLIPS), 6, 1),
  Row('6h', 'head.json truncated, emptied, deleted, a bit flipped', head_damaged, 4, 0),
  Row('21', 'stale and foreign names, clocks set back', strangers, 2, 0),
  Row('27', 'checkpoints of another version', other_versions, 2, 0),
]
