"""Whose a workdir is, from where its run goes on, and what may differ from before.

How its last session ended is in its outcome.json (gated/outcome.py), which is not there
while a session lasts, nor after one that was killed.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gated import config, storage
from gated.devices import determinism, processes
from gated.run import checkpoint, lock, metrics, outcome
from gated.run.metrics import provenance

# What may differ between a run and its resumption; the data are held by fingerprint.
MAY_CHANGE = (
  'config.name',
  'config.steps',
  'config.mesh.',
  'config.eval.',
  'config.checkpoint.',
  'config.log.',
  'config.paper.',
  'config.data.',
  # How a step is computed, which moves its last bits only, and what other devices need.
  'config.accum',
  'config.loss.chunk',
  'config.model.layers',
  'config.model.remat',
  'config.model.attn.backend',
  'config.model.attn.max_segments',
  'config.model.moe.backend',
  # What is done about a bad step; what counts as one (threshold and window) may not.
  'config.stability.on_spike',
  'config.stability.max_',
  'config.stability.stuck_after',
  'config.stability.peer_timeout',
)

LIMIT = provenance.MAX_BYTES  # Of a run.json.
STALE_AFTER = 600.0  # Seconds of silence after which another machine's lock is stale.
SETTLE = {False: 0.2, True: 2.0}  # Seconds until a lock is believed: a disk's, a store's.

_log = logging.getLogger('gated')


class InUse(ValueError):
  """A run that lives has the workdir."""


class TakenOver(RuntimeError):
  """Another run has taken the workdir over; this one may not write there any more."""


class Resume(NamedTuple):
  """What a workdir holds of the run that starts or resumes there."""

  step: int | None  # To restore, verified; None for a fresh start.
  steps: list[int]  # All that are committed.
  changed: dict[str, Any]  # knob: (value in the session before, value now)


def check(
  workdir: storage.Path,
  c: dict,
  fingerprint: dict,
  *,
  like: Any,
  allowed: Collection[str],
  restore_step: str,
) -> Resume:
  """A workdir, a resolved recipe and its data's fingerprint -> Resume.

  `like` is the abstract state that a step is to be restored to. `allowed` names knobs,
  groups of them (`config.optim.`) or 'data' that may differ though they change what is
  trained. `restore_step` is a step, or '' for the newest that is whole.

  ValueError if more differs than may, if no step can be trusted or none fits, or if
  nothing can be written there.
  """
  known = [*config.flatten(c), 'data']
  for name in allowed:
    if not any(_within(k, name) for k in known):
      raise ValueError(f'--allow_change={name} is no knob{config.nearest(name, known)}')
  _check_writable(workdir)
  saves = workdir / 'checkpoints'
  with checkpoint.Reader(saves) as saved:
    if restore_step:
      step = saved.pick(restore_step, '--restore_step')
    else:
      try:
        step = saved.newest_good()
      except ValueError as error:
        raise ValueError(f'--workdir={workdir}: {error}') from error
    steps = saved.steps()
    old = _owner(workdir) or (saved.about(step) if step is not None else None)
    if old is None:
      if metrics.exists(workdir / 'metrics.jsonl'):
        told = 'has a metrics.jsonl, but no run that made it'
        raise ValueError(f'--workdir={workdir} {told}')
      return Resume(None, steps, {})
    changed = config.differences(old['config'], c)
    if old['data'].get('sha256') != fingerprint['sha256']:
      there = str(old['data'].get('sha256'))
      changed['data'] = there[:12], fingerprint['sha256'][:12]
    _refuse(workdir, c, changed, allowed)
    # It moves the last bits only, as the knobs that say how a step is computed.
    before, now = old.get('deterministic'), determinism.asked(os.environ)
    if before is not None and before != now:
      changed['--deterministic'] = before, now
    if step is not None:
      if step > c['steps']:
        raise ValueError(f'config.steps={c["steps"]}, but {workdir} is at step {step}')
      saved.check_state(step, like)
  return Resume(step, steps, changed)


@contextlib.contextmanager
def held(workdir: storage.Path) -> Generator[lock.Lock]:
  """The lock of a workdir, which process 0 holds for all processes of a run.

  InUse, in all of them, if a run that lives has it.
  """
  remote = storage.is_remote(workdir)
  mine = lock.Lock(workdir, stale_after=STALE_AFTER, settle=SETTLE[remote])
  fault = ''
  if jax.process_index() == 0:
    try:
      mine.acquire()
    except ValueError as error:
      fault = str(error)
  try:
    if fault := max(processes.gather(fault)):
      raise InUse(fault)
    yield mine
  finally:
    mine.release()


def check_held(mine: lock.Lock) -> None:
  """Raises TakenOver if the lock was lost."""
  if mine.lost:
    raise TakenOver(mine.lost)


def begin(workdir: storage.Path, resume: Resume, steps: list[int]) -> None:
  """Removes the outcome of the session before, once this process holds the lock.

  `steps` are those that are committed now. InUse if another run saved one since `check`.
  """
  if steps != resume.steps:
    raise InUse(f'--workdir={workdir} was changed by another run meanwhile: start again')
  if jax.process_index() == 0:
    storage.remove(workdir / outcome.NAME)


def conclude(workdir: storage.Path, code: int, told: str) -> None:
  """Writes how a session ended, on process 0; a disk that takes nothing is no fault."""
  if jax.process_index():
    return
  try:
    step = metrics.last_step(workdir / 'metrics.jsonl')
    outcome.write(workdir, outcome.Outcome(code, step, told, time.time()))
  except (OSError, metrics.Damaged) as error:
    _log.warning('%s could not be written: %s', workdir / outcome.NAME, error)


def _refuse(workdir: storage.Path, c: dict, changed: dict, allowed: Collection[str]):
  """Raises ValueError, listing the knobs, if more has changed than may."""
  never = {'config.data.length'}
  if c['model']['moe']['experts'] and c['loss']['balance_over'] != 'global':
    never.add('config.accum')  # Routers are asked to balance by micro-batch.
  asked = {k for k in changed if not k.startswith(MAY_CHANGE) or k in never}
  by_name = {k for k in asked if any(_within(k, name) for name in allowed)}
  refused = {k: changed[k] for k in sorted(asked - by_name)}
  if refused:
    listed = '\n'.join(f'  {k}: {a!r} there, {b!r} here' for k, (a, b) in refused.items())
    raise ValueError(
      f'--workdir={workdir} belongs to a run that differs in\n{listed}\n'
      'Name another workdir, start from its weights with --config.init_from, or go on '
      f'all the same with --allow_change={",".join(refused)}, which is recorded'
    )
  for knob in sorted(by_name):
    _log.warning('%s: %r before, %r from here on, as allowed', knob, *changed[knob])


def _within(knob: str, name: str) -> bool:
  """'config.optim.lr' is within itself, 'config.optim' and 'config.optim.'."""
  return f'{knob}.'.startswith(f'{name.rstrip(".")}.')


def _owner(workdir: storage.Path) -> dict | None:
  """The session before, from run.json: config, data's fingerprint, if deterministic."""
  path = workdir / 'run.json'
  try:
    old = json.loads(storage.read(path, LIMIT))
    *_, last = {}, *old['sessions']
    found = {'config': dict(old['config']), 'data': dict(old['data'])}
    return found | {'deterministic': dict(last).get('deterministic')}
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
    raise ValueError(f'--workdir={workdir}: {path} is damaged: {error!r}') from error


def _check_writable(workdir: storage.Path) -> None:
  if storage.is_remote(workdir):
    return  # A store tells when the lock is written.
  here = Path(workdir).absolute()
  parent = next(p for p in (here, *here.parents) if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ValueError(f'--workdir={workdir}: {parent} is no folder that can be written to')


def split_step(path: str) -> tuple[str, str]:
  """'WORKDIR:STEP' -> ('WORKDIR', 'STEP'); STEP is digits, latest or best, or ''."""
  match = re.fullmatch(r'(.*?)(?::(\d+|latest|best))?', path, re.S)
  assert match  # Every text matches.
  return match[1], match[2] or ''
