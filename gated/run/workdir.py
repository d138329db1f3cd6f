"""A workdir: its owner, the step to resume from, and the knobs that may change.

outcome.json holds the result of the last session (gated/run/outcome.py). The file does
not exist during a session, nor after a session that was killed.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from gated import config, storage
from gated.devices import determinism, processes
from gated.run import checkpoint, exit_codes, lock, metrics, outcome, places
from gated.run.metrics import provenance

# Knobs that may change when a run resumes; the data are compared by fingerprint.
MAY_CHANGE = (
  'config.name',
  'config.model_from',  # The knobs of the model that it sets are compared.
  'config.steps',
  'config.mesh.',
  'config.eval.',
  'config.checkpoint.',
  'config.log.',
  'config.paper.',
  'config.data.',
  # How a step is computed, for other devices: changes only the last bits.
  'config.accum',
  'config.loss.chunk',
  'config.model.layers',
  'config.model.remat',
  'config.model.attn.backend',
  'config.model.attn.max_segments',
  'config.model.attn.mean_segments',
  'config.model.moe.backend',
  # The response to a bad step. Its definition (threshold and window) may not change.
  'config.stability.on_spike',
  'config.stability.max_',
  'config.stability.stuck_after',
  'config.stability.peer_timeout',
)

LIMIT = provenance.MAX_BYTES  # The largest run.json, in bytes.
# Seconds without a beat after which the lock of another machine is stale.
STALE_AFTER = 600.0
SETTLE, SETTLE_REMOTE = 0.2, 2.0  # Seconds before a new lock is read back.

_log = logging.getLogger('gated')


class InUse(ValueError):
  """Another running process holds the workdir."""


class TakenOver(RuntimeError):
  """Another run took over the workdir; this run must stop writing to it."""


class Resume(NamedTuple):
  """The state of a workdir when a run starts or resumes in it."""

  step: int | None  # The verified step to restore; None for a fresh start.
  steps: list[int]  # All committed steps.
  changed: dict[str, Any]  # knob: (value in the previous session, value now)


def check(
  workdir: storage.Path,
  c: dict,
  fingerprint: dict,
  *,
  like: Any,
  allowed: Collection[str],
  restore_step: str,
) -> Resume:
  """A workdir, a resolved recipe and the fingerprint of its data -> Resume.

  `like` is the abstract state to restore. `allowed` lists knobs, groups of knobs
  (`config.optim.`) or 'data' that may change although they change the training.
  `restore_step` is a step, or '' for the newest valid one. If the session before followed
  it too, with the same training, a scheduler has repeated the command: the newest one.

  ValueError if another knob changed, if no step is valid, if the state does not fit, or
  if the workdir is not writable.
  """
  known = [*config.flatten(c), 'data']
  for name in allowed:
    if not any(within(k, name) for k in known):
      raise ValueError(
        f'--allow_change={name} is not a knob{config.nearest(name, known)}'
      )
  places.check(workdir, c['log'])
  saves = workdir / 'checkpoints'
  with checkpoint.Reader(saves) as saved:
    old = _owner(workdir)
    same = old is None or not fixed(config.differences(old['config'], c), c)
    followed = bool(restore_step) and same and saved.followed() == restore_step
    try:
      if restore_step and not followed:
        step = saved.pick(restore_step, '--restore_step')
      else:
        step = saved.newest_good()
    except (ValueError, PermissionError) as error:
      raise ValueError(f'--workdir={workdir}: {error}') from error
    if followed:
      _log.info(
        '--restore_step=%s was followed before: resuming from step %s. To go back again, '
        'resume once without the flag',
        *(restore_step, step),
      )
    steps = saved.steps()
    old = old or (saved.about(step) if step is not None else None)
    if old is None:
      if metrics.exists(workdir / 'metrics.jsonl'):
        raise ValueError(f'--workdir={workdir} has a metrics.jsonl but no run.json')
      return Resume(None, steps, {})
    if step is None:
      _refuse_lost(workdir, old)
    changed = _changed(old, c, fingerprint)
    if step is not None:
      _correct(changed, old, saved.about(step), c, fingerprint)
    misfit = ''
    if step is not None:
      try:
        saved.check_items(step, checkpoint.split(like))
      except ValueError as error:
        misfit = str(error)
    _refuse(workdir, c, changed, allowed, misfit)
    # Allowed: it changes only the last bits.
    before, now = old.get('deterministic'), determinism.enabled(os.environ)
    if before is not None and before != now:
      changed['--deterministic'] = before, now
    if step is not None and step > c['steps']:
      raise ValueError(f'config.steps={c["steps"]}, but {workdir} is at step {step}')
  return Resume(step, steps, changed)


@contextlib.contextmanager
def held(workdir: storage.Path) -> Generator[lock.Lock]:
  """Holds the lock of a workdir; process 0 takes it for all processes of the run.

  Raises InUse in all processes if another running process holds it.
  """
  settle = SETTLE_REMOTE if storage.is_remote(workdir) else SETTLE
  workdir_lock = lock.Lock(workdir, stale_after=STALE_AFTER, settle=settle)
  fault = ''
  if jax.process_index() == 0:
    try:
      workdir_lock.acquire()
    except ValueError as error:
      fault = str(error)
  try:
    if fault := max(processes.gather(fault)):
      raise InUse(fault)
    yield workdir_lock
  finally:
    workdir_lock.release()


def check_held(held_lock: lock.Lock, *, now: bool) -> None:
  """Raises TakenOver if another run took over the workdir: by the last beat, or `now`."""
  if now:
    held_lock.check()
  if held_lock.lost:
    raise TakenOver(held_lock.lost)


def begin(workdir: storage.Path, resume: Resume, steps: list[int]) -> None:
  """Removes the outcome of the previous session; call it while holding the lock.

  `steps` are the steps committed now. InUse if another run saved a step since `check`.
  """
  if steps != resume.steps:
    raise InUse(
      f'--workdir={workdir}: another run saved a step since the check: start again'
    )
  if jax.process_index() == 0:
    storage.remove(workdir / outcome.NAME)


def conclude(workdir: storage.Path, code: int, reason: str) -> None:
  """Writes outcome.json on process 0; only warns if the disk rejects it.

  Updates that were skipped are added to the reason.
  """
  if jax.process_index():
    return
  try:
    log = workdir / 'metrics.jsonl'
    train = metrics.last(log, 'train') or {}
    if skipped := int(train.get('skipped', 0)):
      reason += f'; {skipped} of {train["step"]} updates were skipped'
    step = metrics.last_step(log)
    outcome.write(workdir, outcome.Outcome(code, step, reason, time.time()))
  except (OSError, ValueError, TypeError) as error:  # The log may be damaged.
    _log.warning('%s could not be written: %s', workdir / outcome.NAME, error)


def _refuse_lost(workdir: storage.Path, old: Mapping) -> None:
  """Raises ValueError if a step was saved, as in a copy without checkpoints/."""
  ended = None
  with contextlib.suppress(ValueError):  # A damaged outcome.json is replaced.
    ended = outcome.read(workdir)
  if old['restored'] or (ended and ended.code in exit_codes.SAVED):
    raise ValueError(
      f'--workdir={workdir} has no checkpoints, but its run has saved some: copy the '
      'folder checkpoints as well, choose another workdir, or delete this one to start '
      'from scratch'
    )


def _refuse(
  workdir: storage.Path, c: dict, changed: dict, allowed: Collection, misfit: str
):
  """Raises ValueError with a list of the changed knobs that may not change.

  `misfit` says why the saved state cannot be restored, or is ''.
  """
  locked = fixed(changed, c)
  permitted = {k for k in locked if any(within(k, name) for name in allowed)}
  refused = {k: changed[k] for k in sorted(locked if misfit else locked - permitted)}
  if refused:
    listed = '\n'.join(f'  {k}: {a!r} there, {b!r} here' for k, (a, b) in refused.items())
    advice = (
      'Choose another workdir, start from its weights with --config.init_from, or resume '
      f'with --allow_change={",".join(refused)}, which run.json records'
    )
    if misfit:
      advice = (
        'Choose another workdir, or keep these knobs; --config.init_from adds a gate to '
        f'its weights; --allow_change cannot help: {misfit}'
      )
    raise ValueError(
      f'--workdir={workdir} belongs to a run that differs in\n{listed}\n{advice}'
    )
  if misfit:
    raise ValueError(f'--workdir={workdir}: {misfit}')
  for knob in sorted(permitted):
    _log.warning('%s: changed from %r to %r (--allow_change)', knob, *changed[knob])


def fixed(changed: Iterable[str], c: Mapping) -> set[str]:
  """Changed knobs and a recipe -> those that need --allow_change to resume a run."""
  never = {'config.data.length'}
  if c['model']['moe']['experts'] and c['loss']['balance_over'] != 'global':
    never.add('config.accum')  # Routers balance their load within each micro-batch.
  return {k for k in changed if not k.startswith(MAY_CHANGE) or k in never}


def within(knob: str, name: str) -> bool:
  """Tests if a knob is `name` or in that group: 'config.optim' or 'config.optim.'."""
  return f'{knob}.'.startswith(f'{name.rstrip(".")}.')


def _correct(changed: dict, old: Mapping, about: Mapping, c: Mapping, data: dict) -> None:
  """Compares knobs that were edited in run.json with the checkpoint instead.

  An edited knob differs from the checkpoint, and no session has changed it.
  """
  edited = _changed(about, old['config'], old['data']).keys() - old.get('known', ())
  true = _changed(about, c, data)
  for knob in sorted(edited):
    changed.pop(knob, None)
    if knob in true:
      changed[knob] = true[knob]
    _log.warning('run.json was edited: %s is as in the checkpoint', knob)


def _changed(old: Mapping, c: Mapping, fingerprint: Mapping) -> dict[str, Any]:
  """'config' and 'data' of a session, and those now -> {knob or 'data': (old, new)}."""
  changed = config.differences(old['config'], c)
  data = [str(d.get('sha256')) for d in (old['data'], fingerprint)]
  if data[0] != data[1]:
    changed['data'] = data[0][:12], data[1][:12]
  return changed


def _owner(workdir: storage.Path) -> dict | None:
  """Reads run.json -> 'config', 'data' and 'deterministic' of the previous session.

  Its 'known' are the knobs that a session has changed; 'restored': whether one resumed.
  """
  path = workdir / 'run.json'
  try:
    old = storage.read_json(path, LIMIT)
    *_, last = {}, *old['sessions']
    return {
      'config': dict(old['config']),
      'data': dict(old['data']),
      'deterministic': dict(last).get('deterministic'),
      'restored': any(dict(s).get('restored_step', -1) >= 0 for s in old['sessions']),
      'known': {
        k for session in old['sessions'] for k in dict(session).get('changed', ())
      },
    }
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise ValueError(f'--workdir={workdir}: {path} is damaged: {error!r}') from error


def split_step(path: str, step: str = '') -> tuple[str, str]:
  """'WORKDIR:STEP', or a workdir and a step -> ('WORKDIR', 'STEP').

  STEP is digits, 'latest', 'best', or '' if neither has one. ValueError if both do.
  """
  place, colon, suffix = path.rpartition(':')
  if not (colon and re.fullmatch(r'\d+|latest|best', suffix)):
    return path, step
  if step:
    raise ValueError(f'{path} names a step, and step {step} is given too')
  return place, suffix
