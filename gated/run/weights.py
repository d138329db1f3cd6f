"""Initial weights from another run, or from a Hugging Face folder.

A gate without saved weights keeps its initial values. With zero-initialised logits and
twice their sigmoid, the first step then equals that of the ungated model.
"""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from gated import config, data, hf, model, storage
from gated.run import checkpoint, workdir

ATTEMPTS = 5  # The most reads of a run that removes its steps.

# Knobs of the model that may differ from those of the weights: the function is the same.
SAME_FUNCTION = (
  # How a step is computed.
  *(knob for knob in workdir.MAY_CHANGE if knob.startswith('config.model.')),
  'config.model.numerics.compute',
  'config.model.numerics.matmul',
  'config.model.attn.rounding',
  'config.model.attn.gate.score',
  # Initial values, and how gates learn.
  'config.model.numerics.init_std',
  'config.model.numerics.residual_init',
  'config.model.norm_alpha',
  'config.model.attn.elastic_tau',
  'config.model.attn.gate.init',
  'config.model.attn.gate.std',
  'config.model.attn.gate.bias_init',
  'config.model.attn.gate.lr',
  'config.model.attn.gate.weight_decay',
)

_log = logging.getLogger('gated')


class Removed(ValueError):
  """The run of the given step has removed it meanwhile."""


class Source(NamedTuple):
  """The location of the weights, and how their model differs from the new one."""

  folder: Path | storage.Path  # the checkpoints of a workdir, or a Hugging Face folder
  step: int | None  # None for a Hugging Face folder
  differs: dict[str, tuple[Any, Any]]  # knob: (source, new)
  which: str  # the step as it was given: a number, latest or best

  def __str__(self) -> str:
    if self.step is None:
      return str(self.folder)
    return f'{self.folder.parent}:{self.step}'


def find(
  init_from: str,
  like: model.Transformer,
  corpus: data.Corpus,
  allowed: Collection[str] = (),
) -> Source:
  """'WORKDIR[:STEP]' or a Hugging Face folder -> Source.

  `like` is the abstract model. ValueError if the weights do not fit it, or if the data
  use another tokenizer. Knobs of the model that differ but keep all shapes are logged
  and returned in `differs`. Those that change the function must be in `allowed`, or in a
  group in it; added gates need not.
  """
  place, step = workdir.split_step(init_from)
  try:
    saves = storage.path(place) / 'checkpoints'
    folder = Path(storage.path(init_from))
    if not storage.is_remote(saves) and hf.is_checkpoint(folder):
      return _imported(folder, like, corpus, allowed)
    if not storage.names(saves):
      raise ValueError(f'neither {saves} nor a config.json with *.safetensors exists')
    return _saved(saves, step or 'latest', like, corpus, allowed)
  except ValueError as error:
    raise ValueError(f'config.init_from={init_from!r}: {error}') from error


def _imported(folder: Path, like: model.Transformer, corpus, allowed) -> Source:
  differs = hf.check(folder, like, fresh=True, allowed=allowed)
  tokenizer = folder / 'tokenizer.json'
  if tokenizer.is_file():
    corpus.check_tokenizer(tokenizer)
  else:
    _log.warning(
      '%s has no tokenizer.json: cannot compare it with the tokenizer of the data', folder
    )
  _log_differences(differs)
  return Source(folder, None, differs, '')


def _saved(
  saves: storage.Path, step: str, like: model.Transformer, corpus, allowed
) -> Source:
  with checkpoint.Reader(saves) as source:
    number = source.pick(step, 'step')
    about = source.about(number)
    theirs = config.build(model.Config, about['config']['model'], 'config.model')
    differs = config.differences(
      *({'model': dataclasses.asdict(cfg)} for cfg in (theirs, like.cfg))
    )
    added = () if theirs.attn.named else hf.GATES
    misfit = ''
    try:
      source.check_model(number, like)
    except ValueError as error:
      misfit = str(error)
    _refuse(differs, (*SAME_FUNCTION, *added, *allowed), misfit)
  if about['data'].get('tokenizer') != corpus.fingerprint['tokenizer']:
    raise ValueError('its data has another tokenizer than config.data.mixture')
  _log_differences(differs)
  return Source(saves, number, differs, step)


def _refuse(
  differs: dict[str, tuple[Any, Any]], allowed: Collection[str], misfit: str
) -> None:
  """ValueError for a knob that changes the function, or if the weights do not fit."""
  refused = [k for k in differs if not any(workdir.within(k, name) for name in allowed)]
  if not refused and not misfit:
    return
  values = [f'{k}={differs[k][1]!r}, but its run has {differs[k][0]!r}' for k in refused]
  advice = 'Give these knobs the values of the run'
  if not misfit:
    advice += f', or allow another function with --allow_change={",".join(refused)}'
  faults = '; '.join(filter(None, [*values, misfit]))
  raise ValueError(f'{faults}. {advice}' if refused else faults)


def _log_differences(differs: dict[str, tuple[Any, Any]]) -> None:
  for knob, (old, new) in differs.items():
    _log.info('%s is %r, but was %r for the weights', knob, new, old)


def read(
  source: Source, like: model.Transformer, fresh: model.Transformer
) -> tuple[Any, Source]:
  """Reads the model with the shardings of `like`; missing gates come from `fresh`.

  Also returns the source: another step than the given one if its run, which still
  trains, has removed that step; Removed if the step was given by number.
  """
  _log.info('starting from the weights of %s', source)
  if source.step is None:
    folder, allowed = Path(source.folder), tuple(source.differs)
    return hf.read(folder, like, fresh=fresh, allowed=allowed), source
  with checkpoint.Reader(source.folder) as saved:
    for left in reversed(range(ATTEMPTS)):
      try:
        return saved.restore_model(source.step, like, fresh=fresh), source
      except (ValueError, OSError) as error:
        if not saved.removed([source.step]):
          raise
        if not left or source.which.isdigit():
          raise Removed(
            f'config.init_from: the run has removed {source} meanwhile: start again, or '
            'name a step that it keeps (config.checkpoint.keep_every)'
          ) from error
      source = source._replace(step=saved.pick(source.which, 'step'))
      _log.warning('its run has removed that step: using %s', source)
  raise AssertionError
