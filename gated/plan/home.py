"""The workdir of a run: the given one, or the default one and the runs beside it."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from gated import config, storage
from gated.plan import recipe
from gated.run import workdir as workdirs

RUNS = 'runs'  # The folder of default workdirs.
MOST = 3  # Runs beside the default workdir that are reported.
# Names for --allow_change that do not affect the default workdir; 'data' is the content
# of the data.
UNNAMED = ('data', 'config.paper')

_log = logging.getLogger('gated')


class Near(NamedTuple):
  """A run whose recipe differs in one knob."""

  workdir: storage.Path
  knob: str
  value: Any  # of the knob in that run
  resumes: bool  # whether the new recipe may resume the run

  def __str__(self) -> str:
    text = f'{self.workdir} has the same recipe with {self.knob[7:]}={self.value}'
    return f'{text}: --workdir={self.workdir} resumes it' if self.resumes else text


def workdir(given: str, c: dict, *, allowed: Collection[str]) -> storage.Path:
  """--workdir, a resolved recipe and --allow_change -> the workdir.

  The default is named after the recipe; the log names it, and for a new run the existing
  runs that differ in one knob. ValueError if --workdir names a step, or if --allow_change
  has no effect.
  """
  if given:
    place, step = workdirs.split_step(given)
    if step:
      raise ValueError(
        f'--workdir={given} names a step; to resume from it: --workdir={place} '
        f'--restore_step={step}'
      )
    return storage.path(given)
  default = storage.path(f'{RUNS}/{c["name"]}-{recipe.digest(c)}')
  exists = storage.exists(default / 'run.json')
  beside = [] if exists else sorted(near(default, c), key=lambda run: not run.resumes)
  for name in allowed:
    # A fresh run may need it for the weights of config.init_from.
    if name.rstrip('.').startswith(UNNAMED) or (c['init_from'] and not exists):
      continue
    same = [f'={run.workdir}' for run in beside if workdirs.within(run.knob, name)]
    raise ValueError(
      f'--allow_change={name} needs --workdir{(*same, "")[0]}: the default workdir is '
      'named after the recipe, so a changed knob starts a new run'
    )
  if jax.process_index() == 0:
    _log.info('workdir: %s%s', default, ' (resumes)' if exists else '')
    for run in beside[:MOST]:
      _log.info('%s', run)
  return default


def near(default: storage.Path, c: Mapping) -> Iterable[Near]:
  """A default workdir and its recipe -> the runs beside it that differ in one knob."""
  for name in storage.names(default.parent):
    place = default.parent / name
    try:
      old = storage.read_json(place / 'run.json', workdirs.LIMIT)['config']
      changed = config.differences(old, c)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      continue  # Not a workdir, or damaged.
    named = ('config.name', 'config.paper.')
    knobs = [knob for knob in changed if not knob.startswith(named)]
    before, now = config.flatten(old), config.flatten(c)
    if len(knobs) == 1 and knobs[0] in before.keys() & now.keys():
      free = not workdirs.fixed(knobs, c) and _ahead(place, c)
      yield Near(place, knobs[0], before[knobs[0]], free)


def _ahead(place: storage.Path, c: Mapping) -> bool:
  """Whether no saved step of a run is past the last step of the recipe."""
  saved = storage.names(place / 'checkpoints')
  return all(int(step) <= c['steps'] for step in saved if step.isdecimal())
