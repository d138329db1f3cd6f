"""Rows of the fault table: damaged or foreign files in a workdir."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import evidence
from faults.rows_a import preempt
from faults.world import Outcome, Row, Straight, Tally, World

from gated import config
from gated.run import checkpoint

LEFT = 10  # The step at which the runs below are preempted; step 8 is also saved.
OLDER = 8

Harm = Callable[[Path], None]


def _truncate(path: Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
  os.truncate(path, 0)


def flip(path: Path) -> None:
  """Flips a bit in the middle of a file."""
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
  """Damages every file of a checkpoint in turn, and resumes `times` runs after it."""

  def run(world: World, times: int) -> Outcome:
    straight, tally = world.straight(), Tally()
    two, one = world.path('two-steps'), world.path('one-step')
    preempt(world, two, LEFT)
    preempt(world, one, LEFT, checkpoint__every=100)
    assert evidence.saved(one) == [LEFT] and OLDER in evidence.saved(two)
    for name, what, harm in _cases(two, harms):
      with tally.one(f'{name} {what}, with an older step'):
        _is_skipped(world, two, name, harm)
    for name, what, harm in _cases(one, harms):
      with tally.one(f'{name} {what}, without another step'):
        _refused(world, one, name, harm)
    for name, what, harm in _drawn(world, two, harms, times):
      with tally.one(f'{name} {what}, and the run resumes'):
        _resumes_before(world, two, name, harm, straight)
    for name, what, harm in _drawn(world, one, harms, times // 2):
      with tally.one(f'{name} {what}, and the run is refused'):
        _stops(world, one, name, harm)
    return tally.outcome()

  return run


def _cases(workdir: Path, harms: dict[str, Harm]) -> Iterator[tuple[str, str, Harm]]:
  """Each file of the last step, and each harm that changes it."""
  for name, content in evidence.contents(evidence.committed(workdir, LEFT)).items():
    for what, harm in harms.items():
      if content or what == 'deleted':  # An empty file cannot be changed otherwise.
        yield name, what, harm


def _drawn(world: World, workdir: Path, harms: dict[str, Harm], count: int) -> list:
  """`count` random cases, one of them of the manifest."""
  cases = list(_cases(workdir, harms))
  world.random.shuffle(cases)
  cases.sort(key=lambda case: case[0] != 'manifest.json')
  return cases[len(harms) - 1 :][:count]


def _copy(world: World, workdir: Path, name: str, harm: Harm) -> Path:
  copy = world.path('damaged')
  shutil.copytree(workdir, copy)
  harm(evidence.committed(copy, LEFT) / name)
  return copy


def _is_skipped(world: World, workdir: Path, name: str, harm: Harm) -> None:
  copy = _copy(world, workdir, name, harm)
  with evidence.warnings() as messages, checkpoint.Reader(copy / 'checkpoints') as saved:
    assert saved.newest_good() == OLDER, f'{saved.newest_good()} was accepted'
  log = ' '.join(messages)
  assert 'skipped: ' in log and name in log, f'not logged: {log}'
  shutil.rmtree(copy)


def _refused(world: World, workdir: Path, name: str, harm: Harm) -> None:
  copy = _copy(world, workdir, name, harm)
  with checkpoint.Reader(copy / 'checkpoints') as saved:
    try:
      step = saved.newest_good()
    except ValueError as error:
      assert name in str(error), f'not named: {error}'
    else:
      raise AssertionError(f'{step} was accepted')
  shutil.rmtree(copy)


def _resumes_before(
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
  """head.json is a hint: without it, a run resumes from the newest step."""
  straight, tally = world.straight(), Tally()
  workdir = world.path('left')
  preempt(world, workdir, LEFT)
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
  '012': 'copy',  # A copy of a step; a leading zero is not allowed.
  '0': 'file',
  '12x': 'copy',
  '-12': 'folder',
  '1e3': 'folder',
  '12.5': 'folder',
  '\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT TWO}': 'copy',  # int() gives 12.
  '99999999999999999999': 'copy',
  '20': 'folder',  # An empty folder in place of a later step.
  '23': 'link',  # A link to another step.
}
STALE = ('12.orbax-checkpoint-tmp', '12.orbax-checkpoint-tmp-1790000000', '4.removed')


def strangers(world: World, times: int) -> Outcome:
  """All names at once, with file times years ago and years ahead."""
  straight, tally, year = world.straight(), Tally(), 365 * 86400.0
  workdir = world.path('left')
  preempt(world, workdir, LEFT)
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
      assert evidence.sessions(copy)[-1]['restored_step'] == LEFT, (
        'the order is not by step'
      )
      world.check(copy, straight, foreign=STRANGERS)
      names = evidence.names(folder)
      missing = [name for name in STRANGERS if not name.isdecimal() and name not in names]
      assert not missing, f'foreign files were removed: {missing}'
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
  """Writes manifest.json as another version of this code might."""
  path = folder / 'manifest.json'
  path.write_text(json.dumps(_other_format(json.loads(path.read_text()))))


def _without_manifest(folder: Path) -> None:
  """Changes a step to the layout of Orbax's manager, before manifests existed."""
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
  """All steps, then only the newest, are of another version: nothing is overwritten."""
  straight, tally = world.straight(), Tally()
  workdir = world.path('left')
  preempt(world, workdir, LEFT)
  for what, (age, messages) in list(FORMATS.items())[:times]:
    with tally.one(f'every step: {what}'):
      copy = world.path('old')
      shutil.copytree(workdir, copy)
      for step in evidence.saved(copy):
        age(evidence.committed(copy, step))
      before = evidence.contents(copy)
      world.train(copy).wait().expect(2, messages)
      assert evidence.contents(copy) == before, 'something was overwritten'
  with tally.one('only the newest step: format=0'):
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
  Row('21', 'stale or foreign names in a workdir, clocks set back', strangers, 2, 0),
  Row('27', 'checkpoints of another version', other_versions, 2, 0),
]
