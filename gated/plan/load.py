"""A checkpoint as an object: `gated.load(path)` -> model, tokenizer, config, measures.

T tokens  V vocabulary  L layers  H heads  K head width
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gated import config, data, evals, hf, model, storage
from gated.plan import drawing, probing
from gated.plan.opened import Opened, Text
from gated.plan.plan import evaluate_step
from gated.probes import attention, gates
from gated.run import checkpoint, weights, workdir

# Required entries in a checkpoint's metadata.
NEEDED = (
  'config.model',
  'config.data',
  'config.loss.chunk',
  'config.seed',
  'config.batch',
  'data.sha256',
  'data.tokenizer',
  'stability.rollbacks',
)
_log = logging.getLogger('gated')

CHUNK = 1024  # Tokens per device whose logits are in memory at a time, for imports.


class Loaded(Opened):
  """A trained model and its measures, made by `load`.

  The weights are read when `model` is first used, and split over all devices. A text is a
  single document: a string, or a sequence of token ids.
  """

  def evaluate(self, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    """A placed batch (B, T) -> each row's sum of nats and sum of weights: (B,), (B,)."""
    return self.row_losses(self.model, batch)

  def logits(self, text: Text) -> np.ndarray:
    """A text -> the logits of each next token, (T, V) in float32."""
    batch, count = self._batch(self.tokens(text))
    logit_BTV = self.compiled(_logits)(self.model, batch)
    return np.asarray(logit_BTV[0, :count])

  def loss(self, text: Text) -> float:
    """A text of at least two tokens -> its mean loss, in nats per predicted token."""
    tokens = self.tokens(text)
    if len(tokens) < 2:
      raise ValueError(f'a loss needs at least 2 tokens, but the text has {len(tokens)}')
    batch, _ = self._batch(tokens[:-1], tokens[1:])
    nats_B, weight_B = self.evaluate(batch)
    return float(nats_B[0] / weight_B[0])

  def gates(self, text: Text, position: str = '') -> np.ndarray:
    """A text -> the scores of a gate: (L, H, T) headwise, (L, H, T, K) elementwise.

    As `probes.gates.scores`, for one text. ValueError for a model without the gate.
    """
    batch, count = self._batch(self.tokens(text))
    at = functools.partial(gates.scores, position=position) if position else gates.scores
    score = self.compiled(at)(self.model, batch)
    return np.moveaxis(np.asarray(score[:, 0, :count]), 1, 2)

  def attention(self, text: Text) -> np.ndarray:
    """A text -> its attention weights before any gate: (L, H, T, T).

    As `probes.attention.maps`, for one text. ValueError for more than 512 tokens.
    """
    batch, count = self._batch(self.tokens(text))
    weight = self.compiled(attention.maps)(self.model, batch)
    return np.asarray(weight[..., :count, :count])

  def force(
    self,
    gates: str | float,
    *,
    layers: Sequence[int] | None = None,
    text: Text | data.Batch | None = None,
  ) -> 'Loaded':
    """The same model with forced gate scores, in all layers or in those of `layers`.

    `gates` is 'open' (1), 'closed' (0), a number, or 'mean': each head's (and channel's)
    mean over the tokens of `text`, which may also be packed rows (R, T) on the host.
    'value:open' forces the gate at that position instead of the first. ValueError for a
    model without the gate.
    """
    mean, position = None, str(gates).rpartition(':')[0]
    if isinstance(text, data.Batch):
      mean = probing.mean_scores(self, text, position)
    elif text is not None:
      mean = self.gates(text, position).mean(2)
    change = probing.forcing(self, gates, layers, mean)
    run = self.fit(0)
    run.changes = (*self.changes, change)
    run.model = change(self.model)  # The weights are not read again.
    return run

  def generate(self, prompts: Sequence[Text], **options: Any) -> list[Any]:
    """Prompts -> continuations: a string for a string, an int32 array for token ids.

    The options are the fields of `evals.Sampling`: max_tokens, temperature, top_k, top_p,
    stop, seed. ValueError names a prompt or an option that is wrong. Products are not in
    FP8, whose scales the prompts would share.
    """
    numerics = self.cfg.numerics
    run = self if numerics == numerics.plain() else self._with(numerics=numerics.plain())
    return evals.generate.texts(
      prompts,
      evals.Sampling(**options),
      cfg=run.cfg,
      read_model=lambda: run.model,
      on=run.mesh,
      read_tokenizer=lambda: run.tokenizer,
      context=run.length,
    )

  @functools.cached_property
  def row_losses(self) -> Any:
    """`evaluate` for any model of this shape: (model, batch) -> the sums of each row."""
    return evaluate_step(self.cfg, self.mesh, self._chunk)

  @functools.cached_property
  def token_losses(self) -> Any:
    """(model, batch) -> the result of `evals.positions.measure`."""
    return self.compiled(functools.partial(evals.positions.measure, chunk=self._chunk))

  @property
  def _chunk(self) -> int:
    return self.config['loss']['chunk'] if self.about else CHUNK

  def probe(
    self,
    text: Text | data.Batch,
    *,
    length: int = 0,
    rows: int = 0,
    mask_documents: bool | None = None,
  ) -> dict[str, Any]:
    """A text -> the report of all probes on it, as in `eval.py --probe`.

    The text is cut into rows of `length` tokens (0: the training length, or one row for
    imported weights). The first `rows` rows are read (0: all); each is one document.
    `text` may also be packed rows (R, T) on the host. `mask_documents` replaces the
    model's own setting. ValueError for a text shorter than the probes need. The entry
    'conventions' of the report explains its numbers.
    """
    if not isinstance(text, data.Batch):
      text = self.rows(text, length=length, limit=rows)
    return probing.probe(self, text, mask_documents=mask_documents)

  def rows(self, text: Text, *, length: int, limit: int) -> data.Batch:
    """A text -> its rows, as `probe` reads them."""
    length = length or self.length
    return probing.rows_of(self.tokens(text), length=length, limit=limit)

  def draw(self, report: dict[str, Any], text: Text | data.Batch) -> None:
    """Draws a report of `probe`, and maps and gates of its text, into WORKDIR/probes/.

    The files are STEP-NAME.svg and .png, and STEP-gates.html. For packed rows, the text
    is the longest document of the first row. ValueError without matplotlib, for a model
    with forced gates, and for imported weights, whose folder does not change.
    """
    if self.changes:
      raise ValueError(f'a model with forced gates cannot draw figures into {self.path}')
    rows = isinstance(text, data.Batch)
    ids = evals.longest_document(text) if rows else self.tokens(text)
    label = self.path.name
    drawing.probes({label: self}, {label: report}, ids)


def load(path: storage.PathLike, *, step: str | int = '', cache: str = '') -> Loaded:
  """A workdir, WORKDIR:STEP or a Hugging Face folder -> Loaded.

  STEP is a number, 'latest' (the default) or 'best', the step with the lowest held-out
  loss; `step` may give it instead. A workdir may be in an object store (gs://,
  s3://). Every byte of the step is verified first. `cache` is the folder of the embedded
  corpus, '' for the platform's. Raises ValueError, with the path, if loading fails.
  """
  place, step = workdir.split_step(str(path), str(step))
  folder = storage.path(place)
  if not storage.is_remote(folder) and hf.is_checkpoint(place):
    if step:
      raise ValueError(f'{path}: a Hugging Face folder has no step {step!r}')
    return Loaded(folder, hf.config(place), step=None, about=None, cache=cache)
  saves = folder / 'checkpoints'
  if not storage.names(saves):
    raise ValueError(
      f'{path}: found neither checkpoints, nor config.json with *.safetensors'
    )
  with checkpoint.Reader(saves) as reader:
    number = reader.pick(step or 'latest', f'{place}: step')
    about = reader.about(number)
  try:
    for knob in NEEDED:
      config.dig(about, knob)
    cfg = config.build(model.Config, about['config']['model'], 'config.model')
  except ValueError as error:
    raise ValueError(f'{saves / str(number)}: {error}') from error
  return Loaded(folder, cfg, step=number, about=about, cache=cache)


def take(path: storage.PathLike, *, step: str = '', cache: str = '') -> Loaded:
  """Like `load`, but reads the weights at once: a run in progress may remove any step.

  If it has removed the step before its weights were read, 'latest' and 'best' are chosen
  again; `weights.Removed` for a step that was given by its number.
  """
  by_number = workdir.split_step(str(path), step)[1].isdigit()
  for left in reversed(range(1 if by_number else weights.ATTEMPTS)):
    loaded = load(path, step=step, cache=cache)
    try:
      jax.block_until_ready(loaded.leaves)
      return loaded
    except weights.Removed:
      if not left:
        raise
      _log.warning('%s has removed step %s meanwhile: choosing again', path, loaded.step)
  raise AssertionError


def _logits(net: model.Transformer, batch: data.Batch) -> jax.Array:
  return net(batch.tokens, batch.segments, batch.positions)
