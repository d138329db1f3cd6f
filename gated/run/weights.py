"""Weights to start from: those of another run, or of a folder of Hugging Face's.

A gate that they lack is no fault: it stays as it is made. With zero-initialised logits
and twice their sigmoid, the first step is then that of the ungated model.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from gated import config, data, hf, model, storage
from gated.run import checkpoint, workdir

_log = logging.getLogger('gated')


class Source(NamedTuple):
  """Where weights are, and what of the model that had them is another now."""

  folder: Path | storage.Path  # a workdir's checkpoints, or Hugging Face's folder
  step: int | None  # None for Hugging Face's
  differs: dict[str, tuple[Any, Any]]  # knob: (there, here)

  def __str__(self) -> str:
    run = f'{self.folder.parent}:{self.step}'
    return str(self.folder) if self.step is None else run


def find(init_from: str, like: model.Transformer, corpus: data.Corpus) -> Source:
  """'WORKDIR[:STEP]' or a folder of Hugging Face's -> Source.

  `like` is the abstract model to be filled. ValueError if the weights do not fit it, or
  the data are of another tokenizer than theirs. What fits, but computes otherwise (other
  knobs than the gate's, of the same shapes), is told, and is for the caller to record.
  """
  place, step = workdir.split_step(init_from)
  try:
    saves = storage.path(place) / 'checkpoints'
    if not storage.is_remote(saves) and hf.is_checkpoint(init_from):
      return _imported(Path(init_from), like, corpus)
    if not storage.names(saves):
      raise ValueError(f'there is neither {saves} nor a config.json with *.safetensors')
    return _saved(saves, step or 'latest', like, corpus)
  except ValueError as error:
    raise ValueError(f'config.init_from={init_from!r}: {error}') from error


def _imported(folder: Path, like: model.Transformer, corpus: data.Corpus) -> Source:
  hf.check(folder, like, fresh=True)
  theirs = folder / 'tokenizer.json'
  if theirs.is_file():
    corpus.check_tokenizer(theirs)
  else:
    _log.warning('%s has no tokenizer.json: the data may be of another', folder)
  return Source(folder, None, {})


def _saved(saves: storage.Path, step: str, like: model.Transformer, corpus) -> Source:
  with checkpoint.Reader(saves) as source:
    at = source.pick(step, 'step')
    source.check_model(at, like, fresh=True)
    about = source.about(at)
  if about['data'].get('tokenizer') != corpus.fingerprint['tokenizer']:
    raise ValueError('its data has another tokenizer than config.data.mixture here')
  here = {'model': dataclasses.asdict(like.cfg)}
  differs = config.differences({'model': about['config']['model']}, here)
  for knob, (there, now) in differs.items():
    _log.info('%s is %r here, and was %r for the weights', knob, now, there)
  return Source(saves, at, differs)


def read(source: Source, like: model.Transformer, fresh: model.Transformer) -> Any:
  """The model, placed as `like` says; a gate that the weights lack is that of `fresh`."""
  _log.info('starting from the weights of %s', source)
  if source.step is None:
    return hf.read(Path(source.folder), like, fresh=fresh)
  with checkpoint.Reader(source.folder) as saved:
    return saved.restore_model(source.step, like, fresh=fresh)
