"""Rows of the fault table: situations that no list had named before they were tried."""

import os
import shutil
import subprocess
from pathlib import Path

from faults import evidence, process
from faults.rows_e import each
from faults.world import Outcome, Row, Skip, Straight, World

# 60


def unnamed(world: World, times: int) -> Outcome:
  return each(world, UNNAMED[:times])


def _stopped(world: World) -> Path:
  """A workdir at step 8, as of a run that was stopped."""
  workdir = world.path('stopped')
  term = {'do': 'term', 'at': 'step', 'step': 8}
  world.train(workdir, fault=term).wait().expect(4)
  return workdir


def _power_lost(world: World, straight: Straight) -> None:
  """zeros at the end of metrics.jsonl and spikes.jsonl, as a power failure leaves them"""
  workdir = _stopped(world)
  for name in ('metrics.jsonl', 'spikes.jsonl'):
    with (workdir / name).open('ab') as file:
      file.write(bytes(4096))
  world.finish(workdir)
  world.check(workdir, straight)


def _twice(world: World, straight: Straight) -> None:
  """metrics.jsonl holds its records twice, in reverse"""
  workdir = _stopped(world)
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(True)
  path.write_bytes(b''.join(reversed(lines + lines)))
  done = world.finish(workdir)
  assert 'repeated records were dropped' in done.err, done.tail()
  world.check(workdir, straight)


def _pipes(world: World, straight: Straight) -> None:
  """head.json, or the manifest of the last step, is a pipe: no read waits for it"""
  for name in ('head.json', '8/manifest.json'):
    workdir = _stopped(world)
    path = workdir / 'checkpoints' / name
    path.unlink()
    os.mkfifo(path)
    world.finish(workdir)
    world.check(workdir, straight)


def _hard_links(world: World, straight: Straight) -> None:
  """a copy by hard links (cp -al) keeps its records while the run goes on"""
  workdir, copy = _stopped(world), world.path('copy')
  subprocess.run(['cp', '-al', str(workdir), str(copy)], check=True)
  before = evidence.contents(copy)
  world.finish(workdir)
  assert evidence.contents(copy) == before
  world.finish(copy)
  world.check(workdir, straight)
  world.check(copy, straight)


def _nested(world: World, straight: Straight) -> None:
  """a workdir within the checkpoints of another run, which would remove it"""
  workdir = _stopped(world)
  for name in ('12', '12/run', 'x'):
    inner = workdir / 'checkpoints' / name
    world.train(inner, flags=['--dry_run']).wait().expect(2, 'lies within')
  world.finish(workdir)
  world.check(workdir, straight)


def _no_checkpoints(world: World, straight: Straight) -> None:
  """a copy without checkpoints/ is refused, and keeps its records"""
  copy = world.path('copy')
  shutil.copytree(straight.workdir, copy)
  shutil.rmtree(copy / 'checkpoints')
  world.train(copy).wait().expect(2, 'has no checkpoints')
  assert evidence.losses(copy) == straight.losses


def _scheme(world: World, _: Straight) -> None:
  """a store with one slash, or in capitals, is no local folder"""
  for place in ('GS:/bucket/x', 'file:/x', 'S3://bucket/x'):
    world.train(place, flags=['--dry_run']).wait().expect(2, place)


def _other_settings(world: World, _: Straight) -> None:
  """JAX_ENABLE_X64 is set at the resumption: reported, and the losses are close"""
  workdir, straight = _stopped(world), world.straight()
  done = world.finish(workdir, env={'JAX_ENABLE_X64': '1'})
  assert 'changed since the last session: $JAX_ENABLE_X64 None -> 1' in done.err
  for ours, theirs in zip(evidence.losses(workdir), straight.losses, strict=True):
    assert abs(ours[1] - theirs[1]) < 1e-5, (ours, theirs)


def _debugging(world: World, straight: Straight) -> None:
  """variables for debugging: JAX_DISABLE_JIT is refused, JAX_TRANSFER_GUARD is right"""
  workdir = world.path('debug')
  world.train(workdir, env={'JAX_DISABLE_JIT': '1'}).wait().expect(2, 'JAX_DISABLE_JIT')
  world.finish(workdir, env={'JAX_TRANSFER_GUARD': 'disallow'})
  world.check(workdir, straight)


def _hook(world: World, _: Straight) -> None:
  """GIT_DIR of a hook of git: the recorded commit is that of the code"""
  other, workdir = world.path('other'), world.path('hooked')
  command = ['git', '-C', str(process.ROOT), 'rev-parse', 'HEAD']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise Skip('the code is not in a checkout of git')
  subprocess.run(['git', 'init', '-q', str(other)], check=True)
  world.finish(workdir, steps=1, env={'GIT_DIR': str(other / '.git')})
  git = evidence.sessions(workdir)[-1]['git']
  assert git['commit'] == done.stdout.strip(), git


UNNAMED = (
  _twice,
  _nested,
  _power_lost,
  _pipes,
  _hard_links,
  _no_checkpoints,
  _scheme,
  _other_settings,
  _debugging,
  _hook,
)

ROWS_F = [
  Row('60', 'situations that no list had named', unnamed, len(UNNAMED), 1),
]
