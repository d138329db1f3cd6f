"""The files of a checkpoint -> its model, tokenizer, config and data."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from gated import config, data, hf, model, storage
from gated.data import tokenizer
from gated.devices import mesh, trees
from gated.model import remedies, streaming
from gated.plan.plan import reading, replicated
from gated.run import checkpoint, weights

SHORTEST = 16  # Texts are padded to a power of two; this is the smallest.

_log = logging.getLogger('gated')

Text = str | Sequence[int] | np.ndarray


class Opened:
  """A checkpoint, whose weights are read when `model` is first used.

  They are sharded over all devices. A text is a single document: a string, or a sequence
  of token ids.
  """

  def __init__(
    self,
    path: storage.Path,
    cfg: model.Config,
    *,
    step: int | None,
    about: dict[str, Any] | None,
    cache: str,
  ):
    self.path = path  # the workdir, or the Hugging Face folder
    self.cfg = cfg
    self.step = step  # None for imported weights
    self.about = about  # metadata of the step's checkpoint; None for imported weights
    self.cache = cache  # folder of the embedded corpus and of copied datasets
    self.changes: tuple[Any, ...] = ()  # functions applied to the model after its reading
    self.yarn = ''  # the argument of `stretched`

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The resolved recipe of the run; for imported weights, only its group `model`."""
    return self.about['config'] if self.about else {'model': dataclasses.asdict(self.cfg)}

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices; the weights are split over them."""
    return reading(self.cfg)[0]

  @functools.cached_property
  def model(self) -> model.Transformer:
    """The model: `model(tokens) -> logits`, with its weights."""
    _, like = reading(self.cfg)
    net = trees.unflatten(like, self.leaves)
    net = net if self.step is None else net.at_step(self.step)
    for change in self.changes:
      net = change(net)
    return net

  @functools.cached_property
  def leaves(self) -> dict[str, jax.Array]:
    """The weights by name, as they were saved.

    `weights.Removed` if a run in progress has removed the step since `load`.
    """
    _, like = reading(self.cfg)
    if self.step is None:
      # Evaluations may compute another function, such as with YaRN.
      return trees.flatten(hf.read(Path(self.path), like, allowed=['config.model']))
    with checkpoint.Reader(self.path / 'checkpoints') as saves:
      try:
        return trees.flatten(saves.restore_model(self.step, like))
      except (ValueError, OSError) as error:
        if not saves.removed([self.step]):
          raise
        raise weights.Removed(
          f'{self.path} is a run in progress and has removed step {self.step} '
          'meanwhile: start again, or name a step that it keeps'
        ) from error

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The tokenizer that the model was trained with.

    ValueError if the dataset or the Hugging Face folder no longer holds it.
    """
    if self.about is None:
      file = Path(self.path) / 'tokenizer.json'
      if not file.is_file():
        raise ValueError(f'{self.path} has no tokenizer.json: pass token ids, not text')
      return tokenizer.load(str(file))
    knobs = self.config['data'] | {'cache': self.cache}
    opened = data.open_tokenizer(config.build(data.Config, knobs, 'config.data'))
    if opened.fingerprint != self.about['data']['tokenizer']:
      raise ValueError(
        f'config.data.mixture={knobs["mixture"]!r} now has another tokenizer than '
        f'{self.path} was trained with: pass token ids, not text'
      )
    return opened

  @property
  def length(self) -> int:
    """Tokens of the rows that it was trained on; 0 for imported weights."""
    return self.config['data']['length'] if self.about else 0

  @property
  def prepared(self) -> int:
    """The number of tokens that RoPE is prepared for; 0 if unknown for imported weights.

    This is the length of the training rows, or max_position_embeddings for imported
    weights; more with YaRN.
    """
    yarn, length = self.cfg.attn.yarn, self.length
    stretched = int(yarn.factor * yarn.original) if yarn.factor > 1 else 0
    if not self.about:
      content = hf.files.read_json(Path(self.path) / hf.files.CONFIG)
      length = int(content.get('max_position_embeddings') or 0)
    return stretched if self.yarn and stretched else max(length, stretched)

  @property
  def tag(self) -> str:
    """The step in the names of its reports, such as '1000', 'imported', '1000-yarn=4'."""
    step = 'imported' if self.step is None else f'{self.step}'
    return f'{step}-yarn={self.yarn.replace(",", "+")}' if self.yarn else step

  @property
  def tokenizer_digest(self) -> str:
    """The fingerprint of its tokenizer; ValueError if imported weights have none."""
    return self.about['data']['tokenizer'] if self.about else self.tokenizer.fingerprint

  def corpus(
    self, mixture: str = '', *, knobs: dict[str, Any] | None = None, seed: int = 0
  ) -> data.Corpus:
    """The data that the run was trained on, or another mixture, as rows of tokens.

    `knobs` (as config.data) and `seed` are for imported weights, which have no data of
    their own. With a batch of one row, row i is the run's i-th row. ValueError if the
    run's data has changed or the mixture has another tokenizer.
    """
    c = self.config if self.about else {'data': knobs, 'seed': seed}
    if c['data'] is None:
      raise ValueError(f'{self.path} has no data of its own: pass `knobs`')
    # The cache folder belongs to this machine, not to the checkpoint.
    data_knobs = c['data'] | {'cache': self.cache}
    data_knobs |= {'mixture': mixture} if mixture else {}
    cfg = config.build(data.Config, data_knobs, 'config.data')
    corpus = data.open(cfg, vocab=self.cfg.vocab, batch=1, seed=c['seed'], max_segments=0)
    if self.about:
      self._check_data(corpus, mixture)
    elif (file := Path(self.path) / 'tokenizer.json').is_file():
      corpus.check_tokenizer(file)
    else:
      _log.warning('no %s: the tokenizer of the data is not checked', file)
    return corpus

  def _check_data(self, corpus: data.Corpus, mixture: str) -> None:
    """ValueError if the run's data has changed, or if a mixture has another tokenizer."""
    assert self.about is not None
    fingerprint = self.about['data']
    if not mixture and corpus.fingerprint['sha256'] != fingerprint['sha256']:
      raise ValueError(
        f'config.data.mixture={self.config["data"]["mixture"]!r} is no longer the data '
        'of the run (another Python version, or another dataset in that place): name a '
        'mixture with --data'
      )
    if corpus.fingerprint['tokenizer'] != fingerprint['tokenizer']:
      raise ValueError(f'--data={mixture!r} has another tokenizer than the run')

  def fit(self, segments: int) -> Self:
    """The same model for rows of up to `segments` documents (`max_segments`)."""
    attn = self.cfg.attn
    most = max(attn.max_segments, segments)
    attn = dataclasses.replace(attn, max_segments=most)
    return self._with(attn=attn)

  def dropless(self) -> Self:
    """The same model as far as rows of a batch do not affect each other.

    Its experts are dropless, and no scale of FP8 is shared.
    """
    moe = dataclasses.replace(self.cfg.moe, dispatch='dropless')
    return self._with(moe=moe, numerics=self.cfg.numerics.plain())

  def stretched(self, spec: str) -> Self:
    """The same model with YaRN, such as '4' or '4,truncate=False'; '' for no change.

    `spec` is as for `Yarn.changed`. The factor multiplies the length that RoPE is
    prepared for; if the model already has YaRN, it replaces the factor.
    """
    if not spec:
      return self
    yarn = self.cfg.attn.yarn
    if yarn.factor == 1 and self.prepared:
      yarn = dataclasses.replace(yarn, original=self.prepared)
    attn = dataclasses.replace(self.cfg.attn, yarn=yarn.changed(spec))
    fitted = self._with(attn=attn)
    fitted.yarn = spec
    return fitted

  def streaming(self, window: int, kept: int) -> Self:
    """The same model with StreamingLLM: a window, and the first tokens are kept.

    As in `model.streaming`; each row is one document, whatever `mask_documents` was.
    ValueError for a model whose attention already has a window, or is not a softmax.
    """
    attn = self.cfg.attn
    if attn.window or attn.normalizer not in remedies.OVER_SOFTMAX:
      knob = 'window' if attn.window else 'normalizer'
      raise ValueError(
        f'the model has config.model.attn.{knob}={getattr(attn, knob)!r}, but a softmax '
        'over the whole row is expected'
      )
    attn = dataclasses.replace(attn, window=window)
    fitted = self._with(attn=attn, mask_documents=False)
    if kept:
      fitted.changes += (functools.partial(streaming.keep, kept=kept),)
    return fitted

  def _with(self, **changes: Any) -> Self:
    cfg = dataclasses.replace(self.cfg, **changes)
    same: dict[str, Any] = dict(step=self.step, about=self.about, cache=self.cache)
    fitted = type(self)(self.path, cfg, **same)
    fitted.changes, fitted.yarn = self.changes, self.yarn
    if 'leaves' in vars(self):  # Not read again: a run may have removed the step.
      fitted.leaves = self.leaves
    return fitted

  @functools.cache  # noqa: B019
  def compiled(self, function: Any) -> Any:
    """A function of the model and arrays, compiled for all devices."""
    return replicated(self.cfg, self.mesh, function)

  def tokens(self, text: Text) -> np.ndarray:
    """A text -> its token ids; ValueError for an id outside of the vocabulary."""
    ids = self.tokenizer.encode(text)[0] if isinstance(text, str) else np.asarray(text)
    if not ids.size or ids.ndim != 1 or ids.dtype.kind not in 'iu':
      raise ValueError(f'{text!r:.100} is neither a text with tokens nor a list of ids')
    if ids.min() < 0 or ids.max() >= self.cfg.vocab:
      raise ValueError(f'token ids must be in [0, {self.cfg.vocab})')
    return ids.astype(np.int32)

  def _batch(self, tokens: np.ndarray, targets: Any = None) -> tuple[data.Batch, int]:
    """One text -> (a placed batch whose rows all hold it, its number of tokens).

    The batch has one row for each shard of a batch on the mesh.
    """
    count = len(tokens)
    length = max(SHORTEST, 1 << (count - 1).bit_length())
    pad = lambda x: np.pad(np.asarray(x), (0, length - count))
    live = pad(np.ones(count, np.int32))
    row = data.Batch(
      tokens=pad(tokens),
      targets=pad(tokens if targets is None else targets),
      weights=live.astype(np.float32),
      segments=live,
      positions=np.arange(length, dtype=np.int32),
    )
    rows = mesh.ways('batch', self.mesh)
    held = len(mesh.rows(self.mesh, rows))
    local = jax.tree.map(lambda x: np.broadcast_to(x, (held, length)), row)
    return mesh.place(local, self.mesh, rows), count
