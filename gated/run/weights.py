"""Initial weights from another run, or from a Hugging Face folder.

A gate without saved weights keeps its initial values. With zero-initialised logits and
twice their sigmoid, the first step then equals that of the ungated model.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from gated import config, data, hf, model, storage
from gated.run import checkpoint, workdir

_log = logging.getLogger('gated')


class Source(NamedTuple):
  """The location of the weights, and how their model differs from the new one."""

  folder: Path | storage.Path  # the checkpoints of a workdir, or a Hugging Face folder
  step: int | None  # None for a Hugging Face folder
  differs: dict[str, tuple[Any, Any]]  # knob: (source, new)

  def __str__(self) -> str:
    if self.step is None:
      return str(self.folder)
    return f'{self.folder.parent}:{self.step}'


def find(init_from: str, like: model.Transformer, corpus: data.Corpus) -> Source:
  """'WORKDIR[:STEP]' or a Hugging Face folder -> Source.

  `like` is the abstract model. ValueError if the weights do not fit it, or if the data
  use another tokenizer. Knobs of the model that differ but keep all shapes are logged
  and returned in `differs`.
  """
  place, step = workdir.split_step(init_from)
  try:
    saves = storage.path(place) / 'checkpoints'
    if not storage.is_remote(saves) and hf.is_checkpoint(init_from):
      return _imported(Path(init_from), like, corpus)
    if not storage.names(saves):
      raise ValueError(f'neither {saves} nor a config.json with *.safetensors exists')
    return _saved(saves, step or 'latest', like, corpus)
  except ValueError as error:
    raise ValueError(f'config.init_from={init_from!r}: {error}') from error


def _imported(folder: Path, like: model.Transformer, corpus: data.Corpus) -> Source:
  hf.check(folder, like, fresh=True)
  tokenizer = folder / 'tokenizer.json'
  if tokenizer.is_file():
    corpus.check_tokenizer(tokenizer)
  else:
    _log.warning(
      '%s has no tokenizer.json: cannot compare it with the tokenizer of the data', folder
    )
  return Source(folder, None, {})


def _saved(saves: storage.Path, step: str, like: model.Transformer, corpus) -> Source:
  with checkpoint.Reader(saves) as source:
    number = source.pick(step, 'step')
    source.check_model(number, like)
    about = source.about(number)
  if about['data'].get('tokenizer') != corpus.fingerprint['tokenizer']:
    raise ValueError('its data has another tokenizer than config.data.mixture')
  current = {'model': dataclasses.asdict(like.cfg)}
  differs = config.differences({'model': about['config']['model']}, current)
  for knob, (old, new) in differs.items():
    _log.info('%s is %r, but was %r for the weights', knob, new, old)
  return Source(saves, number, differs)


def read(source: Source, like: model.Transformer, fresh: model.Transformer) -> Any:
  """Reads the model with the shardings of `like`; missing gates come from `fresh`."""
  _log.info('starting from the weights of %s', source)
  if source.step is None:
    return hf.read(Path(source.folder), like, fresh=fresh)
  with checkpoint.Reader(source.folder) as saved:
    return saved.restore_model(source.step, like, fresh=fresh)
